"""`fasttrain eval localization`, end to end on tiny synthetic datasets in the published layouts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import segmentation, write_run
from test_command import evaluate, fails, read

from fasttrain.evaluation.localization import smoothed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("as_breakfast", [False, True])
def test_localization_end_to_end(as_breakfast: bool, run: Path, tmp_path: Path) -> None:
    root = segmentation(tmp_path / "data", as_breakfast=as_breakfast)
    assert evaluate("localization", "--run", run, "--root", root, "--output", tmp_path / "out") == 0
    report = read(tmp_path / "out", "localization")
    assert report["data"]["background"] == ["background"]
    # The last annotation is one frame shorter than its video.
    assert report["data"]["test_frames"] == 8 * 4 + 9 * 4 - 1
    assert report["data"]["train_frames"] == (5 + 6 + 7) * 4
    for variant in ("before", "after"):
        assert report["results"][variant]["frame accuracy"] > 90
        assert set(report["results"][variant]) >= {"edit", "F1@10", "F1@25", "F1@50", "mAP@0.7", "mAP mean"}
    assert list((tmp_path / "out").glob("localization-*/figures/segments.png"))
    # Predict every third frame and score all labels.
    coarse_options = [
        "--stride",
        3,
        "--smooth",
        2,
        "--background",
        "--tiou",
        "activitynet",
        "--max-train-frames",
        20,
    ]
    options = ["--run", run, "--root", root, "--baseline-only", "--output", tmp_path / "coarse"]
    assert evaluate("localization", *options, *coarse_options) == 0
    coarse = read(tmp_path / "coarse", "localization")
    assert coarse["data"]["background"] == []
    assert list(coarse["results"]) == ["before"]
    assert coarse["data"]["test_frames"] == report["data"]["test_frames"]
    assert 50 < coarse["results"]["before"]["frame accuracy"] <= report["results"]["before"]["frame accuracy"]
    assert "mAP@0.95" in coarse["results"]["before"]


def test_invalid_settings_and_datasets(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = segmentation(tmp_path / "data")
    options = ["--run", run, "--root", root, "--output", tmp_path / "out"]
    fails("localization", [*options, "--split", 9], "no train.split9.bundle in", capsys)
    fails("localization", [*options, "--background", "nap"], "--background: 'nap' is not one of", capsys)
    fails("localization", [*options, "--smooth", 0], "--smooth 0", capsys)
    fails("localization", [*options, "--stride", 0], "--stride 0", capsys)
    train = root / "splits" / "train.split1.bundle"
    fails("localization", [*options, "--test-list", train], "'S0_Tea_C1' is in both the training", capsys)
    (root / "groundTruth" / "S1_Tea_C1.txt").write_text("cut\nfry\n")
    fails("localization", options, "'S1_Tea_C1' has label 'fry'; expected a label", capsys)
    (root / "groundTruth" / "S1_Tea_C1.txt").unlink()
    fails("localization", options, "S1_Tea_C1.txt", capsys)
    shutil.copy(root / "groundTruth" / "S0_Tea_C1.txt", root / "groundTruth" / "S1_Tea_C1.txt")
    (root / "videos" / "S3_Tea_C1.avi").unlink()
    fails("localization", options, "match several files: 1 (for example S3_Tea_C1)", capsys)
    train.write_text("\n")
    fails("localization", options, "the training list is empty", capsys)
    (root / "mapping.txt").write_text("a\n")
    fails("localization", options, "expected `NUMBER LABEL`", capsys)


def test_wrong_number_of_labels_and_class_without_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = segmentation(tmp_path / "data")
    path = root / "groundTruth" / "S3_Tea_C1.txt"
    path.write_text(path.read_text() * 2)
    # Frames of a class without training videos are scored as wrong, and the class is reported.
    truth = (root / "groundTruth" / "S4_Tea_C1.txt").read_text()
    (root / "mapping.txt").write_text((root / "mapping.txt").read_text() + "4 serve\n")
    (root / "groundTruth" / "S4_Tea_C1.txt").write_text(truth.replace("cut", "serve"))
    assert evaluate("localization", "--run", run, "--root", root, "--output", tmp_path / "out") == 0
    report = read(tmp_path / "out", "localization")
    assert report["data"]["skipped"] == ["S3_Tea_C1: 32 frames, but 64 labels; expected one per frame"]
    assert "skipped videos with too few or too many labels: 1 (for example S3" in capsys.readouterr().out
    assert report["data"]["classes_without_training"] == ["serve"]
    assert report["results"]["before"]["frame accuracy"] < 80
    assert np.isfinite(report["results"]["before"]["mAP mean"])


def test_all_labels_at_another_frame_rate(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = segmentation(tmp_path / "data")
    for path in (root / "groundTruth").iterdir():
        path.write_text(path.read_text() * 2)
    options = ["--run", run, "--root", root, "--output", tmp_path / "out"]
    fails("localization", options, "all videos in a list have too few or too many labels", capsys)


@given(st.integers(1, 9), st.integers(1, 12))
def test_smoothing_is_a_running_mean(window: int, length: int) -> None:
    values = np.random.default_rng(length).random((length, 2))
    means = smoothed(values, window)
    for t in range(length):
        neighbours = values[max(0, t - (window - 1) // 2) : t + window // 2 + 1]
        np.testing.assert_allclose(means[t], neighbours.mean(axis=0))
