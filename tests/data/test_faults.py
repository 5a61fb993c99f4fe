"""Training on data with many kinds of damage: unreadable samples are replaced, counted and reported."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import BROKEN_FRAMES, encode_video, odd_frames, picture, write_folders
from torch import Tensor, nn

from fasttrain.distributed import World
from fasttrain.errors import InputError, LocalInputError
from fasttrain.recipe import Recipe, recipe_from_dict, to_yaml
from fasttrain.trainer import Trainer

STEPS = 40


def make_recipe(folder: Path, source: Path, max_bad_fraction: float = 1.0) -> Recipe:
    return recipe_from_dict(
        {
            "output": str(folder / "run"),
            "device": "cpu",
            "backbone": {"name": "dino", "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
            "data": {
                "source": str(source),
                "image_size": 32,
                "num_threads": 1,
                "prefetch": 1,
                "pairs_per_video": 8,
                "max_bad_fraction": max_bad_fraction,
            },
            "train": {
                "steps": STEPS,
                "batch_size": 2,
                "precision": "fp32",
                "log_every": 5,
                "save_every": STEPS,
                "tensorboard": False,
            },
            "eval": {"every": 0},
        }
    )


def check_faults(folder: Path, output: str) -> list[str]:
    """Check that the output has every fault in metrics.jsonl and `bad_samples` their number. Returns them."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(5, STEPS + 1, 5))
    faults = [fault for record in records for fault in record.get("faults", [])]
    assert records[-1]["bad_samples"] == len(faults)
    for fault in faults:
        assert f"unreadable sample: {fault}" in output
    return faults


@pytest.mark.slow
def test_two_ranks_on_damaged_frame_folders(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "frames", [8] * 4)
    for case, (content, suffix, _) in BROKEN_FRAMES.items():
        (root / case).mkdir()
        for frame in range(8):
            (root / case / f"{frame}{suffix}").write_bytes(content)
    for case, stored in odd_frames().items():
        (root / case).mkdir()
        for frame, data in enumerate(stored):
            suffix = "png" if b"PNG" in data[:4] else "jpg"
            (root / case / f"{frame}.{suffix}").write_bytes(data)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(make_recipe(tmp_path, root)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "fasttrain", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    faults = check_faults(tmp_path, done.stdout)
    assert {fault.partition(",")[0] for fault in faults} == set(BROKEN_FRAMES)
    for case, (_, _, reason) in BROKEN_FRAMES.items():
        assert any(fault.startswith(f"{case}, frame") and reason in fault for fault in faults)


def test_damaged_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    for video in range(5):
        encode_video(root / f"{video}.mp4", [picture(video, t) for t in range(8)])
    encode_video(root / "one_frame.mp4", [picture(7, 0)])
    encode_video(root / "large.webm", [picture(8, t, 96, 160) for t in range(8)], "libvpx-vp9")
    intact = (root / "0.mp4").read_bytes()
    (root / "truncated.mp4").write_bytes(intact[: len(intact) // 2])
    (root / "empty.mp4").write_bytes(b"")
    (root / "notes.txt").touch()
    trainer = Trainer(make_recipe(tmp_path, root), World.single())
    # Damage three more videos after the trainer has indexed them.
    (root / "1.mp4").unlink()
    (root / "2.mp4").write_bytes(b"")
    (root / "3.mp4").write_bytes(intact[:900])
    results = trainer.train()
    output = capsys.readouterr().out
    faults = check_faults(tmp_path, output)
    assert {fault.partition(",")[0] for fault in faults} == {"1.mp4", "2.mp4", "3.mp4"}
    assert [result["bad_files"] for result in results.values()] == [2]
    assert "skipped empty.mp4: " in output
    assert "skipped truncated.mp4: " in output
    assert "files left out: 1, of which 1 .txt (first notes.txt)" in output
    assert "1 of 7 videos have a single frame" in output


@dataclass(frozen=True, kw_only=True)
class MirroredWorld(World):
    """Rank 0 of two ranks, where rank 1 behaves exactly like rank 0."""

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def mean(self, values: Tensor) -> Tensor:
        return values

    def barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def test_the_limit_on_unreadable_samples_counts_all_ranks(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "frames", [8] * 6)
    for path in (root / "class_1" / "video_3").iterdir():
        path.write_bytes(b"")
    world = MirroredWorld(rank=0, size=2, cores=1, device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"max_bad_fraction: \d+ of \d+ samples are unreadable") as caught:
        Trainer(make_recipe(tmp_path, root, max_bad_fraction=0.004), world).train()
    # All ranks raise this error in the same step, so it is not local to one of them.
    assert not isinstance(caught.value, LocalInputError)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["bad_samples"] == sum(len(record.get("faults", [])) for record in records) > 4
    assert records[-1]["step"] < STEPS
