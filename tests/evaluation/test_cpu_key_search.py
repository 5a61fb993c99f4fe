"""The bounds hold, and the search by bounds finds what the search of everything finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_propagation import make_features
from torch import Tensor
from torch.nn import functional

from fasttrain.evaluation import cpu_key_search, propagate_labels
from fasttrain.evaluation.cpu_key_search import CpuKeySearch
from fasttrain.evaluation.key_search import KeySearch, strips

CPU = torch.device("cpu")
# Two sums of 48 products in float32, each in its own order.
ATOL = 4 * torch.finfo(torch.float32).eps


def unit_features(seed: int, frames: int, rank: int, noise: float) -> Tensor:
    """(T, 12 * 9, 48)."""
    features = make_features(seed, (frames, 12, 9, 48), rank, noise)
    return functional.normalize(features.flatten(1, 2), dim=-1)


def build(
    unit_TND: Tensor, topk: int, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> tuple[KeySearch, CpuKeySearch]:
    """Both searches with all frames but the last remembered."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": dtype == "bfloat16"})
    options = {"slots": len(unit_TND) - 1, "topk": topk}
    searches = KeySearch(unit_TND[0], **options), CpuKeySearch(unit_TND[0], **options)
    for search in searches:
        for slot in range(1, len(unit_TND) - 1):
            search.remember(slot, unit_TND[slot])
    return searches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rank=st.sampled_from([1, 4, 48]),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
    radius=st.sampled_from([1.0, 1.5, 4.0, 30.0]),
    topk=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_finds_the_same_affinities(
    dtype: str, seed: int, rank: int, noise: float, radius: float, topk: int, share: float
) -> None:
    """Whatever share of the keys may reach the floor before a query is searched in full."""
    unit_TND = unit_features(seed, 5, rank, noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_key_search, "MAX_SHARE", share)
        whole, bounded = build(unit_TND, topk, patch, dtype)
        for strip in strips(12, 9, radius, 3, CPU):
            query_QD = unit_TND[-1, strip.queries]
            expected_Qk, _ = whole.largest(query_QD, strip, 3)
            found_Qk, source_Qk = bounded.largest(query_QD, strip, 3)
            keys_QkD = unit_TND[:-1].flatten(0, 1)[source_Qk]
            own_Qk = (keys_QkD.double() @ query_QD.double()[..., None])[..., 0]
            torch.testing.assert_close(found_Qk, expected_Qk, rtol=0, atol=ATOL)
            torch.testing.assert_close(found_Qk.double(), own_Qk, rtol=0, atol=ATOL)
            assert all(len(set(row)) == len(row) for row in source_Qk.tolist())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rank", "noise"), [(1, 0.0), (4, 0.1), (48, 1.0)])
def test_no_affinity_is_above_its_bound(
    monkeypatch: pytest.MonkeyPatch, dtype: str, rank: int, noise: float
) -> None:
    """A bound that is too low would lose a key in silence; one that says nothing would only cost time."""
    unit_TND = unit_features(3, 4, rank, noise)
    (strip,) = strips(12, 9, 30.0, 2, CPU)
    _, search = build(unit_TND, 5, monkeypatch, dtype)
    first_QN, bound_FKQ = search._bounds(unit_TND[-1], strip, 2)
    shared_Q1 = (unit_TND[-1].double() @ search.mean_D.double())[:, None]
    bound_FQN = torch.cat([first_QN[None], bound_FKQ.float().transpose(1, 2)]).double()
    affinity_FQN = unit_TND[-1].double() @ unit_TND[:-1].double().transpose(1, 2) - shared_Q1
    # The product is rounded to the nearest when it is written.
    written = torch.finfo(search.dtype).eps / 2 * bound_FQN.abs()
    assert (bound_FQN >= affinity_FQN - written - cpu_key_search.SLACK).all()
    if rank < 48:
        assert (bound_FQN - affinity_FQN).mean() < 0.02


def test_keys_beyond_the_disc_do_not_raise_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last keys are all the query itself, the disc holds one cell: the first frame's keys are found."""
    unit_TND = unit_features(5, 5, 48, 1.0)
    unit_TND[1:] = unit_TND[1, 0]
    (strip,) = strips(12, 9, 1.0, 3, CPU)
    whole, bounded = build(unit_TND, 9, monkeypatch, "float32")
    expected_Qk, _ = whole.largest(unit_TND[-1], strip, 3)
    found_Qk, _ = bounded.largest(unit_TND[-1], strip, 3)
    torch.testing.assert_close(found_Qk, expected_Qk, rtol=0, atol=ATOL)


@pytest.mark.parametrize("channels", [384, 768, 1024])
def test_one_hot_features_have_directions(channels: int) -> None:
    """A covariance of few and equal eigenvalues, on which LAPACK's eigenvalue solvers may fail."""
    point_TN = torch.randint(channels, (3, 40), generator=torch.Generator().manual_seed(0))
    features = functional.one_hot(point_TN, channels).float().view(3, 8, 5, channels)
    assert propagate_labels(features, torch.rand(8, 5, 2)).isfinite().all()
