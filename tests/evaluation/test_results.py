"""Tests of the results of evaluations: their files, the table, and how their metrics are read."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import SETTINGS

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.evaluation.results import (
    better,
    distinguish,
    find_results,
    format_value,
    identify,
    meaning,
    print_others,
    print_table,
    read_result,
    result_path,
    write_results,
)
from fasttrain.projection import Projection

RESULTS = {"before": {"J&F-Mean": 0.5, "J-Decay": 0.2}, "after": {"J&F-Mean": 0.6, "J-Decay": 0.1}}


@pytest.fixture(scope="module")
def encoder() -> Backbone:
    return load_backbone(**SETTINGS)


def write(folder: Path, encoder: Backbone, seed: int | None = 0, **settings: Any) -> Path:
    """Write the result of an evaluation of DAVIS with a projection, or without one if `seed` is None."""
    projection = Projection(encoder.embed_dim, seed=seed) if seed is not None else None
    identity = identify("davis", {"root": folder / "DAVIS", **settings}, encoder, projection)
    path = result_path(folder, identity)
    write_results(path, identity, {"results": RESULTS, "pictures": []}, torch.device("cpu"))
    return path


def test_only_a_repetition_replaces_a_result(tmp_path: Path, encoder: Backbone) -> None:
    first = write(tmp_path, encoder, year="2017", output=tmp_path / "one", cache=None)
    moved = {"output": tmp_path / "moved", "cache": tmp_path / "cache"}
    assert write(tmp_path, encoder, year="2017", **moved) == first
    listed = tmp_path / "list.txt"
    listed.write_text("a")
    with_list = write(tmp_path, encoder, list=listed)
    listed.write_text("b")
    others = [
        with_list,
        write(tmp_path, encoder, list=listed),
        write(tmp_path, encoder, year="2016"),
        write(tmp_path, encoder, year="2017", root=tmp_path / "other" / "DAVIS"),
        write(tmp_path, encoder, seed=1, year="2017"),
        write(tmp_path, encoder, seed=None, year="2017"),
        write(tmp_path, load_backbone(**SETTINGS, seed=7), year="2017"),
        # The run of a projection stores these values, so they are not among the settings.
        write(tmp_path, load_backbone(**SETTINGS, mean=(0.5, 0.5, 0.5)), year="2017"),
        write(tmp_path, load_backbone(**SETTINGS, activation="quick_gelu"), year="2017"),
    ]
    assert len({first, *others}) == 10
    assert find_results(tmp_path) == sorted([first, *others])
    for path in (first, *others):
        assert path.name.startswith("davis-DAVIS-")


def test_a_result_says_when_and_how_it_was_made(
    tmp_path: Path, encoder: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"root": Path("DAVIS"), "run": Path("run"), "topk": 7}
    identity = identify("davis", settings, encoder, Projection(encoder.embed_dim))
    path = result_path(tmp_path / "eval", identity)
    content = {"J": [float("nan"), float("inf"), 0.1], "results": RESULTS, "pictures": []}
    write_results(path, identity, content, torch.device("cpu"))
    content = json.loads(path.read_text())
    assert torch.__version__.startswith(content["versions"]["torch"])
    assert content["J"] == [None, None, 0.1]
    assert content["settings"] == {"root": str(tmp_path / "DAVIS"), "run": "run", "topk": 7}
    assert content["device"] == "cpu"
    assert content["date"].endswith("+00:00")
    assert len(content["model"]["projection_hash"]) == len(content["model"]["weights_hash"])
    assert read_result(path).values("J&F-Mean") == {"before": 0.5, "after": 0.6}


def test_the_name_of_a_data_set_does_not_leave_the_folder(tmp_path: Path, encoder: Backbone) -> None:
    for root in ("/", "..", "a b/$(c) d", "x" * 200):
        path = result_path(tmp_path, identify("davis", {"root": Path(root)}, encoder, None))
        assert path.parent == tmp_path
        assert set(path.name) & set(" $()/") == set()
        assert len(path.name) < 80


def test_other_results_of_the_benchmark_are_printed(
    tmp_path: Path, encoder: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, encoder, topk=7)
    print_others(path)
    assert capsys.readouterr().out == ""
    # As version 0.1.0 wrote it.
    old: dict[str, Any] = {
        "task": "davis",
        "model": {"backbone": "dino", "weights": "a.pth"},
        "settings": {"topk": 5},
    }
    (tmp_path / "davis").mkdir()
    old |= {"results": {"before": {"J&F-Mean": None}}, "pictures": []}
    (tmp_path / "davis" / "davis.json").write_text(json.dumps(old))
    (tmp_path / "damaged.json").write_text("{")
    write(tmp_path, encoder, topk=10)
    print_others(path)
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading == f"all results of davis in {tmp_path} (* this one):"
    assert len(lines) == 3
    assert lines[0].startswith("   no date           J&F-Mean -  davis/davis.json  topk=5")
    assert lines[0].endswith("weights=a.pth, projection=none")
    assert [line.split("topk=")[1].split(",")[0] for line in lines if line.startswith("*")] == ["7"]


def test_which_direction_is_better() -> None:
    names = ("J&F-Mean", "J-Decay", "intra_normalized_95", "inter_normalized_95", "intra_original", "R@1")
    assert list(map(better, names)) == ["higher", "lower", "lower", "higher", "", "higher"]
    assert "relative to" in meaning("intra_normalized_95")
    assert meaning("something else") == ""


def test_only_settings_that_differ_are_named() -> None:
    assert distinguish([{"year": "2016", "topk": 7}, {"year": "2017", "topk": 7}, {"topk": 7}]) == [
        "year=2016",
        "year=2017",
        "",
    ]


def test_names_of_metrics_are_not_parsed_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"before": {"class[/b] [red]": float("nan")}})
    assert "class[/b] [red]" in capsys.readouterr().out


def test_the_table_does_not_end_a_command_whose_output_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        print_table(RESULTS)


@pytest.mark.parametrize(
    ("metric", "shown"),
    [
        ("J", "0.1235"),
        ("PCK@0.1 wrist", "0.12"),
        ("R@5", "0.12"),
        ("20-NN top-1", "0.12"),
        ("mAP@0.5", "0.12"),
    ],
)
def test_percentages_have_two_decimals(metric: str, shown: str) -> None:
    assert format_value(0.123456, metric) == shown
    assert format_value(0.123456, metric, "difference") == f"+{shown}"
