"""`fasttrain eval retrieval` and `probe`, end to end on tiny synthetic datasets."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import timm
import torch
from hub_server import Hub
from processes import run_two_ranks
from synthetic import (
    LAYOUTS,
    clips,
    kinetics,
    plain,
    published_name,
    result_of,
    save_release,
    segmentation,
    ucf101,
    write_davis,
    write_frames,
    write_run,
    write_videos,
    write_weights,
)
from torch import Tensor

from fasttrain import options
from fasttrain.__main__ import main
from fasttrain.backbones import Backbone
from fasttrain.encoder_options import load_model
from fasttrain.evaluation import plots
from fasttrain.projection import PROJECTION_FILE, Projection
from fasttrain.video_encoder import load_video_encoder
from fasttrain.weights import hash_state_dict

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
    return json.loads(result_of(output, task).read_text())


def lists_of(root: Path) -> list[Any]:
    return ["--train-list", root / "train.txt", "--test-list", root / "test.txt"]


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw pictures at a low resolution, because drawing takes most of the time of a small evaluation."""
    monkeypatch.setitem(plots.STYLE, "savefig.dpi", 30)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_end_to_end(
    layout: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = LAYOUTS[layout](tmp_path / "data")
    options = ["--run", run, "--root", root, "--num-frames", 2, "--cache", tmp_path / "cache"]
    options += lists_of(root) if layout == "list" else []
    for task, metric, picture in (
        ("retrieval", "R@1", "retrieval.png"),
        ("probe", "linear top-1", "confusion.png"),
    ):
        output = tmp_path / task
        assert evaluate(task, *options, "--output", output) == 0
        report = read(output, task)
        assert report["data"]["layout"] == layout
        assert (report["data"]["train_videos"], report["data"]["test_videos"]) == (9, 6)
        # Each class is one scene, so even a random encoder separates the classes.
        assert report["results"]["before"][metric] == report["results"]["after"][metric] == 100
        assert report["results"]["difference"][metric] == 0
        assert set(report["versions"]) >= {"torch", "fasttrain"}
        assert report["settings"]["num_frames"] == 2
        assert (result_of(output, task).with_suffix("") / "figures" / picture).stat().st_size > 1000
        assert metric in capsys.readouterr().out


def pack(source: Path, destination: Path) -> Path:
    """Pack all frames of a folder of videos at nearly their original quality."""
    words = ["pack", source, destination, "--short-side", 64, "--frames", 0, "--quality", 100]
    assert main(list(map(str, words))) == 0
    return destination


# Both options with every task would repeat what the tasks share.
@pytest.mark.parametrize(
    ("option", "task"), [("--run", "davis"), ("--projection", "consistency"), ("--run", "retrieval")]
)
def test_frames_are_normalised_for_the_encoder(
    option: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mean 0 and std 1, pixels remain between 0 and 1."""
    received: list[Tensor] = []
    tokens = Backbone.tokens
    monkeypatch.setattr(
        Backbone, "tokens", lambda self, images: received.append(images) or tokens(self, images)
    )
    name = "test_vit"
    sizes = dict.fromkeys(("embed_dim", "depth", "num_heads"))
    run = write_run(tmp_path / "run", name=name, **sizes, image_size=224, mean=(0, 0, 0), std=(1, 1, 1))
    root = {"davis": write_davis, "consistency": write_videos, "retrieval": ucf101}[task](tmp_path / "data")
    model = [option, run] if option == "--run" else ["--backbone", name, option, run / PROJECTION_FILE]
    size = ["--height", 64, "--width", 96] if task == "davis" else ["--image-size", 64]
    words = ["eval", task, "--root", root, "--output", tmp_path / "out", "--device", "cpu", *model, *size]
    assert main([*map(str, words)]) == 0
    for images in received:
        assert 0 <= images.min() < 0.5 < images.max() <= 1
    report = read(tmp_path / "out", task)
    assert report["model"]["mean"] == [0, 0, 0]
    assert report["model"]["std"] == [1, 1, 1]


def test_a_projection_of_other_weights_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "other.pth")
    words = [
        "eval",
        "davis",
        "--root",
        tmp_path,
        "--backbone",
        "test_vit",
        "--weights",
        tmp_path / "other.pth",
    ]
    assert main([*map(str, words), "--projection", str(run / PROJECTION_FILE)]) == 2
    assert "other.pth' of test_vit are not those used in training" in capsys.readouterr().err


def test_the_model_may_be_on_the_hub(run: Path, hub: Hub, tmp_path: Path) -> None:
    """Also by the name of a projection that the paper's authors published, whose backbone is not stored."""
    file = run / PROJECTION_FILE
    state = Projection.load(file).state_dict()
    save_release(tmp_path / "ours.pth", {published_name(key, "linear"): state[key] for key in state})
    hub.repos["me/run"] = {PROJECTION_FILE: file.read_bytes()}
    checkpoint = {"ckpts/ours/dino+ours/checkpoint.pth": (tmp_path / "ours.pth").read_bytes()}
    hub.repos["yafeng19/Co-Settle"] = checkpoint
    backbone = ["--backbone", "dino", "--weights", write_weights(tmp_path / "dino.pth"), "--num-heads", 2]
    for model in (
        ["--run", "hf://me/run"],
        [*backbone, "--projection", "hf://me/run"],
        [*backbone, "--projection", run],
        [*backbone, "--projection", "cosettle://dino"],
    ):
        words = ["davis", "--root", tmp_path, *model]
        arguments = options.new_parser("eval").parse_args([*map(str, words)])
        loaded = load_model(arguments, torch.device("cpu"))
        assert loaded.projection is not None
        assert hash_state_dict(loaded.projection.state_dict()) == hash_state_dict(state)
        assert loaded.encoder.weights_hash == load_video_encoder(run).encoder.weights_hash


def test_results_of_a_run_on_the_hub_are_in_the_working_directory(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["me/run"] = {PROJECTION_FILE: (run / PROJECTION_FILE).read_bytes()}
    videos = write_videos(tmp_path / "videos")
    monkeypatch.chdir(tmp_path)
    words = ["--root", videos, "--num-frames", 9, "--baseline-only"]
    assert evaluate("consistency", "--run", "hf://me/run", *words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval", "videos"]


def test_packed_videos(run: Path, tmp_path: Path) -> None:
    root = kinetics(tmp_path / "data")
    packed = pack(root, tmp_path / "packed")
    for which in ("train", "val"):
        shutil.rmtree(root / which)
    options = ["--run", run, "--root", root, "--videos", packed, "--num-frames", 2]
    assert evaluate("retrieval", *options, "--output", tmp_path / "out") == 0
    assert read(tmp_path / "out", "retrieval")["results"]["before"]["R@1"] == 100
    segmented = segmentation(tmp_path / "segmented", as_breakfast=True)
    # At a URL, too.
    memory = fsspec.filesystem("memory")
    memory.put(f"{pack(segmented, tmp_path / 'packed too')}/", "/segmented/", recursive=True)
    options = ["--run", run, "--root", segmented, "--videos", "memory://segmented"]
    assert evaluate("localization", *options, "--output", tmp_path / "out") == 0
    assert read(tmp_path / "out", "localization")["results"]["before"]["frame accuracy"] > 90


def test_tasks_and_variants_share_a_cache(run: Path, ucf: Path, tmp_path: Path) -> None:
    def entries(task: str, *words: str) -> dict[Path, int]:
        options = ["--run", run, "--root", ucf, "--num-frames", 2, "--cache", tmp_path / "cache"]
        assert evaluate(task, *options, *words, "--output", tmp_path / "".join([task, *words])) == 0
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}

    assert len(entries("retrieval", "--baseline-only")) == 15
    written = entries("retrieval", "--projection-only")
    assert len(written) == 30
    assert entries("probe") == entries("retrieval") == written
    both, *single = [
        read(tmp_path / f"retrieval{only}", "retrieval")["results"]
        for only in ("", "--baseline-only", "--projection-only")
    ]
    assert single == [{"before": both["before"]}, {"after": both["after"]}]


@pytest.mark.parametrize("task", [pytest.param("probe", marks=pytest.mark.slow), "consistency"])
def test_two_processes_give_the_results_of_one(task: str, run: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    if task == "consistency":
        words = ["--root", write_videos(root)]
        write_frames(clips(0)[0], root / "short")
    else:
        words = ["--root", plain(root), *lists_of(root), "--num-frames", 2]
        # With random labels, the accuracy is neither 0 nor 100.
        draw = random.Random(3)
        for path in (root / "train.txt", root / "test.txt"):
            lines = [line for line in path.read_text().splitlines() if line[0] != "#"]
            path.write_text("".join(f"{line[:-1]}{draw.choice('012')}\n" for line in lines))
    one, two = tmp_path / "one", tmp_path / "two"
    run_two_ranks(["eval", task, "--run", run, "--output", two, *words, *SMALL])
    assert evaluate(task, "--run", run, "--output", one, *words) == 0
    reports = [read(output, task) for output in (one, two)]
    for report in reports:
        del report["seconds"], report["settings"], report["date"]
    assert reports[0] == reports[1]
    if task == "probe":
        assert 0 < reports[0]["results"]["before"]["linear top-1"] < 100


def fails(task: str, words: list[Any], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that the command exits with code 2 and one line that contains `part`."""
    assert evaluate(task, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("fasttrain: ")
    assert error.count("\n") == 1
    assert part in error


def test_unreadable_and_missing_videos(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ucf101(tmp_path / "data")
    options = ["--run", run, "--root", root, "--num-frames", 2, "--output", tmp_path / "out"]
    videos = sorted((root / "UCF-101").rglob("*.avi"))
    # Damage one training video and one test video.
    videos[0].write_bytes(videos[0].read_bytes()[:200])
    videos[9].write_bytes(b"")
    assert evaluate("probe", *options) == 0
    data = read(tmp_path / "out", "probe")["data"]
    assert (data["train_videos"], data["test_videos"]) == (8, 5)
    assert [line.split(":")[0] for line in data["skipped"]] == [
        "Archery/v_Archery_g00_c01.avi", "Bowling/v_Bowling_g04_c01.avi",
    ]  # fmt: skip
    for video in videos:
        video.write_bytes(b"")
    fails("retrieval", options, "none of the 9 videos in a list is readable", capsys)
    for video in videos[5:8]:
        video.unlink()
    fails("probe", [*options, "--allow-missing"], "class 'Bowling' has test videos but no training", capsys)
    shutil.rmtree(root / "UCF-101")
    fails("retrieval", options, "match several files: 15 (for example", capsys)


@pytest.mark.parametrize(
    ("task", "words", "part"),
    [
        ("probe", ["--neighbours", 5, 0], "--neighbours 5 0"),
        ("probe", ["--temperature", 0], "--temperature 0.0"),
        ("probe", ["--temperature", "nan"], "--temperature nan"),
        ("probe", ["--max-iterations", 0], "--max-iterations 0"),
        ("retrieval", ["--num-frames", 0], "--num-frames 0"),
        ("retrieval", ["--batch-size", 0], "--batch-size 0"),
        ("retrieval", ["--workers", -1], "--workers -1"),
        ("retrieval", ["--image-size", 50], "multiples of 16"),
        ("retrieval", ["--dataset", "ssv2"], "labels.json"),
        ("retrieval", ["--projection", "other.safetensors"], "cannot be combined with --run"),
    ],
)
def test_invalid_settings(
    task: str,
    words: list[Any],
    part: str,
    run: Path,
    ucf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["eval", task, *SMALL, "--run", run, "--root", ucf, "--output", tmp_path / "out", *words]
    assert main(list(map(str, command))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert part in error
