"""J, F, PCK and mIoU against the official toolkits' numbers, and at the edges that those define."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.errors import InputError
from fasttrain.evaluation import boundary_accuracy, mean_iou, pck, region_similarity
from fasttrain.evaluation.jhmdb import joint_maps, poses_from_maps
from fasttrain.evaluation.metrics import statistics

EMPTY = np.zeros((20, 30), dtype=bool)
SQUARE = EMPTY.copy()
SQUARE[5:12, 8:20] = True


@pytest.mark.parametrize("sequence", ["car-shadow", "motocross-jump"])
def test_davis_measures_equal_the_toolkit(shared: Path, sequence: str) -> None:
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
    """0.008 of the diagonal is 4 and 4.2 pixels: shifts up to it, rounded up, cost nothing."""
    mask = np.zeros(size, dtype=bool)
    mask[100:200, 100:200] = True
    assert boundary_accuracy(np.roll(mask, pixels, axis=1), mask) == 1
    assert boundary_accuracy(np.roll(mask, pixels + 1, axis=1), mask) < 1


def test_statistics_share_the_border_frames_of_their_bins() -> None:
    """38 frames fall into bins that begin at 1, 10, 20, 29 and end at 10, 20, 29, 38 (counted from one)."""
    values = np.linspace(1, 0, 38)
    found = statistics(values)
    assert found["mean"] == pytest.approx(0.5)
    assert found["recall"] == pytest.approx(0.5)
    assert found["decay"] == pytest.approx(values[0:10].mean() - values[28:38].mean())
    # Three frames: borders at 1, 1.5, 2, 2.5 and 3, halves rounded up. Recall is of values above 0.5.
    assert statistics([1, 0.5, 0])["decay"] == (1 + 0.5) / 2 - 0
    assert statistics([0.5, 0.6])["recall"] == 0.5


def test_pck_equals_the_published_numbers(shared: Path) -> None:
    golden = np.load(shared / "golden/eval/jhmdb_pck.npz")
    predictions, truths = [], []
    for video in range(3):
        (height, width), (rows, columns) = golden[f"size_{video}"], golden["grid"]
        scale = np.array([width / columns, height / rows])[:, None, None]
        predictions.append(golden[f"pred_grid_{video}"] * scale)
        truths.append(golden[f"gt_{video}"])
    np.testing.assert_allclose(pck(predictions, truths), golden["pck"], rtol=1e-12)


def test_pck_leaves_out_the_first_frame_and_joints_not_found() -> None:
    truth = np.zeros((2, 3, 2))
    truth[:, 1], truth[:, 2] = 30, 40
    prediction = truth.copy()
    prediction[:, :, 0] += 1000
    prediction[:, 2] = -1
    assert pck([prediction], [truth], thresholds=[0.1]) == [100]
    prediction[0, 0, 1] += 0.1 * 0.6 * np.hypot(30, 30) + 0.01
    assert pck([prediction], [truth], thresholds=[0.1]) == [50]


@pytest.mark.parametrize(("shift", "found", "percent"), [(3, True, 100), (3.1, True, 50), (0, False, 0)])
def test_pck_at_the_threshold_and_of_a_joint_found_alone(shift: float, found: bool, percent: float) -> None:
    """The box's diagonal is 50 pixels, a person's size 30: a tenth of it is 3 pixels.

    The box of a joint that is found alone is a point, so that no distance is small; it counts all the same,
    as in videowalk.
    """
    truth = np.stack([np.array([[0.0, 30.0], [0.0, 40.0]])] * 2, axis=-1)
    prediction = truth.copy()
    prediction[0, 0, 1] += shift
    if not found:
        prediction[:, 1, 1] = -1
    assert pck([prediction], [truth], thresholds=[0.1]) == [percent]


def test_joint_maps_carry_joints() -> None:
    joints = np.array([[3.0, 0.0, 9.7, 40.0], [2.0, 0.0, 5.2, 3.0]])
    maps = joint_maps(joints, (8, 12))
    assert maps.shape == (8, 12, 5)
    # In the corner a quarter of the Gaussian is left: weights 1, e^-2, e^-2 and e^-4.
    corner = math.exp(-2) / (1 + math.exp(-2))
    # The last joint's Gaussian lies outside the grid.
    expected = [[3.0, corner, 10.0, -1], [2.0, corner, 5.0, -1]]
    np.testing.assert_allclose(poses_from_maps(maps[None], np.ones(2))[..., 0], expected, atol=1e-6)
    assert torch.equal(maps[..., 0] == 1, maps[..., 1:].sum(-1) == 0)


def test_mean_iou_equals_the_published_number(shared: Path) -> None:
    golden = np.load(shared / "golden/eval/vip_miou.npz")
    names = [name.removeprefix("gt_") for name in golden.files if name.startswith("gt_")]
    found = mean_iou(
        [golden[f"pred_{name}"] for name in names],
        [golden[f"gt_{name}"] for name in names],
        num_classes=int(golden["num_classes"]),
    )
    assert found == pytest.approx(float(golden["miou"]), rel=1e-14)


def test_mean_iou_leaves_out_classes_that_never_occur_and_void() -> None:
    truth = np.array([[0, 0, 1, 255, -1]])
    assert mean_iou([np.array([[0, 1, 1, 0, 0]])], [truth], num_classes=20) == pytest.approx(
        (1 / 2 + 1 / 2) / 2
    )


def test_bad_input() -> None:
    with pytest.raises(InputError, match="shape"):
        region_similarity(EMPTY, EMPTY[:5])
    with pytest.raises(InputError, match="as many"):
        mean_iou([EMPTY], [])
    with pytest.raises(InputError, match="predicted class 7"):
        mean_iou([np.full((2, 2), 7)], [np.zeros((2, 2))], num_classes=5)
    with pytest.raises(InputError, match="as many"):
        pck([], [])
    with pytest.raises(InputError, match="poses of shapes"):
        pck([np.zeros((2, 3))], [np.zeros((2, 3))])
