"""What the evaluation tasks share."""

from pathlib import Path

import pytest
import torch

from fasttrain.distributed import World
from fasttrain.evaluation.harness import gather, print_comparison


def test_what_a_broken_run_left_costs_the_next_nothing(tmp_path: Path) -> None:
    """A run of more processes wrote its shares and was cut off."""
    (tmp_path / ".parts").mkdir()
    (tmp_path / ".parts" / "3.json").write_text('{"old": 1}')
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    assert gather({"b": 2, "a": 1}, tmp_path, world) == {"a": 1, "b": 2}
    assert not (tmp_path / ".parts").exists()


def test_a_path_that_looks_like_markup_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison("weights[/b] [red]", {"before": {"J": float("nan")}})
    assert "weights[/b]" in capsys.readouterr().out
