"""VIP: propagate the first frame's body parts through each video, write masks, score them with mean IoU.

Reads VIP_Fine in its own layout: Images/VIDEO/*.jpg, Annotations/Category_ids/VIDEO/*.png and
lists/SUBSET_videos.txt. The measure is in `vip.py`; as in github ajabri/videowalk all frames count, the first
one as its labels come back from the grid. Shape suffixes: H W pixels, C classes.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.map_ahead import map_ahead
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import sequences
from fasttrain.evaluation.frames import fit_to_patches, read_image, read_label_map
from fasttrain.evaluation.metrics import CLASSES, class_iou, sum_confusions
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.sequences import Evaluation, LabelMap, VideoSequence

# The short side of the frames as encoded is a multiple of this.
SHORT_SIDE_STEP = 64
VOID = 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subset", default="val", help="list in lists/: SUBSET_videos.txt (default: val)")
    parser.add_argument("--list", type=Path, help="another list file: a video a line, by name or by path")
    parser.add_argument("--long-side", type=int, default=880, help="of the frames as encoded (default: 880)")
    sequences.add_arguments(parser, topk=10)


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Figures of all videos, on the main process."""
    if arguments.long_side < SHORT_SIDE_STEP:
        raise InputError(f"--long-side {arguments.long_side}: expected at least {SHORT_SIDE_STEP}")
    found = find_sequences(arguments.root, arguments.subset, arguments.list)
    for sequence in found:
        read_parts(sequence.annotations[0])
    merged = sequences.evaluate_all(found, evaluate_sequence, arguments, model, output, world)
    if merged is None:
        return None
    notes = sequences.take_notes(merged)
    confusions = {
        variant: {name: np.array(result[variant], dtype=np.int64) for name, result in merged.items()}
        for variant in model.variants
    }
    return {
        "data": {
            "sequences": len(found),
            "frames": sum(len(one.frames) for one in found),
            "classes": len(CLASSES),
            "notes": notes,
        },
        "results": {
            variant: summarise(np.sum(list(of_videos.values()), axis=0))
            for variant, of_videos in confusions.items()
        },
        "per_sequence": {
            name: {variant: summarise(of_videos[name]) for variant, of_videos in confusions.items()}
            for name in merged
        },
    }


def find_sequences(root: Path, subset: str, listed: Path | None) -> list[VideoSequence]:
    """The videos of a list. Raises InputError, naming the path, where the layout is another."""
    base = root if (root / "Images").is_dir() else root / "VIP_Fine"
    listed = listed or base / "lists" / f"{subset}_videos.txt"
    for path in (base / "Images", base / "Annotations" / "Category_ids", listed):
        if not path.exists():
            raise InputError(f"{path} does not exist; --root must hold VIP (VIP_Fine) in its own layout")
    names = dict.fromkeys(Path(line.split()[0]).name for line in sequences.read_list(listed))
    return [_find_sequence(base, name) for name in names]


def _find_sequence(base: Path, name: str) -> VideoSequence:
    frames = sequences.numbered(base / "Images" / name, ".jpg")
    annotations = sequences.check_pairs(name, frames, base / "Annotations" / "Category_ids" / name, fewest=2)
    return VideoSequence(name, frames, annotations)


def read_parts(path: Path) -> LabelMap:
    """(H, W) classes of one frame; 255 is not scored. Raises InputError for a label that is no class."""
    labels_HW = read_label_map(path)
    largest = int(labels_HW[labels_HW != VOID].max(initial=0))
    if largest >= len(CLASSES):
        raise InputError(f"annotation {path} holds label {largest}; expected classes 0 to {len(CLASSES) - 1}")
    return labels_HW


def encoded_size(size: tuple[int, int], long_side: int, patch: int) -> tuple[int, int]:
    """Height and width of the frames as encoded: the short side floored to a multiple of 64."""
    height, width = size
    short = max(1, min(size) * long_side // max(size) // SHORT_SIDE_STEP) * SHORT_SIDE_STEP
    return fit_to_patches((short, long_side) if width > height else (long_side, short), patch)


def evaluate_sequence(sequence: VideoSequence, evaluation: Evaluation, drawn: bool) -> dict[str, Any]:
    """Per variant the pixels of each true (row) and predicted class; writes masks and pictures."""
    truth = list(map_ahead(read_parts, sequence.annotations))
    height, width, _ = read_image(sequence.frames[0]).shape
    size = encoded_size((height, width), evaluation.arguments.long_side, evaluation.model.encoder.patch_size)
    first_HW = np.where(truth[0] == VOID, 0, truth[0]).astype(np.uint8)
    first_hwC = sequences.soft_labels(
        sequences.resize_labels(first_HW, size), evaluation.model.encoder.grid(*size), classes=len(CLASSES)
    )
    found = sequences.propagate(sequence.frames, size, first_hwC, evaluation)
    notes = []
    if not first_HW.any():
        notes.append(f"video {sequence.name}: no part is labelled in the first frame, so none is propagated")
    result: dict[str, Any] = {"notes": notes}
    masks: dict[str, list[LabelMap]] = {}
    for variant, labels_ThwC in found.labels_ThwC.items():
        masks[variant] = [
            sequences.resize_labels(sequences.hard_labels(labels_hwC, size), truth_HW.shape)
            for labels_hwC, truth_HW in zip(labels_ThwC, truth, strict=True)
        ]
        sequences.write_masks(
            masks[variant], sequence.annotations, evaluation.output / "masks" / variant / sequence.name
        )
        pairs = zip(masks[variant], truth, strict=True)
        result[variant] = sum_confusions(pairs, len(CLASSES)).tolist()
    if drawn:
        sequences.draw_masks(sequence, masks, truth, found.matches_M4, evaluation.output / "figures")
    return result


def summarise(confusion_CC: np.ndarray) -> dict[str, float]:
    """Mean IoU over the classes that occur, and the IoU of each; NaN for one that never occurs."""
    iou_C = class_iou(confusion_CC)
    return {"mIoU": float(np.nanmean(iou_C))} | dict(zip(CLASSES, iou_C.tolist(), strict=True))
