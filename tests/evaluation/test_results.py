"""What is written and printed of an evaluation."""

import json
from pathlib import Path

import pytest
import torch

from fasttrain.evaluation.results import print_table, write_results


def test_a_path_that_looks_like_markup_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("weights[/b] [red]", {"before": {"J": float("nan")}})
    assert "weights[/b]" in capsys.readouterr().out


def test_json_has_versions_and_no_nan(tmp_path: Path) -> None:
    write_results(tmp_path / "davis.json", {"root": tmp_path, "J": [float("nan"), float("inf"), 0.1]})
    found = json.loads((tmp_path / "davis.json").read_text())
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert (found["root"], found["J"]) == (str(tmp_path), [None, None, 0.1])
