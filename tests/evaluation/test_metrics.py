"""The metrics: golden vectors of official toolkits, hand-computed cases, brute force, invariants."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fasttrain.errors import InputError
from fasttrain.evaluation import boundary_accuracy, mean_iou, pck, region_similarity
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
    statistics,
    top_accuracy,
)

# --- masks, label maps and poses ---

EMPTY = np.zeros((20, 30), dtype=bool)
SQUARE = EMPTY.copy()
SQUARE[5:12, 8:20] = True


@pytest.mark.parametrize("sequence", ["car-shadow", "motocross-jump"])
def test_j_and_f_equal_the_toolkit(shared: Path, sequence: str) -> None:
    golden = json.loads((shared / "golden/eval/osvos_jf.json").read_text())[sequence]
    for frame in range(0, len(golden["J"]), 3):
        mask, truth = (
            np.asarray(Image.open(shared / "davis" / folder / sequence / f"{frame:05d}.png")) > 0
            for folder in ("osvos", "Annotations/480p")
        )
        assert region_similarity(mask, truth) == pytest.approx(golden["J"][frame], abs=1e-15)
        assert boundary_accuracy(mask, truth) == pytest.approx(golden["F"][frame], abs=1e-15)


def test_empty_masks() -> None:
    assert region_similarity(EMPTY, EMPTY) == boundary_accuracy(EMPTY, EMPTY) == 1
    assert region_similarity(EMPTY, SQUARE) == boundary_accuracy(EMPTY, SQUARE) == 0
    assert region_similarity(SQUARE, EMPTY) == boundary_accuracy(SQUARE, EMPTY) == 0


@pytest.mark.parametrize(("size", "pixels"), [((300, 400), 4), ((315, 420), 5)])
def test_contours_match_within_the_tolerance(size: tuple[int, int], pixels: int) -> None:
    """The tolerance is 0.008 of the diagonal, rounded up: 4.0 gives 4 pixels and 4.2 gives 5."""
    mask = np.zeros(size, dtype=bool)
    mask[100:200, 100:200] = True
    assert boundary_accuracy(np.roll(mask, pixels, axis=1), mask) == 1
    assert boundary_accuracy(np.roll(mask, pixels + 1, axis=1), mask) < 1


def test_bins_of_the_decay_share_a_frame() -> None:
    """38 frames have bins that begin at 1, 10, 20, 29 and end at 10, 20, 29, 38 (counted from one)."""
    values = np.linspace(1, 0, 38)
    summary = statistics(values)
    assert summary["mean"] == pytest.approx(0.5)
    assert summary["recall"] == pytest.approx(0.5)
    assert summary["decay"] == pytest.approx(values[0:10].mean() - values[28:38].mean())
    # The bins of three frames have borders at 1, 1.5, 2, 2.5 and 3; halves are rounded up.
    assert statistics([1, 0.5, 0])["decay"] == (1 + 0.5) / 2 - 0
    # Recall is the share of values above 0.5.
    assert statistics([0.5, 0.6])["recall"] == 0.5


def test_pck_equals_golden_vectors(shared: Path) -> None:
    golden = np.load(shared / "golden/eval/jhmdb_pck.npz")
    predictions, truths = [], []
    for video in range(3):
        (height, width), (rows, columns) = golden[f"size_{video}"], golden["grid"]
        scale = np.array([width / columns, height / rows])[:, None, None]
        predictions.append(golden[f"pred_grid_{video}"] * scale)
        truths.append(golden[f"gt_{video}"])
    np.testing.assert_allclose(pck(predictions, truths), golden["pck"], rtol=1e-12)


def test_pck_leaves_out_the_first_frame_and_undetected_joints() -> None:
    truth = np.zeros((2, 3, 2))
    truth[:, 1], truth[:, 2] = 30, 40
    prediction = truth.copy()
    prediction[:, :, 0] += 1000
    prediction[:, 2] = -1
    assert pck([prediction], [truth], thresholds=[0.1]) == [100]
    prediction[0, 0, 1] += 0.1 * 0.6 * np.hypot(30, 30) + 0.01
    assert pck([prediction], [truth], thresholds=[0.1]) == [50]


@pytest.mark.parametrize(("shift", "both", "percent"), [(3, True, 100), (3.1, True, 50), (0, False, 0)])
def test_pck_at_the_threshold_and_with_one_detected_joint(shift: float, both: bool, percent: float) -> None:
    """The diagonal of the box is 50 pixels and the person's size 30, so PCK@0.1 allows 3 pixels.

    If only one joint is detected, its box is a point and it is scored as wrong, as in videowalk.
    """
    truth = np.stack([np.array([[0.0, 30.0], [0.0, 40.0]])] * 2, axis=-1)
    prediction = truth.copy()
    prediction[0, 0, 1] += shift
    if not both:
        prediction[:, 1, 1] = -1
    assert pck([prediction], [truth], thresholds=[0.1]) == [percent]


def test_mean_iou_equals_golden_vectors(shared: Path) -> None:
    golden = np.load(shared / "golden/eval/vip_miou.npz")
    names = [name.removeprefix("gt_") for name in golden.files if name.startswith("gt_")]
    result = mean_iou(
        [golden[f"pred_{name}"] for name in names],
        [golden[f"gt_{name}"] for name in names],
        num_classes=int(golden["num_classes"]),
    )
    assert result == pytest.approx(float(golden["miou"]), rel=1e-14)


def test_mean_iou_ignores_absent_classes_and_unlabelled_pixels() -> None:
    truth = np.array([[0, 0, 1, 255, -1]])
    assert mean_iou([np.array([[0, 1, 1, 0, 0]])], [truth], num_classes=20) == pytest.approx(
        (1 / 2 + 1 / 2) / 2
    )


def test_invalid_masks_label_maps_and_poses() -> None:
    with pytest.raises(InputError, match="shape"):
        region_similarity(EMPTY, EMPTY[:5])
    with pytest.raises(InputError, match="expected equal numbers"):
        mean_iou([EMPTY], [])
    with pytest.raises(InputError, match="predicted class 7"):
        mean_iou([np.full((2, 2), 7)], [np.zeros((2, 2))], num_classes=5)
    with pytest.raises(InputError, match="expected equal numbers"):
        pck([], [])
    with pytest.raises(InputError, match="poses have shapes"):
        pck([np.zeros((2, 3))], [np.zeros((2, 3))])


# --- retrieval ---


def test_recall_of_a_hand_computed_case() -> None:
    neighbours = torch.tensor([[0, 1, 1], [0, 1, 2], [2, 2, 0], [1, 1, 1]])
    labels = torch.tensor([0, 1, 0, 2])
    assert recall_at(neighbours, labels, (1, 2, 3, 10)) == {1: 25, 2: 50, 3: 75, 10: 75}


def test_neighbours_do_not_depend_on_the_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(2500, 4, generator=generator), torch.randn(20, 4, generator=generator)
    assert torch.equal(nearest(queries[2000:], gallery, 5)[1], nearest(queries, gallery, 5)[1][2000:])


def test_non_finite_features() -> None:
    with pytest.raises(InputError, match="not all finite"):
        nearest(torch.ones(2, 3), torch.tensor([[1, 1, torch.nan]]), 1)


# --- k-NN and accuracy ---


def random_features(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Return features (count, 6) and labels that cycle through three classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.arange(count) % 3


@given(st.integers(0, 2**31), st.integers(1, 20), st.floats(0.02, 1))
def test_knn_equals_brute_force(seed: int, k: int, temperature: float) -> None:
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


def test_knn_skips_ks_above_the_number_of_videos() -> None:
    train, labels = random_features(0, count=30)
    assert list(knn_classify(train, train, labels, num_classes=3)) == [10, 20]
    assert list(knn_classify(train, train[:6], labels[:6], num_classes=3)) == [6]


def test_class_without_votes_is_never_predicted() -> None:
    train, _ = random_features(0, 2)
    scores = knn_classify(train, train, torch.tensor([1, 1]), num_classes=6)[2]
    assert top_accuracy(scores, torch.tensor([1, 1]), 1) == 100
    assert top_accuracy(scores, torch.tensor([0, 0]), 5) == 0


def test_votes_at_the_minimum_temperature_are_finite() -> None:
    train = torch.tensor([[-1.0, 0.0], [1.0, 0.05], [1.0, 0.0]])
    scores = knn_classify(train[2:], train, torch.arange(3), num_classes=3, temperature=MIN_TEMPERATURE)[3]
    assert scores[0, 1:].isfinite().all()
    assert scores.argsort().tolist() == [[0, 1, 2]]


def test_accuracy_of_a_hand_computed_case() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    labels = torch.tensor([0, 0, 1, 1])
    # The third row is a tie, which goes to the lower class.
    assert [top_accuracy(scores, labels, k) for k in (1, 2, 3, 5)] == [25, 75, 100, 100]


def test_rows_of_the_confusion_are_true_classes() -> None:
    counts = confusion(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_hold_out_selects_the_end_of_each_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 3 + [2] + [0] * 5)
    held_out = hold_out(labels)
    assert held_out.nonzero()[:, 0].tolist() == [12, 16, 17, 18]


# --- localisation ---

TRUTH = np.array([0, 0, 1, 1, 1, 1, 2, 2, 2, 0])
GUESS = np.array([0, 1, 1, 1, 1, 2, 2, 1, 2, 0])

frame_labels = st.lists(st.integers(0, 3), min_size=1, max_size=30).map(np.array)


def test_segments_are_runs_of_equal_labels() -> None:
    assert segments(TRUTH, background=[0]) == [Segment(1, 2, 6), Segment(2, 6, 9)]
    assert [(one.start, one.end) for one in segments(TRUTH)] == [(0, 2), (2, 6), (6, 9), (9, 10)]


def test_segmentation_metrics_of_a_hand_computed_case() -> None:
    assert frame_accuracy([GUESS], [TRUTH]) == 70
    # The predicted segments 1 2 1 2 have an edit distance of 2 to the true segments 1 2 (0 is background).
    assert edit_score([GUESS], [TRUTH], background=[0]) == 50
    # The IoUs of the four predicted segments are 3/5, 1/4, 0 and 1/3: one match at 0.5.
    assert segmental_f1([GUESS], [TRUTH], 0.5, background=[0]) == pytest.approx(100 * 2 / (4 + 2))
    # At 0.25, the first prediction of label 2 matches the true segment, so the second cannot.
    assert segmental_f1([GUESS], [TRUTH], 0.25, background=[0]) == pytest.approx(100 * 4 / (4 + 2))
    assert segmental_f1([GUESS], [TRUTH], 0.75, background=[0]) == 0


def test_f1_is_over_all_segments_and_edit_is_a_mean_over_videos() -> None:
    perfect = np.array([1, 1, 2])
    assert segmental_f1([GUESS, perfect], [TRUTH, perfect], 0.5, [0]) == pytest.approx(100 * 6 / (6 + 4))
    assert edit_score([GUESS, perfect], [TRUTH, perfect], [0]) == 75
    assert frame_accuracy([GUESS, perfect], [TRUTH, perfect]) == pytest.approx(100 * 10 / 13)


def test_videos_with_only_background() -> None:
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
    by_video = {"video": segments(labels)}
    assert detection_map(by_video, by_video, (0.5, 1.0)) == {0.5: 100, 1.0: 100}


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_levenshtein_equals_its_recursive_definition(first: list[int], second: list[int]) -> None:
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


def test_average_precision_of_a_hand_computed_case() -> None:
    truth = {"a": [Segment(1, 0, 10), Segment(1, 20, 30)], "b": [Segment(1, 0, 10)], "c": [Segment(2, 0, 4)]}
    predictions = {
        "a": [Segment(1, 0, 10, 0.9), Segment(1, 1, 10, 0.8), Segment(1, 20, 26, 0.3)],
        "b": [Segment(1, 5, 10, 0.7)],
        "elsewhere": [Segment(1, 0, 10, 0.2)],
    }
    # At 0.5, by decreasing score: match, miss (already matched), match (IoU 0.5), match (IoU 0.6), miss. The
    # precisions are 1, 1/2, 2/3, 3/4 and 3/5; interpolated at the matches, 1, 3/4 and 3/4. Label 2 is never
    # predicted, which halves the mean.
    precision = detection_map(predictions, truth, (0.5, 0.6, 0.7))
    assert precision[0.5] == pytest.approx(100 * (1 + 3 / 4 + 3 / 4) / 3 / 2)
    # At 0.6, the segment of b is missed, and the precisions at the matches are 1 and 2/4. At 0.7, one match
    # is left.
    assert precision[0.6] == pytest.approx(100 * (1 + 2 / 4) / 3 / 2)
    assert precision[0.7] == pytest.approx(100 * 1 / 3 / 2)


def test_score_of_a_segment_is_its_mean_probability() -> None:
    probabilities = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.4, 0.6]])
    scored = scored_segments(np.array([0, 0, 1, 1]), probabilities)
    assert [segment.score for segment in scored] == pytest.approx([0.7, 0.7])
    assert scored_segments(np.array([0, 0, 1, 1]), probabilities, background=[0]) == scored[1:]


def test_detection_without_true_segments() -> None:
    with pytest.raises(InputError, match="all their labels are background"):
        detection_map({}, {"video": []}, [0.5])
