"""Label propagation: golden vectors, a brute-force reference in float64, invalid input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fasttrain.errors import InputError
from fasttrain.evaluation import propagate_labels
from fasttrain.evaluation.propagation import Propagator


def brute_force(
    features: Tensor, earlier: Tensor, context: int, radius: float, topk: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Propagate labels in float64, exactly as defined: all copies of frames, all keys, one softmax.

    The labels of frame t are computed from the labels `earlier` (T, H, W, C) of the preceding frames. Returns
    the labels and a mask (T, H, W) of the tokens whose k-th and next affinities are so far apart that float32
    must choose the same keys.
    """
    frames, height, width, _ = features.shape
    tokens = height * width
    unit = functional.normalize(features.double(), dim=-1).reshape(frames, tokens, -1)
    y, x = (
        grid.flatten() for grid in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    far = ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).double().sqrt() >= radius
    given = earlier.double().reshape(frames, tokens, -1)
    labels, clear = [given[0]], [torch.ones(tokens, dtype=torch.bool)]
    for t in range(1, frames):
        sources = [0, *(max(0, s) for s in range(t - context, t))]
        affinity = torch.stack([unit[t] @ unit[s].T for s in sources], dim=1)
        affinity[:, 1:].masked_fill_(far[:, None], -torch.inf)
        k = min(topk, affinity[0].numel())
        value, index = affinity.flatten(1).topk(k, dim=-1)
        weight = (value / temperature).softmax(-1)
        labels.append((weight[..., None] * given[sources].flatten(0, 1)[index]).sum(1))
        # Ties are harmless, because they are between identical copies of a key.
        off = (affinity.flatten(1) - value[:, -1:]).abs()
        clear.append(~((off > 0) & (off < 1e-6)).any(-1))
    return torch.stack(labels).view(frames, height, width, -1), torch.stack(clear).view(frames, height, width)


def assert_propagates(features: Tensor, first: Tensor, *options: float, device: str = "cpu") -> None:
    fast = propagate_labels(features.to(device), first.to(device), *options).cpu()
    slow, clear = brute_force(features, fast, *options)
    # The division by the temperature amplifies the rounding of float32 affinities.
    atol = 4 * torch.finfo(torch.float32).eps / options[-1]
    torch.testing.assert_close(fast[clear].double(), slow[clear], rtol=0, atol=atol)
    assert clear.float().mean() > 0.9


def make_features(seed: int, shape: tuple[int, int, int, int], rank: int, noise: float) -> Tensor:
    """Return random features around a common mean: a signal of the given rank plus noise."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width, channels = shape
    strong = torch.randn(frames, height, width, rank, generator=generator)
    features = strong @ torch.randn(rank, channels, generator=generator)
    features = features + 2 * torch.randn(channels, generator=generator)
    return features + noise * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", ["propagation", "propagation_wide"])
def test_equals_golden_vectors(shared: Path, name: str) -> None:
    golden = np.load(shared / "golden" / "eval" / f"{name}.npz")
    labels = propagate_labels(
        torch.from_numpy(golden["features"]),
        torch.from_numpy(golden["first_labels"]),
        context=int(golden["context"]),
        radius=int(golden["radius"]),
        topk=int(golden["topk"]),
        temperature=float(golden["temperature"]),
    )
    # The golden vectors are float32: allow for a few units in the last place.
    np.testing.assert_allclose(labels.numpy(), golden["labels"], rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    frames=st.integers(1, 7),
    rank=st.sampled_from([1, 3, 32]),
    noise=st.sampled_from([0.1, 0.5]),
    context=st.integers(1, 9),
    radius=st.sampled_from([0.5, 1.0, 2.0, 3.5, 20.0]),
    topk=st.one_of(st.integers(1, 9), st.sampled_from([50, 200, 1000])),
)
def test_equals_brute_force(
    seed: int,
    grid: tuple[int, int],
    frames: int,
    rank: int,
    noise: float,
    context: int,
    radius: float,
    topk: int,
) -> None:
    features = make_features(seed, (frames, *grid, 32), rank, noise)
    first = torch.rand(*grid, 3, generator=torch.Generator().manual_seed(seed))
    assert_propagates(features, first, context, radius, topk, 0.1)


@pytest.mark.parametrize(("grid", "radius"), [((40, 60), 4.0), ((60, 40), 3.5)])
def test_grid_of_several_strips(grid: tuple[int, int], radius: float) -> None:
    features = make_features(1, (5, *grid, 32), 8, 0.2)
    first = torch.rand(*grid, 4, generator=torch.Generator().manual_seed(0))
    assert len(Propagator(features[0], first, 3, radius, 7, 0.7).strips) > 1
    assert_propagates(features, first, 3, radius, 7, 0.7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    features = make_features(5, (5, 6, 6, 32), 3, 0.3).to(dtype)
    first = torch.rand(6, 6, 2, generator=torch.Generator().manual_seed(4))
    assert propagate_labels(features, first).dtype == torch.float32
    assert_propagates(features, first, 20, 20, 7, 0.7)


@pytest.mark.parametrize(("frame", "value"), [(0, torch.nan), (2, torch.nan), (1, torch.inf)])
def test_non_finite_features(frame: int, value: float) -> None:
    features = torch.ones(3, 3, 4, 8)
    features[frame, 1, 1, 0] = value
    with pytest.raises(InputError, match="not all finite"):
        propagate_labels(features, torch.zeros(3, 4, 5))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Compare with the brute force: results on a CPU may differ where affinities are nearly equal."""
    features = make_features(7, (8, 24, 30, 64), 4, 0.1)
    first = torch.rand(24, 30, 3, generator=torch.Generator().manual_seed(8))
    assert_propagates(features, first, 20, 20, 7, 0.7, device="cuda")


@pytest.mark.parametrize(
    ("features", "first", "options", "message"),
    [
        ((3, 4, 8), (4, 4, 2), {}, r"features have shape \(3, 4, 8\)"),
        ((3, 4, 4, 0), (4, 4, 2), {}, r"features have shape \(3, 4, 4, 0\)"),
        ((3, 4, 4, 8), (4, 5, 2), {}, r"first labels \(4, 5, 2\)"),
        ((3, 4, 4, 8), (4, 4, 2), {"context": 0}, "context 0, .* of at least 1"),
        ((3, 4, 4, 8), (4, 4, 2), {"topk": 0}, "topk 0, .* of at least 1"),
        ((3, 4, 4, 8), (4, 4, 2), {"radius": float("nan")}, "radius nan, .* radius of at least 0"),
        ((3, 4, 4, 8), (4, 4, 2), {"temperature": 0.0}, "temperature 0.0: .* above 0"),
    ],
)
def test_invalid_input(features: tuple, first: tuple, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        propagate_labels(torch.ones(features), torch.ones(first), **options)
