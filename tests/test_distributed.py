"""Communication among ranks: simulated ones, and a group of a single rank."""

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from synthetic import OneOfTwo

from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.recipe import recipe_from_dict

DEVICES = [
    pytest.param("cpu", "gloo", id="gloo"),
    pytest.param("cuda", "nccl", id="nccl", marks=pytest.mark.gpu),
]
# A rank of a run on the device in argv fails while its device is busy, and its exit hangs. The group has one
# rank, because NCCL refuses two on one GPU.
HANGING = """
import atexit, os, sys, time
import torch
import torch.distributed as dist
from fasttrain import distributed

device, backend = sys.argv[1:]
store = dist.HashStore()
dist.init_process_group(backend, store=store, rank=0, world_size=1)
values = torch.ones(4, device=device)
dist.all_reduce(values)
distributed._join = lambda: store
dist.init_process_group = lambda *_, **__: None
distributed.EXIT_SECONDS = 2
os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
with distributed.start(device):
    if device == "cuda":
        torch.cuda._sleep(2**38)  # cycles, more than two minutes
        dist.all_reduce(values)
    else:
        atexit.register(time.sleep, 600)
    raise RuntimeError("planted fault")
"""


def fail() -> None:
    raise InputError("not found")


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    assert OneOfTwo(None).run_on_all(lambda: 5) == 5
    for world, function in [(OneOfTwo(None), fail), (OneOfTwo("not found"), lambda: 5)]:
        with pytest.raises(InputError, match="not found"):
            world.run_on_all(function)


def test_values_that_differ_between_ranks_are_refused() -> None:
    OneOfTwo([1]).check_same([1], "the files")
    with pytest.raises(InputError, match="the files: ranks 0 and 1 differ"):
        OneOfTwo([2]).check_same([1], "the files")


def test_every_item_is_in_exactly_one_shard() -> None:
    worlds = [dataclasses.replace(World.single(), rank=rank, size=3) for rank in range(3)]
    assert [world.shard(range(5)) for world in worlds] == [[0, 3], [1, 4], [2]]
    assert World.single().shard("ab") == ["a", "b"]


@contextmanager
def group_of_one(device: str, backend: str) -> Iterator[World]:
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield dataclasses.replace(World.single(torch.device(device, 0)), store=store)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("device", "backend"), DEVICES)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_group_of_one_trains_as_a_single_process(device: str, backend: str, cuda_graph: bool) -> None:
    """Two micro-batches per step, whose gradients are averaged in the second; meters are averaged, too."""
    recipe = recipe_from_dict(
        {
            "device": device,
            "backbone": {"name": "dino", "embed_dim": 64, "depth": 1},
            "data": {"image_size": 64},
            "encoder": {"compile": "none", "cuda_graph": cuda_graph},
            "train": {"batch_size": 4, "accumulate": 2},
        }
    )

    def trained(world: World) -> tuple[dict[str, float], torch.Tensor]:
        trainer = BackboneTrainer(recipe, world)
        trainer.warm_up()
        assert trainer.graph_failure is None
        for step_index in range(3):
            for number in range(2):
                generator = torch.Generator().manual_seed(2 * step_index + number)
                frames = torch.randn(2, 4, 3, 64, 64, generator=generator).to(device, trainer.dtype)
                trainer.forward_backward(frames, step_index, last=number == 1, diagnostics=step_index == 2)
            trainer.update(1e-3)
        assert trainer.meter.first_non_finite(world) is None
        world.barrier()
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.projection.parameters()])
        return trainer.meter.read(world), weights

    with group_of_one(device, backend) as world:
        metrics, weights = trained(world)
        assert world.gather({"rank": 0}) == [{"rank": 0}]
        assert world.run_on_all(lambda: 5) == 5
    expected, expected_weights = trained(World.single(torch.device(device, 0)))
    assert metrics == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), DEVICES)
def test_a_rank_that_fails_ends_even_if_its_exit_hangs(device: str, backend: str) -> None:
    command = [sys.executable, "-c", HANGING, device, backend]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert "planted fault" in ended.stderr
    assert ended.returncode == -signal.SIGALRM or (device == "cuda" and ended.returncode == 1)
