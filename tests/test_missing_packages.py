"""Machines without PyAV, DALI and Triton, and without calls that macOS lacks.

Everything works but video files, which are refused with one line.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from synthetic import write_davis, write_folders

ROOT = Path(__file__).resolve().parents[1]
BLOCK = """
import os, sys
sys.modules.update(dict.fromkeys(('av', 'nvidia.dali', 'triton')))
del os.sched_getaffinity, os.posix_fadvise
"""
# Runs the commands in the JSON list on stdin one after the other, and prints a list of their outcomes.
COMMANDS = f"""
{BLOCK}
import contextlib, io, json
import fasttrain.loggers
from fasttrain.__main__ import main
# No signs of life, which depend on the speed of the machine.
fasttrain.loggers.SILENCE = 600
outcomes = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    outcomes.append((code, out.getvalue(), err.getvalue()))
json.dump(outcomes, sys.stdout)
"""
MODEL = ["backbone.name=test_vit", "backbone.weights=random", "data.image_size=64"]
TRAINING = [
    *["device=cpu", "train.precision=fp32", "train.batch_size=2", "train.tensorboard=false"],
    *["train.steps=2", "train.save_every=1", "data.pairs_per_video=4"],
]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def run(*commands: list[str]) -> list[Outcome]:
    """Run commands in a process that can import neither PyAV nor DALI."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], input=json.dumps(commands), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return [Outcome(*outcome) for outcome in json.loads(done.stdout)]


def test_every_module_can_be_imported() -> None:
    modules = [path.relative_to(ROOT) for path in sorted((ROOT / "fasttrain").rglob("*.py"))]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in modules]
    names.remove("fasttrain.data.dali")
    program = f"{BLOCK}\nimport importlib; [importlib.import_module(name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_images_are_packed_trained_on_and_evaluated(tmp_path: Path) -> None:
    frames, davis = write_folders(tmp_path / "frames", [8] * 6), write_davis(tmp_path / "davis")
    packed, run_folder, other = tmp_path / "packed", tmp_path / "run", tmp_path / "other"
    train = ["recipes/base.yaml", *MODEL, *TRAINING]
    on_packed = [*train, f"data.source={packed}", f"output={run_folder}"]
    packing, training, on_folders = run(
        ["pack", str(frames), str(packed)], on_packed, [*train, f"data.source={frames}", f"output={other}"]
    )
    projection = run_folder / "projection.safetensors"
    finished = load_file(projection)
    (run_folder / "checkpoints" / "step_00000002.pt").unlink()
    projection.unlink()
    size = ["--device", "cpu", "--height", "64", "--width", "96", "--pictures", "1"]
    resumed, doctor, evaluation = run(
        on_packed,
        ["doctor"],
        ["eval", "davis", "--run", str(run_folder), "--root", str(davis), "--output", str(tmp_path), *size],
    )
    for outcome in (packing, training, on_folders, resumed, doctor, evaluation):
        assert (outcome.code, outcome.err) == (0, "")
    assert "JPEG files are not checked for damaged data" in packing.out
    for outcome in (training, on_folders, resumed):
        assert outcome.out.count("DALI is not installed, so Pillow and PyTorch load the frames") == 1
    assert "resuming after 1 of 2 steps" in resumed.out
    torch.testing.assert_close(load_file(projection), finished, rtol=0, atol=0)
    assert "as pictures only, not as videos" in evaluation.out
    assert {path.suffix for path in tmp_path.glob("davis-*/figures/*")} == {".png"}


def test_a_video_file_is_refused_with_one_line(tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    video.write_bytes(b"any")
    destination = tmp_path / "packed"
    outcomes = run(
        ["recipes/base.yaml", *MODEL, *TRAINING, f"data.source={video}", f"output={tmp_path / 'run'}"],
        ["pack", str(video), str(destination)],
        ["demo", f"data.source={tmp_path / 'demo'}", f"output={tmp_path / 'run'}"],
    )
    for outcome, (source, action) in zip(
        outcomes, [("data.source: ", "reading"), ("", "reading"), ("", "reading")], strict=True
    ):
        message = f"{source}{action} video files needs the package av (PyAV), which is not installed. "
        assert (outcome.code, outcome.err) == (2, f"fasttrain: {message}Run: pip install av\n")
