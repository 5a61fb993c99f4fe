"""DAVIS: propagate the first frame's objects through each sequence, write masks, score them with J and F.

Reads the data set's own layout: JPEGImages/480p and Annotations/480p, with ImageSets/YEAR/SUBSET.txt of the
2017 release or ImageSets/480p/SUBSET.txt of the 2016 one. Shape suffixes:
T frames, H W pixels, h w grid, C objects and background, O objects.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.map_ahead import map_ahead
from fasttrain.distributed import World
from fasttrain.errors import InputError, check_options
from fasttrain.evaluation import sequences
from fasttrain.evaluation.frames import read_label_map
from fasttrain.evaluation.metrics import boundary_accuracy, region_similarity, statistics
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.propagation import TOPK
from fasttrain.evaluation.sequences import Evaluation, LabelMap, VideoSequence, hard_labels, soft_labels

VOID = 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--year", choices=("2016", "2017"), default="2017", help="2016: one object a sequence"
    )
    parser.add_argument("--subset", default="val", help="list in ImageSets/YEAR (default: val)")
    parser.add_argument("--height", type=int, default=480, help="of the frames as encoded (default: 480)")
    parser.add_argument("--width", type=int, default=880, help="of the frames as encoded (default: 880)")
    sequences.add_arguments(parser, topk=TOPK)


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Figures of all sequences, on the main process."""
    check_options(arguments, height=1, width=1)
    found = find_sequences(arguments.root, arguments.year, arguments.subset)
    evaluated = sequences.evaluate_all(found, evaluate_sequence, arguments, model, output, world)
    if evaluated is None:
        return None
    per_sequence, data = evaluated
    objects = sum(len(one[model.variants[0]]) for one in per_sequence.values())
    return {
        "data": {**data, "objects": objects},
        "results": {variant: summarise(per_sequence, variant) for variant in model.variants},
        "per_sequence": per_sequence,
    }


def find_sequences(root: Path, year: str, subset: str) -> list[VideoSequence]:
    """The sequences of a subset. Raises InputError, naming the path, where the layout is another."""
    frames, annotations = root / "JPEGImages" / "480p", root / "Annotations" / "480p"
    listed = root / "ImageSets" / year / f"{subset}.txt"
    if year == "2016" and not listed.exists():
        listed = root / "ImageSets" / "480p" / f"{subset}.txt"
    sequences.require((frames, annotations, listed), "DAVIS")
    # A line names a sequence or, in the release of 2016, a frame and its annotation.
    lines = [Path(line.split()[0]) for line in sequences.read_list(listed)]
    names = dict.fromkeys(line.parent.name if line.suffix == ".jpg" else line.name for line in lines)
    # J and F leave out the first frame and the last.
    return [sequences.find_pairs(name, frames / name, annotations / name, fewest=3) for name in names]


def read_objects(annotations: Sequence[Path], year: str) -> LabelMap:
    """(T, H, W) object numbers of a sequence's first frames. Raises InputError where the first shows none.

    Binary annotations (0, 255) and the year 2016 make one object of all.
    """
    maps = list(map_ahead(read_label_map, annotations))
    for path, labels_HW in zip(annotations, maps, strict=True):
        if labels_HW.shape != maps[0].shape:
            raise InputError(
                f"annotation {path} is {labels_HW.shape}, the first of its sequence {maps[0].shape}"
            )
    labels_THW = np.stack(maps)
    if year == "2016" or set(np.unique(maps[0])) <= {0, VOID}:
        labels_THW = (labels_THW > 0).astype(np.uint8)
    labels_THW[labels_THW == VOID] = 0
    if not labels_THW[0].any():
        raise InputError(f"annotation {annotations[0]} is empty; the first frame must show the objects")
    return labels_THW


def note_late_objects(sequence: VideoSequence, truth_THW: LabelMap) -> list[str]:
    """A note on each object that the first frame does not show."""
    first = set(np.unique(truth_THW[0]))
    return [
        f"sequence {sequence.name}: object {number} is not in the first frame; it is not propagated and "
        f"is {'scored as missed' if number < max(first) else 'not scored'}, as in the official toolkit"
        for number in sorted(set(np.unique(truth_THW)) - first)
    ]


def evaluate_sequence(sequence: VideoSequence, evaluation: Evaluation) -> dict[str, Any]:
    """Per variant and object the mean, recall and decay of J and F; writes masks and pictures."""
    options = evaluation.arguments
    truth_THW = read_objects(sequence.annotations, options.year)
    notes = note_late_objects(sequence, truth_THW)
    # The toolkit scores the objects up to the largest number of the first frame.
    count = int(truth_THW[0].max())
    truth_THW[truth_THW > count] = 0
    size = evaluation.size(options.height, options.width)
    first_hwC = soft_labels(truth_THW[0], evaluation.model.encoder.grid(*size), classes=count + 1)
    propagated, matches_M4 = sequences.propagate(sequence.frames, size, first_hwC, evaluation)
    masks = {
        variant: [truth_THW[0], *(hard_labels(labels, truth_THW.shape[1:]) for labels in labels_ThwC[1:])]
        for variant, labels_ThwC in propagated.items()
    }
    sequences.save_masks(sequence, masks, list(truth_THW), matches_M4, evaluation)
    return {"notes": notes} | {variant: score(np.stack(maps), truth_THW) for variant, maps in masks.items()}


def score(masks_THW: LabelMap, truth_THW: LabelMap) -> dict[str, dict[str, dict[str, float]]]:
    """Per object: mean, recall and decay of J and F over all frames but the first and the last."""
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
    """The toolkit's global figures: means over all objects of all sequences."""
    objects = [one for sequence in per_sequence.values() for one in sequence[variant].values()]
    means = {
        f"{name}-{kind.capitalize()}": float(np.mean([one[name][kind] for one in objects]))
        for name in ("J", "F")
        for kind in ("mean", "recall", "decay")
    }
    return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2, **means}
