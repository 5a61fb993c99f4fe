"""The theory applied to covariances for which the answers are known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fasttrain.evaluation import theory
from fasttrain.evaluation.theory import Covariances, Point, Verdict


def make(noise: list[float], video: list[float], signal: list[float], rotation_DD: Tensor | None = None):
    """Return the covariances of tokens = video + signal + noise, with variances in common directions."""
    noise_DD, video_DD, signal_DD = (
        torch.tensor(values).double().diag() for values in (noise, video, signal)
    )
    rotation_DD = torch.eye(len(noise)).double() if rotation_DD is None else rotation_DD
    return Covariances(
        noise_DD=rotation_DD @ noise_DD @ rotation_DD.T,
        total_DD=rotation_DD @ (noise_DD + video_DD + signal_DD) @ rotation_DD.T,
        within_DD=rotation_DD @ (noise_DD + signal_DD) @ rotation_DD.T,
        video_DD=rotation_DD @ video_DD @ rotation_DD.T,
    )


def predict(covariances: Covariances) -> list[Point]:
    def solve(strength: float) -> Tensor:
        within_DD = covariances.within_DD
        noise_DD = covariances.noise_DD + covariances.video_DD
        return within_DD @ torch.linalg.inv(within_DD + noise_DD / strength)

    maps = ((strength, solve(strength)) for strength in theory.STRENGTHS)
    return theory.relative(theory.trade_off_curve(maps, covariances))


def judge(covariances: Covariances) -> Verdict:
    curve = predict(covariances)
    return theory.judge(covariances, curve, curve, videos=9)


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)).double())[0]


def test_measures_of_known_features() -> None:
    point = theory.measure(make([1, 1], [2, 0], [1, 3]))
    assert point[1:] == pytest.approx((2 / 6, 2 / 8, 1.0))
    # One of four channels varies.
    assert theory.measure(make([1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0])).effective_rank == pytest.approx(
        1 / 4
    )


@pytest.mark.parametrize("rotated", [False, True])
def test_curve_is_that_of_a_gain_per_direction(rotated: bool) -> None:
    noise, video, signal = torch.tensor([[0.1, 0.5, 1.0], [1.0, 0.2, 0.1], [0.4, 0.3, 0.2]]).double()
    frame_DD = rotation(3) if rotated else None
    curve = predict(make(noise.tolist(), video.tolist(), signal.tolist(), frame_DD))
    within, total = noise + signal, noise + video + signal
    for strength, intra, inter, _ in curve:
        power = (1 + (noise + video) / within / strength) ** -2
        for variance, spread, relative in ((noise, within, intra), (video, total, inter)):
            expected = (power @ variance) / (power @ spread) / (variance.sum() / spread.sum())
            assert relative == pytest.approx(expected.item(), rel=1e-5)
    assert curve[0][1:] == (1, 1, 1)
    # What falls on every curve is all noise relative to the signal.
    frozen, falling = noise.sum() / within.sum(), []
    for _, intra, inter, _ in curve:
        between = inter * video.sum() / total.sum()
        falling.append((intra * frozen + between / (1 - between)).item())
    assert all(later < value for value, later in pairwise(falling))


def test_noise_in_proportion_to_everything_cannot_be_reduced() -> None:
    covariances = make([0.4, 0.2, 0.1], [0.8, 0.4, 0.2], [1.2, 0.6, 0.3], rotation(3))
    for point in predict(covariances):
        assert point[1:] == pytest.approx((1, 1, 1))
    verdict = judge(covariances)
    assert (verdict.outlook, verdict.limit) == ("unlikely", "spread")
    assert verdict.reduction == pytest.approx(0, abs=1e-9)
    assert "is unlikely to help" in verdict.sentence
    assert "by 0% at no cost between videos" in verdict.sentence


def test_noise_where_videos_differ_costs_separability() -> None:
    """Noise in proportion to B: every gain is paid for."""
    verdict = judge(make([2] * 2 + [0] * 6, [4] * 2 + [0] * 6, [1] * 2 + [6] * 6))
    assert (verdict.outlook, verdict.limit) == ("likely", "rank")
    assert verdict.point.inter_relative < 0.1
    cost = 1 - verdict.point.inter_relative
    assert f"at a cost of {cost:.0%} between videos" in verdict.sentence
    assert "which carry 50% of what separates videos" in verdict.sentence


def test_noise_apart_from_what_separates_videos_can_be_removed() -> None:
    covariances = make([1] * 4 + [0.01] * 12, [0] * 4 + [0.02] * 12, [0.1] * 4 + [1] * 12)
    verdict = judge(covariances)
    assert (verdict.outlook, verdict.limit) == ("likely", "rank")
    assert verdict.reduction > 0.5
    assert verdict.point.inter_relative > 1
    assert theory.overlap(covariances) == pytest.approx(
        {"directions": 3, "video": 0, "total": 3.3 / 16.76}, abs=1e-9
    )
    assert "half of it in 3 of 16 directions, which carry 0% of what separates videos" in verdict.sentence


def test_a_gain_on_the_same_videos_alone_asks_for_more_videos() -> None:
    covariances = make([1] * 4 + [0.01] * 12, [0] * 4 + [0.02] * 12, [0.1] * 4 + [1] * 12)
    same = predict(covariances)
    held_out = theory.mean_curve([same, [same[0]._replace(strength=point.strength) for point in same]])
    for point, half in zip(same, held_out, strict=True):
        assert half.intra_relative == pytest.approx((1 + point.intra_relative) / 2)
    verdict = theory.judge(covariances, same, held_out, videos=7)
    assert verdict.limit == "spread"
    flat = [same[0]._replace(strength=point.strength) for point in same]
    verdict = theory.judge(covariances, same, flat, videos=7)
    assert (verdict.outlook, verdict.limit) == ("unlikely", "videos")
    assert "It is limited by the number of videos (7)" in verdict.sentence


def test_commutators() -> None:
    frame_DD = rotation(6)
    shared = make([1, 2, 3, 4, 5, 6], [6, 1, 5, 2, 4, 3], [1] * 6, frame_DD)
    commuting = theory.commutation(shared.noise_DD, shared.video_DD)
    assert commuting["commutator"] == pytest.approx(0, abs=1e-12)
    assert commuting["commutator_random"] > 5 * commuting["commutator_random_std"] > 0
    # Two projections at 45 degrees.
    known = theory.commutation(torch.tensor([[1.0, 0], [0, 0]]).double(), torch.full((2, 2), 0.5).double())
    assert known["commutator"] == pytest.approx(1 / math.sqrt(8))
    assert known["relative_commutator"] == pytest.approx(1 / 2)


def normal(count: int, dim: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(0)).double()


def test_normal_tokens_pass_whatever_their_covariance() -> None:
    tokens_SD = normal(20_000, 12) @ normal(12, 12) + 3
    measured = theory.normality(tokens_SD)
    assert measured["skewed"] == measured["heavy_tailed"] == 0
    for name in ("skewness", "kurtosis"):
        assert abs(measured[f"{name}_median"]) < 3 * measured[f"{name}_error"]
    for name in ("mardia_skewness", "mardia_kurtosis"):
        difference = measured[name] - measured[f"{name}_expected"]
        assert abs(difference) < 4 * measured[f"{name}_error"], name


def test_other_tokens_do_not() -> None:
    normal_SD = normal(20_000, 12)
    # A common scale makes the tails of all channels heavy, and the tokens dependent.
    scale_S1 = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(2)).double()
    heavy = theory.normality(normal_SD / (0.2 + scale_S1))
    assert (heavy["skewed"], heavy["heavy_tailed"]) == (0, 1)
    assert heavy["mardia_kurtosis"] > 1.5 * heavy["mardia_kurtosis_expected"]
    skewed = theory.normality(normal_SD.exp())
    assert skewed["skewed"] == 1
    assert skewed["mardia_skewness"] > 100 * skewed["mardia_skewness_expected"]


def test_mardia_follows_its_definition_and_constant_channels_are_left_out() -> None:
    tokens_SD = torch.cat((normal(60, 3).exp(), torch.full((60, 1), 2.0).double()), 1)
    centred_SD = tokens_SD[:, :3] - tokens_SD[:, :3].mean(0)
    products_SS = centred_SD @ torch.linalg.inv(centred_SD.T @ centred_SD / 60) @ centred_SD.T
    measured = theory.normality(tokens_SD)
    assert measured["mardia_components"] == 3
    assert measured["mardia_skewness"] == pytest.approx(products_SS.pow(3).mean().item())
    assert measured["mardia_kurtosis"] == pytest.approx(products_SS.diagonal().square().mean().item())
