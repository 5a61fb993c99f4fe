"""Measures of the benchmarks on whole videos: hand-computed cases, brute force, what must always hold.

Retrieval, k-NN, accuracy, and localisation.
"""

from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.errors import InputError
from fasttrain.evaluation.localization import smoothed
from fasttrain.evaluation.metrics import (
    MIN_TEMPERATURE,
    Segment,
    confusion,
    detection_map,
    edit_score,
    frame_accuracy,
    hold_out,
    knn_classify,
    levenshtein,
    nearest,
    recall_at,
    scored_segments,
    segmental_f1,
    segments,
    top_accuracy,
)

# --- retrieval ---


def test_recall_of_a_hand_computed_case() -> None:
    neighbours = torch.tensor([[0, 1, 1], [0, 1, 2], [2, 2, 0], [1, 1, 1]])
    labels = torch.tensor([0, 1, 0, 2])
    assert recall_at(neighbours, labels, (1, 2, 3, 10)) == {1: 25, 2: 50, 3: 75, 10: 75}


def test_neighbours_do_not_depend_on_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(2500, 4, generator=generator), torch.randn(20, 4, generator=generator)
    assert torch.equal(nearest(queries[2000:], gallery, 5)[1], nearest(queries, gallery, 5)[1][2000:])


def test_features_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="not finite"):
        nearest(torch.ones(2, 3), torch.tensor([[1, 1, torch.nan]]), 1)


# --- k-NN and accuracy ---


def random_features(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Features (count, 6), and labels of three classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.arange(count) % 3


@given(st.integers(0, 2**31), st.integers(1, 20), st.floats(0.02, 1))
def test_knn_is_brute_force(seed: int, k: int, temperature: float) -> None:
    train, labels = random_features(seed, count=20)
    test, _ = random_features(seed + 1, count=7)
    scores = knn_classify(
        test.double(), train.double(), labels, num_classes=4, neighbours=(k,), temperature=temperature
    )[k]
    unit = [
        one.double().numpy() / np.linalg.norm(one.double().numpy(), axis=1)[:, None] for one in (test, train)
    ]
    for s in range(7):
        cosine = unit[1] @ unit[0][s]
        votes = np.zeros(4)
        for n in np.argsort(-cosine)[:k]:
            votes[labels[n]] += np.exp(cosine[n] / temperature)
        expected = np.where(votes > 0, votes, -np.inf)
        np.testing.assert_allclose(scores[s].numpy(), expected, rtol=1e-9)


def test_knn_takes_the_counts_that_fit() -> None:
    train, labels = random_features(0, count=30)
    assert list(knn_classify(train, train, labels, num_classes=3)) == [10, 20]
    assert list(knn_classify(train, train[:6], labels[:6], num_classes=3)) == [6]


def test_a_class_without_a_vote_is_never_predicted() -> None:
    train, _ = random_features(0, 2)
    scores = knn_classify(train, train, torch.tensor([1, 1]), num_classes=6)[2]
    assert top_accuracy(scores, torch.tensor([1, 1]), 1) == 100
    assert top_accuracy(scores, torch.tensor([0, 0]), 5) == 0


def test_votes_at_the_least_temperature_are_numbers() -> None:
    train = torch.tensor([[-1.0, 0.0], [1.0, 0.05], [1.0, 0.0]])
    scores = knn_classify(train[2:], train, torch.arange(3), num_classes=3, temperature=MIN_TEMPERATURE)[3]
    assert scores[0, 1:].isfinite().all()
    assert scores.argsort().tolist() == [[0, 1, 2]]


def test_accuracy_of_a_hand_computed_case() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    labels = torch.tensor([0, 0, 1, 1])
    # The third row is a tie, which the lower class wins.
    assert [top_accuracy(scores, labels, k) for k in (1, 2, 3, 5)] == [25, 75, 100, 100]


def test_confusion_counts_truth_by_row() -> None:
    counts = confusion(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_the_end_of_each_class_is_held_out() -> None:
    labels = torch.tensor([0] * 10 + [1] * 3 + [2] + [0] * 5)
    held_out = hold_out(labels)
    assert held_out.nonzero()[:, 0].tolist() == [12, 16, 17, 18]


# --- localisation ---

TRUTH = np.array([0, 0, 1, 1, 1, 1, 2, 2, 2, 0])
GUESS = np.array([0, 1, 1, 1, 1, 2, 2, 1, 2, 0])

frame_labels = st.lists(st.integers(0, 3), min_size=1, max_size=30).map(np.array)


def test_segments_are_runs() -> None:
    assert segments(TRUTH, background=[0]) == [Segment(1, 2, 6), Segment(2, 6, 9)]
    assert [(one.start, one.end) for one in segments(TRUTH)] == [(0, 2), (2, 6), (6, 9), (9, 10)]


def test_hand_computed_case() -> None:
    assert frame_accuracy([GUESS], [TRUTH]) == 70
    # Guessed 1 2 1 2 for 1 2, background 0: two insertions of four.
    assert edit_score([GUESS], [TRUTH], background=[0]) == 50
    # IoU: 1 at 1..5 over 1..6 is 3/5; 2 at 5..7 is 1/4; 1 at 7..8 misses; 2 at 8..9 is 1/3, but below 0.5.
    assert segmental_f1([GUESS], [TRUTH], 0.5, background=[0]) == pytest.approx(100 * 2 / (4 + 2))
    # At 0.25 the first guess of 2 takes the segment, and the better second one comes too late.
    assert segmental_f1([GUESS], [TRUTH], 0.25, background=[0]) == pytest.approx(100 * 4 / (4 + 2))
    assert segmental_f1([GUESS], [TRUTH], 0.75, background=[0]) == 0


def test_f1_is_over_the_segments_of_all_videos_and_edit_over_videos() -> None:
    perfect = np.array([1, 1, 2])
    assert segmental_f1([GUESS, perfect], [TRUTH, perfect], 0.5, [0]) == pytest.approx(100 * 6 / (6 + 4))
    assert edit_score([GUESS, perfect], [TRUTH, perfect], [0]) == 75
    assert frame_accuracy([GUESS, perfect], [TRUTH, perfect]) == pytest.approx(100 * 10 / 13)


def test_videos_of_background_alone() -> None:
    nothing, something = np.zeros(4, dtype=int), np.array([0, 1, 1, 0])
    assert edit_score([nothing], [nothing], [0]) == 100
    assert edit_score([something], [nothing], [0]) == 0
    assert segmental_f1([nothing], [nothing], 0.5, [0]) == 0
    assert segmental_f1([something, something], [nothing, something], 0.5, [0]) == pytest.approx(200 / 3)


@given(frame_labels)
def test_perfect_predictions(labels: np.ndarray) -> None:
    assert frame_accuracy([labels], [labels]) == edit_score([labels], [labels]) == 100
    for overlap in (0.1, 0.25, 0.5, 1.0):
        assert segmental_f1([labels], [labels], overlap) == 100
    found = {"video": segments(labels)}
    assert detection_map(found, found, (0.5, 1.0)) == {0.5: 100, 1.0: 100}


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_levenshtein_by_recursion(first: list[int], second: list[int]) -> None:
    @lru_cache(None)
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (first[i - 1] != second[j - 1]),
        )

    assert levenshtein(first, second) == distance(len(first), len(second)) == levenshtein(second, first)


def test_precision_of_a_hand_computed_case() -> None:
    truth = {"a": [Segment(1, 0, 10), Segment(1, 20, 30)], "b": [Segment(1, 0, 10)], "c": [Segment(2, 0, 4)]}
    guesses = {
        "a": [Segment(1, 0, 10, 0.9), Segment(1, 1, 10, 0.8), Segment(1, 20, 26, 0.3)],
        "b": [Segment(1, 5, 10, 0.7)],
        "elsewhere": [Segment(1, 0, 10, 0.2)],
    }
    # At 0.5, surest first: hit, miss (taken), hit (b, 0.5), hit (0.6), miss. Precisions 1, 1/2, 2/3, 3/4 and
    # 3/5, made monotonous 1, 3/4, 3/4 at the three hits. Label 2 is never guessed.
    found = detection_map(guesses, truth, (0.5, 0.6, 0.7))
    assert found[0.5] == pytest.approx(100 * (1 + 3 / 4 + 3 / 4) / 3 / 2)
    # At 0.6 b is missed: hit, miss, miss, hit: 1 and 2/4. At 0.7 one hit is left.
    assert found[0.6] == pytest.approx(100 * (1 + 2 / 4) / 3 / 2)
    assert found[0.7] == pytest.approx(100 * 1 / 3 / 2)


def test_score_of_a_segment_is_its_mean_probability() -> None:
    probabilities = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.4, 0.6]])
    found = scored_segments(np.array([0, 0, 1, 1]), probabilities)
    assert [one.score for one in found] == pytest.approx([0.7, 0.7])
    assert scored_segments(np.array([0, 0, 1, 1]), probabilities, background=[0]) == found[1:]


@given(st.integers(1, 9), st.integers(1, 12))
def test_smoothing_is_a_running_mean(window: int, length: int) -> None:
    values = np.random.default_rng(length).random((length, 2))
    found = smoothed(values, window)
    for t in range(length):
        about = values[max(0, t - (window - 1) // 2) : t + window // 2 + 1]
        np.testing.assert_allclose(found[t], about.mean(axis=0))


def test_nothing_but_background() -> None:
    with pytest.raises(InputError, match="every label background"):
        detection_map({}, {"video": []}, [0.5])
