"""Machines without PyAV, DALI and Triton, and without calls that macOS lacks.

Everything works but video files, which are refused with one line.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from synthetic import write_davis, write_folders

ROOT = Path(__file__).resolve().parents[1]
BLOCK = """
import os, sys
sys.modules.update(dict.fromkeys(('av', 'nvidia.dali', 'triton')))
del os.sched_getaffinity, os.posix_fadvise
"""
# Each line on stdin is a list of words, a command to run, or a name, a module to import. Prints the outcomes.
COMMANDS = f"""
{BLOCK}
import contextlib, importlib, io, json
import fasttrain.loggers
from fasttrain.__main__ import main
# No signs of life, which depend on the speed of the machine.
fasttrain.loggers.SILENCE = 600
for line in sys.stdin:
    request, code, out, err = json.loads(line), 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if isinstance(request, str):
            importlib.import_module(request)
        else:
            code = main(request)
    print(json.dumps((code, out.getvalue(), err.getvalue())), flush=True)
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


Run = Callable[[str | list[str]], Outcome]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a command or import a module in a process that can import neither PyAV nor DALI."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMANDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(request: str | list[str]) -> Outcome:
            print(json.dumps(request), file=process.stdin, flush=True)
            return Outcome(*json.loads(process.stdout.readline()))

        yield run


def test_every_module_can_be_imported(run: Run) -> None:
    modules = [path.relative_to(ROOT) for path in sorted((ROOT / "fasttrain").rglob("*.py"))]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in modules]
    names.remove("fasttrain.data.dali")
    for name in names:
        assert run(name).code == 0


def test_images_are_packed_trained_on_and_evaluated(run: Run, tmp_path: Path) -> None:
    frames, davis = write_folders(tmp_path / "frames", [8] * 6), write_davis(tmp_path / "davis")
    packed, run_folder, other = tmp_path / "packed", tmp_path / "run", tmp_path / "other"
    train = ["recipes/base.yaml", *MODEL, *TRAINING]
    on_packed = [*train, f"data.source={packed}", f"output={run_folder}"]
    packing = run(["pack", str(frames), str(packed)])
    training, on_folders = run(on_packed), run([*train, f"data.source={frames}", f"output={other}"])
    projection = run_folder / "projection.safetensors"
    finished = load_file(projection)
    (run_folder / "checkpoints" / "step_00000002.pt").unlink()
    projection.unlink()
    size = ["--device", "cpu", "--height", "64", "--width", "96", "--pictures", "1"]
    resumed, doctor = run(on_packed), run(["doctor"])
    words = ["--run", str(run_folder), "--root", str(davis), "--output", str(tmp_path), *size]
    evaluation = run(["eval", "davis", *words])
    for outcome in (packing, training, on_folders, resumed, doctor, evaluation):
        assert (outcome.code, outcome.err) == (0, "")
    assert "JPEG files are not checked for damaged data" in packing.out
    for outcome in (training, on_folders, resumed):
        assert outcome.out.count("DALI is not installed, so Pillow and PyTorch load the frames") == 1
    assert "resuming after 1 of 2 steps" in resumed.out
    torch.testing.assert_close(load_file(projection), finished, rtol=0, atol=0)
    assert "as pictures only, not as videos" in evaluation.out
    assert {path.suffix for path in tmp_path.glob("davis-*/figures/*")} == {".png"}


def test_a_video_file_is_refused_with_one_line(run: Run, tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    video.write_bytes(b"any")
    destination = tmp_path / "packed"
    commands = (
        ["recipes/base.yaml", *MODEL, *TRAINING, f"data.source={video}", f"output={tmp_path / 'run'}"],
        ["pack", str(video), str(destination)],
        ["demo", f"data.source={tmp_path / 'demo'}", f"output={tmp_path / 'run'}"],
    )
    for words, source in zip(commands, ("data.source: ", "", ""), strict=True):
        outcome = run(words)
        message = f"{source}reading video files needs the package av (PyAV), which is not installed. "
        assert (outcome.code, outcome.err) == (2, f"fasttrain: {message}Run: pip install av\n")
