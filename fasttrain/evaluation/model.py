"""What every benchmark shares: the encoder before and after its projection, work over ranks, files.

Used by the tasks (`*_task.py`) and `command.py`. Shape suffixes: T frames, H W pixels, N tokens, D channels.
"""

import argparse
import json
import math
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.files import text_lines, write_atomically
from fasttrain.projection import Projection
from fasttrain.video_encoder import load_video_encoder

Item = TypeVar("Item")
PACKAGES = ("fasttrain", "torch", "timm", "numpy", "scipy", "pillow")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The encoder under evaluation and which sides of its projection to measure."""

    encoder: Backbone
    projection: Projection | None
    moments: tuple[str, ...]
    """Of `before` (frozen backbone alone) and `after` (with the projection)."""

    def to(self, device: torch.device) -> "Subject":
        self.encoder.to(device).eval()
        if self.projection is not None:
            self.projection.to(device).eval()
        return self

    def tokens(self, frames: Iterable[Tensor], device: torch.device) -> dict[str, Tensor]:
        """Tokens (T, N, D) float32 per moment of frames (3, H, W); frames are encoded one at a time."""
        encoded = list(self.stream(frames, device))
        return {moment: torch.stack([tokens[moment] for tokens in encoded]) for moment in self.moments}

    @torch.inference_mode()
    def stream(self, frames: Iterable[Tensor], device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Tokens (N, D) float32 per moment of one frame (3, H, W) after another."""
        for frame_3HW in frames:
            tokens_ND = self.encoder.tokens(frame_3HW[None].to(device))[0].float()
            found = {"before": tokens_ND} if "before" in self.moments else {}
            if self.projection is not None and "after" in self.moments:
                found["after"] = self.projection(tokens_ND).float()
            yield found

    def describe(self) -> dict[str, Any]:
        head = self.projection.head if self.projection else None
        weights = {"weights": self.encoder.weights, "weights_hash": self.encoder.weights_hash}
        return {"backbone": self.encoder.name, **weights, "head": head}


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, help="output folder of a training run")
    parser.add_argument(
        "--backbone", help="evaluate this backbone without a run: mae, dino, ... or a timm ViT"
    )
    parser.add_argument("--weights", help="weights of --backbone (path, hf://, timm://, random)")
    parser.add_argument("--projection", type=Path, help="a projection.safetensors to go with --backbone")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--baseline-only", action="store_true", help="the frozen backbone alone")
    only.add_argument("--projection-only", action="store_true", help="with the projection alone")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--output", type=Path, help="folder for figures (default: RUN/eval/TASK, or eval/TASK)"
    )


def load_subject(arguments: argparse.Namespace) -> Subject:
    """The encoder that the command line names. Raises InputError where it names none, or two."""
    if (arguments.run is None) == (arguments.backbone is None):
        raise InputError("give either --run FOLDER or --backbone NAME: which encoder is to be evaluated")
    if arguments.run is not None and arguments.projection is not None:
        raise InputError(f"--projection {arguments.projection} goes with --backbone; --run has its own")
    projection: Projection | None
    if arguments.run is not None:
        loaded = load_video_encoder(arguments.run, weights=arguments.weights)
        encoder, projection = loaded.encoder, loaded.projection
    else:
        encoder = load_backbone(arguments.backbone, weights=arguments.weights or "random")
        projection = Projection.load(arguments.projection) if arguments.projection else None
    if projection is not None and projection.dim != encoder.embed_dim:
        raise InputError(f"projection of width {projection.dim} for an encoder of width {encoder.embed_dim}")
    if arguments.projection_only and projection is None:
        raise InputError("--projection-only, but there is no projection; give --run or --projection")
    moments = ("before",) if projection is None or arguments.baseline_only else ("before", "after")
    return Subject(
        encoder=encoder, projection=projection, moments=("after",) if arguments.projection_only else moments
    )


def read_lines(path: Path, expected: str = "a text file in UTF-8") -> list[str]:
    """The lines of a text file that say something, stripped. Raises InputError where it cannot be read."""
    try:
        return text_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected {expected}") from error


def fit_to_patches(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """The nearest height and width that whole patches cover."""
    height, width = (max(patch, round(side / patch) * patch) for side in size)
    return height, width


def own_share(items: Sequence[Item], world: World) -> list[Item]:
    """The items of this process: every process gets each `size`-th."""
    return list(items[world.rank :: world.size])


def gather(results: dict[str, Any], output: Path, world: World) -> dict[str, Any] | None:
    """Results of all processes in the order of their names, on the main one; None on the others.

    Goes through files in `output`, which all processes must see, as they do the pictures written there.
    """
    parts = output / ".parts"
    parts.mkdir(parents=True, exist_ok=True)
    (parts / f"{world.rank}.json").write_text(json.dumps(results), encoding="utf-8")
    world.barrier()
    merged: dict[str, Any] | None = None
    if world.is_main:
        merged = {}
        for rank in range(world.size):
            path = parts / f"{rank}.json"
            merged |= json.loads(path.read_text(encoding="utf-8"))
        # With what a run of more processes, cut off here, may have left.
        shutil.rmtree(parts)
        merged = dict(sorted(merged.items()))
    return merged


def write_figures(path: Path, payload: Mapping[str, Any]) -> None:
    """Write JSON with the installed versions of what computed it; what is not a finite number is null."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        # fasttrain itself is not installed where it runs from a checkout, as `make gpu-check` lets it.
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    text = json.dumps(_finite({**payload, "versions": versions}), indent=2, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def with_difference(by_moment: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Adds after - before where both were measured."""
    if set(by_moment) != {"before", "after"}:
        return by_moment
    difference = {key: by_moment["after"][key] - value for key, value in by_moment["before"].items()}
    return {**by_moment, "difference": difference}


def print_comparison(title: str, by_moment: dict[str, dict[str, float]]) -> None:
    table = Table(title=escape(title))
    table.add_column("measure")
    for moment in by_moment:
        table.add_column(moment, justify="right")
    for key in next(iter(by_moment.values())):
        table.add_row(key, *(_cell(figures[key], moment) for moment, figures in by_moment.items()))
    Console().print(table)


def _cell(value: float, moment: str) -> str:
    return "-" if math.isnan(value) else format(value, "+.4f" if moment == "difference" else ".4f")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
