"""The measures of all benchmarks: they take arrays and know nothing of models or files."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn import functional

from fasttrain.errors import InputError

# --- Object masks: region similarity J and contour accuracy F ---------------------------------------------
#
# As the DAVIS 2017 toolkit defines them (davisvideochallenge/davis2017-evaluation): Perazzi et al., "A
# Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016); Pont-Tuset et al.,
# "The 2017 DAVIS Challenge on Video Object Segmentation". Shape suffixes: H W pixels, M points, T frames.

# Width of the band in which contours match, as a share of the image diagonal.
CONTOUR_TOLERANCE = 0.008

Mask = npt.NDArray[np.bool_]


def region_similarity(mask: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor) -> float:
    """J of one object in one frame: intersection over union of two (H, W) masks; 1 where both are empty.

    Non-zero is foreground. Raises InputError where the shapes differ.
    """
    mask_HW, truth_HW = _pair(mask, truth)
    union = np.count_nonzero(mask_HW | truth_HW)
    return np.count_nonzero(mask_HW & truth_HW) / union if union else 1.0


def boundary_accuracy(mask: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor) -> float:
    """F of one object in one frame: harmonic mean of the contours' precision and recall.

    A contour pixel is matched where the other contour comes within 0.008 of the image diagonal, rounded up to
    pixels. Both masks empty gives 1, one of them 0. Raises InputError where the shapes differ.
    """
    mask_HW, truth_HW = _pair(mask, truth)
    contour_M2, truth_contour_M2 = _contour(mask_HW), _contour(truth_HW)
    if not len(contour_M2) or not len(truth_contour_M2):
        return float(len(contour_M2) == len(truth_contour_M2))
    reach = math.ceil(CONTOUR_TOLERANCE * math.hypot(*mask_HW.shape))
    precision = _share_within(reach, contour_M2, truth_contour_M2)
    recall = _share_within(reach, truth_contour_M2, contour_M2)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(values: npt.ArrayLike) -> dict[str, float]:
    """`mean`, `recall` (share above 0.5) and `decay` of one measure of one object over the frames 2..n-1.

    Decay is the mean of the first of four bins of frames less that of the last; neighbouring bins share their
    border frame, as in the toolkit.
    """
    values_T = np.asarray(values, dtype=np.float64)
    edges = np.round(np.linspace(1, len(values_T), 5) + 1e-10).astype(int) - 1
    first, last = values_T[edges[0] : edges[1] + 1], values_T[edges[3] : edges[4] + 1]
    return {
        "mean": float(values_T.mean()),
        "recall": float((values_T > 0.5).mean()),
        "decay": float(first.mean() - last.mean()),
    }


def _contour(mask_HW: Mask) -> npt.NDArray[np.int64]:
    """Positions (M, 2) of the pixels that differ from their right, lower or lower right neighbour."""
    edge_HW = np.zeros_like(mask_HW)
    edge_HW[:, :-1] |= mask_HW[:, :-1] ^ mask_HW[:, 1:]
    edge_HW[:-1] |= mask_HW[:-1] ^ mask_HW[1:]
    edge_HW[:-1, :-1] |= mask_HW[:-1, :-1] ^ mask_HW[1:, 1:]
    return np.argwhere(edge_HW)


def _share_within(reach: int, points_M2: npt.NDArray[np.int64], others_M2: npt.NDArray[np.int64]) -> float:
    distance_M, _ = KDTree(others_M2).query(points_M2, distance_upper_bound=reach + 1)
    return np.count_nonzero(distance_M <= reach) / len(points_M2)


def _pair(mask: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor) -> tuple[Mask, Mask]:
    mask_HW, truth_HW = (
        np.asarray(array.cpu() if isinstance(array, Tensor) else array).astype(bool)
        for array in (mask, truth)
    )
    if mask_HW.ndim != 2 or mask_HW.shape != truth_HW.shape:
        raise InputError(f"masks of shapes {mask_HW.shape} and {truth_HW.shape}; expected the same (H, W)")
    return mask_HW, truth_HW


# --- Label maps: mean intersection over union -------------------------------------------------------------
#
# As for VIP in github ajabri/videowalk; Zhou et al., "Adaptive Temporal Encoding Network for Video
# Instance-level Human Parsing" (ACM MM 2018). Shape suffixes: H W pixels, M counted pixels, C classes.


def mean_iou(
    predictions: Sequence[npt.ArrayLike | Tensor],
    truths: Sequence[npt.ArrayLike | Tensor],
    num_classes: int = 20,
) -> float:
    """Mean over the classes of the intersection over union of all (H, W) label maps together, 0..1.

    A class that occurs in no map is left out of the mean; true labels outside 0..num_classes-1 are not
    counted. Raises InputError where lists or shapes differ or a prediction is not a class.
    """
    if len(predictions) != len(truths):
        raise InputError(f"{len(predictions)} predictions for {len(truths)} truths; expected as many")
    counts = (confusion(p, t, num_classes) for p, t in zip(predictions, truths, strict=True))
    return float(np.nanmean(class_iou(sum(counts, start=np.zeros((num_classes, num_classes), np.int64)))))


def confusion(
    prediction: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor, num_classes: int
) -> npt.NDArray[np.int64]:
    """(C, C) counts: how much of the row's class was taken for the column's. No true class is not counted."""
    predicted, true = np.asarray(prediction), np.asarray(truth)
    if predicted.shape != true.shape:
        raise InputError(f"label map of shape {predicted.shape} against truth of {true.shape}")
    counted = (true >= 0) & (true < num_classes)
    predicted_M = predicted[counted].astype(np.int64)
    if len(predicted_M) and not 0 <= predicted_M.min() <= predicted_M.max() < num_classes:
        raise InputError(f"predicted class {predicted_M.max()}; expected 0 to {num_classes - 1}")
    cell_M = num_classes * true[counted].astype(np.int64) + predicted_M
    return np.bincount(cell_M, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(confusion_CC: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Intersection over union of each class; NaN for a class that never occurs."""
    correct_C = np.diag(confusion_CC)
    with np.errstate(invalid="ignore"):
        return correct_C / (confusion_CC.sum(0) + confusion_CC.sum(1) - correct_C)


# --- Poses: percentage of correct keypoints ---------------------------------------------------------------
#
# As for JHMDB in github ajabri/videowalk; Jhuang et al., "Towards Understanding Action Recognition" (ICCV
# 2013). Shape suffixes: T frames, J joints.

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
# Size of a person: this share of the diagonal of the box around the joints.
PERSON_SHARE = 0.6

Counts = npt.NDArray[np.int64]


def pck(
    predictions: Sequence[npt.ArrayLike | Tensor],
    truths: Sequence[npt.ArrayLike | Tensor],
    thresholds: Sequence[float] = THRESHOLDS,
) -> npt.NDArray[np.float64]:
    """Mean over the joints of the percentage of correct keypoints, one number per threshold.

    `predictions` and `truths` hold one (2, joints, T) array of pixel x, y per video. A keypoint is correct
    within `threshold` times 0.6 of the diagonal of the box of the true joints of its frame. The first frame
    is given and does not count. A joint predicted at a negative x was not found: it counts neither as right
    nor as wrong, nor in the box. Raises InputError where lists or shapes differ.
    """
    if len(predictions) != len(truths) or not truths:
        raise InputError(f"{len(predictions)} predicted poses for {len(truths)} true ones; expected as many")
    counts = (count_correct(p, t, thresholds) for p, t in zip(predictions, truths, strict=True))
    return mean_over_joints(percentages(counts))


def count_correct(
    prediction: npt.ArrayLike | Tensor,
    truth: npt.ArrayLike | Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[Counts, Counts]:
    """Correct keypoints (thresholds, joints) and found ones (joints,) of one video; see `pck`."""
    prediction_2JT, truth_2JT = np.asarray(prediction, dtype=float), np.asarray(truth, dtype=float)
    if prediction_2JT.shape != truth_2JT.shape or prediction_2JT.ndim != 3 or len(prediction_2JT) != 2:
        shapes = f"{prediction_2JT.shape} and {truth_2JT.shape}"
        raise InputError(f"poses of shapes {shapes}; expected the same (2, joints, frames)")
    found_JT = prediction_2JT[0] >= 0
    lowest_2T = np.where(found_JT, truth_2JT, np.inf).min(1)
    highest_2T = np.where(found_JT, truth_2JT, -np.inf).max(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        size_T = PERSON_SHARE * np.linalg.norm(highest_2T - lowest_2T, axis=0)
        distance_JT = np.linalg.norm(prediction_2JT - truth_2JT, axis=0) / size_T
    # A joint that is found alone is wrong, whatever the threshold: its box is a point.
    distance_JT[:, size_T == 0] = np.inf
    distance_JT[~found_JT] = np.inf
    correct = np.stack([(distance_JT[:, 1:] <= threshold).sum(1) for threshold in thresholds])
    return correct, found_JT[:, 1:].sum(1)


def percentages(counts: Iterable[tuple[Counts, Counts]]) -> npt.NDArray[np.float64]:
    """(thresholds, joints) percentages over videos, from what `count_correct` says of each."""
    correct, found_J = (np.sum(of_videos, axis=0) for of_videos in zip(*counts, strict=True))
    with np.errstate(invalid="ignore"):
        return 100.0 * correct / found_J


def mean_over_joints(percent: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(thresholds,) means of (thresholds, joints); joints never found are left out, NaN if none was."""
    known_J = ~np.isnan(percent[0])
    return percent[:, known_J].mean(axis=1) if known_J.any() else np.full(len(percent), np.nan)


# --- Video retrieval: recall at k -------------------------------------------------------------------------
#
# The protocol of self-supervised video retrieval on UCF101 and HMDB51 (Büchler et al., ECCV 2018; Xu et al.,
# "Self-Supervised Spatiotemporal Learning via Video Clip Order Prediction", CVPR 2019): test videos are the
# queries, training videos the gallery, one mean feature a video, cosine similarity; a query counts as correct
# at k if one of its k nearest videos has its class.
#
# Shape suffixes: Q queries, G gallery videos, D channels, K neighbours.

RANKS = (1, 5, 10)
_BLOCK = 1024


def nearest(queries_QD: Tensor, gallery_GD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity (Q, K) and number in the gallery (Q, K) of each query's nearest, nearest first.

    K is `count`, or G where the gallery is smaller. Queries go in blocks, so Q x G is never in memory.
    Raises InputError for features that are not finite.
    """
    if not bool(queries_QD.isfinite().all() and gallery_GD.isfinite().all()):
        raise InputError("features that are not finite have no neighbours; is the encoder's output?")
    gallery_GD = functional.normalize(gallery_GD, dim=-1)
    found = [
        (functional.normalize(block_QD, dim=-1) @ gallery_GD.T).topk(min(count, len(gallery_GD)))
        for block_QD in queries_QD.split(_BLOCK)
    ]
    return torch.cat([block.values for block in found]), torch.cat([block.indices for block in found])


def recall_at(
    neighbour_labels_QK: Tensor, labels_Q: Tensor, ranks: Sequence[int] = RANKS
) -> dict[int, float]:
    """Share in percent of queries with one of their class among the k nearest, for each k of `ranks`.

    neighbour_labels_QK: classes of the neighbours, nearest first; a k above K counts all of them.
    """
    hits_QK = neighbour_labels_QK == labels_Q[:, None]
    return {k: 100 * hits_QK[:, :k].any(dim=1).double().mean().item() for k in ranks}


# --- Classification of videos: weighted k-NN, top-k accuracy, what to hold out ----------------------------
#
# The k-NN is that of DINO (Caron et al., ICCV 2021, eval_knn.py; after Wu et al., CVPR 2018): cosine
# similarity s, each of the k nearest votes exp(s / 0.07) for its class.
#
# Shape suffixes: S test videos, N training videos, D channels, C classes, K neighbours.

TEMPERATURE = 0.07
# exp(1 / temperature), the vote of a video like the query, overflows float64 below 0.0014.
MIN_TEMPERATURE = 0.0015
NEIGHBOURS = (10, 20, 100, 200)


def knn_classify(
    test_SD: Tensor,
    train_ND: Tensor,
    train_labels_N: Tensor,
    *,
    num_classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """Votes (S, C) for every k of `neighbours` that N allows; for N itself where it allows none.

    No vote is -inf: DINO ranks classes without a vote behind the others in no particular order; here they are
    never predicted.
    """
    fitting = [k for k in neighbours if k <= len(train_ND)] or [len(train_ND)]
    similarity_SK, index_SK = nearest(test_SD, train_ND, max(fitting))
    weight_SK = (similarity_SK.double() / temperature).exp()
    labels_SK = train_labels_N[index_SK]
    scores = {}
    for k in fitting:
        votes_SC = weight_SK.new_zeros(len(test_SD), num_classes)
        votes_SC.scatter_add_(1, labels_SK[:, :k], weight_SK[:, :k])
        scores[k] = votes_SC.masked_fill(votes_SC == 0, -torch.inf)
    return scores


def top_accuracy(scores_SC: Tensor, labels_S: Tensor, k: int) -> float:
    """Share in percent of samples whose class is among the k highest scores.

    Of equal scores the lower class comes first; a score of -inf is never among them.
    """
    ranked = scores_SC.sort(dim=1, descending=True, stable=True)
    right_SC = (ranked.indices == labels_S[:, None]) & (ranked.values > -torch.inf)
    return 100 * right_SC[:, :k].any(dim=1).double().mean().item()


def hold_out(labels_N: Tensor, share: float = 0.2) -> Tensor:
    """(N,) bool: the last `share` of each class, at least one where it has two or more.

    The last in the list's order, not a draw: neighbours in a list are often cut from one recording, as the
    groups of UCF101 are, and stay together so.
    """
    held_out_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in labels_N.unique():
        own = (labels_N == label).nonzero()[:, 0]
        count = max(1, int(len(own) * share)) if len(own) > 1 else 0
        held_out_N[own[len(own) - count :]] = True
    return held_out_N


# --- Actions in time: frame accuracy, segmental F1, edit score, mAP over temporal IoU ---------------------
#
# Frame accuracy, F1@10/25/50 and edit score are those of action segmentation as MS-TCN computes them (Abu
# Farha and Gall, CVPR 2019, eval.py; after Lea et al., CVPR 2017). The average precision is that of
# ActivityNet (Caba Heilbron et al., CVPR 2015, eval_detection.py). All are in percent. A segment is a longest
# run of frames with one label; segments of background labels count in none but the frame accuracy.
#
# Shape suffixes: T frames, P predicted segments, Y true segments, C classes.

Labels = npt.NDArray[np.integer]

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
    edges = [0, *(np.flatnonzero(np.diff(labels_T)) + 1).tolist(), len(labels_T)]
    runs = (Segment(int(labels_T[start]), start, end) for start, end in pairwise(edges))
    return [run for run in runs if run.label not in background]


def scored_segments(
    labels_T: Labels, probabilities_TC: npt.NDArray[np.floating], background: Collection[int] = ()
) -> list[Segment]:
    """The segments of predicted labels, each with the mean probability of its label over its frames."""
    return [
        replace(run, score=float(probabilities_TC[run.start : run.end, run.label].mean()))
        for run in segments(labels_T, background)
    ]


def frame_accuracy(predicted: Sequence[Labels], truth: Sequence[Labels]) -> float:
    """Share of all frames of all videos with the right label, background included."""
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
    scores = []
    for pair in zip(predicted, truth, strict=True):
        guessed, true = ([one.label for one in segments(labels_T, background)] for labels_T in pair)
        longer = max(len(guessed), len(true), 1)
        scores.append(100 * (1 - levenshtein(guessed, true) / longer))
    return float(np.mean(scores))


def levenshtein(first: Sequence[int], second: Sequence[int]) -> int:
    """Least number of insertions, deletions and substitutions that turn one sequence into the other."""
    second_Y = np.asarray(second)
    row = column = np.arange(len(second) + 1)
    for number, label in enumerate(first, start=1):
        replaced = row[:-1] + (second_Y != label)
        best = np.concatenate([[number], np.minimum(row[1:] + 1, replaced)])
        # Insertions run along the row: each entry is the least of all before it plus the way from there.
        row = np.minimum.accumulate(best - column) + column
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
    by_label = []
    for label in labels:
        actual = {video: [one for one in found if one.label == label] for video, found in truth.items()}
        total = sum(map(len, actual.values()))
        guesses = [
            (video, one) for video in sorted(predicted) for one in predicted[video] if one.label == label
        ]
        guesses.sort(key=lambda guess: -guess[1].score)
        # The IoU with each true segment of the video, by its first frame.
        overlaps = [
            {(video, other.start): _iou(one, other) for other in actual.get(video, [])}
            for video, one in guesses
        ]
        by_label.append([_average_precision(overlaps, total, threshold) for threshold in thresholds])
    means = 100 * np.mean(by_label, axis=0)
    return dict(zip(thresholds, means.tolist(), strict=True))


def _average_precision(
    overlaps: Sequence[Mapping[tuple[str, int], float]], total: int, threshold: float
) -> float:
    """The area under the interpolated precision-recall curve of one label's guesses, surest first."""
    taken: set[tuple[str, int]] = set()
    right_P = np.zeros(len(overlaps))
    for number, by_segment in enumerate(overlaps):
        free = {key: iou for key, iou in by_segment.items() if iou >= threshold and key not in taken}
        if free:
            taken.add(max(free, key=lambda key: free[key]))
            right_P[number] = 1
    precision_P = np.cumsum(right_P) / np.arange(1, len(overlaps) + 1)
    interpolated_P = np.maximum.accumulate(precision_P[::-1])[::-1]
    return float((interpolated_P * right_P).sum() / total)


def _iou(one: Segment, other: Segment) -> float:
    shared = min(one.end, other.end) - max(one.start, other.start)
    return max(0, shared) / (max(one.end, other.end) - min(one.start, other.start))
