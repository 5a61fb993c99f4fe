"""What the evaluation tasks share."""

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fasttrain.distributed import World
from fasttrain.evaluation.model import gather, print_comparison, write_figures


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


def test_figures_are_written_where_the_project_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkout on the search path alone, after an evaluation that may have taken hours."""
    installed = metadata.version

    def version(name: str) -> str:
        if name == "fasttrain":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    write_figures(tmp_path / "davis.json", {"seconds": 1.0})
    found = json.loads((tmp_path / "davis.json").read_text())
    assert found["seconds"] == 1.0
    assert found["versions"]["torch"] == installed("torch")
    assert "fasttrain" not in found["versions"]
