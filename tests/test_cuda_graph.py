"""CUDA graphs compared with plain passes: on a GPU, and on a CPU with a pretended recording."""

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain import backbone_trainer, cuda_graph, distributed
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.cuda_graph import CapturedCall
from fasttrain.distributed import World
from fasttrain.errors import LocalInputError
from fasttrain.recipe import load_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "dino.yaml"
TINY = [
    "backbone.weights=random", "backbone.embed_dim=128", "backbone.depth=1", "data.image_size=64",
    "train.batch_size=4", "train.accumulate=1", "encoder.compile=none",
]  # fmt: skip

# Waits for the device in every pass, which no recording permits.
WAITING = """
import torch
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.distributed import World
from fasttrain.errors import LocalInputError
from fasttrain.recipe import load_recipe

run_pass = BackboneTrainer._run_pass

def waiting(self, *arguments, **keywords):
    losses = run_pass(self, *arguments, **keywords)
    losses.loss.item()
    return losses

BackboneTrainer._run_pass = waiting
recipe = load_recipe(RECIPE, [*TINY, "encoder.cuda_graph=true"])
trainer = BackboneTrainer(recipe, World.single(torch.device("cuda", 0)))
try:
    trainer.warm_up()
except LocalInputError as error:
    print("refused:", error)
else:
    print("continued:", trainer.graph_failure)
    frames = torch.randn(2, 4, 3, 64, 64).to("cuda", trainer.dtype)
    for step_index in range(3):
        trainer.forward_backward(frames, step_index, last=True, diagnostics=False)
        trainer.update(1e-3)
        torch.cuda.empty_cache()
    assert trainer.meter.first_non_finite(trainer.world) is None
"""


class PretendedGraph(TorchDispatchMode):
    """Runs and records operations on a CPU. Like a CUDA graph, `replay` repeats them on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*arguments, **(keywords or {}))
        self.operations.append((function, arguments, keywords or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, arguments, keywords, recorded in self.operations:
            repeated = function(*arguments, **keywords)
            for old, new in zip(tree_leaves(recorded), tree_leaves(repeated), strict=True):
                # A view, and the result of an operation in place, is up to date.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CUDA graphs be recorded on the CPU."""

    @contextmanager
    def record(graph: PretendedGraph, **_: Any) -> Iterator[None]:
        try:
            with graph:
                yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(backbone_trainer, "is_recordable", lambda device: True)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nullcontext,
        "set_stream": lambda stream: None,
        "synchronize": lambda: None,
        "CUDAGraph": PretendedGraph,
        "graph": record,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def make_trainer(world: World, *overrides: str, graph: bool) -> BackboneTrainer:
    recipe = load_recipe(RECIPE, [*TINY, f"encoder.cuda_graph={str(graph).lower()}", *overrides])
    trainer = BackboneTrainer(recipe, world)
    if trainer.runtime.awaits_calibration:
        trainer.calibrate(torch.randn(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    trainer.warm_up()
    assert trainer.graph_failure is None
    return trainer


def take_steps(trainer: BackboneTrainer, first: int, last: int) -> Tensor:
    """Take the steps from index `first` up to `last`; return the losses of each pass.

    Every third step has diagnostics, as if it was logged. The frames depend on the step and the pass only.
    """
    train, objective = trainer.recipe.train, trainer.recipe.objective
    for step_index in range(first, last):
        for number in range(train.accumulate):
            generator = torch.Generator().manual_seed(10 * step_index + number)
            size = trainer.recipe.data.image_size
            shape = (objective.frames, train.batch_size, 3, size, size)
            frames = torch.randn(shape, generator=generator)
            trainer.forward_backward(
                frames.to(trainer.world.device, train.dtype),
                step_index,
                last=number == train.accumulate - 1,
                diagnostics=step_index % 3 == 1,
                walk_frames=2 + step_index % 2 if objective.curriculum else None,
            )
        trainer.update(1e-3)
    return torch.stack(trainer.meter._losses).cpu()


def weights(trainer: BackboneTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.projection.parameters()]).cpu()


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.accumulate=2",),
        ("train.precision=fp16",),
        ("encoder.precision=fp8",),
        ("objective.weighting=gradnorm",),
        ("objective.weighting=constrained", "train.precision=fp16"),
        ("objective.frames=3",),
        ("objective.frames=3", "objective.curriculum=true"),
    ],
)
def test_pretended_graphs_equal_plain_passes(pretended: None, overrides: tuple[str, ...]) -> None:
    """Losses and projection are the same to the bit, also after a resume with or without graphs."""
    overrides = overrides or ("train.precision=fp32",)
    plain = make_trainer(World.single(), *overrides, graph=False)
    recorded = make_trainer(World.single(), *overrides, graph=True)
    whole = recorded._recorded_pass is not None
    assert whole == (overrides[-1] not in ("train.precision=fp16", "objective.curriculum=true"))
    assert whole or isinstance(recorded._encode, CapturedCall)
    assert torch.equal(take_steps(plain, 0, 4), take_steps(recorded, 0, 4))
    assert torch.equal(weights(plain), weights(recorded))
    losses = take_steps(plain, 4, 7)[-3 * plain.recipe.train.accumulate :]
    state = copy.deepcopy(recorded.state())
    for graph in (True, False):
        resumed = BackboneTrainer(recorded.recipe if graph else plain.recipe, World.single())
        resumed.load_state(copy.deepcopy(state))
        resumed.warm_up()
        assert torch.equal(take_steps(resumed, 4, 7), losses)
        assert torch.equal(weights(resumed), weights(plain))


def test_training_continues_without_a_graph_if_the_recording_fails(
    pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pass = BackboneTrainer._run_pass

    def waiting(self: BackboneTrainer, *arguments: Any, **keywords: Any) -> Any:
        losses = run_pass(self, *arguments, **keywords)
        losses.loss.item()
        return losses

    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(BackboneTrainer, "_run_pass", waiting)
    recipe = load_recipe(RECIPE, [*TINY, "encoder.cuda_graph=true", "train.precision=fp32"])
    trainer = BackboneTrainer(recipe, World.single())
    trainer.warm_up()
    assert trainer.graph_failure == "operation not permitted when stream is capturing"
    assert emptied
    plain = make_trainer(World.single(), "train.precision=fp32", graph=False)
    assert torch.equal(take_steps(trainer, 0, 3), take_steps(plain, 0, 3))


def test_a_process_that_cannot_continue_after_a_failed_recording_says_so(
    pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED\nmore")

    monkeypatch.setattr(cuda_graph.torch.cuda, "empty_cache", fail)
    monkeypatch.setattr(backbone_trainer, "CapturedCall", fail)
    recipe = load_recipe(RECIPE, [*TINY, "encoder.cuda_graph=true"])
    trainer = BackboneTrainer(recipe, World.single())
    with pytest.raises(LocalInputError, match=r"recording failed \(captures_underway\S+ INTERNAL") as caught:
        trainer.warm_up()
    assert "encoder.cuda_graph=false" in str(caught.value)


@pytest.mark.gpu
def test_a_captured_call_uses_its_new_inputs() -> None:
    weight = torch.randn(8, 8, device="cuda")
    call = CapturedCall(lambda x: x @ weight, (torch.zeros(4, 8, device="cuda"),))
    for _ in range(2):
        x = torch.randn(4, 8, device="cuda")
        assert torch.equal(call(x), x @ weight)


@pytest.mark.gpu
def test_a_failed_recording_is_survived_or_ends_the_run() -> None:
    """Which of the two depends on the version of PyTorch. In a process of its own, which may be unusable."""
    program = f"RECIPE, TINY = {str(RECIPE)!r}, {TINY}\n{WAITING}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr
    assert re.match("(continued|refused): .*captur", ended.stdout)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.accumulate=2",),
        ("train.precision=fp16",),
        ("encoder.compile=default",),
        ("encoder.precision=fp8",),
        ("encoder.precision=fp8", "encoder.compile=default"),
        ("objective.weighting=gradnorm",),
        ("objective.weighting=constrained", "train.precision=fp16"),
        ("objective.frames=3", "objective.sub_cycles=true"),
    ],
)
def test_recorded_steps_equal_plain_steps(overrides: tuple[str, ...]) -> None:
    """Steps with and without diagnostics give the same projection up to rounding errors."""
    if "encoder.precision=fp8" in overrides and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    with distributed.start("cuda") as world:
        plain, recorded = (make_trainer(world, *overrides, graph=graph) for graph in (False, True))
        start = weights(plain)
        losses = [take_steps(trainer, 0, 4) for trainer in (plain, recorded)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0.0)
    change = weights(plain) - start
    assert change.norm() > 0
    assert (weights(recorded) - weights(plain)).norm() < torch.finfo(torch.bfloat16).eps * change.norm()


@pytest.mark.gpu
def test_graphs_of_several_backbones_do_not_affect_each_other() -> None:
    """Two recorded trainers take turns, and each gives what it gives alone."""
    with distributed.start("cuda") as world:
        alone = make_trainer(world, graph=True)
        expected = take_steps(alone, 0, 3)
        one, other = make_trainer(world, graph=True), make_trainer(world, "seed=1", graph=True)
        for step_index in range(3):
            losses = take_steps(one, step_index, step_index + 1)
            take_steps(other, step_index, step_index + 1)
    torch.testing.assert_close(losses, expected, rtol=0.01, atol=0.0)
    assert not torch.equal(weights(one), weights(other))
