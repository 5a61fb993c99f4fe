"""DAVIS: propagate the first frame's objects through each sequence, write masks, score them with J and F.

Reads the data set's own layout (JPEGImages/480p, Annotations/480p, ImageSets/YEAR/SUBSET.txt). The measures
are in `davis.py`. Shape suffixes: T frames, H W pixels, h w grid, N tokens, C objects and background.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import figures
from fasttrain.evaluation.davis import boundary_accuracy, region_similarity, statistics
from fasttrain.evaluation.frames import read_image, read_label_map, resize, spread
from fasttrain.evaluation.harness import Subject, fit_to_patches, gather, own_share
from fasttrain.evaluation.propagation import propagate_labels

VOID = 255
SHOWN_FRAMES = 6


@dataclass(frozen=True)
class Sequence:
    """One sequence: frames and annotations of the same names, in order."""

    name: str
    frames: list[Path]
    annotations: list[Path]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--year", choices=("2016", "2017"), default="2017", help="2016: one object a sequence"
    )
    parser.add_argument("--subset", default="val", help="list in ImageSets/YEAR (default: val)")
    parser.add_argument("--context", type=int, default=20, help="frames attended to (default: 20)")
    parser.add_argument("--radius", type=float, default=20, help="in grid cells (default: 20)")
    parser.add_argument("--topk", type=int, default=7)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--height", type=int, default=480, help="of the frames as encoded (default: 480)")
    parser.add_argument("--width", type=int, default=880, help="of the frames as encoded (default: 880)")


def run(arguments: argparse.Namespace, subject: Subject, output: Path, world: World) -> dict[str, Any] | None:
    """Figures of all sequences, on the main process."""
    sequences = find_sequences(arguments.root, arguments.year, arguments.subset)
    results = {
        sequence.name: evaluate_sequence(sequence, subject, arguments, output, world.device)
        for sequence in own_share(sequences, world)
    }
    merged = gather(results, output, world)
    if merged is None:
        return None
    return {
        "data": {"sequences": len(sequences), "frames": sum(len(one.frames) for one in sequences)},
        "results": {moment: summarise(merged, moment) for moment in subject.moments},
        "per_sequence": merged,
    }


def find_sequences(root: Path, year: str, subset: str) -> list[Sequence]:
    """The sequences of a subset. Raises InputError, naming the path, where the layout is another."""
    listed = root / "ImageSets" / year / f"{subset}.txt"
    for path in (root / "JPEGImages" / "480p", root / "Annotations" / "480p", listed):
        if not path.exists():
            raise InputError(f"{path} does not exist; --root must hold DAVIS in its own layout")
    names = listed.read_text(encoding="utf-8").split()
    if not names:
        raise InputError(f"{listed} lists no sequence")
    return [_find_sequence(root, name) for name in names]


def _find_sequence(root: Path, name: str) -> Sequence:
    frames = sorted((root / "JPEGImages" / "480p" / name).glob("*.jpg"))
    annotations = [root / "Annotations" / "480p" / name / f"{frame.stem}.png" for frame in frames]
    if len(frames) < 3:
        raise InputError(f"sequence {name} has {len(frames)} frames (*.jpg); J and F need at least 3")
    missing = [path for path in annotations if not path.is_file()]
    if missing:
        raise InputError(f"sequence {name}: annotation {missing[0]} is missing ({len(missing)} in all)")
    surplus = {path.stem for path in annotations[0].parent.glob("*.png")} - {path.stem for path in frames}
    if surplus:
        raise InputError(f"sequence {name}: frame {min(surplus)} is annotated, but its image is missing")
    return Sequence(name, frames, annotations)


def read_objects(sequence: Sequence, year: str) -> np.ndarray:
    """(T, H, W) object numbers. Binary annotations (0, 255) and the year 2016 make one object of all."""
    maps = [read_label_map(path) for path in sequence.annotations]
    for path, labels_HW in zip(sequence.annotations, maps, strict=True):
        if labels_HW.shape != maps[0].shape:
            raise InputError(
                f"annotation {path} is {labels_HW.shape}, the first of its sequence {maps[0].shape}"
            )
    labels_THW = np.stack(maps)
    if year == "2016" or set(np.unique(labels_THW[0])) <= {0, VOID}:
        labels_THW = (labels_THW > 0).astype(np.uint8)
    labels_THW[labels_THW == VOID] = 0
    count = int(labels_THW[0].max())
    if not count:
        raise InputError(
            f"annotation {sequence.annotations[0]} is empty; the first frame must show the objects"
        )
    # The toolkit scores the objects of the first frame only.
    labels_THW[labels_THW > count] = 0
    return labels_THW


def evaluate_sequence(
    sequence: Sequence, subject: Subject, arguments: argparse.Namespace, output: Path, device: torch.device
) -> dict[str, Any]:
    """Per moment and object the mean, recall and decay of J and F; writes masks, contact sheet and video."""
    truth_THW = read_objects(sequence, arguments.year)
    size = fit_to_patches((arguments.height, arguments.width), subject.encoder.patch_size)
    grid = subject.encoder.grid(*size)
    tokens = subject.tokens((resize(read_image(path), size) for path in sequence.frames), device)
    first_hwC = soft_labels(truth_THW[0], grid).to(device)
    result: dict[str, Any] = {}
    masks: dict[str, np.ndarray] = {}
    for moment, tokens_TND in tokens.items():
        labels_ThwC = propagate_labels(
            tokens_TND.unflatten(1, grid),
            first_hwC,
            arguments.context,
            arguments.radius,
            arguments.topk,
            arguments.temperature,
        )
        masks[moment] = np.stack([hard_labels(labels_hwC, truth_THW.shape[1:]) for labels_hwC in labels_ThwC])
        masks[moment][0] = truth_THW[0]
        for path, mask_HW in zip(sequence.annotations, masks[moment], strict=True):
            figures.write_label_map(mask_HW, output / "masks" / moment / sequence.name / path.name)
        result[moment] = score(masks[moment], truth_THW)
    _draw(sequence, masks, truth_THW, output)
    return result


def soft_labels(labels_HW: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(h, w, C) float32: the one-hot labels at the middle of each cell, bilinearly."""
    one_hot_1CHW = functional.one_hot(torch.from_numpy(labels_HW).long()).movedim(-1, 0)[None].float()
    return functional.interpolate(one_hot_1CHW, size=grid, mode="bilinear")[0].movedim(0, -1).contiguous()


def hard_labels(labels_hwC: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """(H, W) uint8: the most likely label of each pixel, bilinearly between cells."""
    full_CHW = functional.interpolate(labels_hwC.movedim(-1, 0)[None], size=size, mode="bilinear")[0]
    return full_CHW.argmax(0).byte().cpu().numpy()


def score(masks_THW: np.ndarray, truth_THW: np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """Per object: mean, recall and decay of J and F over all frames but the first and the last."""
    scored = range(1, len(truth_THW) - 1)
    return {
        str(number): {
            name: asdict(
                statistics([measure(masks_THW[t] == number, truth_THW[t] == number) for t in scored])
            )
            for name, measure in (("J", region_similarity), ("F", boundary_accuracy))
        }
        for number in range(1, int(truth_THW[0].max()) + 1)
    }


def summarise(per_sequence: dict[str, Any], moment: str) -> dict[str, float]:
    """The toolkit's global figures: means over all objects of all sequences."""
    objects = [one for sequence in per_sequence.values() for one in sequence[moment].values()]
    means = {
        f"{name}-{kind.capitalize()}": float(np.mean([one[name][kind] for one in objects]))
        for name in ("J", "F")
        for kind in ("mean", "recall", "decay")
    }
    return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2, **means}


def _draw(sequence: Sequence, masks: dict[str, np.ndarray], truth_THW: np.ndarray, output: Path) -> None:
    frames_THWC = [read_image(path) for path in sequence.frames]
    shown = spread(len(frames_THWC), SHOWN_FRAMES)
    rows = {"truth": truth_THW, **masks}
    sheet = [
        (name, [figures.overlay_masks(frames_THWC[t], labels[t]) for t in shown])
        for name, labels in rows.items()
    ]
    figures.contact_sheet(sheet, output / "figures" / f"{sequence.name}.png")
    film = [
        np.concatenate([figures.overlay_masks(frame, labels[t]) for labels in masks.values()], axis=1)
        for t, frame in enumerate(frames_THWC)
    ]
    figures.write_video(film, output / "figures" / f"{sequence.name}.mp4")
