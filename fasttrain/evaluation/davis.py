"""Region similarity J and contour accuracy F of object masks, as the DAVIS 2017 toolkit defines them.

The measures alone; `davis_task.py` runs the benchmark. Perazzi et al., "A Benchmark Dataset and Evaluation
Methodology for Video Object Segmentation" (CVPR 2016); Pont-Tuset et al., "The 2017 DAVIS Challenge on Video
Object Segmentation" (github davisvideochallenge/davis2017-evaluation).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree
from torch import Tensor

from fasttrain.errors import InputError

# Width of the band in which contours match, as a share of the image diagonal.
CONTOUR_TOLERANCE = 0.008

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Statistics:
    """A measure over an object's frames: mean, share of frames above 0.5, loss from first to last quarter."""

    mean: float
    recall: float
    decay: float


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
    contour_M2, truth_contour_M2 = np.argwhere(contour(mask_HW)), np.argwhere(contour(truth_HW))
    if not len(contour_M2) or not len(truth_contour_M2):
        return float(len(contour_M2) == len(truth_contour_M2))
    reach = math.ceil(CONTOUR_TOLERANCE * math.hypot(*mask_HW.shape))
    precision = _share_within(reach, contour_M2, truth_contour_M2)
    recall = _share_within(reach, truth_contour_M2, contour_M2)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(values: npt.ArrayLike) -> Statistics:
    """Mean, recall and decay of one measure of one object over frames 2..n-1 of its sequence.

    Decay is the mean of the first of four bins of frames less that of the last; neighbouring bins share their
    border frame, as in the toolkit. NaN for no frames at all.
    """
    values_T = np.asarray(values, dtype=np.float64)
    if not len(values_T):
        return Statistics(math.nan, math.nan, math.nan)
    edges = np.round(np.linspace(1, len(values_T), 5) + 1e-10).astype(int) - 1
    first, last = values_T[edges[0] : edges[1] + 1], values_T[edges[3] : edges[4] + 1]
    return Statistics(
        float(values_T.mean()), float((values_T > 0.5).mean()), float(first.mean() - last.mean())
    )


def contour(mask_HW: Mask) -> Mask:
    """Pixels that differ from their right, lower or lower right neighbour, as far as they have one."""
    edge_HW = np.zeros_like(mask_HW)
    edge_HW[:, :-1] |= mask_HW[:, :-1] ^ mask_HW[:, 1:]
    edge_HW[:-1] |= mask_HW[:-1] ^ mask_HW[1:]
    edge_HW[:-1, :-1] |= mask_HW[:-1, :-1] ^ mask_HW[1:, 1:]
    return edge_HW


def _share_within(reach: int, points_M2: npt.NDArray[np.int64], others_M2: npt.NDArray[np.int64]) -> float:
    distance_M, _ = KDTree(others_M2).query(points_M2, distance_upper_bound=reach + 1)
    return np.count_nonzero(distance_M <= reach) / len(points_M2)


def _pair(mask: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor) -> tuple[Mask, Mask]:
    mask_HW, truth_HW = (
        np.asarray(array.cpu() if isinstance(array, Tensor) else array).astype(bool)
        for array in (mask, truth)
    )
    if mask_HW.ndim != 2 or mask_HW.shape != truth_HW.shape:
        raise InputError(
            f"mask of shape {mask_HW.shape} against truth of shape {truth_HW.shape}; expected (H, W)"
        )
    return mask_HW, truth_HW
