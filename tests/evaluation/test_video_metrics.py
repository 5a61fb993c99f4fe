"""Video retrieval: neighbours against brute force, recall against hand-computed cases."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.errors import InputError
from fasttrain.evaluation import nearest, recall_at


def test_recall_of_a_hand_computed_case() -> None:
    neighbours = torch.tensor([[0, 1, 1], [0, 1, 2], [2, 2, 0], [1, 1, 1]])
    labels = torch.tensor([0, 1, 0, 2])
    assert recall_at(neighbours, labels, (1, 2, 3, 10)) == {1: 25, 2: 50, 3: 75, 10: 75}


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 9), st.integers(1, 15))
def test_neighbours_are_those_of_brute_force(seed: int, queries: int, gallery: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query_QD = torch.randn(queries, 5, generator=generator, dtype=torch.float64)
    gallery_GD = torch.randn(gallery, 5, generator=generator, dtype=torch.float64)
    similarity_QK, index_QK = nearest(query_QD, gallery_GD, count)
    cosine_QG = np.array(
        [
            [float(q @ g / np.linalg.norm(q) / np.linalg.norm(g)) for g in gallery_GD.numpy()]
            for q in query_QD.numpy()
        ]
    )
    order_QG = np.argsort(-cosine_QG, axis=1)[:, :count]
    np.testing.assert_array_equal(index_QK.numpy(), order_QG)
    np.testing.assert_allclose(similarity_QK.numpy(), np.take_along_axis(cosine_QG, order_QG, 1), atol=1e-12)


def test_neighbours_do_not_depend_on_length_or_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(10, 4, generator=generator), torch.randn(20, 4, generator=generator)
    whole = nearest(queries, gallery, 5)[1]
    monkeypatch.setattr("fasttrain.evaluation.metrics._BLOCK", 3)
    assert torch.equal(nearest(7 * queries, gallery * torch.arange(1, 21)[:, None], 5)[1], whole)


@pytest.mark.parametrize(
    ("queries", "gallery", "count", "part"),
    [
        ((2, 3), (4, 5), 1, r"\(2, 3\)"),
        ((2, 3), (0, 3), 1, "gallery of 0"),
        ((2, 3), (4, 3), 0, "0 neighbours"),
    ],
)
def test_bad_input(queries: tuple[int, int], gallery: tuple[int, int], count: int, part: str) -> None:
    with pytest.raises(InputError, match=part):
        nearest(torch.ones(queries), torch.ones(gallery), count)


def test_no_query() -> None:
    with pytest.raises(InputError, match="0 labels"):
        recall_at(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long))


def test_features_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="not finite"):
        nearest(torch.ones(2, 3), torch.tensor([[1, 1, torch.nan]]), 1)
