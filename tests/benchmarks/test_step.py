"""Tests that the baseline computes the same losses as fasttrain, and that every section runs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step as benchmark
from benchmarks.baseline import BaselineStep
from benchmarks.measure import Results, command_line
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.distributed import World
from fasttrain.encoder_runtime import fuse_gelu
from fasttrain.recipe import Recipe

RECIPE = str(Path(__file__).resolve().parents[2] / "recipes" / "dino.yaml")
TINY = ["backbone.embed_dim=64", "backbone.depth=2", "data.image_size=64", "train.batch_size=3"]
TINY += ["train.precision=fp32", "encoder.compile=none"]


@pytest.mark.parametrize("regularizer", ["kl", "mse"])
def test_the_baseline_computes_the_same_losses(regularizer: str) -> None:
    """With the same positions, the loss and diagnostics of an untrained head agree up to rounding."""
    overrides = [*TINY, "device=cpu", f"objective.regularizer={regularizer}"]
    recipe = benchmark.read_recipe(RECIPE, overrides)
    frames = torch.randn(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = BackboneTrainer(recipe, World.single())
    baseline = BaselineStep(recipe, torch.device("cpu"))
    baseline.head.load_state_dict(ours.projection.state_dict())
    loss, accuracy, similarity = baseline(frames, ours.asymmetric_positions(7))
    ours.forward_backward(frames, 7, last=True, diagnostics=True)
    readings = ours.meter.read(World.single())
    assert loss == pytest.approx(readings["loss"], rel=1e-5)
    assert accuracy == pytest.approx(readings["cycle_accuracy"])
    assert similarity == pytest.approx(readings["identity_similarity"], rel=1e-4)
    # The step reduces the loss, and its random positions are a crop that fasttrain could draw.
    assert baseline(frames, ours.asymmetric_positions(7))[0] < loss
    torch.manual_seed(0)
    crop = baseline.asymmetric_positions()
    torch.manual_seed(0)
    row, column = torch.randint(0, ours.encoder.asymmetric_range(10.0), (2,)).tolist()
    assert torch.equal(crop, ours.encoder.asymmetric_positions(ratio=10.0, offset=(row, column)))
    # 2 L (4 D^2 + 8 D^2) + 4 L^2 D per block and view with L tokens, plus the patch embedding of two frames.
    blocks = 2 * (24 * 17 * 64**2 + 4 * 17**2 * 64)
    flops = 3 * blocks + 2 * 16 * 2 * 3 * 16**2 * 64
    assert benchmark.encoder_flops(ours, frames, ours.asymmetric_positions(0)) == flops
    fuse_gelu(ours.encoder.blocks)
    assert benchmark.encoder_flops(ours, frames, ours.asymmetric_positions(0)) == flops


@pytest.mark.parametrize(
    ("sections", "size"),
    [
        (["steps", "parts", "switches", "scaling"], 64),
        pytest.param(["training", "end_to_end"], 224, marks=pytest.mark.slow),
    ],
)
def test_every_section_runs(tmp_path: Path, sections: list[str], size: int) -> None:
    out = tmp_path / "step.json"
    options = ["--short", "--device", "cpu", "--out", str(out), "--only", *sections]
    benchmark.main([RECIPE, *TINY, f"data.image_size={size}", *options])
    content = json.loads(out.read_text())
    assert content["skipped"] == {}
    assert content.keys() >= set(sections)
    assert out.with_suffix(".trace.json").exists() == ("training" in sections)


def test_the_times_to_start_are_measured_in_new_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last way to start finds the caches of another."""
    found = []

    def count(function: Any, recipe: Recipe, _: Results, *, seconds: float) -> float:
        assert function is benchmark.start_seconds
        assert seconds > 0
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        found.append((recipe.encoder.compile, cache.exists()))
        cache.mkdir(parents=True, exist_ok=True)
        return 1.0

    monkeypatch.setattr(benchmark, "in_own_process", count)
    arguments = command_line("step", "").parse_args(["--device", "cpu", "--out", str(tmp_path / "out.json")])
    recipe = benchmark.read_recipe(RECIPE, [*TINY, "device=cpu"])
    run = benchmark.Run(recipe, World.single(), Results("step", arguments), short=True)
    assert benchmark.starts(run) == {"not compiled": 1.0, "compiled": 1.0, "compiled, cached": 1.0}
    assert found == [("none", False), ("default", False), ("default", True)]
    assert benchmark.start_seconds(recipe, run.results) > 0
