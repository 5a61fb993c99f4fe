"""Segment body parts on VIP: propagate the first frame's parts and measure mean IoU.

The dataset (VIP_Fine) must be in its published layout: Images/VIDEO/*.jpg,
Annotations/Category_ids/VIDEO/*.png and lists/SUBSET_videos.txt. The protocol is that of
github.com/ajabri/videowalk: all frames are scored, including the first one, whose labels are resized to the
encoder's grid and back. The predicted masks are written as palette PNGs.
"""

# Shape suffixes: H W pixels, C classes.

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.map_ahead import map_ahead
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError, check_options
from fasttrain.evaluation import plots, sequences
from fasttrain.evaluation.frames import read_image, read_label_map
from fasttrain.evaluation.metrics import class_iou, confusion
from fasttrain.evaluation.sequences import (
    Evaluation,
    LabelMap,
    VideoSequence,
    hard_labels,
    resize_labels,
    soft_labels,
)

CLASSES = (
    *("background", "hat", "hair", "sun-glasses", "upper-clothes", "dress", "coat", "socks", "pants"),
    *("gloves", "scarf", "skirt", "torso-skin", "face", "right-arm", "left-arm", "right-leg", "left-leg"),
    *("right-shoe", "left-shoe"),
)
# The short side of the encoded frames is rounded down to a multiple of this number.
SHORT_SIDE_STEP = 64
# The label of pixels that are not scored.
VOID = 255


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Evaluate all videos. Returns the results on the main process and None on the others."""
    check_options(arguments, long_side=SHORT_SIDE_STEP)
    listed = find_sequences(arguments.root, arguments.subset, arguments.list)
    evaluated = sequences.evaluate_all(listed, evaluate_sequence, arguments, model, output, world)
    if evaluated is None:
        return None
    confusions, data = evaluated
    return {
        "data": {**data, "classes": len(CLASSES)},
        "results": {
            variant: summarise(np.sum([result[variant] for result in confusions.values()], axis=0))
            for variant in model.variants
        },
        "per_sequence": {
            name: {variant: summarise(counts_CC) for variant, counts_CC in result.items()}
            for name, result in confusions.items()
        },
    }


def find_sequences(root: Path, subset: str, listed: Path | None) -> list[VideoSequence]:
    """Find the videos of a subset or list. Raises InputError if part of the layout is missing."""
    base = root if (root / "Images").is_dir() else root / "VIP_Fine"
    frames, annotations = base / "Images", base / "Annotations" / "Category_ids"
    sequences.require((frames, annotations), "VIP (VIP_Fine)")
    if listed is None:
        listed = base / "lists" / f"{subset}_videos.txt"
        sequences.require((listed,), "VIP (VIP_Fine)")
    names = dict.fromkeys(Path(line.split()[0]).name for line in sequences.read_list(listed))
    return [sequences.find_pairs(name, frames / name, annotations / name, min_frames=2) for name in names]


def read_parts(path: Path) -> LabelMap:
    """Read the class labels (H, W) of one frame. Raises InputError for a label that is not a class."""
    labels_HW = read_label_map(path)
    largest = int(labels_HW[labels_HW != VOID].max(initial=0))
    if largest >= len(CLASSES):
        raise InputError(
            f"annotation '{path}' has label {largest}; expected a class from 0 to {len(CLASSES) - 1}, or "
            f"{VOID} for pixels that are not scored"
        )
    return labels_HW


def encoded_size(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Return the height and width of the encoded frames, the short side rounded down to a multiple of 64."""
    short_side = min(height, width) * long_side // max(height, width)
    short_side = max(1, short_side // SHORT_SIDE_STEP) * SHORT_SIDE_STEP
    return (short_side, long_side) if width > height else (long_side, short_side)


def evaluate_sequence(sequence: VideoSequence, evaluation: Evaluation) -> dict[str, Any]:
    """Return the confusion counts (C, C) by variant; write masks and pictures."""
    truth = list(map_ahead(read_parts, sequence.annotations))
    height, width, _ = read_image(sequence.frames[0]).shape
    size = evaluation.size(*encoded_size(height, width, evaluation.arguments.long_side))
    first_HW = np.where(truth[0] == VOID, 0, truth[0]).astype(np.uint8)
    first_hwC = soft_labels(
        resize_labels(first_HW, size), evaluation.model.encoder.grid(*size), classes=len(CLASSES)
    )
    propagated, matches_M4 = sequences.propagate(sequence, size, first_hwC, evaluation)
    masks = {
        variant: [
            resize_labels(hard_labels(labels_hwC, size), truth_HW.shape)
            for labels_hwC, truth_HW in zip(labels_ThwC, truth, strict=True)
        ]
        for variant, labels_ThwC in propagated.items()
    }
    counts = {
        variant: np.sum([count(*pair) for pair in zip(maps, truth, strict=True)], axis=0)
        for variant, maps in masks.items()
    }
    scores = {variant: summarise(counts_CC)["mIoU"] for variant, counts_CC in counts.items()}

    def score(labels_HW: LabelMap, truth_HW: LabelMap) -> float:
        return summarise(count(labels_HW, truth_HW))["mIoU"]

    shown = {label for t in sequences.shown_frames(len(truth)) for label in np.unique(truth[t]).tolist()}
    legend = {CLASSES[label]: plots.label_color(label) for label in sorted(shown - {0, VOID})}
    sequences.save_masks(sequence, masks, truth, matches_M4, evaluation, "mIoU", scores, score, legend)
    return counts


def count(labels_HW: LabelMap, truth_HW: LabelMap) -> np.ndarray:
    """Return the confusion counts (C, C) of one frame."""
    return confusion(labels_HW, truth_HW, len(CLASSES))


def summarise(confusion_CC: np.ndarray) -> dict[str, float]:
    """Return the mean IoU over the classes that occur and the IoU of each class (NaN if it never occurs)."""
    iou_C = class_iou(confusion_CC)
    return {"mIoU": float(np.nanmean(iou_C))} | dict(zip(CLASSES, iou_C.tolist(), strict=True))
