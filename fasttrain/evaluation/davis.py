"""DAVIS: propagate the first frame's objects through each sequence, write masks, score them with J and F.

Reads the data set's own layout: JPEGImages/480p and Annotations/480p, with ImageSets/YEAR/SUBSET.txt of the
2017 release or ImageSets/480p/SUBSET.txt of the 2016 one. The measures are in `davis.py`. Shape suffixes:
T frames, H W pixels, h w grid, C objects and background, O objects.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.map_ahead import map_ahead
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import sequences
from fasttrain.evaluation.frames import fit_to_patches, read_label_map
from fasttrain.evaluation.metrics import boundary_accuracy, region_similarity, statistics
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.propagation import TOPK
from fasttrain.evaluation.sequences import Evaluation, LabelMap, VideoSequence

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
    for name in ("height", "width"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: expected a number above 0")
    found = find_sequences(arguments.root, arguments.year, arguments.subset)
    for sequence in found:
        read_first_objects(sequence, arguments.year)
    merged = sequences.evaluate_all(found, evaluate_sequence, arguments, model, output, world)
    if merged is None:
        return None
    return {
        "data": {
            "sequences": len(found),
            "frames": sum(len(one.frames) for one in found),
            "objects": sum(len(one[model.variants[0]]) for one in merged.values()),
            "notes": sequences.take_notes(merged),
        },
        "results": {variant: summarise(merged, variant) for variant in model.variants},
        "per_sequence": merged,
    }


def find_sequences(root: Path, year: str, subset: str) -> list[VideoSequence]:
    """The sequences of a subset. Raises InputError, naming the path, where the layout is another."""
    listed = root / "ImageSets" / year / f"{subset}.txt"
    of_2016 = root / "ImageSets" / "480p" / f"{subset}.txt"
    if year == "2016" and not listed.exists() and of_2016.exists():
        listed = of_2016
    for path in (root / "JPEGImages" / "480p", root / "Annotations" / "480p", listed):
        if not path.exists():
            raise InputError(f"{path} does not exist; --root must hold DAVIS in its own layout")
    # A line names a sequence or, in the release of 2016, a frame and its annotation.
    lines = [Path(line.split()[0]) for line in sequences.read_list(listed)]
    names = dict.fromkeys(line.parent.name if line.suffix == ".jpg" else line.name for line in lines)
    return [_find_sequence(root, name) for name in names]


def _find_sequence(root: Path, name: str) -> VideoSequence:
    frames = sequences.numbered(root / "JPEGImages" / "480p" / name, ".jpg")
    # J and F leave out the first frame and the last.
    annotations = sequences.check_pairs(name, frames, root / "Annotations" / "480p" / name, fewest=3)
    return VideoSequence(name, frames, annotations)


def read_first_objects(sequence: VideoSequence, year: str) -> LabelMap:
    """(H, W) object numbers of the first frame. Raises InputError where it shows none.

    Binary annotations (0, 255) and the year 2016 make one object of all.
    """
    labels_HW = read_label_map(sequence.annotations[0])
    if year == "2016" or set(np.unique(labels_HW)) <= {0, VOID}:
        labels_HW = (labels_HW > 0).astype(np.uint8)
    labels_HW = np.where(labels_HW == VOID, 0, labels_HW).astype(np.uint8)
    if not labels_HW.any():
        raise InputError(
            f"annotation {sequence.annotations[0]} is empty; the first frame must show the objects"
        )
    return labels_HW


def read_objects(sequence: VideoSequence, year: str) -> tuple[LabelMap, list[str]]:
    """(T, H, W) object numbers, and a note on each object that the first frame does not show."""
    first_HW = read_first_objects(sequence, year)
    maps = [read_label_map(path) for path in sequence.annotations]
    for path, labels_HW in zip(sequence.annotations, maps, strict=True):
        if labels_HW.shape != first_HW.shape:
            raise InputError(
                f"annotation {path} is {labels_HW.shape}, the first of its sequence {first_HW.shape}"
            )
    labels_THW = np.stack(maps)
    if year == "2016" or set(np.unique(maps[0])) <= {0, VOID}:
        labels_THW = (labels_THW > 0).astype(np.uint8)
    labels_THW[labels_THW == VOID] = 0
    count = int(first_HW.max())
    notes = []
    for number in sorted(set(np.unique(labels_THW)) - set(np.unique(first_HW)) - {0}):
        path = sequence.annotations[int((labels_THW == number).any((1, 2)).argmax())]
        treated = "scored as missed" if number < count else "not scored"
        notes.append(
            f"sequence {sequence.name}: object {number} appears late, in {path.name}; it cannot be "
            f"propagated and is {treated}, as in the official toolkit"
        )
    # The toolkit scores the objects up to the largest number of the first frame.
    labels_THW[labels_THW > count] = 0
    return labels_THW, notes


def evaluate_sequence(sequence: VideoSequence, evaluation: Evaluation, drawn: bool) -> dict[str, Any]:
    """Per variant and object the mean, recall and decay of J and F; writes masks, contact sheet and video."""
    truth_THW, notes = read_objects(sequence, evaluation.arguments.year)
    size = fit_to_patches(
        (evaluation.arguments.height, evaluation.arguments.width), evaluation.model.encoder.patch_size
    )
    first_hwC = sequences.soft_labels(
        truth_THW[0], evaluation.model.encoder.grid(*size), classes=int(truth_THW[0].max()) + 1
    )
    found = sequences.propagate(sequence.frames, size, first_hwC, evaluation)
    result: dict[str, Any] = {"notes": notes}
    masks: dict[str, list[LabelMap]] = {}
    for variant, labels_ThwC in found.labels_ThwC.items():
        masks[variant] = [truth_THW[0]]
        masks[variant] += [
            sequences.hard_labels(labels_hwC, truth_THW.shape[1:]) for labels_hwC in labels_ThwC[1:]
        ]
        sequences.write_masks(
            masks[variant], sequence.annotations, evaluation.output / "masks" / variant / sequence.name
        )
        result[variant] = score(np.stack(masks[variant]), truth_THW)
    if drawn:
        sequences.draw_masks(
            sequence, masks, list(truth_THW), found.matches_M4, evaluation.output / "figures"
        )
    return result


def score(masks_THW: LabelMap, truth_THW: LabelMap) -> dict[str, dict[str, dict[str, float]]]:
    """Per object: mean, recall and decay of J and F over all frames but the first and the last."""
    objects = range(1, int(truth_THW[0].max()) + 1)

    def measure(t: int) -> list[tuple[float, float]]:
        pairs = [(masks_THW[t] == number, truth_THW[t] == number) for number in objects]
        return [(region_similarity(*pair), boundary_accuracy(*pair)) for pair in pairs]

    measured_TO2 = np.array(list(map_ahead(measure, range(1, len(truth_THW) - 1))))
    return {
        str(number): {
            name: asdict(statistics(measured_TO2[:, number - 1, place])) for place, name in enumerate("JF")
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
