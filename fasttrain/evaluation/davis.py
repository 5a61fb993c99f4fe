"""Segment video objects on DAVIS: propagate the first frame's masks and measure J and F.

The dataset must be in its published layout: JPEGImages/480p, Annotations/480p and a list of sequences,
ImageSets/YEAR/SUBSET.txt in the 2017 release or ImageSets/480p/SUBSET.txt in the 2016 release. The predicted
masks are written as palette PNGs.
"""

# Shape suffixes: T frames, H W pixels, h w grid, C object labels with background, O objects.

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.map_ahead import map_ahead
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError, check_options
from fasttrain.evaluation import sequences
from fasttrain.evaluation.frames import read_label_map
from fasttrain.evaluation.metrics import boundary_accuracy, region_similarity, statistics
from fasttrain.evaluation.sequences import Evaluation, LabelMap, VideoSequence, hard_labels, soft_labels

# The label of void pixels, which are scored as background.
VOID = 255


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Evaluate all sequences. Returns the results on the main process and None on the others."""
    check_options(arguments, height=1, width=1)
    listed = find_sequences(arguments.root, arguments.year, arguments.subset)
    evaluated = sequences.evaluate_all(listed, evaluate_sequence, arguments, model, output, world)
    if evaluated is None:
        return None
    per_sequence, data = evaluated
    objects = sum(len(scores[model.variants[0]]) for scores in per_sequence.values())
    return {
        "data": {**data, "objects": objects},
        "results": {variant: summarise(per_sequence, variant) for variant in model.variants},
        "per_sequence": per_sequence,
    }


def find_sequences(root: Path, year: str, subset: str) -> list[VideoSequence]:
    """Find the sequences of a subset. Raises InputError if part of the layout is missing."""
    frames, annotations = root / "JPEGImages" / "480p", root / "Annotations" / "480p"
    listed = root / "ImageSets" / year / f"{subset}.txt"
    original = root / "ImageSets" / "480p" / f"{subset}.txt"
    if year == "2016" and not listed.exists() and original.exists():
        listed = original
    sequences.require((frames, annotations, listed), "DAVIS")
    # A line is the name of a sequence or, in the 2016 release, the paths of a frame and its annotation.
    lines = [Path(line.split()[0]) for line in sequences.read_list(listed)]
    names = dict.fromkeys(line.parent.name if line.suffix == ".jpg" else line.name for line in lines)
    # J and F exclude the first and the last frame, so a sequence needs at least three.
    return [sequences.find_pairs(name, frames / name, annotations / name, min_frames=3) for name in names]


def read_objects(annotations: Sequence[Path], year: str) -> LabelMap:
    """Read the object labels (T, H, W) of a sequence. Raises InputError if the first frame has no object.

    All objects are merged into one for 2016 and if the first annotation is binary (0 and 255).
    """
    maps = list(map_ahead(read_label_map, annotations))
    for path, labels_HW in zip(annotations, maps, strict=True):
        if labels_HW.shape != maps[0].shape:
            raise InputError(
                f"annotation '{path}' has shape {labels_HW.shape}; expected {maps[0].shape}, the shape of "
                "the first annotation of its sequence. Replace it."
            )
    labels_THW = np.stack(maps)
    if year == "2016" or set(np.unique(maps[0])) <= {0, VOID}:
        labels_THW = (labels_THW > 0).astype(np.uint8)
    labels_THW[labels_THW == VOID] = 0
    if not labels_THW[0].any():
        raise InputError(
            f"annotation '{annotations[0]}' has no object. The first frame must show the objects."
        )
    return labels_THW


def note_late_objects(sequence: VideoSequence, truth_THW: LabelMap) -> list[str]:
    """Return a note for each object that does not appear in the first frame."""
    first = set(np.unique(truth_THW[0]))
    return [
        f"sequence {sequence.name!r}: object {number} is not in the first frame, so it is not propagated and "
        f"is {'scored as missed' if number < max(first) else 'not scored'}, as in the official toolkit"
        for number in sorted(set(np.unique(truth_THW)) - first)
    ]


def evaluate_sequence(sequence: VideoSequence, evaluation: Evaluation) -> dict[str, Any]:
    """Return the mean, recall and decay of J and F by variant and object; write masks and pictures."""
    options = evaluation.arguments
    truth_THW = read_objects(sequence.annotations, options.year)
    notes = note_late_objects(sequence, truth_THW)
    # The toolkit scores objects up to the highest label in the first frame.
    count = int(truth_THW[0].max())
    truth_THW[truth_THW > count] = 0
    size = evaluation.size(options.height, options.width)
    first_hwC = soft_labels(truth_THW[0], evaluation.model.encoder.grid(*size), classes=count + 1)
    propagated, matches_M4 = sequences.propagate(sequence, size, first_hwC, evaluation)
    masks = {
        variant: [truth_THW[0], *(hard_labels(labels, truth_THW.shape[1:]) for labels in labels_ThwC[1:])]
        for variant, labels_ThwC in propagated.items()
    }
    scores = {variant: score(np.stack(maps), truth_THW) for variant, maps in masks.items()}
    means = {
        variant: float(np.mean([of_object["J"]["mean"] for of_object in by_object.values()]))
        for variant, by_object in scores.items()
    }
    sequences.save_masks(
        sequence, masks, list(truth_THW), matches_M4, evaluation, "J", means, mean_similarity
    )
    return {"notes": notes, **scores}


def mean_similarity(labels_HW: LabelMap, truth_HW: LabelMap) -> float:
    """Return the mean J over the objects in the truth of one frame. NaN if there are none."""
    values = [
        region_similarity(labels_HW == label, truth_HW == label)
        for label in np.unique(truth_HW[truth_HW > 0])
    ]
    return float(np.mean(values)) if values else np.nan


def score(masks_THW: LabelMap, truth_THW: LabelMap) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean, recall and decay of J and F by object, without the first and the last frame."""
    objects = range(1, int(truth_THW[0].max()) + 1)

    def measure(t: int) -> list[tuple[float, float]]:
        pairs = [(masks_THW[t] == number, truth_THW[t] == number) for number in objects]
        return [(region_similarity(*pair), boundary_accuracy(*pair)) for pair in pairs]

    measured_TO2 = np.array(list(map_ahead(measure, range(1, len(truth_THW) - 1))))
    return {
        str(number): {
            name: statistics(measured_TO2[:, number - 1, column]) for column, name in enumerate("JF")
        }
        for number in objects
    }


def summarise(per_sequence: dict[str, Any], variant: str) -> dict[str, float]:
    """Return the toolkit's global results: means over all objects of all sequences."""
    objects = [scores for sequence in per_sequence.values() for scores in sequence[variant].values()]
    means = {
        f"{name}-{kind.capitalize()}": float(np.mean([scores[name][kind] for scores in objects]))
        for name in ("J", "F")
        for kind in ("mean", "recall", "decay")
    }
    return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2, **means}
