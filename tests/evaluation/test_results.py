"""Tests of the JSON file and the table that an evaluation writes."""

import json
from pathlib import Path

import pytest
import torch

from fasttrain.evaluation.results import print_table, write_results


def test_table_title_is_not_parsed_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("weights[/b] [red]", {"before": {"J": float("nan")}})
    assert "weights[/b]" in capsys.readouterr().out


def test_json_has_versions_and_null_for_non_finite_numbers(tmp_path: Path) -> None:
    write_results(tmp_path / "davis.json", {"root": tmp_path, "J": [float("nan"), float("inf"), 0.1]})
    content = json.loads((tmp_path / "davis.json").read_text())
    assert torch.__version__.startswith(content["versions"]["torch"])
    assert (content["root"], content["J"]) == (str(tmp_path), [None, None, 0.1])
