"""The paper's trade-off between consistency within videos and separability between videos.

All definitions follow the published implementation (yafeng19/Co-Settle, cal_metric.py). The intra-video
distance matches the patches of consecutive frames; the inter-video distance compares the middle frames of
videos. Both are also given relative to a diameter of the features.

Shape suffixes: V videos, T frames, P patches, D channels, S sampled patches, W windows,
G = T - 7 and C pairs of frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fasttrain.errors import InputError

PERCENTILES = (90, 95, 100)
# The first and second frame of each cycle, as fractions of the video's length.
CYCLE_PAIRS = ((0.25, 0.4), (0.35, 0.5), (0.45, 0.6), (0.55, 0.7), (0.65, 0.8))
CYCLE_TEMPERATURE = 0.03
# The number of frames that the intra-video distance leaves out at either end of a video.
MARGIN = 3
SAMPLED_PATCHES = 8
MIN_FRAMES = 2 * MARGIN + 2


def consistency_separability(
    features_VTPD: Tensor, patch_indices: Tensor | Sequence[int] | None = None
) -> dict[str, float]:
    """Measure the consistency of features within videos and their separability between videos.

    The definitions are those of the published implementation (yafeng19/Co-Settle, cal_metric.py).

    Args:
        features_VTPD: Features of V videos of T frames, each with P patches in a square grid.
        patch_indices: Patches whose features are compared between videos. The default is eight random
            patches, drawn with seed 42.

    Returns:
        The metrics by name. `X_original` is the distance, where X is `intra` or `inter`; `X_diameter_q` is
            twice the q-th percentile (q is 90, 95 or 100) of the features' distances from their mean;
            `X_normalized_q` is the distance divided by such a diameter (for `inter`, that of the compared
            patches). The others are `effective_rank` and `cycle_accuracy`. Metrics are NaN if the features
            are not finite; the distances between videos are also NaN for a single video.

    Raises:
        InputError: If videos have fewer than 8 frames or P is not a square number of at least 4.
    """
    return summarise([measure_video(video_TPD) for video_TPD in features_VTPD], patch_indices)


@dataclass(frozen=True)
class VideoMeasures:
    """The measurements of one video, in host memory."""

    within: dict[str, Tensor]
    """Intra-video distances, diameters and cycle accuracy."""
    middle_PD: Tensor
    """Features of the middle frame, which are compared between videos."""


def measure_video(video_TPD: Tensor) -> VideoMeasures:
    """Measure one video (T, P, D) on its device. Videos may differ in their number of frames."""
    frames, patches, _ = video_TPD.shape
    if frames < MIN_FRAMES:
        raise InputError(f"a video has {frames} frames; expected at least {MIN_FRAMES}")
    if int(patches**0.5) ** 2 != patches or patches < 4:
        raise InputError(f"a frame has {patches} patches; expected a square grid of at least 2 x 2")
    video_TPD = video_TPD.detach().float()
    distance, radius_N = _frame_distance(video_TPD), _radii(video_TPD)
    within = {"intra_original": distance}
    for percentile in PERCENTILES:
        diameter = 2 * torch.quantile(radius_N, percentile / 100)
        within[f"intra_diameter_{percentile}"] = diameter
        within[f"intra_normalized_{percentile}"] = distance / (diameter + 1e-8)
    within["cycle_accuracy"] = _cycle_accuracy(video_TPD)
    return VideoMeasures({key: value.cpu() for key, value in within.items()}, video_TPD[frames // 2].cpu())


def summarise(
    videos: Sequence[VideoMeasures], patch_indices: Tensor | Sequence[int] | None = None
) -> dict[str, float]:
    """Compute the metrics of `consistency_separability` from the measurements of one or more videos."""
    result = {
        key: torch.stack([video.within[key] for video in videos]).mean().item() for key in videos[0].within
    }
    return result | _between_videos(torch.stack([video.middle_PD for video in videos]), patch_indices)


def _frame_distance(video_TPD: Tensor) -> Tensor:
    """Compute the mean distance from a patch to its nearest patch in the next frame.

    Only the half of the patches with the smallest distances counts.
    """
    inner_TPD = video_TPD[MARGIN : len(video_TPD) - MARGIN]
    exact = "donot_use_mm_for_euclid_dist"
    nearest_GP = torch.cdist(inner_TPD[:-1], inner_TPD[1:], compute_mode=exact).amin(-1)
    half = nearest_GP.shape[1] // 2
    return nearest_GP.topk(half, largest=False, dim=-1).values.mean()


def _between_videos(middles_VPD: Tensor, patch_indices: Tensor | Sequence[int] | None) -> dict[str, float]:
    """Compute the distance between videos at the sampled patches, the diameters and the effective rank."""
    if patch_indices is None:
        generator = torch.Generator().manual_seed(42)
        patch_indices = torch.randperm(middles_VPD.shape[1], generator=generator)[:SAMPLED_PATCHES]
    sampled_VSD = middles_VPD[:, torch.as_tensor(patch_indices)]
    distances = [
        (sampled_VSD[video + 1 :] - sampled_VSD[video]).norm(dim=-1).mean(-1)
        for video in range(len(sampled_VSD))
    ]
    # The mean is NaN for a single video.
    distance = torch.cat(distances).mean().item()
    radius_N = _radii(middles_VPD)
    sampled_radius_N = _radii(sampled_VSD).sort().values
    result = {"inter_original": distance}
    for percentile in PERCENTILES:
        within = max(1, int(len(sampled_radius_N) * percentile / 100))
        sampled_diameter = 2 * sampled_radius_N[within - 1].item()
        result[f"inter_normalized_{percentile}"] = distance / (sampled_diameter + 1e-8)
        result[f"inter_diameter_{percentile}"] = 2 * torch.quantile(radius_N, percentile / 100).item()
    return result | {"effective_rank": _effective_rank(middles_VPD.flatten(0, 1))}


def _radii(features_TPD: Tensor) -> Tensor:
    """Compute the distances (N,) of all patches from their mean."""
    patches_ND = features_TPD.flatten(0, 1)
    return (patches_ND - patches_ND.mean(0)).norm(dim=-1)


def _effective_rank(features_ND: Tensor) -> float:
    """Compute the effective rank (Roy and Vetterli, EUSIPCO 2007) as a share of the maximum rank.

    The effective rank is the exponential of the entropy of the normalised singular values.
    """
    if not features_ND.isfinite().all():
        return math.nan
    # In float32, the last digits of the entropy would depend on the number of threads.
    values = torch.linalg.svdvals(features_ND.double())
    share = values / values.sum() + 1e-12
    return (-(share * share.log()).sum()).exp().item() / min(features_ND.shape)


def _cycle_accuracy(video_TPD: Tensor) -> Tensor:
    """Compute the share of 2 x 2 windows to which a walk to the second frame and back most likely returns."""
    affinity_CWW = _window_affinities(video_TPD) / CYCLE_TEMPERATURE
    cycle_CWW = affinity_CWW.softmax(-1) @ affinity_CWW.transpose(1, 2).softmax(-1)
    home_W = torch.arange(cycle_CWW.shape[-1], device=cycle_CWW.device)
    accuracy = ((cycle_CWW + 1e-6).log().argmax(-1) == home_W).float().mean()
    return accuracy.masked_fill(~cycle_CWW.isfinite().all(), torch.nan)


def nearest_accuracy(video_TPD: Tensor) -> Tensor:
    """Compute the share of 2 x 2 windows that are the nearest neighbour of their nearest neighbour.

    The neighbours are those by cosine similarity, in the pairs of frames of the cycle accuracy. Unlike that,
    it depends on no temperature, so that encoders whose similarities differ in scale can be compared.

    Args:
        video_TPD: Features of the P patches of T frames, in a square grid.

    Returns:
        The share (0-d), from 0 to 1; NaN if a feature is not finite.
    """
    affinity_CWW = _window_affinities(functional.normalize(video_TPD.float(), dim=-1))
    there_CW, back_CW = affinity_CWW.argmax(-1), affinity_CWW.argmax(-2)
    home_W = torch.arange(there_CW.shape[-1], device=there_CW.device)
    share = (back_CW.gather(1, there_CW) == home_W).float().mean()
    return share.masked_fill(~affinity_CWW.isfinite().all(), torch.nan)


def _window_affinities(video_TPD: Tensor) -> Tensor:
    """Return the inner products (C, W, W) of the mean features of 2 x 2 windows in C pairs of frames."""
    frames, patches, channels = video_TPD.shape
    side = int(patches**0.5)
    grid_TDhw = video_TPD.transpose(1, 2).reshape(frames, channels, side, side)
    pooled_TWD = functional.avg_pool2d(grid_TDhw, kernel_size=2).flatten(2).transpose(1, 2)
    share = torch.tensor(CYCLE_PAIRS) * frames
    first_CWD, second_CWD = (pooled_TWD[share[:, side].long()] for side in (0, 1))
    return first_CWD @ second_CWD.transpose(1, 2)
