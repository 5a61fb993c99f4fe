"""The commands that are interrupted, the data they work on, and the comparison of what they leave behind."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import yaml
from PIL import Image
from synthetic import LAYOUTS, encode_video, write_davis, write_folders, write_run

# Keys of JSON files whose values are times.
TIMES = ("date", "seconds", "pairs_per_second")
STEPS = 14
RECIPE: dict[str, Any] = {
    "device": "cpu",
    "backbone": {"name": "dino", "weights": "random", "embed_dim": 32, "depth": 1, "num_heads": 2},
    "data": {"source": "../sources/frames", "image_size": 64, "num_threads": 1, "max_bad_fraction": 0.5},
    "optimizer": {"lr": 0.1},
    "train": {
        "steps": STEPS,
        "batch_size": 4,
        "precision": "fp32",
        "log_every": 3,
        "save_every": 2,
        "keep": 2,
        "tensorboard": False,
    },
    "eval": {"every": 0},
    "output": "run",
}


@dataclass(frozen=True)
class Workload:
    """One or several commands that run at the same time, in a folder next to the folder `sources`."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    """The arguments of fasttrain in each process."""
    are_ranks: bool = False
    """Whether the processes are the ranks of one run. Otherwise, they are independent."""


def train(*overrides: str, recipe: str = "recipe") -> tuple[str, ...]:
    return ("train", f"../sources/{recipe}.yaml", *overrides)


def _pack(source: str, *options: str) -> tuple[str, ...]:
    return ("pack", f"../sources/{source}", "packed", "--shard-size", "1", "--workers", "2", *options)


def _eval(task: str, root: str, *options: str) -> tuple[str, ...]:
    shared = ("--run", "../sources/run", "--device", "cpu", "--output", "eval")
    return ("eval", task, *shared, "--root", f"../sources/{root}", *options)


_LISTS = ("--train-list", "../sources/labelled/train.txt", "--test-list", "../sources/labelled/test.txt")
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("train", (train("eval.every=7", "eval.num_videos=2", "eval.num_frames=8"),)),
        Workload("train two backbones", (train(recipe="two_backbones"),)),
        Workload("train two ranks", (train("train.batch_size=2"),) * 2, are_ranks=True),
        Workload("pack", (_pack("images"),)),
        Workload("pack two shares", (_pack("videos", "--shard", "1/2"), _pack("videos", "--shard", "2/2"))),
        Workload("export", (("export", "../sources/run", "export/encoder.pt2"),)),
        Workload("eval retrieval", (_eval("retrieval", "labelled", *_LISTS, "--num-frames", "4"),)),
        Workload("eval davis", (_eval("davis", "davis", "--height", "64", "--width", "96"),)),
    )
}


def write_sources(folder: Path) -> None:
    """Write the data of all workloads."""
    frames = write_folders(folder / "frames", [8] * 6)
    # Unreadable frames, so that replacements and their counts must also survive.
    for path in sorted(frames.rglob("00003.jpg"))[:2]:
        path.write_bytes(path.read_bytes()[:200])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    backbones = [{**RECIPE["backbone"], "name": name} for name in ("mae", "dino")]
    two = {key: value for key, value in RECIPE.items() if key != "backbone"} | {"backbones": backbones}
    (folder / "two_backbones.yaml").write_text(yaml.safe_dump(two))
    random = np.random.default_rng(0)
    for video in range(12):
        (folder / f"images/{video:02d}").mkdir(parents=True)
        for frame in range(8):
            noise = random.integers(0, 256, (150, 200, 3), np.uint8)
            # Every third frame is encoded again, because it is too large.
            size = (400, 300) if frame % 3 == 0 else (200, 150)
            image = Image.fromarray(noise).resize(size)
            image.save(folder / f"images/{video:02d}/{frame}.jpg", quality=95)
    (folder / "images/05/2.jpg").write_bytes(b"")
    (folder / "videos").mkdir()
    for video in range(8):
        noise = [random.integers(0, 256, (160, 160, 3), np.uint8) for _ in range(10)]
        encode_video(folder / f"videos/{video}.mp4", noise, crf=30)
    (folder / "videos/3.mp4").write_bytes(b"damaged")
    write_run(folder / "run")
    LAYOUTS["list"](folder / "labelled")
    write_davis(folder / "davis")


def result(folder: Path) -> dict[str, str]:
    """Hash what each file in a folder says, without times; the keys are relative paths."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> bytes:
    """Return the bytes that must be equal in two equal runs."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(content)
    if path.suffix == ".safetensors":
        # The order of the entries in its header is random.
        size = 8 + int.from_bytes(content[:8], "little")
        return json.dumps(json.loads(content[8:size]), sort_keys=True).encode() + content[size:]
    if path.suffix == ".pt":
        # Equal values can be pickled differently, depending on which of them are one object.
        return "\n".join(_flat(torch.load(path, weights_only=True))).encode()
    if path.suffix == ".mp4":
        # libx264 with several threads encodes equal frames differently.
        with av.open(str(path)) as container:
            return str(sum(1 for _ in container.decode(video=0))).encode()
    if path.suffix not in (".json", ".jsonl"):
        return content
    values = [json.loads(content)] if path.suffix == ".json" else list(map(json.loads, content.splitlines()))
    for value in values:
        for key in TIMES:
            value.pop(key, None)
        # Ranks list the unreadable samples since the last report or stop, one rank after the other.
        if "faults" in value:
            value["faults"].sort()
    return json.dumps(values).encode()


def _flat(value: Any, name: str = "") -> Iterator[str]:
    """Yield the names and values in a tree; tensors as their dtype, shape and bits."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from _flat(entry, f"{name}/{number}")
    elif isinstance(value, torch.Tensor):
        bits = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield f"{name} {value.dtype} {tuple(value.shape)} {hashlib.sha256(bits).hexdigest()}"
    else:
        yield f"{name} {value!r}"


def difference(expected: dict[str, str], found: dict[str, str]) -> str:
    """Name the files that differ; the result is empty if there are none."""
    parts = {
        "missing": expected.keys() - found.keys(),
        "left over": found.keys() - expected.keys(),
        "different": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
    }
    return "; ".join(f"{what}: {', '.join(sorted(names)[:4])}" for what, names in parts.items() if names)
