"""The command itself on two ranks, over data with every fault at once: replaced, counted, named, in step."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from synthetic import BROKEN_FRAMES, encode_video, odd_frames, picture, write_folders
from torch import Tensor, nn

from fasttrain.distributed import World
from fasttrain.errors import InputError, LocalInputError
from fasttrain.recipe import load_recipe, recipe_from_dict, to_yaml
from fasttrain.trainer import Trainer

STEPS = 40
PAIRS_PER_VIDEO = 8


def write_recipe(folder: Path, source: Path, **data: Any) -> Path:
    recipe = recipe_from_dict(
        {
            "output": str(folder / "run"),
            "device": "cpu",
            "backbone": {"name": "dino", "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
            "data": {
                "source": str(source),
                "image_size": 32,
                "num_threads": 1,
                "prefetch": 1,
                "pairs_per_video": PAIRS_PER_VIDEO,
                **data,
            },
            "train": {
                "steps": STEPS,
                "batch_size": 2,
                "precision": "fp32",
                "log_every": 5,
                "save_every": STEPS,
                "tensorboard": False,
            },
        }
    )
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    return path


def train_on_two(recipe: Path, at_first_line: Callable[[], None] | None = None) -> tuple[int, str]:
    """torchrun to the end; a call when the first line of metrics is there. Returns exit code and output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, "-m", "fasttrain", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = recipe.parent / "run" / "metrics.jsonl"
    while at_first_line and process.poll() is None:
        if metrics.exists() and metrics.stat().st_size:
            at_first_line()
            break
        time.sleep(0.01)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def check_books(folder: Path, said: str) -> list[str]:
    """Every fault stands in metrics.jsonl and in the log, and the count is theirs. Returns them."""
    records = lines(folder)
    assert [record["step"] for record in records] == list(range(5, STEPS + 1, 5))
    faults = [fault for record in records for fault in record.get("faults", [])]
    assert records[-1]["bad_samples"] == len(faults)
    for fault in faults:
        assert f"replaced a sample that cannot be read: {fault}" in said
    return faults


def test_frame_folders_with_every_fault(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "frames", [8] * 4)
    for case, (make, suffix, _) in BROKEN_FRAMES.items():
        (root / case).mkdir()
        for frame in range(8):
            (root / case / f"{frame}{suffix}").write_bytes(make())
    for case, stored in odd_frames().items():
        (root / case).mkdir()
        for frame, data in enumerate(stored):
            suffix = "png" if b"PNG" in data[:4] else "jpg"
            (root / case / f"{frame}.{suffix}").write_bytes(data)
    vanishing = root / "vanishing"
    vanishing.mkdir()
    for frame in range(8):
        Image.fromarray(picture(9, frame)).save(vanishing / f"{frame}.jpg")

    def vanish() -> None:
        for path in vanishing.iterdir():
            path.unlink()

    recipe = write_recipe(tmp_path, root, max_bad_fraction=1.0)
    code, said = train_on_two(recipe, at_first_line=vanish)
    assert code == 0, said
    faults = check_books(tmp_path, said)
    named = {fault.partition(",")[0] for fault in faults}
    assert named == {*BROKEN_FRAMES, "vanishing"}
    for case, (_, _, words) in BROKEN_FRAMES.items():
        assert any(fault.startswith(f"{case}, frame") and words in fault for fault in faults)
    assert any(fault.startswith("vanishing") and "no such file" in fault for fault in faults)


def test_videos_with_every_fault(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    for video in range(5):
        encode_video(root / f"{video}.mp4", [picture(video, t) for t in range(8)])
    encode_video(root / "one_frame.mp4", [picture(7, 0)])
    encode_video(root / "large.webm", [picture(8, t, 96, 160) for t in range(8)], "libvpx-vp9")
    whole = (root / "0.mp4").read_bytes()
    (root / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "empty.mp4").write_bytes(b"")

    def spoil() -> None:
        (root / "1.mp4").unlink()
        (root / "2.mp4").write_bytes(b"")
        (root / "3.mp4").write_bytes((root / "3.mp4").read_bytes()[:900])

    recipe = write_recipe(tmp_path, root, max_bad_fraction=1.0)
    code, said = train_on_two(recipe, at_first_line=spoil)
    assert code == 0, said
    faults = check_books(tmp_path, said)
    assert {fault.partition(",")[0] for fault in faults} == {"1.mp4", "2.mp4", "3.mp4"}
    assert lines(tmp_path)[-1]["bad_files"] == 2
    assert "skipped empty.mp4: " in said
    assert "skipped truncated.mp4: " in said
    assert "1 of 7 videos have a single frame" in said


@dataclass(frozen=True, kw_only=True)
class TwoAlike(World):
    """Rank 0 of two, as if the other one met what this one meets."""

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def mean(self, values: Tensor) -> Tensor:
        return values

    def maximum(self, values: Tensor) -> Tensor:
        return values

    def barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def test_the_limit_is_of_all_ranks_and_stops_them_at_the_same_step(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "frames", [8] * 6)
    for path in (root / "class_1" / "video_3").iterdir():
        path.write_bytes(b"")
    recipe = load_recipe(write_recipe(tmp_path, root, max_bad_fraction=0.004))
    world = TwoAlike(rank=0, size=2, local_size=2, device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"^\d+ of \d+ samples .*max_bad_fraction=0.004 allows") as caught:
        Trainer(recipe, world).train()
    # Only this process met what a loader raises; what the ranks agree on all of them raise.
    assert not isinstance(caught.value, LocalInputError)
    records = lines(tmp_path)
    assert records[-1]["bad_samples"] == 2 * sum(len(record.get("faults", [])) // 2 for record in records) > 4
    assert records[-1]["step"] < STEPS
