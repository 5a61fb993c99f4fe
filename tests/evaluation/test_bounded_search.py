"""The bounds hold, and the search by bounds finds what the search of everything finds."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_propagation import make_features
from torch import Tensor
from torch.nn import functional

from fasttrain.evaluation import bounded_search, propagate_labels
from fasttrain.evaluation.bounded_search import BoundedKeySearch
from fasttrain.evaluation.key_search import KeySearch, Strip, strips

CPU = torch.device("cpu")
FORMATS = ("float32", "bfloat16")


def unit_features(seed: int, frames: int, long: int, short: int, rank: int, noise: float) -> Tensor:
    features = make_features(seed, (frames, long, short, 48), rank, noise)
    return functional.normalize(features.flatten(1, 2), dim=-1)


def build(
    unit_TND: Tensor, of: list[Strip], topk: int, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> tuple[KeySearch, BoundedKeySearch]:
    """Both searches with all frames but the last remembered."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": dtype == "bfloat16"})
    options = {"places": len(unit_TND) - 1, "topk": topk}
    searches = KeySearch(unit_TND[0], **options), BoundedKeySearch(unit_TND[0], **options, strips=of)
    for search in searches:
        for place in range(1, len(unit_TND) - 1):
            search.remember(place, unit_TND[place])
    return searches


@pytest.mark.parametrize("dtype", FORMATS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rank=st.sampled_from([1, 4, 48]),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
    radius=st.sampled_from([1.5, 4.0, 30.0]),
    topk=st.integers(1, 9),
    most=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_finds_the_same_affinities(
    dtype: str, seed: int, rank: int, noise: float, radius: float, topk: int, most: float
) -> None:
    unit_TND = unit_features(seed, 5, 12, 9, rank, noise)
    of = list(strips(12, 9, radius, 3, CPU))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded_search, "MOST_SHARE", most)
        whole, bounded = build(unit_TND, of, topk, patch, dtype)
        for strip in of:
            query_QD = unit_TND[-1, strip.queries]
            expected_Qk, _ = whole.largest(query_QD, strip, 3)
            found_Qk, source_Qk = bounded.largest(query_QD, strip, 3)
            keys_QkD = unit_TND[:-1].flatten(0, 1)[source_Qk]
            own_Qk = (keys_QkD.double() @ query_QD.double()[..., None])[..., 0]
            # Two sums of 48 products in float32, each in its own order.
            atol = 4 * torch.finfo(torch.float32).eps
            torch.testing.assert_close(found_Qk, expected_Qk, rtol=0, atol=atol)
            torch.testing.assert_close(found_Qk.double(), own_Qk, rtol=0, atol=atol)
            assert all(len(set(row)) == len(row) for row in source_Qk.tolist())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rank", "noise"), [(1, 0.0), (4, 0.1), (48, 1.0)])
def test_no_affinity_is_above_its_bound(
    monkeypatch: pytest.MonkeyPatch, dtype: str, rank: int, noise: float
) -> None:
    unit_TND = unit_features(3, 4, 10, 8, rank, noise)
    (strip,) = strips(10, 8, 30.0, 2, CPU)
    _, search = build(unit_TND, [strip], 5, monkeypatch, dtype)
    first_QN, bound_FKQ = search._bounds(unit_TND[-1], strip, 2)
    shared_Q1 = (unit_TND[-1].double() @ search.mean_D.double())[:, None]
    bound_FQN = torch.cat([first_QN[None], bound_FKQ.float().transpose(1, 2)]).double()
    affinity_FQN = unit_TND[-1].double() @ unit_TND[:-1].double().transpose(1, 2) - shared_Q1
    columns_QE = search._columns(unit_TND[-1], of_keys=False).double()
    exact_FQN = columns_QE @ search.short_FNE.double().transpose(1, 2)
    # The columns are made in float32.
    assert (exact_FQN >= affinity_FQN - 2 * torch.finfo(torch.float32).eps).all()
    # A bound is rounded to the nearest as it is written.
    written = torch.finfo(search.dtype).eps / 2 * bound_FQN.abs()
    assert (bound_FQN >= affinity_FQN - written - bounded_search.SLACK).all()
    # And it says something: features of few directions are bounded closely.
    if rank < 48:
        assert (bound_FQN - affinity_FQN).mean() < 0.02


def test_queries_without_a_match_are_searched_in_full_and_their_strip_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Isotropic noise has no direction that a short product could keep; copies are found all the same."""
    noise_TND = torch.randn(4, 240, 48, generator=torch.Generator().manual_seed(1))
    noise_TND[-1, :100] = noise_TND[2, :100]
    unit_TND = functional.normalize(noise_TND, dim=-1)
    (strip,) = strips(16, 15, 30.0, 2, CPU)
    whole, bounded = build(unit_TND, [strip], 1, monkeypatch, "float32")
    searched: list[int] = []
    full = KeySearch.largest

    def counting(search: KeySearch, query_QD: Tensor, of: Strip, recent: int) -> tuple[Tensor, Tensor]:
        searched.append(len(query_QD))
        return full(search, query_QD, of, recent)

    monkeypatch.setattr(KeySearch, "largest", counting)
    expected_Qk, _ = full(whole, unit_TND[-1], strip, 2)
    for _ in range(bounded_search.FRAMES_IN_FULL + 2):
        found_Qk, _ = bounded.largest(unit_TND[-1], strip, 2)
        torch.testing.assert_close(found_Qk, expected_Qk, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    # By bounds, which the noise did not profit from; in full, frame by frame; by bounds again.
    assert searched == [140, *[240] * bounded_search.FRAMES_IN_FULL, 140]


def test_keys_beyond_the_disc_do_not_raise_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last keys are all the query itself, the disc holds one cell: the first frame's keys are found."""
    unit_TND = unit_features(5, 5, 12, 9, 48, 1.0)
    unit_TND[1:] = unit_TND[1, 0]
    (strip,) = strips(12, 9, 1.0, 3, CPU)
    whole, bounded = build(unit_TND, [strip], 9, monkeypatch, "float32")
    expected_Qk, _ = whole.largest(unit_TND[-1], strip, 3)
    found_Qk, _ = bounded.largest(unit_TND[-1], strip, 3)
    torch.testing.assert_close(found_Qk, expected_Qk, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_rounded_up_is_not_below(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    unit_TND = unit_features(4, 3, 6, 5, 4, 0.1)
    _, search = build(unit_TND, list(strips(6, 5, 3.0, 1, CPU)), 2, monkeypatch, dtype)
    value = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    assert (search._above(value).double() >= value.double()).all()
    # Features that lie in the directions kept leave a rest of rounding alone, which is not taken for none.
    inside_ND = search.mean_D + torch.randn(50, search.basis_DE.shape[1]) @ search.basis_DE.T
    rest_N = search._columns(inside_ND, of_keys=True)[:, search.basis_DE.shape[1]]
    assert (rest_N > 0).all()


@pytest.mark.parametrize("channels", [384, 768, 1024])
def test_one_hot_features_have_directions(channels: int) -> None:
    """A covariance of few and equal eigenvalues, on which LAPACK's eigenvalue solvers may fail."""
    for seed in range(4):
        point_TN = torch.randint(channels, (3, 40), generator=torch.Generator().manual_seed(seed))
        features = functional.one_hot(point_TN, channels).float().view(3, 8, 5, channels)
        labels = propagate_labels(features, torch.rand(8, 5, 2))
        assert labels.isfinite().all()


def test_few_pairs_are_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a grid of any size: what would be many goes into a product."""
    pairs: list[int] = []
    compute = BoundedKeySearch._compute

    def counting(search: BoundedKeySearch, query: Tensor, query_M: Tensor, source_M: Tensor) -> Any:
        pairs.append(len(source_M))
        return compute(search, query, query_M, source_M)

    noise_TND = torch.randn(6, 196, 48, generator=torch.Generator().manual_seed(5))
    for unit_TND in (functional.normalize(noise_TND, dim=-1), torch.full((6, 196, 48), 48**-0.5)):
        (strip,) = strips(14, 14, 30.0, 4, CPU)
        whole, bounded = build(unit_TND, [strip], 7, monkeypatch, "float32")
        monkeypatch.setattr(BoundedKeySearch, "_compute", counting)
        pairs.clear()
        found_Qk, _ = bounded.largest(unit_TND[-1], strip, 4)
        expected_Qk, _ = whole.largest(unit_TND[-1], strip, 4)
        torch.testing.assert_close(found_Qk, expected_Qk, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
        guesses, *rest = pairs
        assert guesses == 196 * 14
        assert sum(rest) <= bounded_search.MOST_SHARE * 196 * 5 * 196
