"""`fasttrain eval` on labelled videos: retrieval and probe, end to end on tiny synthetic data sets."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import (
    LAYOUTS,
    clips,
    kinetics,
    plain,
    segmentation,
    ucf101,
    write_frames,
    write_run,
    write_videos,
)

from fasttrain.__main__ import main

SMALL = ["--image-size", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ucf101(tmp_path_factory.mktemp("ucf") / "ucf")


def evaluate(task: str, *words: Any) -> int:
    return main(["eval", task, *map(str, words), *SMALL])


def read(output: Path, task: str) -> dict[str, Any]:
    return json.loads((output / f"{task}.json").read_text())


def lists_of(root: Path) -> list[Any]:
    return ["--train-list", root / "train.txt", "--test-list", root / "test.txt"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_from_end_to_end(
    layout: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = LAYOUTS[layout](tmp_path / "data")
    given = ["--run", run, "--root", root, "--num-frames", 2, "--cache", tmp_path / "cache"]
    given += lists_of(root) if layout == "list" else []
    for task, measure, picture in (
        ("retrieval", "R@1", "retrieval.png"),
        ("probe", "linear top-1", "confusion.png"),
    ):
        output = tmp_path / task
        assert evaluate(task, *given, "--output", output) == 0
        found = read(output, task)
        assert found["data"]["layout"] == layout
        assert (found["data"]["train_videos"], found["data"]["test_videos"]) == (9, 6)
        # Clips of one scene: even a random encoder tells them from those of another.
        assert found["results"]["before"][measure] == found["results"]["after"][measure] == 100
        assert found["results"]["difference"][measure] == 0
        assert set(found["versions"]) >= {"torch", "fasttrain"}
        assert found["settings"]["num_frames"] == 2
        assert (output / "figures" / picture).stat().st_size > 5000
        assert measure in capsys.readouterr().out


def pack(source: Path, destination: Path) -> Path:
    """All frames, as they are."""
    words = ["pack", source, destination, "--short-side", 64, "--frames", 0, "--quality", 100]
    assert main(list(map(str, words))) == 0
    return destination


def test_packed_videos(run: Path, tmp_path: Path) -> None:
    root = kinetics(tmp_path / "data")
    packed = pack(root, tmp_path / "packed")
    for which in ("train", "val"):
        shutil.rmtree(root / which)
    given = ["--run", run, "--root", root, "--videos", packed, "--num-frames", 2]
    assert evaluate("retrieval", *given, "--output", tmp_path / "out") == 0
    assert read(tmp_path / "out", "retrieval")["results"]["before"]["R@1"] == 100
    segmented = segmentation(tmp_path / "segmented", as_breakfast=True)
    given = ["--run", run, "--root", segmented, "--videos", pack(segmented, tmp_path / "packed too")]
    assert evaluate("localization", *given, "--output", tmp_path / "out") == 0
    assert read(tmp_path / "out", "localization")["results"]["before"]["frame accuracy"] > 90


def test_tasks_and_sides_of_the_projection_share_a_cache(run: Path, ucf: Path, tmp_path: Path) -> None:
    def entries(task: str, *words: str) -> dict[Path, int]:
        given = ["--run", run, "--root", ucf, "--num-frames", 2, "--cache", tmp_path / "cache"]
        assert evaluate(task, *given, *words, "--output", tmp_path / "".join([task, *words])) == 0
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}

    assert len(entries("retrieval", "--baseline-only")) == 15
    written = entries("retrieval", "--projection-only")
    assert len(written) == 30
    assert entries("probe") == entries("retrieval") == written
    both, *sides = [
        read(tmp_path / f"retrieval{only}", "retrieval")["results"]
        for only in ("", "--baseline-only", "--projection-only")
    ]
    assert sides == [{"before": both["before"]}, {"after": both["after"]}]


@pytest.mark.parametrize("task", ["probe", "consistency"])
def test_two_processes_find_what_one_does(task: str, run: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    if task == "consistency":
        words = ["--root", write_videos(root)]
        write_frames(clips(0)[0], root / "short")
    else:
        words = ["--root", plain(root), *lists_of(root), "--num-frames", 2]
        # With labels drawn at random no figure is 0 or 100.
        draw = random.Random(3)
        for path in (root / "train.txt", root / "test.txt"):
            lines = [line for line in path.read_text().splitlines() if line[0] != "#"]
            path.write_text("".join(f"{line[:-1]}{draw.choice('012')}\n" for line in lines))
    one, two = tmp_path / "one", tmp_path / "two"
    command = [
        # `--`: torchrun would take --run for an option of its own.
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--",
        "fasttrain", "eval", task, "--run", run, "--output", two, *words, *SMALL,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert evaluate(task, "--run", run, "--output", one, *words) == 0
    finally:
        torch.set_num_threads(threads)
    found = [read(output, task) for output in (one, two)]
    for output in found:
        del output["seconds"], output["settings"]
    assert found[0] == found[1]
    if task == "probe":
        assert 0 < found[0]["results"]["before"]["linear top-1"] < 100


def fails(task: str, words: list[Any], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(task, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("fasttrain: ")
    assert error.count("\n") == 1
    assert part in error


def test_videos_that_cannot_be_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ucf101(tmp_path / "data")
    given = ["--run", run, "--root", root, "--num-frames", 2, "--output", tmp_path / "out"]
    videos = sorted((root / "UCF-101").rglob("*.avi"))
    # One of the training and one of the test videos.
    videos[0].write_bytes(videos[0].read_bytes()[:200])
    videos[9].write_bytes(b"")
    assert evaluate("probe", *given) == 0
    data = read(tmp_path / "out", "probe")["data"]
    assert (data["train_videos"], data["test_videos"]) == (8, 5)
    assert [line.split(":")[0] for line in data["skipped"]] == [
        "Archery/v_Archery_g00_c01.avi", "Bowling/v_Bowling_g04_c01.avi",
    ]  # fmt: skip
    for video in videos:
        video.write_bytes(b"")
    fails("retrieval", given, "none of 9 videos of a list can be read", capsys)
    for video in videos[5:8]:
        video.unlink()
    fails("probe", [*given, "--allow-missing"], "class 'Bowling' has test videos, but no training", capsys)
    shutil.rmtree(root / "UCF-101")
    fails("retrieval", given, "15 listed videos are not under", capsys)


@pytest.mark.parametrize(
    ("task", "words", "part"),
    [
        ("probe", ["--neighbours", 5, 0], "--neighbours [5, 0]"),
        ("probe", ["--temperature", 0], "--temperature 0.0"),
        ("probe", ["--temperature", "nan"], "--temperature nan"),
        ("probe", ["--max-iterations", 0], "--max-iterations 0"),
        ("retrieval", ["--num-frames", 0], "--num-frames 0"),
        ("retrieval", ["--batch-size", 0], "--batch-size 0"),
        ("retrieval", ["--workers", -1], "--workers -1"),
        ("retrieval", ["--image-size", 50], "multiples of 16"),
        ("retrieval", ["--dataset", "ssv2"], "labels.json"),
        ("retrieval", ["--projection", "other.safetensors"], "--run has its own"),
    ],
)
def test_bad_settings(
    task: str,
    words: list[Any],
    part: str,
    run: Path,
    ucf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["eval", task, *SMALL, "--run", run, "--root", ucf, "--output", tmp_path / "out", *words]
    assert main(list(map(str, given))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert part in error
