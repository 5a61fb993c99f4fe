"""What is written and printed of an evaluation."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from fasttrain.evaluation.results import print_table, write_results


def test_a_path_that_looks_like_markup_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("weights[/b] [red]", {"before": {"J": float("nan")}})
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
    write_results(tmp_path / "davis.json", {"seconds": 1.0})
    found = json.loads((tmp_path / "davis.json").read_text())
    assert found["seconds"] == 1.0
    assert found["versions"]["torch"] == installed("torch")
    assert "fasttrain" not in found["versions"]
