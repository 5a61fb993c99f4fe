"""How processes join a run."""

import dataclasses
from datetime import timedelta

import pytest
import torch.distributed as dist

from fasttrain import distributed
from fasttrain.distributed import World


def test_processes_wait_for_one_another_longer_than_nccl_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares of an evaluation may end more than its ten minutes apart."""
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with distributed.start("cpu"):
        pass
    assert given["timeout"] >= timedelta(hours=1)


def test_every_item_is_in_one_shard() -> None:
    worlds = [dataclasses.replace(World.single(), rank=rank, size=3) for rank in range(3)]
    assert [world.shard(range(5)) for world in worlds] == [[0, 3], [1, 4], [2]]
    assert World.single().shard("ab") == ["a", "b"]
