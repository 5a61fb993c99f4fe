"""Temporal action localisation: frame accuracy, segmental F1, edit score, mAP over temporal IoU.

Frame accuracy, F1@10/25/50 and edit score are those of the action-segmentation literature, as MS-TCN computes
them (Abu Farha and Gall, CVPR 2019, eval.py; after Lea et al., CVPR 2017). The average precision is that of
ActivityNet (Caba Heilbron et al., CVPR 2015, Evaluation/eval_detection.py). All are in percent. A segment is
a longest run of frames with one label; segments of background labels count in none but the frame accuracy.

Shape suffixes: T frames, P predicted segments, Y true segments, C classes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fasttrain.errors import InputError

Labels = npt.NDArray[np.integer]
Probabilities = npt.NDArray[np.floating]

OVERLAPS = (0.10, 0.25, 0.50)
# The thresholds of THUMOS14 and of ActivityNet.
TEMPORAL_IOU: dict[str, tuple[float, ...]] = {
    "thumos": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    "activitynet": (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
}


@dataclass(frozen=True)
class Segment:
    """Frames start..end - 1 of one label; score: how sure a detector is of it."""

    label: int
    start: int
    end: int
    score: float = 1.0


def segments(labels_T: Labels, background: Collection[int] = ()) -> list[Segment]:
    """The runs of equal labels in order, background left out."""
    labels_T = np.asarray(labels_T)
    if labels_T.ndim != 1 or not len(labels_T):
        raise InputError(f"frame labels of shape {labels_T.shape}; expected one label a frame, at least one")
    borders = np.flatnonzero(np.diff(labels_T)) + 1
    starts, ends = [0, *borders.tolist()], [*borders.tolist(), len(labels_T)]
    runs = (Segment(int(labels_T[start]), start, end) for start, end in zip(starts, ends, strict=True))
    return [run for run in runs if run.label not in background]


def scored_segments(
    labels_T: Labels, probabilities_TC: Probabilities, background: Collection[int] = ()
) -> list[Segment]:
    """The segments of predicted labels, each with the mean probability of its label over its frames."""
    return [
        Segment(one.label, one.start, one.end, float(probabilities_TC[one.start : one.end, one.label].mean()))
        for one in segments(labels_T, background)
    ]


def frame_accuracy(predicted: Sequence[Labels], truth: Sequence[Labels]) -> float:
    """Share of all frames of all videos with the right label, background included."""
    _check_pairs(predicted, truth)
    right = sum(int((p == y).sum()) for p, y in zip(predicted, truth, strict=True))
    return 100 * right / sum(map(len, truth))


def segmental_f1(
    predicted: Sequence[Labels], truth: Sequence[Labels], overlap: float, background: Collection[int] = ()
) -> float:
    """F1 over the segments of all videos together.

    In the order of time, a predicted segment is a true positive if, of the true segments of its label, the
    one of highest IoU reaches `overlap` and is not taken yet; otherwise it is a false positive. True segments
    that nothing took are false negatives. 0 where there is no segment at all.
    """
    _check_pairs(predicted, truth)
    hits = guesses = actual = 0
    for p, y in zip(predicted, truth, strict=True):
        guessed, true = segments(p, background), segments(y, background)
        guesses, actual = guesses + len(guessed), actual + len(true)
        taken: set[int] = set()
        for one in guessed:
            overlaps = [_iou(one, other) if other.label == one.label else 0.0 for other in true]
            best = int(np.argmax(overlaps)) if overlaps else -1
            if best >= 0 and overlaps[best] >= overlap:
                taken.add(best)
        hits += len(taken)
    # 2 precision recall / (precision + recall), written without its divisions by zero.
    return 200 * hits / (guesses + actual) if guesses + actual else 0.0


def edit_score(
    predicted: Sequence[Labels], truth: Sequence[Labels], background: Collection[int] = ()
) -> float:
    """Mean over videos of 1 - Levenshtein distance of the sequences of segment labels / the longer's length.

    A video without a segment in either counts as 100.
    """
    _check_pairs(predicted, truth)
    scores = []
    for p, y in zip(predicted, truth, strict=True):
        guessed = [one.label for one in segments(p, background)]
        true = [one.label for one in segments(y, background)]
        longer = max(len(guessed), len(true))
        scores.append(100 * (1 - levenshtein(guessed, true) / longer) if longer else 100.0)
    return float(np.mean(scores))


def levenshtein(first: Sequence[int], second: Sequence[int]) -> int:
    """Least number of insertions, deletions and substitutions that turn one sequence into the other."""
    second_Y = np.asarray(second)
    places = np.arange(len(second) + 1)
    row = places
    for number, label in enumerate(first, start=1):
        replaced = row[:-1] + (second_Y != label)
        best = np.concatenate([[number], np.minimum(row[1:] + 1, replaced)])
        # Insertions run along the row: each place is the least of all before it plus the way from there.
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])


def detection_map(
    predicted: Mapping[str, Sequence[Segment]],
    truth: Mapping[str, Sequence[Segment]],
    thresholds: Sequence[float],
) -> dict[float, float]:
    """Mean average precision for each threshold of temporal IoU, over the labels that occur in `truth`.

    By video name. Predictions of a label, surest first, each take the free true segment of highest IoU in
    their video if that reaches the threshold. Average precision is the area under the precision-recall
    curve with precision made monotonous (PASCAL VOC 2011). A label that is never predicted has 0.
    """
    labels = sorted({one.label for found in truth.values() for one in found})
    if not labels:
        raise InputError("there is no true segment to detect; is every label background?")
    by_label = [_average_precision(predicted, truth, label, thresholds) for label in labels]
    means = 100 * np.mean(by_label, axis=0)
    return dict(zip(thresholds, means.tolist(), strict=True))


def _average_precision(
    predicted: Mapping[str, Sequence[Segment]],
    truth: Mapping[str, Sequence[Segment]],
    label: int,
    thresholds: Sequence[float],
) -> list[float]:
    actual = {video: [one for one in found if one.label == label] for video, found in truth.items()}
    total = sum(map(len, actual.values()))
    guesses = [(video, one) for video in sorted(predicted) for one in predicted[video] if one.label == label]
    guesses.sort(key=lambda guess: -guess[1].score)
    overlaps = [[_iou(one, other) for other in actual.get(video, [])] for video, one in guesses]
    precisions = []
    for threshold in thresholds:
        taken: set[tuple[str, int]] = set()
        right = np.zeros(len(guesses))
        for number, (video, _) in enumerate(guesses):
            for place in np.argsort([-overlap for overlap in overlaps[number]], kind="stable").tolist():
                if overlaps[number][place] < threshold:
                    break
                if (video, place) not in taken:
                    taken.add((video, place))
                    right[number] = 1
                    break
        precisions.append(_area(right, total))
    return precisions


def _area(right_P: npt.NDArray[np.float64], total: int) -> float:
    """Area under the interpolated precision-recall curve of ranked guesses (1 right, 0 wrong)."""
    if not len(right_P):
        return 0.0
    precision_P = np.cumsum(right_P) / np.arange(1, len(right_P) + 1)
    interpolated_P = np.maximum.accumulate(precision_P[::-1])[::-1]
    return float((interpolated_P * right_P).sum() / total)


def _iou(one: Segment, other: Segment) -> float:
    shared = min(one.end, other.end) - max(one.start, other.start)
    return max(0, shared) / (max(one.end, other.end) - min(one.start, other.start))


def _check_pairs(predicted: Sequence[Labels], truth: Sequence[Labels]) -> None:
    if not truth or len(predicted) != len(truth):
        raise InputError(
            f"{len(predicted)} predicted videos for {len(truth)} true ones; at least one is needed"
        )
    for number, (p, y) in enumerate(zip(predicted, truth, strict=True)):
        if np.shape(p) != np.shape(y):
            raise InputError(f"video {number}: {np.shape(p)} predicted labels, {np.shape(y)} true ones")
