"""`eval localization`, end to end on tiny synthetic data sets in the published layouts."""

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
def test_localization_from_end_to_end(as_breakfast: bool, run: Path, tmp_path: Path) -> None:
    root = segmentation(tmp_path / "data", as_breakfast=as_breakfast)
    assert evaluate("localization", "--run", run, "--root", root, "--output", tmp_path / "out") == 0
    found = read(tmp_path / "out", "localization")
    assert found["data"]["background"] == ["background"]
    # The last annotation is one frame shorter than its video.
    assert found["data"]["test_frames"] == 8 * 4 + 9 * 4 - 1
    assert found["data"]["train_frames"] == (5 + 6 + 7) * 4
    for variant in ("before", "after"):
        assert found["results"][variant]["frame accuracy"] > 90
        assert set(found["results"][variant]) >= {"edit", "F1@10", "F1@25", "F1@50", "mAP@0.7", "mAP mean"}
    assert (tmp_path / "out" / "figures" / "segments.png").is_file()
    # Every third frame stands for two more; all labels count.
    words = ["--stride", 3, "--smooth", 2, "--background", "--tiou", "activitynet", "--max-train-frames", 20]
    given = ["--run", run, "--root", root, "--baseline-only", "--output", tmp_path / "coarse"]
    assert evaluate("localization", *given, *words) == 0
    coarse = read(tmp_path / "coarse", "localization")
    assert coarse["data"]["background"] == []
    assert list(coarse["results"]) == ["before"]
    assert coarse["data"]["test_frames"] == found["data"]["test_frames"]
    assert 50 < coarse["results"]["before"]["frame accuracy"] <= found["results"]["before"]["frame accuracy"]
    assert "mAP@0.95" in coarse["results"]["before"]


def test_bad_data_sets_for_localization(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = segmentation(tmp_path / "data")
    given = ["--run", run, "--root", root, "--output", tmp_path / "out"]
    fails("localization", [*given, "--split", 9], "no train.split9.bundle in", capsys)
    fails("localization", [*given, "--background", "nap"], "--background nap: not in mapping.txt", capsys)
    fails("localization", [*given, "--smooth", 0], "--smooth 0", capsys)
    fails("localization", [*given, "--stride", 0], "--stride 0", capsys)
    train = root / "splits" / "train.split1.bundle"
    fails("localization", [*given, "--test-list", train], "S0_Tea_C1 is in both lists", capsys)
    (root / "groundTruth" / "S1_Tea_C1.txt").write_text("cut\nfry\n")
    fails("localization", given, "S1_Tea_C1 is of class 'fry'; expected one of 4", capsys)
    (root / "groundTruth" / "S1_Tea_C1.txt").unlink()
    fails("localization", given, "S1_Tea_C1.txt cannot be read", capsys)
    shutil.copy(root / "groundTruth" / "S0_Tea_C1.txt", root / "groundTruth" / "S1_Tea_C1.txt")
    (root / "videos" / "S3_Tea_C1.avi").unlink()
    fails("localization", given, "1 listed videos are not under", capsys)
    train.write_text("\n")
    fails("localization", given, "the training list is empty", capsys)
    (root / "mapping.txt").write_text("a\n")
    fails("localization", given, "expected `NUMBER LABEL`", capsys)


def test_labels_that_do_not_belong_to_the_frames(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = segmentation(tmp_path / "data")
    path = root / "groundTruth" / "S3_Tea_C1.txt"
    path.write_text(path.read_text() * 2)
    # A class that no training video has is reported, and counts as wrong.
    truth = (root / "groundTruth" / "S4_Tea_C1.txt").read_text()
    (root / "mapping.txt").write_text((root / "mapping.txt").read_text() + "4 serve\n")
    (root / "groundTruth" / "S4_Tea_C1.txt").write_text(truth.replace("cut", "serve"))
    assert evaluate("localization", "--run", run, "--root", root, "--output", tmp_path / "out") == 0
    found = read(tmp_path / "out", "localization")
    assert found["data"]["skipped"] == ["S3_Tea_C1: 32 frames, but 64 labels; expected a label per frame"]
    assert "videos that do not fit their labels: 1 are skipped, such as S3_Tea_C1" in capsys.readouterr().out
    assert found["data"]["classes_without_training"] == ["serve"]
    assert found["results"]["before"]["frame accuracy"] < 80
    assert np.isfinite(found["results"]["before"]["mAP mean"])


@given(st.integers(1, 9), st.integers(1, 12))
def test_smoothing_is_a_running_mean(window: int, length: int) -> None:
    values = np.random.default_rng(length).random((length, 2))
    found = smoothed(values, window)
    for t in range(length):
        about = values[max(0, t - (window - 1) // 2) : t + window // 2 + 1]
        np.testing.assert_allclose(found[t], about.mean(axis=0))
