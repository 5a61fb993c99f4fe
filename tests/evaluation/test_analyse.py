"""The command `fasttrain analyse` on synthetic videos."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import make_scene, result_of, write_frames, write_run

from fasttrain.__main__ import main
from fasttrain.data.preprocessing import centre_crop
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.evaluation import command, plots
from fasttrain.projection import PROJECTION_FILE, Projection
from fasttrain.video_encoder import load_video_encoder

OPTIONS = ("--pairs", "2", "--image-size", "64", "--device", "cpu")
LENGTHS = (9, 8, 5, 9, 12, 10)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frame folders, one of which is too short."""
    root = tmp_path_factory.mktemp("videos")
    for seed, length in enumerate(LENGTHS):
        write_frames(make_scene(seed, length), root / f"video_{seed}")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """A run that was trained on these videos."""
    run = write_run(tmp_path_factory.mktemp("runs") / "run")
    projection = Projection.load(run / PROJECTION_FILE)
    recipe = {"data": {"source": str(videos)}}
    projection.save(run / PROJECTION_FILE, {**projection.metadata, "recipe": json.dumps(recipe)})
    return run


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plots.STYLE, "savefig.dpi", 30)


def analyse(*words: Any) -> int:
    return main(["analyse", *map(str, words), *OPTIONS])


def mutual_differences(run: Path, root: Path) -> tuple[np.ndarray, ...]:
    """Compute tr N / tr W before and after the projection of a run, pair by pair."""
    model = load_video_encoder(run)
    index = open_source(root)
    squares, spreads = ([], []), ([], [])
    for video, length in enumerate(index.num_frames):
        gap = int(0.15 * length)
        for first in (0, int(length) - gap - 1) if length >= 8 else ():
            frames = [
                centre_crop(index.read_frame(video, number), 64, model.encoder.mean, model.encoder.std)
                for number in (first, first + gap)
            ]
            with torch.inference_mode():
                frozen_2ND = model.encoder.tokens(torch.stack(frames))
                projected_2ND = model.projection(frozen_2ND)
            unit_2ND = torch.nn.functional.normalize(frozen_2ND, dim=-1)
            similarity_NN = (unit_2ND[0] @ unit_2ND[1].T).numpy()
            for variant, both_2ND in enumerate((frozen_2ND.double().numpy(), projected_2ND.double().numpy())):
                spreads[variant].append(both_2ND.var(axis=1).sum(-1).mean())
                for i, row in enumerate(similarity_NN):
                    j = row.argmax()
                    if similarity_NN[:, j].argmax() == i:
                        squares[variant].append(((both_2ND[0, i] - both_2ND[1, j]) ** 2).sum() / 2)
    return tuple(np.mean(squares[i]) / np.mean(spreads[i]) for i in range(2))


def test_a_run_is_analysed_on_the_videos_of_its_training(
    run: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyse("--run", run) == 0
    path = result_of(run / "eval", "analyse")
    content = json.loads(path.read_text())
    before, after, difference = (content["results"][name] for name in ("before", "after", "difference"))
    expected = mutual_differences(run, videos)
    assert (before["intra_relative"], after["intra_relative"]) == pytest.approx(expected, rel=1e-4)
    assert difference["inter_relative"] == pytest.approx(after["inter_relative"] - before["inter_relative"])
    assert content["data"]["videos"] == 5
    assert content["data"]["skipped"] == ["video_2: fewer than 8 frames"]
    curve, held_out = content["curve"], content["curve_held_out"]
    for point in (curve[0], held_out[0]):
        # JSON has no infinity.
        assert list(point.values()) == [None, 1, 1, 1]
    assert 0 < curve[-1]["intra_relative"] < curve[1]["intra_relative"] < 1
    assert held_out[-1]["intra_relative"] > curve[-1]["intra_relative"]
    assert (path.with_suffix("") / "figures/predicted_trade_off.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "Mardia's skewness" in printed
    assert printed.splitlines()[-1] == content["verdict"]["sentence"]
    assert main(["report", str(run), "--output", str(run.parent / "report.html")]) == 0
    assert "analyse" in (run.parent / "report.html").read_text()


def test_two_processes_find_what_one_does(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    class Rank(World):
        """Rank 1 stores what it sends, and rank 0 receives it."""

        def gather(self, value: Any) -> list[Any]:
            if self.rank == 0:
                return [value, sent.pop(0)]
            sent.append(value)
            return [value]

    words = (videos, "--run", run, "--output", tmp_path)
    assert analyse(*words) == 0
    path = result_of(tmp_path, "analyse")
    expected = json.loads(path.read_text())
    path.unlink()
    for rank in (1, 0):
        world = Rank(rank=rank, size=2, cores=1, device=torch.device("cpu"))
        monkeypatch.setattr(command.distributed, "start", lambda _, world=world: nullcontext(world))
        assert analyse(*words) == 0
        assert path.exists() == (rank == 0)
    content = json.loads(path.read_text())
    assert content["data"] == expected["data"]
    for part in ("results", "normality", "commutation", "overlap"):
        for name, value in expected[part].items():
            assert content[part][name] == pytest.approx(value, rel=1e-9), name
    assert content["verdict"]["sentence"] == expected["verdict"]["sentence"]


def test_bad_input(run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, still = tmp_path / "few", tmp_path / "still"
    for seed in range(3):
        write_frames(make_scene(seed, 8), few / str(seed))
    scene = make_scene(0, 8)
    scene.frames_THWC[:] = scene.frames_THWC[0]
    for number in range(4):
        write_frames(scene, still / str(number))
    untold = write_run(tmp_path / "untold")
    for words, message in (
        ((few, "--run", run), "3 videos can be analysed; expected at least 4 with 8 frames or more"),
        ((still, "--run", run), "matching tokens or videos do not differ"),
        (("--backbone", "test_vit"), "SOURCE is missing"),
        (("--run", untold), "does not say what it was trained on. Pass videos as SOURCE"),
        ((tmp_path / "absent", "--run", run), "absent' does not exist"),
        ((videos, "--run", run, "--num-videos", "3"), "--num-videos 3: expected at least 4"),
    ):
        assert analyse(*words, "--output", tmp_path) == 2
        assert message in capsys.readouterr().err
