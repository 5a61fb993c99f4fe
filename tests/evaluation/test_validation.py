"""Validation during training: the score, the projection that a run keeps, and what it says."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from synthetic import SETTINGS, write_folders

from fasttrain.checkpoint import load_checkpoint
from fasttrain.data.loader import whole_frames
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import report, validation
from fasttrain.evaluation.trade_off import measure_video
from fasttrain.evaluation.validation import Validation, score
from fasttrain.loggers import read_records
from fasttrain.projection import LAST_PROJECTION_FILE, PROJECTION_FILE, Projection
from fasttrain.recipe import EvalRecipe, Recipe, recipe_from_dict
from fasttrain.summary import say_results
from fasttrain.trainer import Trainer
from fasttrain.training import train
from fasttrain.video_encoder import load_video_encoder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of eight or nine frames, and one that is too short for validation."""
    return write_folders(tmp_path_factory.mktemp("frames"), [8, 8, 9, 5, 8, 9])


def make_recipe(source: Path, output: Path, **sections: dict[str, Any]) -> Recipe:
    tree: dict[str, Any] = {
        "output": str(output),
        "device": "cpu",
        "backbone": {key: value for key, value in SETTINGS.items() if key != "image_size"},
        "data": {"source": str(source), "image_size": 64, "num_threads": 1},
        "optimizer": {"lr": 0.1},
        "train": {
            "steps": 4, "batch_size": 3, "precision": "fp32", "log_every": 2, "save_every": 1, "keep": 9,
            "tensorboard": False,
        },
        "eval": {"every": 1, "num_videos": 2, "num_frames": 8},
    }  # fmt: skip
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    return recipe_from_dict(tree)


def run(recipe: Recipe) -> None:
    trainer = Trainer(recipe, World.single())
    results = trainer.train()
    say_results(trainer.backbone_trainers, results, trainer.console)


def make_eval(**keys: Any) -> EvalRecipe:
    return recipe_from_dict({"eval": keys}).eval


def trained(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the projection in a checkpoint."""
    state: dict[str, torch.Tensor] = load_checkpoint(folder / "checkpoints", step)["projection"]
    return state


@pytest.fixture
def let_score(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Set the scores of the projections after 0, 1, 2, ... steps; that of the frozen features is 0."""

    def let(scores: list[float]) -> None:
        update, now = Validation.update, [None]

        def update_at(self: Validation, projection: Projection, completed_steps: int) -> Any:
            now[0] = completed_steps
            return update(self, projection, completed_steps)

        def score(_: Any) -> float:
            return 0.0 if now[0] is None else scores[now[0]]

        monkeypatch.setattr(Validation, "update", update_at)
        monkeypatch.setattr(validation, "score", score)
        # The frozen features are measured first in every run.
        begin = Trainer._begin_validation

        def begin_again(self: Trainer) -> None:
            now[0] = None
            begin(self)

        monkeypatch.setattr(Trainer, "_begin_validation", begin_again)

    return let


def assert_same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


# --- the measure ---------------------------------------------------------------------------------------


def test_the_score_is_the_cycle_accuracy_by_cosine_similarity() -> None:
    generator = torch.Generator().manual_seed(0)
    frame_ND = torch.randn(16, 8, generator=generator)
    # Tokens of any length that are alike in all frames are found again.
    tokens_TND = frame_ND * (0.1 + torch.rand(8, 16, 1, generator=generator))
    normalized_TND = torch.nn.functional.normalize(tokens_TND, dim=-1)
    assert score(tokens_TND) == measure_video(normalized_TND).within["cycle_accuracy"] == 1
    assert score(tokens_TND * torch.rand(8, 16, 1, generator=generator)) == 1
    # Tokens that are all alike return to one window.
    assert score(torch.ones(8, 16, 3)) == 1 / 4
    tokens_TND[2, 2] = math.nan
    assert math.isnan(score(tokens_TND))


# --- runs ----------------------------------------------------------------------------------------------


def test_metrics_are_recorded(videos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(videos, tmp_path, train={"precision": "bf16"})
    recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, every=3))
    train(recipe)
    records = read_records(tmp_path / "metrics.jsonl")
    validated = {record["step"]: record for record in records if "after/score" in record}
    # Before the first step, every third one, independently of `train.log_every`, and after the last one.
    assert list(validated) == [0, 3, 4]
    for variant in ("before", "centred", "after"):
        for key in (*validation.RECORDED, "score"):
            assert f"{variant}/{key}" in validated[3]
    # The backbone is frozen; only the projection changes.
    for variant, changes in {"before": False, "centred": False, "after": True}.items():
        name = f"{variant}/intra_normalized_95"
        assert (validated[0][name] != validated[4][name]) == changes
    assert (tmp_path / "figures" / "learning.png").is_file()


def test_the_best_projection_is_kept_and_the_last_one_stays(
    videos: Path, tmp_path: Path, let_score: Callable[[list[float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    let_score([0.1, 0.2, 0.9, 0.3, 0.9])
    run(make_recipe(videos, tmp_path))
    assert_same(load_file(tmp_path / PROJECTION_FILE), trained(tmp_path, 2))
    assert_same(load_file(tmp_path / LAST_PROJECTION_FILE), trained(tmp_path, 4))
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["best_step"] for record in records] == [0, 1, 2, 2, 2]
    assert json.loads((tmp_path / "train.json").read_text())["best_score"] == 0.9
    printed = " ".join(capsys.readouterr().out.split())
    assert "kept the projection after step 2 (score 0.900; frozen 0.000, without its mean 0.000)" in printed
    assert "did not improve" not in printed


def test_a_run_whose_last_projection_is_the_best_has_one_file(
    videos: Path, tmp_path: Path, let_score: Callable[[list[float]], None]
) -> None:
    let_score([0.1, 0.2, 0.3, 0.1, 0.4])
    run(make_recipe(videos, tmp_path))
    assert not (tmp_path / LAST_PROJECTION_FILE).exists()
    assert_same(load_file(tmp_path / PROJECTION_FILE), trained(tmp_path, 4))


def test_validation_does_not_change_training(videos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(videos, tmp_path / "with")
    run(recipe)
    without = dataclasses.replace(recipe, output=str(tmp_path / "without"), eval=make_eval(every=0))
    run(without)
    assert_same(*(trained(tmp_path / name, 4) for name in ("with", "without")))
    assert_same(load_file(tmp_path / "without" / PROJECTION_FILE), trained(tmp_path / "without", 4))


def test_a_run_that_loses_keeps_the_frozen_features_without_their_mean(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At this learning rate, all tokens soon become alike."""
    run(make_recipe(videos, tmp_path, optimizer={"lr": 1e4}, projection={"head": "mlp2"}))
    printed = " ".join(capsys.readouterr().out.split())
    assert "kept the frozen features with their mean removed, because no projection was better" in printed
    assert "did not improve its features; raise objective.lambda_reg, lower optimizer.lr" in printed
    assert "projection.init=frozen" not in printed  # It is the default.
    assert Projection.load(tmp_path / LAST_PROJECTION_FILE).head == "mlp2"
    records = read_records(tmp_path / "metrics.jsonl")
    assert records[-1]["best_step"] is None
    assert report._status(tmp_path, records).startswith("4 steps; keeps the frozen features")
    # A map of the form c (token - mean).
    encoder = load_video_encoder(tmp_path)
    (linear,) = encoder.projection.linears
    scale = linear.get_parameter("weight")[0, 0]
    torch.testing.assert_close(linear.get_parameter("weight"), scale * torch.eye(encoder.projection.dim))
    frames = torch.stack([*whole_frames(open_source(videos), 64)])
    mean = encoder.encoder.tokens(frames).mean(dim=(0, 1))
    torch.testing.assert_close(linear.get_parameter("bias"), -scale * mean)


class Crashing(Trainer):
    def train_step(self, step_index: int, *, diagnostics: bool) -> None:
        if step_index == 3:
            raise RuntimeError("crashed")
        super().train_step(step_index, diagnostics=diagnostics)


@pytest.mark.parametrize("scores", [[0.1, 0.9, 0.2, 0.3, 0.4], [-1, -0.5, -2, -3, -0.4]])
def test_a_resumed_run_keeps_what_an_uninterrupted_one_keeps(
    scores: list[float], videos: Path, tmp_path: Path, let_score: Callable[[list[float]], None]
) -> None:
    let_score(scores)
    whole, resumed = (make_recipe(videos, tmp_path / name) for name in ("whole", "resumed"))
    run(whole)
    with pytest.raises(RuntimeError, match="crashed"):
        Crashing(resumed, World.single()).train()
    run(resumed)
    for name in (PROJECTION_FILE, LAST_PROJECTION_FILE):
        assert_same(*(load_file(tmp_path / folder / name) for folder in ("whole", "resumed")))
    records = [
        [
            {key: value for key, value in record.items() if "second" not in key}
            for record in read_records(tmp_path / folder / "metrics.jsonl")
        ]
        for folder in ("whole", "resumed")
    ]
    assert records[0] == records[1]


def test_a_run_that_crashed_before_its_first_checkpoint_begins_again(videos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(videos, tmp_path, train={"save_every": 100})
    with pytest.raises(RuntimeError, match="crashed"):
        Crashing(recipe, World.single()).train()
    run(recipe)
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_scores_on_other_videos_are_not_compared(
    videos: Path,
    tmp_path: Path,
    let_score: Callable[[list[float]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    let_score([0.1, 0.9, 0.2, 0.3, 0.4])
    recipe = make_recipe(videos, tmp_path)
    with pytest.raises(RuntimeError, match="crashed"):
        Crashing(recipe, World.single()).train()
    run(dataclasses.replace(recipe, eval=make_eval(every=1, num_videos=3, num_frames=8)))
    assert "only projections after step 3 are compared" in capsys.readouterr().out
    assert read_records(tmp_path / "metrics.jsonl")[-1]["best_step"] == 4


# --- held-out videos -----------------------------------------------------------------------------------


def test_held_out_videos_are_validated_and_never_drawn(
    tmp_path: Path, let_score: Callable[[list[float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    let_score([0.1] * 5)
    source = write_folders(tmp_path / "frames", [8, 8, 9, 5, 8, 9])
    # Evenly spaced among those that are long enough.
    held_out = ["class_0/video_0", "class_1/video_5"]
    for name in held_out:
        for path in (source / name).iterdir():
            path.write_bytes(b"")
    recipe = make_recipe(source, tmp_path / "run", eval={"held_out": 2}, data={"max_bad_fraction": 1.0})
    trainer = Trainer(recipe, World.single())
    assert trainer.validated.names == held_out
    assert trainer.index.names == [f"class_{i % 2}/video_{i}" for i in (2, 4, 1, 3)]
    trainer.train()
    printed = capsys.readouterr().out
    assert "4 videos, 30 frames; 2 more held out" in " ".join(printed.split())
    assert "warning: no video can be validated, so the last projection will be kept" in printed
    record = read_records(tmp_path / "run/metrics.jsonl")[-1]
    assert record["bad_samples"] == 0
    assert "best_step" not in record


def test_a_run_is_not_resumed_with_other_videos_held_out(videos: Path, tmp_path: Path) -> None:
    run(make_recipe(videos, tmp_path, eval={"held_out": 2, "every": 4}))
    with pytest.raises(InputError, match=r"holds a run of another recipe \(eval.held_out: 2 -> 0\)"):
        Trainer(make_recipe(videos, tmp_path), World.single())


@pytest.mark.parametrize("number", [6, 7])
def test_too_many_held_out_videos_are_refused(number: int, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"eval.held_out: {number} is too many for 6 videos, of which 5 have"
    ):
        Trainer(make_recipe(videos, tmp_path, eval={"held_out": number}), World.single())
