"""The peer does the same maths as fasttrain, and figures are computed as they say; no timing is judged."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step as benchmark
from benchmarks.baseline import BaselineStep
from benchmarks.measure import Timing, cpu_seconds, interleave, speedup
from benchmarks.step import Run, encoder_flops, fp8_error, read_recipe, scaling, stepper, switches
from fasttrain import distributed
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.distributed import World
from fasttrain.recipe import Recipe

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def tiny(*overrides: str) -> Recipe:
    sizes = [
        "backbone.embed_dim=64",
        "backbone.depth=2",
        "data.image_size=64",
        "train.batch_size=3",
        "device=cpu",
        "train.precision=fp32",
        "encoder.compile=none",
    ]
    return read_recipe(str(ROOT / "recipes" / "dino.yaml"), [*sizes, *overrides], small=True)


def student(recipe: Recipe) -> BackboneTrainer:
    with distributed.start("cpu") as world:
        return BackboneTrainer(recipe, world)


@pytest.mark.parametrize("regularizer", ["kl", "mse"])
def test_the_peer_computes_the_same_loss(regularizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the positions of our step, loss and accuracy of the untrained head agree to rounding."""
    recipe = tiny(f"objective.regularizer={regularizer}")
    ours = student(recipe)
    frames = torch.randn(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    peer = BaselineStep(recipe, device=CPU, dtype=torch.float32)
    peer.head.load_state_dict(ours.projection.state_dict())
    monkeypatch.setattr(peer, "_asymmetric_positions", lambda: ours.positions(7))
    loss, accuracy, similarity = peer(frames)
    ours.forward_backward(frames, 7, last=True, diagnostics=True)
    readings, _ = ours.meter.read(World.single())
    assert loss == pytest.approx(readings["loss"], rel=1e-5)
    assert accuracy == pytest.approx(readings["cycle_accuracy"])
    assert similarity == pytest.approx(readings["identity_similarity"], rel=1e-4)


def test_the_peers_positions_are_a_crop_of_ours() -> None:
    recipe = tiny()
    ours, peer = student(recipe), BaselineStep(recipe, device=CPU, dtype=torch.float32)
    torch.manual_seed(0)
    crop = peer._asymmetric_positions()
    torch.manual_seed(0)
    row, column = torch.randint(0, ours.encoder.asymmetric_range(10.0), (2,)).tolist()
    assert torch.equal(crop, ours.encoder.asymmetric_positions(ratio=10.0, offset=(row, column)))


def test_both_learn() -> None:
    recipe = tiny()
    ours, peer = student(recipe), BaselineStep(recipe, device=CPU, dtype=torch.float32)
    frames = torch.randn(2, 3, 3, 64, 64)
    step = stepper(ours, frames)
    before = [p.clone() for p in ours.projection.parameters()]
    step()
    assert not all(torch.equal(a, b) for a, b in zip(before, ours.projection.parameters(), strict=True))
    losses = [peer(frames)[0] for _ in range(20)]
    assert losses[-1] < losses[0]


def test_flops_are_those_of_the_formula() -> None:
    """2 L (4 D^2 + 8 D^2) + 4 L^2 D a block and view, and the patches of two frames."""
    width, depth, tokens, patches = 64, 2, 17, 16
    blocks = depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    expected = 3 * blocks + 2 * patches * 2 * 3 * 16**2 * width
    flops = encoder_flops(student(tiny()), torch.randn(2, 3, 3, 64, 64))
    assert flops == expected


def test_fp8_costs_more_than_bf16_and_little() -> None:
    with distributed.start("cpu") as world:
        error = fp8_error(Run(tiny(), world, short=True))
    assert 0 < error["bf16_tokens"] < error["fp8_tokens"] < 2**-4
    assert error["fp8_loss"] < 2**-4


def test_nothing_is_begun_when_time_is_over() -> None:
    with distributed.start("cpu") as world:
        run = Run(tiny(), world, short=True, seconds=0)
        assert run.attempt("parts", dict) is None
        assert switches(run) == {}
    assert run.failed == {}
    assert run.left_out["parts"] == run.left_out["switches, as it is"] == "out of time"


def test_the_recipe_as_it_is_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, int, int]] = []

    def cost(run: Run, recipe: Recipe, count: int) -> dict[str, float]:
        measured.append((recipe.train.batch_size, recipe.data.image_size, count))
        return {"ms": 1.0}

    monkeypatch.setattr(benchmark, "step_cost", cost)
    monkeypatch.setattr(benchmark, "depth_beside_the_peer", lambda run, depth: {})
    with distributed.start("cpu") as world:
        rows = scaling(Run(tiny("train.batch_size=4", "data.image_size=224"), world, short=True))
    assert [[row["ms"] for row in rows[key]] for key in ("backbones", "batch", "resolution")] == [
        [1.0, 1.0]
    ] * 3
    assert len(measured) == len(set(measured)) == 4


def test_contenders_take_turns_both_ways() -> None:
    calls: list[str] = []
    contenders: dict[str, Any] = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = interleave(contenders, rounds=2, calls=2, device=CPU)
    assert "".join(calls[4:]) == "aabb" + "bbaa"
    assert all(len(timing.wall) == len(timing.cpu) == 2 for timing in timings.values())


def test_speedup_is_taken_round_by_round() -> None:
    slow, fast = Timing([4.0, 9.0, 2.0], [2.0, 2.0, 2.0]), Timing([2.0, 3.0, 2.0], [1.0, 1.0, 1.0])
    assert speedup(slow, fast) == {"wall": 2.0, "wall_least": 1.0, "wall_most": 3.0, "cpu": 2.0}
    assert fast.result(4)["pairs_per_second"] == 2.0
    assert fast.result(4, calls=2)["pairs_per_second"] == 4.0
    assert fast.result(4, calls=2)["ms"] == 1000.0


def test_cpu_time_counts_living_workers() -> None:
    begun = cpu_seconds()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(sum, range(3_000_000)).result()
        alive = cpu_seconds() - begun
    # Starting an interpreter alone takes several ticks of the kernel's clock.
    assert alive > 0.02


def test_committed_results_are_whole() -> None:
    found = sorted((ROOT / "benchmarks" / "results").glob("throughput-*.json"))
    for path in found:
        content = json.loads(path.read_text())
        assert {"environment", "ceilings", "steps"} <= content.keys()
        # On a lent GPU time may run out; what failed is not for keeping.
        reasons = ("the run ended before", "out of time")
        ended = {name for name, reason in content["skipped"].items() if reason in reasons}
        assert {"parts", "switches", "scaling"} <= content.keys() | ended
    assert found
