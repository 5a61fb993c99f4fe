"""The theory of the projection, applied to measured covariances: its assumptions and what it predicts.

docs/theory.md derives the formulas and says how the numbers are read. N is the covariance of the differences
of matching tokens, T that of all tokens, W that within frames, B that of the mean tokens of videos.

Shape suffixes: S tokens, D channels, P principal components or other directions.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

# The principal components of Mardia's tests.
COMPONENTS = 10
# A component is called skewed or heavy-tailed above these absolute values.
SKEWED, HEAVY_TAILED = 0.5, 1.0
# The random rotations that the commutator is compared with.
ROTATIONS = 20
# Strengths of the closed form, from the frozen features to nearly 0: six per decade.
STRENGTHS = (math.inf, *(10 ** (3 - step / 6) for step in range(37)))
# A projection that keeps less of the effective rank than this is too strong.
KEPT_RANK = 0.8
# The reductions of the intra-video distance from which a projection is likely to help, or may help a little.
LIKELY, LITTLE = 0.2, 0.1
# More videos are what is missing if they could multiply the reduction by this factor.
TOO_FEW = 2
# Variances below this, relative to the largest, are rounding errors: the last norm of an encoder makes one of
# them exactly zero.
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Covariances:
    """The covariances of some videos' tokens, (D, D) in float64."""

    noise_DD: Tensor
    """N: mean of (z1 - z2)(z1 - z2)^T / 2 over the matching tokens z1 and z2 of two frames."""
    total_DD: Tensor
    """T: the covariance of all tokens."""
    within_DD: Tensor
    """W: the mean over frames of the covariance of their tokens."""
    video_DD: Tensor
    """B: the covariance of the mean tokens of videos."""


class Point(NamedTuple):
    """A point of the trade-off."""

    strength: float
    """The strength mu of the closed form, infinity for features as they are."""
    intra_relative: float
    """tr N / tr W: squared distance of matching tokens, relative to that of tokens of one frame."""
    inter_relative: float
    """tr B / tr T: squared distance of videos, relative to that of tokens."""
    effective_rank: float
    """Effective rank (Roy and Vetterli, EUSIPCO 2007) of centred tokens as a share of the channels."""


def measure(covariances: Covariances) -> Point:
    """Return the point of features as they are."""
    noise, total, within, video = (
        matrix_DD.trace().item()
        for matrix_DD in (
            covariances.noise_DD,
            covariances.total_DD,
            covariances.within_DD,
            covariances.video_DD,
        )
    )
    values_D = torch.linalg.eigvalsh(covariances.total_DD).clamp_min(0).sqrt()
    share_D = values_D / values_D.sum()
    entropy = -torch.xlogy(share_D, share_D).sum()
    return Point(math.inf, noise / within, video / total, entropy.exp().item() / len(values_D))


def trade_off_curve(maps: Iterable[tuple[float, Tensor]], measured: Covariances) -> list[Point]:
    """Return the points of projections A (D, D), given with their strengths, on the measured features."""
    points = []
    for strength, map_DD in maps:
        projected = Covariances(
            noise_DD=map_DD @ measured.noise_DD @ map_DD.T,
            total_DD=map_DD @ measured.total_DD @ map_DD.T,
            within_DD=map_DD @ measured.within_DD @ map_DD.T,
            video_DD=map_DD @ measured.video_DD @ map_DD.T,
        )
        points.append(measure(projected)._replace(strength=strength))
    return points


def relative(curve: Sequence[Point]) -> list[Point]:
    """Divide the points of a curve by its first one, which is that of the frozen features."""
    return [
        Point(point.strength, *(value / first for value, first in zip(point[1:], curve[0][1:], strict=True)))
        for point in curve
    ]


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Average several curves with the same strengths."""
    return [
        Point(points[0].strength, *map(fmean, list(zip(*points, strict=True))[1:]))
        for points in zip(*curves, strict=True)
    ]


# --- the assumptions -----------------------------------------------------------------------------------


def normality(tokens_SD: Tensor) -> dict[str, float]:
    """Measure how far tokens are from a normal distribution.

    These are the absolute skewness and the excess kurtosis of each channel, and Mardia's multivariate ones
    (Biometrika 57(3), 1970) of the leading principal components. For a normal distribution, those of channels
    are 0, and Mardia's are `..._expected`. The standard errors `..._error` are those of independent normal
    tokens. Tokens of a video are not independent, so that the true errors are larger.
    """
    centred_SD = tokens_SD.double() - tokens_SD.double().mean(0)
    count = len(centred_SD)
    values_D, vectors_DD = torch.linalg.eigh(centred_SD.T @ centred_SD / count)
    varying_D = centred_SD.square().mean(0) > _NEGLIGIBLE * values_D[-1]
    scaled_SD = centred_SD[:, varying_D] / centred_SD[:, varying_D].square().mean(0).sqrt()
    skewness_D = scaled_SD.pow(3).mean(0).abs()
    kurtosis_D = scaled_SD.pow(4).mean(0) - 3
    kept_P = values_D[-COMPONENTS:] > _NEGLIGIBLE * values_D[-1]
    whitened_SP = (centred_SD @ vectors_DD[:, -COMPONENTS:] / values_D[-COMPONENTS:].sqrt())[:, kept_P]
    # The mean of (y_i . y_j)^3 over all pairs of tokens is the squared norm of the third moments.
    third_PPP = torch.einsum("sa,sb,sc->abc", whitened_SP, whitened_SP, whitened_SP) / count
    p = whitened_SP.shape[1]
    degrees = p * (p + 1) * (p + 2) / 6
    return {
        "tokens": count,
        "skewness_median": skewness_D.median().item(),
        "skewness_error": math.sqrt(6 / count),
        "skewed": (skewness_D > SKEWED).double().mean().item(),
        "kurtosis_median": kurtosis_D.median().item(),
        "kurtosis_error": math.sqrt(24 / count),
        "heavy_tailed": (kurtosis_D.abs() > HEAVY_TAILED).double().mean().item(),
        "mardia_components": p,
        "mardia_skewness": third_PPP.square().sum().item(),
        "mardia_skewness_expected": 6 * degrees / count,
        "mardia_skewness_error": 6 * math.sqrt(2 * degrees) / count,
        "mardia_kurtosis": whitened_SP.square().sum(1).square().mean().item(),
        "mardia_kurtosis_expected": p * (p + 2),
        "mardia_kurtosis_error": math.sqrt(8 * p * (p + 2) / count),
    }


def commutation(noise_DD: Tensor, video_DD: Tensor) -> dict[str, float]:
    """Measure how far N and B are from commuting.

    With Frobenius norms, `commutator` is |NB - BN| / (2 |N| |B|), and `relative_commutator` is
    |NB - BN| / (2 |NB|), which does not depend on how much N and B overlap. Both are 0 if N and B commute.
    They are also given for random rotations of N: mean (`..._random`) and standard deviation
    (`..._random_std`).
    """

    def both(rotated_DD: Tensor) -> Tensor:
        product_DD = rotated_DD @ video_DD
        difference = (product_DD - product_DD.T).norm() / 2
        return torch.stack([difference / (noise_DD.norm() * video_DD.norm()), difference / product_DD.norm()])

    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(ROTATIONS):
        normal_DD = torch.randn(noise_DD.shape, generator=generator, dtype=torch.float64)
        rotation_DD, triangle_DD = torch.linalg.qr(normal_DD)
        # With these signs, the rotation is uniform (Mezzadri, Notices of the AMS 54(5), 2007).
        rotation_DD = rotation_DD * triangle_DD.diagonal().sign()
        values.append(both(rotation_DD @ noise_DD @ rotation_DD.T))
    std_2, mean_2 = torch.std_mean(torch.stack(values), dim=0)
    result = {}
    for suffix, numbers_2 in {"": both(noise_DD), "_random": mean_2, "_random_std": std_2}.items():
        result[f"commutator{suffix}"], result[f"relative_commutator{suffix}"] = numbers_2.tolist()
    return result


def overlap(covariances: Covariances) -> dict[str, float]:
    """Find the fewest directions that hold half of tr N, and their shares of tr B and tr T."""
    values_D, vectors_DD = torch.linalg.eigh(covariances.noise_DD)
    share_D = values_D.flip(0).cumsum(0) / values_D.sum()
    count = int((share_D < 0.5 - 1e-9).sum()) + 1
    leading_DP = vectors_DD[:, -count:]
    shares = {
        name: ((leading_DP.T @ matrix_DD @ leading_DP).trace() / matrix_DD.trace()).item()
        for name, matrix_DD in (("video", covariances.video_DD), ("total", covariances.total_DD))
    }
    return {"directions": count, **shares}


# --- the verdict ---------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What a projection can be expected to do, and the numbers from which this follows."""

    outlook: str
    """`likely`, `a little` or `unlikely`."""
    limit: str
    """What ends the gain: `videos`, `rank` or `spread`."""
    point: Point
    """The most consistent projection that keeps enough, on videos that it was not computed from, relative to
    the frozen features."""
    reduction: float
    """By how much it lowers the intra-video distance."""
    reduction_same: float
    """The same on the videos that it was computed from, where another one may be the most consistent."""
    sentence: str


def judge(covariances: Covariances, same: Sequence[Point], held_out: Sequence[Point], videos: int) -> Verdict:
    """Judge by rules (docs/theory.md) whether a projection is likely to help.

    Args:
        covariances: Those of all videos.
        same: The predicted curve on the videos that the projection is computed from, relative to the frozen
            features.
        held_out: The same on other videos.
        videos: The number of videos.
    """
    point, limit = _best(held_out)
    best_same, _ = _best(same)
    reduction, reduction_same = (max(0.0, 1 - best.intra_relative) for best in (point, best_same))
    outlook = "likely" if reduction >= LIKELY else "a little" if reduction >= LITTLE else "unlikely"
    if reduction_same >= max(TOO_FEW * reduction, LITTLE):
        limit = "videos"
    cost = 1 - point.inter_relative
    shares = overlap(covariances)
    openings = {
        "likely": "A projection is likely to help here",
        "a little": "A projection may help a little here",
        "unlikely": "A projection is unlikely to help here",
    }
    reasons = {
        "videos": f"by the number of videos ({videos}): on those that it is computed from, the distance "
        f"falls by {reduction_same:.0%}. More videos may change this",
        "rank": "by the number of dimensions: a stronger projection would lose more than "
        f"{1 - KEPT_RANK:.0%} of the effective rank",
        "spread": "because the differences that remain have the directions of the variance within frames",
    }
    # Negative if the projection brings videos further apart.
    paid = f"at a cost of {cost:.0%} between videos" if round(100 * cost) > 0 else "at no cost between videos"
    sentence = (
        f"{openings[outlook]}. Matching patches differ by {measure(covariances).intra_relative:.1%} of the "
        f"variance within frames, half of it in {shares['directions']} of {len(covariances.noise_DD)} "
        f"directions, which carry {shares['video']:.0%} of what separates videos. On new videos, it can "
        f"lower the distance within videos by {reduction:.0%} {paid}. It is limited {reasons[limit]}."
    )
    return Verdict(outlook, limit, point, reduction, reduction_same, sentence)


def _best(curve: Sequence[Point]) -> tuple[Point, str]:
    """Return the most consistent point before one that loses too much, and what ends the gain."""
    kept = list(itertools.takewhile(lambda point: point.effective_rank >= KEPT_RANK, curve))
    limit = "spread" if len(kept) == len(curve) else "rank"
    return min(kept, key=lambda point: point.intra_relative), limit
