"""Percentage of correct keypoints of propagated poses, and the joint maps that carry them (JHMDB).

The measures alone. Jhuang et al., "Towards Understanding Action Recognition" (ICCV 2013), evaluated as in
github ajabri/videowalk. Shape suffixes: T frames, J joints, H W grid, N = H * W cells, C top cells, S side
of a Gaussian.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fasttrain.errors import InputError

JOINTS = (
    *("neck", "belly", "face", "right shoulder", "left shoulder", "right hip", "left hip", "right elbow"),
    *("left elbow", "right knee", "left knee", "right wrist", "left wrist", "right ankle", "left ankle"),
)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
# Size of a person: this share of the diagonal of the box around the joints.
PERSON_SHARE = 0.6

Coordinates = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def pck(
    predictions: Sequence[npt.ArrayLike | Tensor],
    truths: Sequence[npt.ArrayLike | Tensor],
    thresholds: Sequence[float] = THRESHOLDS,
) -> npt.NDArray[np.float64]:
    """Mean over the joints of the percentage of correct keypoints, one number per threshold.

    `predictions` and `truths` hold one (2, joints, T) array of pixel x, y per video. See `pck_per_joint`.
    """
    return mean_over_joints(pck_per_joint(predictions, truths, thresholds))


def pck_per_joint(
    predictions: Sequence[npt.ArrayLike | Tensor],
    truths: Sequence[npt.ArrayLike | Tensor],
    thresholds: Sequence[float] = THRESHOLDS,
) -> npt.NDArray[np.float64]:
    """(thresholds, joints) percentages; NaN for a joint that was never found.

    A keypoint is correct within `threshold` times 0.6 of the diagonal of the box of the true joints of its
    frame. The first frame is given and does not count. A joint predicted at a negative x was not found: it
    counts neither as right nor as wrong, nor in the box. Raises InputError where lists or shapes differ.
    """
    if len(predictions) != len(truths) or not truths:
        raise InputError(f"{len(predictions)} predicted poses for {len(truths)} true ones; expected as many")
    counts = [count_correct(p, t, thresholds) for p, t in zip(predictions, truths, strict=True)]
    correct, found_J = (np.sum(of_videos, axis=0) for of_videos in zip(*counts, strict=True))
    return percentages(correct, found_J)


def count_correct(
    prediction: npt.ArrayLike | Tensor,
    truth: npt.ArrayLike | Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[Counts, Counts]:
    """Correct keypoints (thresholds, joints) and found ones (joints,) of one video; see `pck_per_joint`."""
    distance_JT = _relative_distances(*_checked(prediction, truth))
    correct = np.stack([(distance_JT <= threshold).sum(1) for threshold in thresholds])
    return correct, (~np.isnan(distance_JT)).sum(1)


def percentages(correct: Counts, found_J: Counts) -> npt.NDArray[np.float64]:
    """(thresholds, joints) percentages of the counts of all videos; NaN for a joint that was never found."""
    with np.errstate(invalid="ignore"):
        return 100.0 * correct / found_J


def mean_over_joints(percent: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(thresholds,) means of (thresholds, joints); joints never found are left out, NaN if none was."""
    known_J = ~np.isnan(percent[0])
    return percent[:, known_J].mean(axis=1) if known_J.any() else np.full(len(percent), np.nan)


def joint_maps(joints_2J: npt.ArrayLike, grid: tuple[int, int], sigma: float = 0.5) -> Tensor:
    """(h, w, 1 + J) float32: for each joint a Gaussian of peak 1 about its cell, behind the background.

    `joints_2J` holds x, y in cells. The peak stands on the nearest cell and the Gaussian is cut off at 3
    sigma; a joint whose Gaussian lies outside the grid has an empty map. The background is 1 where no joint
    is. (Newell's drawing, as github ajabri/videowalk uses it, but rounded alike at all borders.)
    """
    height, width = grid
    joints_2J = np.asarray(joints_2J, dtype=np.float64)
    maps_HWJ = np.zeros((height, width, joints_2J.shape[1]), dtype=np.float32)
    offset_S = np.arange(int(np.ceil(6 * sigma + 1))) - (6 * sigma + 1) // 2
    bell_SS = np.exp(-(offset_S[:, None] ** 2 + offset_S**2) / (2 * sigma**2))
    for joint, (x, y) in enumerate(joints_2J.T):
        left, top = math.floor(x - 3 * sigma), math.floor(y - 3 * sigma)
        right, bottom = math.floor(x + 3 * sigma + 1), math.floor(y + 3 * sigma + 1)
        if left >= width or top >= height or right < 0 or bottom < 0:
            continue
        rows, columns = slice(max(0, top), min(bottom, height)), slice(max(0, left), min(right, width))
        maps_HWJ[rows, columns, joint] = bell_SS[
            rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]
    maps = torch.from_numpy(maps_HWJ)
    background = (maps.sum(-1, keepdim=True) == 0).float()
    return torch.cat([background, maps], dim=-1)


def joints_from_maps(maps_HWJ: Tensor, cells: int = 5) -> Tensor:
    """(2, J) x, y in cells of the joints of (h, w, 1 + J) maps: the mean of the top `cells`, by weight.

    A joint whose map is zero everywhere is not found: -1, -1.
    """
    height, width, channels = maps_HWJ.shape
    maps_NJ = maps_HWJ[..., 1:].reshape(height * width, channels - 1)
    weight_CJ, cell_CJ = maps_NJ.topk(min(cells, len(maps_NJ)), dim=0)
    total_J = weight_CJ.sum(0)
    x_J = (cell_CJ % width * weight_CJ).sum(0) / total_J
    y_J = (cell_CJ // width * weight_CJ).sum(0) / total_J
    joints_2J = torch.stack([x_J, y_J])
    joints_2J[:, maps_NJ.sum(0) == 0] = -1
    return joints_2J


def _relative_distances(prediction_2JT: Coordinates, truth_2JT: Coordinates) -> Coordinates:
    """(J, T - 1) distances in person sizes, NaN where the joint was not found.

    Infinite where the box is a point, as where no other joint was found: wrong, whatever the threshold.
    """
    found_JT = prediction_2JT[0] >= 0
    lowest_2T = np.where(found_JT, truth_2JT, np.inf).min(1)
    highest_2T = np.where(found_JT, truth_2JT, -np.inf).max(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        size_T = PERSON_SHARE * np.linalg.norm(highest_2T - lowest_2T, axis=0)
        distance_JT = np.linalg.norm(prediction_2JT - truth_2JT, axis=0) / size_T
    distance_JT[:, size_T == 0] = np.inf
    return np.where(found_JT, distance_JT, np.nan)[:, 1:]


def _checked(
    prediction: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor
) -> tuple[Coordinates, Coordinates]:
    prediction_2JT, truth_2JT = np.asarray(prediction, dtype=float), np.asarray(truth, dtype=float)
    if prediction_2JT.shape != truth_2JT.shape or prediction_2JT.ndim != 3 or len(prediction_2JT) != 2:
        shapes = f"{prediction_2JT.shape} against {truth_2JT.shape}"
        raise InputError(f"poses of shape {shapes}; expected (2, joints, frames) in both")
    return prediction_2JT, truth_2JT
