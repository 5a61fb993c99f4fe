"""Communication among ranks that are simulated in one process."""

import dataclasses

import pytest
from synthetic import OneOfTwo

from fasttrain.distributed import World
from fasttrain.errors import InputError


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
