"""The metrics of all benchmarks, as functions of arrays and tensors, without models or files."""

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
from fasttrain.options import KNN_TEMPERATURE, NEIGHBOURS

# --- Object masks: region similarity J and contour accuracy F ---------------------------------------------
#
# As the DAVIS 2017 toolkit defines them (davisvideochallenge/davis2017-evaluation): Perazzi et al., "A
# Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016); Pont-Tuset et al.,
# "The 2017 DAVIS Challenge on Video Object Segmentation". Shape suffixes: H W pixels, M points, T frames.

# Contours match within this fraction of the image diagonal.
CONTOUR_TOLERANCE = 0.008

Mask = npt.NDArray[np.bool_]


def region_similarity(mask: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor) -> float:
    """Compute the region similarity J of one object in one frame.

    J is the intersection over union of the masks, as in the DAVIS 2017 toolkit (Perazzi et al., CVPR 2016).

    Args:
        mask: Predicted mask (H, W); non-zero pixels belong to the object.
        truth: True mask (H, W).

    Returns:
        J, from 0 to 1; 1 if both masks are empty.

    Raises:
        InputError: If the masks are not two-dimensional or their shapes differ.
    """
    mask_HW, truth_HW = _pair(mask, truth)
    union = np.count_nonzero(mask_HW | truth_HW)
    return np.count_nonzero(mask_HW & truth_HW) / union if union else 1.0


def boundary_accuracy(mask: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor) -> float:
    """Compute the contour accuracy F of one object in one frame.

    F is the harmonic mean of precision and recall of the contour pixels, as in the DAVIS 2017 toolkit
    (Perazzi et al., CVPR 2016). A contour pixel is correct if its distance to the other contour is at most
    0.008 of the image diagonal, rounded up to whole pixels.

    Args:
        mask: Predicted mask (H, W); non-zero pixels belong to the object.
        truth: True mask (H, W).

    Returns:
        F, from 0 to 1; 1 if neither mask has a contour, 0 if only one has.

    Raises:
        InputError: If the masks are not two-dimensional or their shapes differ.
    """
    mask_HW, truth_HW = _pair(mask, truth)
    contour_M2, truth_contour_M2 = _contour(mask_HW), _contour(truth_HW)
    if not len(contour_M2) or not len(truth_contour_M2):
        return float(len(contour_M2) == len(truth_contour_M2))
    tolerance = math.ceil(CONTOUR_TOLERANCE * math.hypot(*mask_HW.shape))
    precision = _share_within(tolerance, contour_M2, truth_contour_M2)
    recall = _share_within(tolerance, truth_contour_M2, contour_M2)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(values: npt.ArrayLike) -> dict[str, float]:
    """Summarise J or F of one object over frames: `mean`, `recall` (share above 0.5) and `decay`.

    Decay is the mean over the first of four bins of frames minus that over the last. As in the toolkit,
    neighbouring bins share a frame.
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
    """Return the positions (M, 2) of pixels that differ from their right, lower or lower right neighbour."""
    edge_HW = np.zeros_like(mask_HW)
    edge_HW[:, :-1] |= mask_HW[:, :-1] ^ mask_HW[:, 1:]
    edge_HW[:-1] |= mask_HW[:-1] ^ mask_HW[1:]
    edge_HW[:-1, :-1] |= mask_HW[:-1, :-1] ^ mask_HW[1:, 1:]
    return np.argwhere(edge_HW)


def _share_within(distance: int, points_M2: npt.NDArray[np.int64], others_M2: npt.NDArray[np.int64]) -> float:
    """Return the share of points whose nearest other point is at most `distance` pixels away."""
    nearest_M, _ = KDTree(others_M2).query(points_M2, distance_upper_bound=distance + 1)
    return np.count_nonzero(nearest_M <= distance) / len(points_M2)


def _pair(mask: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor) -> tuple[Mask, Mask]:
    mask_HW, truth_HW = (
        np.asarray(array.cpu() if isinstance(array, Tensor) else array).astype(bool)
        for array in (mask, truth)
    )
    if mask_HW.ndim != 2 or mask_HW.shape != truth_HW.shape:
        raise InputError(f"masks have shapes {mask_HW.shape} and {truth_HW.shape}; expected the same (H, W)")
    return mask_HW, truth_HW


# --- Label maps: mean intersection over union -------------------------------------------------------------
#
# As for VIP in github.com/ajabri/videowalk; Zhou et al., "Adaptive Temporal Encoding Network for Video
# Instance-level Human Parsing" (ACM MM 2018). Shape suffixes: H W pixels, M counted pixels, C classes.


def mean_iou(
    predictions: Sequence[npt.ArrayLike | Tensor],
    truths: Sequence[npt.ArrayLike | Tensor],
    num_classes: int = 20,
) -> float:
    """Compute the mean over classes of the intersection over union, over all label maps together.

    This is the metric of the VIP benchmark (Zhou et al., ACM MM 2018) as computed by ajabri/videowalk.

    Args:
        predictions: Predicted label maps (H, W), one per frame, with labels from 0 to num_classes - 1.
        truths: True label maps (H, W), one per frame. Pixels with any other label are ignored.
        num_classes: Number of classes, including the background.

    Returns:
        Mean IoU from 0 to 1 over the classes that occur in `predictions` or `truths`; NaN if none occurs.

    Raises:
        InputError: If the number or the shapes of the maps differ or a predicted label is out of range.
    """
    if len(predictions) != len(truths):
        raise InputError(f"{len(predictions)} predictions for {len(truths)} truths; expected equal numbers")
    counts = (confusion(p, t, num_classes) for p, t in zip(predictions, truths, strict=True))
    return float(np.nanmean(class_iou(sum(counts, start=np.zeros((num_classes, num_classes), np.int64)))))


def confusion(
    prediction: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor, num_classes: int
) -> npt.NDArray[np.int64]:
    """Count the predicted class (column) for each true class (row): (C, C). Other true labels are ignored."""
    predicted, true = np.asarray(prediction), np.asarray(truth)
    if predicted.shape != true.shape:
        raise InputError(f"label map has shape {predicted.shape}; expected that of the truth, {true.shape}")
    counted = (true >= 0) & (true < num_classes)
    predicted_M = predicted[counted].astype(np.int64)
    if len(predicted_M) and not 0 <= predicted_M.min() <= predicted_M.max() < num_classes:
        wrong = predicted_M.min() if predicted_M.min() < 0 else predicted_M.max()
        raise InputError(f"predicted class {wrong}; expected 0 to {num_classes - 1}")
    cell_M = num_classes * true[counted].astype(np.int64) + predicted_M
    return np.bincount(cell_M, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(confusion_CC: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Compute the intersection over union of each class; NaN for a class that never occurs."""
    correct_C = np.diag(confusion_CC)
    with np.errstate(invalid="ignore"):
        return correct_C / (confusion_CC.sum(0) + confusion_CC.sum(1) - correct_C)


# --- Poses: percentage of correct keypoints ---------------------------------------------------------------
#
# As for JHMDB in github.com/ajabri/videowalk; Jhuang et al., "Towards Understanding Action Recognition" (ICCV
# 2013). Shape suffixes: T frames, J joints.

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
# The size of a person is this fraction of the diagonal of the box around the joints.
PERSON_SHARE = 0.6

Counts = npt.NDArray[np.int64]


def pck(
    predictions: Sequence[npt.ArrayLike | Tensor],
    truths: Sequence[npt.ArrayLike | Tensor],
    thresholds: Sequence[float] = THRESHOLDS,
) -> npt.NDArray[np.float64]:
    """Compute the percentage of correct keypoints (PCK), averaged over joints.

    A keypoint is correct if its distance to the truth is at most `threshold` times the size of the person,
    which is 0.6 times the diagonal of the box around the true joints in that frame. The first frame is not
    scored, because its pose is given. A joint with a negative predicted x was not detected: it is not scored
    and does not extend the box. This is the metric of JHMDB (Jhuang et al., ICCV 2013) as computed by
    ajabri/videowalk.

    Args:
        predictions: Predicted poses (2, joints, T), one per video: x and y in pixels.
        truths: True poses in the same format.
        thresholds: Fractions of the person's size (default: 0.1, 0.2, 0.3, 0.4 and 0.5).

    Returns:
        Percentages (thresholds,), float64. Joints that were never detected are left out of the mean,
        which is NaN if no joint was detected.

    Raises:
        InputError: If there are no poses, or if their numbers or shapes differ.
    """
    if len(predictions) != len(truths) or not truths:
        raise InputError(
            f"{len(predictions)} predicted and {len(truths)} true poses; expected equal numbers above 0"
        )
    counts = (count_correct(p, t, thresholds) for p, t in zip(predictions, truths, strict=True))
    return mean_over_joints(percentages(counts))


def count_correct(
    prediction: npt.ArrayLike | Tensor,
    truth: npt.ArrayLike | Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[Counts, Counts]:
    """Count the correct (thresholds, joints) and the detected (joints,) keypoints of one video; see `pck`."""
    prediction_2JT, truth_2JT = np.asarray(prediction, dtype=float), np.asarray(truth, dtype=float)
    if prediction_2JT.shape != truth_2JT.shape or prediction_2JT.ndim != 3 or len(prediction_2JT) != 2:
        shapes = f"{prediction_2JT.shape} and {truth_2JT.shape}"
        raise InputError(f"poses have shapes {shapes}; expected the same (2, joints, T)")
    detected_JT = prediction_2JT[0] >= 0
    lowest_2T = np.where(detected_JT, truth_2JT, np.inf).min(1)
    highest_2T = np.where(detected_JT, truth_2JT, -np.inf).max(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        size_T = PERSON_SHARE * np.linalg.norm(highest_2T - lowest_2T, axis=0)
        distance_JT = np.linalg.norm(prediction_2JT - truth_2JT, axis=0) / size_T
    # If only one joint is detected, its box is a point, and the joint is wrong at any threshold.
    distance_JT[:, size_T == 0] = np.inf
    distance_JT[~detected_JT] = np.inf
    correct = np.stack([(distance_JT[:, 1:] <= threshold).sum(1) for threshold in thresholds])
    return correct, detected_JT[:, 1:].sum(1)


def percentages(counts: Iterable[tuple[Counts, Counts]]) -> npt.NDArray[np.float64]:
    """Compute the percentages (thresholds, joints) over videos, given the `count_correct` of each."""
    correct, detected_J = (np.sum(of_videos, axis=0) for of_videos in zip(*counts, strict=True))
    with np.errstate(invalid="ignore"):
        return 100.0 * correct / detected_J


def mean_over_joints(percent: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Average percentages (thresholds, joints) over the detected joints; NaN if none was detected."""
    detected_J = ~np.isnan(percent[0])
    return percent[:, detected_J].mean(axis=1) if detected_J.any() else np.full(len(percent), np.nan)


# --- Video retrieval: recall at k -------------------------------------------------------------------------
#
# The protocol of self-supervised video retrieval on UCF101 and HMDB51 (Büchler et al., ECCV 2018; Xu et al.,
# "Self-Supervised Spatiotemporal Learning via Video Clip Order Prediction", CVPR 2019). Test videos are the
# queries and training videos the gallery. Each video has one mean feature; the similarity is the cosine. A
# query is correct at k if one of its k nearest videos has its class.
#
# Shape suffixes: Q queries, G gallery videos, D channels, K neighbours.

RANKS = (1, 5, 10)
# Queries are compared in blocks of this size, so that the (Q, G) similarities are never in memory at once.
_BLOCK = 1024


def nearest(queries_QD: Tensor, gallery_GD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the K = min(count, G) nearest gallery videos of each query, nearest first.

    Returns their cosine similarities (Q, K) and their positions in the gallery (Q, K). Raises InputError if
    the features are not finite.
    """
    if not bool(queries_QD.isfinite().all() and gallery_GD.isfinite().all()):
        raise InputError("features are not all finite. Check the encoder's weights and output.")
    gallery_GD = functional.normalize(gallery_GD, dim=-1)
    blocks = [
        (functional.normalize(block_QD, dim=-1) @ gallery_GD.T).topk(min(count, len(gallery_GD)))
        for block_QD in queries_QD.split(_BLOCK)
    ]
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])


def recall_at(
    neighbour_labels_QK: Tensor, labels_Q: Tensor, ranks: Sequence[int] = RANKS
) -> dict[int, float]:
    """Compute, for each k in `ranks`, the percentage of queries whose k nearest videos include their class.

    `neighbour_labels_QK` has the classes of the neighbours, nearest first. A k above K uses all K.
    """
    hits_QK = neighbour_labels_QK == labels_Q[:, None]
    return {k: 100 * hits_QK[:, :k].any(dim=1).double().mean().item() for k in ranks}


# --- Video classification: weighted k-NN, top-k accuracy, held-out videos ---------------------------------
#
# The k-NN is that of DINO (Caron et al., ICCV 2021, eval_knn.py; after Wu et al., CVPR 2018): each of the k
# nearest videos, at cosine similarity s, has a vote of exp(s / 0.07) for its class.
#
# Shape suffixes: S test videos, N training videos, D channels, C classes, K neighbours.

# Below 0.0014, exp(1 / temperature), the vote of an identical video, overflows float64.
MIN_TEMPERATURE = 0.0015


def knn_classify(
    test_SD: Tensor,
    train_ND: Tensor,
    train_labels_N: Tensor,
    *,
    num_classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
) -> dict[int, Tensor]:
    """Sum the votes (S, C) of the k nearest training videos, for each k in `neighbours`.

    Values of k above N are skipped; if all are, k = N is used. The sum for a class without votes is -inf, so
    that it is never predicted. (DINO ranks such classes last, in arbitrary order.)
    """
    ks = [k for k in neighbours if k <= len(train_ND)] or [len(train_ND)]
    similarity_SK, index_SK = nearest(test_SD, train_ND, max(ks))
    weight_SK = (similarity_SK.double() / temperature).exp()
    labels_SK = train_labels_N[index_SK]
    scores = {}
    for k in ks:
        votes_SC = weight_SK.new_zeros(len(test_SD), num_classes)
        votes_SC.scatter_add_(1, labels_SK[:, :k], weight_SK[:, :k])
        scores[k] = votes_SC.masked_fill(votes_SC == 0, -torch.inf)
    return scores


def top_accuracy(scores_SC: Tensor, labels_S: Tensor, k: int) -> float:
    """Compute the percentage of samples whose class is among the k highest scores.

    Ties go to the class with the lower number. A class with the score -inf is never predicted.
    """
    ranked = scores_SC.sort(dim=1, descending=True, stable=True)
    correct_SC = (ranked.indices == labels_S[:, None]) & (ranked.values > -torch.inf)
    return 100 * correct_SC[:, :k].any(dim=1).double().mean().item()


def hold_out(labels_N: Tensor, share: float = 0.2) -> Tensor:
    """Select the last `share` of each class, as a mask (N,): at least one video if a class has two or more.

    The choice follows the order of the list and is not random, because neighbours in a list are often clips
    of the same recording, such as the groups of UCF101, and should not be separated.
    """
    held_out_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in labels_N.unique():
        own = (labels_N == label).nonzero()[:, 0]
        count = max(1, int(len(own) * share)) if len(own) > 1 else 0
        held_out_N[own[len(own) - count :]] = True
    return held_out_N


# --- Temporal action localisation: frame accuracy, segmental F1, edit score, mAP over temporal IoU --------
#
# Frame accuracy, F1@10/25/50 and edit score are computed as in MS-TCN (Abu Farha and Gall, CVPR 2019,
# eval.py; after Lea et al., CVPR 2017), the average precision as in ActivityNet (Caba Heilbron et al., CVPR
# 2015, eval_detection.py). All are in percent. A segment is a maximal run of frames with the same label.
# Segments with background labels are ignored, but their frames do count for the frame accuracy.
#
# Shape suffixes: T frames, P predicted segments, Y true segments, C classes.

Labels = npt.NDArray[np.integer]

OVERLAPS = (0.10, 0.25, 0.50)
# The IoU thresholds of the THUMOS14 and ActivityNet benchmarks.
TEMPORAL_IOU: dict[str, tuple[float, ...]] = {
    "thumos": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    "activitynet": (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
}


@dataclass(frozen=True)
class Segment:
    """Frames `start` to `end - 1` with the same label, and the confidence of the detection."""

    label: int
    start: int
    end: int
    score: float = 1.0


def segments(labels_T: Labels, background: Collection[int] = ()) -> list[Segment]:
    """Return the segments in temporal order, without those of background labels."""
    edges = [0, *(np.flatnonzero(np.diff(labels_T)) + 1).tolist(), len(labels_T)]
    runs = (Segment(int(labels_T[start]), start, end) for start, end in pairwise(edges))
    return [run for run in runs if run.label not in background]


def scored_segments(
    labels_T: Labels, probabilities_TC: npt.NDArray[np.floating], background: Collection[int] = ()
) -> list[Segment]:
    """Return the segments of predicted labels, scored by the mean probability of their label."""
    return [
        replace(run, score=float(probabilities_TC[run.start : run.end, run.label].mean()))
        for run in segments(labels_T, background)
    ]


def frame_accuracy(predicted: Sequence[Labels], truth: Sequence[Labels]) -> float:
    """Compute the percentage of frames of all videos with the correct label, including the background."""
    correct = sum(int((p == y).sum()) for p, y in zip(predicted, truth, strict=True))
    return 100 * correct / sum(map(len, truth))


def segmental_f1(
    predicted: Sequence[Labels], truth: Sequence[Labels], overlap: float, background: Collection[int] = ()
) -> float:
    """Compute F1 over the segments of all videos together; 0 if there are none.

    Predicted segments are processed in temporal order. Each is compared with the true segment of its label
    that it overlaps most. It is a true positive if their IoU is at least `overlap` and no earlier prediction
    matched that segment, and a false positive otherwise. Unmatched true segments are false negatives.
    """
    num_matched = num_predicted = num_true = 0
    for p, y in zip(predicted, truth, strict=True):
        predicted_segments, true_segments = segments(p, background), segments(y, background)
        num_predicted, num_true = num_predicted + len(predicted_segments), num_true + len(true_segments)
        matched: set[int] = set()
        for segment in predicted_segments:
            overlaps = [_iou(segment, true) if true.label == segment.label else 0.0 for true in true_segments]
            best = int(np.argmax(overlaps)) if overlaps else -1
            if best >= 0 and overlaps[best] >= overlap:
                matched.add(best)
        num_matched += len(matched)
    # This form of 2 precision recall / (precision + recall) avoids divisions by zero.
    return 200 * num_matched / (num_predicted + num_true) if num_predicted + num_true else 0.0


def edit_score(
    predicted: Sequence[Labels], truth: Sequence[Labels], background: Collection[int] = ()
) -> float:
    """Compute the mean over videos of the edit score, in percent.

    The score of a video is 1 - d / n, where d is the Levenshtein distance between its predicted and true
    sequences of segment labels and n the length of the longer sequence. It is 1 if both are empty.
    """
    scores = []
    for pair in zip(predicted, truth, strict=True):
        sequence, true = ([segment.label for segment in segments(labels_T, background)] for labels_T in pair)
        length = max(len(sequence), len(true), 1)
        scores.append(100 * (1 - levenshtein(sequence, true) / length))
    return float(np.mean(scores))


def levenshtein(first: Sequence[int], second: Sequence[int]) -> int:
    """Compute the minimum number of insertions, deletions and substitutions between two sequences."""
    second_Y = np.asarray(second)
    row = column = np.arange(len(second) + 1)
    for number, label in enumerate(first, start=1):
        replaced = row[:-1] + (second_Y != label)
        best = np.concatenate([[number], np.minimum(row[1:] + 1, replaced)])
        # Insertions: an entry is the minimum, over itself and the entries before it, of value plus distance.
        row = np.minimum.accumulate(best - column) + column
    return int(row[-1])


def detection_map(
    predicted: Mapping[str, Sequence[Segment]],
    truth: Mapping[str, Sequence[Segment]],
    thresholds: Sequence[float],
) -> dict[float, float]:
    """Compute the mean average precision over the labels in `truth`, for each threshold of temporal IoU.

    `predicted` and `truth` map the names of videos to segments. The predictions of a label are processed in
    order of decreasing score. Each matches the unmatched true segment of its video that it overlaps most, if
    their IoU is at least the threshold. The average precision is the area under the precision-recall curve
    with monotonically decreasing precision (PASCAL VOC 2011); it is 0 for a label that is never predicted.
    Raises InputError if there are no true segments.
    """
    labels = sorted({segment.label for of_video in truth.values() for segment in of_video})
    if not labels:
        raise InputError("the test videos have no segments, because all their labels are background")
    by_label = []
    for label in labels:
        true = {name: [one for one in of_video if one.label == label] for name, of_video in truth.items()}
        total = sum(map(len, true.values()))
        detections = [
            (name, segment)
            for name in sorted(predicted)
            for segment in predicted[name]
            if segment.label == label
        ]
        detections.sort(key=lambda detection: -detection[1].score)
        # The IoU with each true segment of the video, by name and first frame.
        overlaps = [
            {(name, other.start): _iou(segment, other) for other in true.get(name, [])}
            for name, segment in detections
        ]
        by_label.append([_average_precision(overlaps, total, threshold) for threshold in thresholds])
    means = 100 * np.mean(by_label, axis=0)
    return dict(zip(thresholds, means.tolist(), strict=True))


def _average_precision(
    overlaps: Sequence[Mapping[tuple[str, int], float]], total: int, threshold: float
) -> float:
    """Compute the area under the interpolated precision-recall curve of one label.

    `overlaps` has the IoU of each predicted segment with each true one, predictions in order of decreasing
    score.
    """
    matched: set[tuple[str, int]] = set()
    correct_P = np.zeros(len(overlaps))
    for number, by_segment in enumerate(overlaps):
        candidates = {key: iou for key, iou in by_segment.items() if iou >= threshold and key not in matched}
        if candidates:
            matched.add(max(candidates, key=lambda key: candidates[key]))
            correct_P[number] = 1
    precision_P = np.cumsum(correct_P) / np.arange(1, len(overlaps) + 1)
    interpolated_P = np.maximum.accumulate(precision_P[::-1])[::-1]
    return float((interpolated_P * correct_P).sum() / total)


def _iou(one: Segment, other: Segment) -> float:
    """Compute the temporal intersection over union of two segments."""
    shared = min(one.end, other.end) - max(one.start, other.start)
    return max(0, shared) / (max(one.end, other.end) - min(one.start, other.start))
