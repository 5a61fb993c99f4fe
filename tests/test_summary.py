"""What a run prints before and after training."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_folders
from test_trainer import Interrupted, crash, tiny

from fasttrain.options import new_parser
from fasttrain.recipe import Recipe, recipe_from_dict
from fasttrain.summary import run_warnings, what_to_change
from fasttrain.training import train


def test_the_first_and_last_lines_describe_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = write_folders(tmp_path / "frames", [8] * 6)
    recipe = tiny(frames, tmp_path, optimizer={"lr": 1e-4}, objective={"frames": 3, "lambda_reg": 1.0})
    with pytest.raises(RuntimeError, match="crashed"):
        Interrupted(recipe, 3, crash).train()
    out = capsys.readouterr().out
    for line in (
        "  objective      lambda_reg=1.0, frames=3",
        "  epoch          6 pairs = 6 videos x 1 pair",
        "  global batch   4 pairs = batch_size 4 x accumulate 1 x 1 process",
        "  training       4 steps = 2.67 epochs, warm-up 1",
        "  learning rate  1.6e-06 at its peak = 0.0001 x 4 / 256",
        "warning: the learning rate for a global batch of 4, 1.6e-06, is far below the 0.0002 of the paper; "
        "raise train.accumulate, or optimizer.lr to 0.013",
    ):
        assert f"{line}\n" in out
    # A long path wraps the line.
    assert f"data {frames}: 6 videos, 48 frames epoch" in " ".join(out.split())
    assert "warning: a run of 4 steps is short" in out
    train(recipe)
    out = capsys.readouterr().out
    assert "  training       resuming after 2 of 4 steps = 2.67 epochs" in out
    assert "trained 8 pairs in 0:00:" in out
    assert f"  projection       {tmp_path}/projection.safetensors\n" in out
    command = next(line for line in out.splitlines() if line.startswith("  python -i -c "))
    code = f'import fasttrain; encoder = fasttrain.load_video_encoder("{tmp_path}")'
    assert shlex.split(command) == ["python", "-i", "-c", code]
    commands = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("  fasttrain ")]
    for name, *words in commands:
        new_parser(name).parse_args(words)
    assert [words[0] for words in commands] == ["eval", "report"]


@pytest.mark.parametrize(
    ("peak_lr", "steps", "parts"),
    [
        (1e-3, 99, ["a run of 99 steps is short"]),
        (1e-2, 100, []),
        (
            0.1,
            100,
            [
                "the learning rate for a global batch of 16, 0.1, is far above the 0.003 of the demo; lower "
                "optimizer.lr to 0.048 or less"
            ],
        ),
    ],
)
def test_only_settings_far_from_the_recipes_are_warned_about(
    peak_lr: float, steps: int, parts: list[str]
) -> None:
    recipe = recipe_from_dict({"backbone": {"weights": "timm://x"}})
    warnings = list(run_warnings(recipe, 16, peak_lr, steps))
    assert len(warnings) == len(parts)
    assert all(part in warning for part, warning in zip(parts, warnings, strict=True))


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"objective": {"frames": 3, "sub_cycles": True}, "eval": {"held_out": 2, "every": 1}}, []),
        ({"objective": {"frames": 6}, "data": {"gap": 0.2}}, []),
        ({"objective": {"frames": 7}, "data": {"gap": 0.2}}, ["data.gap=0.2 need more than a video"]),
        ({"objective": {"curriculum": True}}, ["objective.curriculum do nothing with 2 frames"]),
        ({"objective": {"separability_limit": 0.2}}, ["does nothing with objective.weighting=fixed"]),
        ({"objective": {"separability_limit": 0.2, "weighting": "constrained"}}, []),
        ({"eval": {"held_out": 2, "every": 0}}, ["eval.held_out=2 only leaves videos out"]),
        (
            {"backbones": [{"name": "dino"}, {"name": "mae", "weights": "timm://x"}]},
            ["the weights of dino are random"],
        ),
    ],
)
def test_settings_without_effect_are_warned_about(keys: dict[str, Any], parts: list[str]) -> None:
    recipe = recipe_from_dict({"backbone": {"weights": "timm://x"}, **keys})
    warnings = list(run_warnings(recipe, 128, 1e-3, 1000))
    assert len(warnings) == len(parts)
    assert all(part in warning for part, warning in zip(parts, warnings, strict=True))


def test_the_advice_after_training_in_vain_suits_the_recipe() -> None:
    constrained = recipe_from_dict({"objective": {"weighting": "constrained"}})
    assert what_to_change(constrained, False).startswith("lower objective.separability_limit, lower optim")
    assert "projection.init=frozen" in what_to_change(Recipe(), False)
    assert "projection.init=frozen" not in what_to_change(Recipe(), True)
    given = recipe_from_dict({"projection": {"weights": "runs/fit"}})
    assert "projection.init=frozen" not in what_to_change(given, False)
