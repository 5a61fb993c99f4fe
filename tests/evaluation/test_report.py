"""The trade-off of one and of several runs, on the page and during training."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from synthetic import SETTINGS, write_frames, write_run

from fasttrain.__main__ import main
from fasttrain.evaluation import plots
from fasttrain.tools.synthetic import render_scene


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three frame folders of ten frames."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(3):
        write_frames(render_scene(number, num_frames=10, height=64, width=64), root / f"video{number}")
    return root


def test_trade_off_of_two_runs(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / f"run{seed}", seed=seed) for seed in (1, 2)]
    for run in runs:
        words = ["--run", str(run), "--root", str(videos), "--image-size", "64", "--device", "cpu"]
        assert main(["eval", "consistency", *words]) == 0
    drawn: list[tuple[str, dict[str, float], dict[str, float]]] = []
    draw = plots.trade_off

    def trade_off(points: Any, path: Any) -> Path:
        drawn.extend(points)
        return draw(points, path)

    monkeypatch.setattr(plots, "trade_off", trade_off)
    page = tmp_path / "pages" / "report.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    assert [name for name, _, _ in drawn] == ["run1", "run2"]
    measured = [
        json.loads((run / "eval" / "consistency" / "consistency.json").read_text())["results"] for run in runs
    ]
    assert [before for _, before, _ in drawn] == [one["before"] for one in measured]
    assert [after for _, _, after in drawn] == [one["after"] for one in measured]
    # One encoder, two projections.
    assert measured[0]["before"] == measured[1]["before"]
    assert measured[0]["after"] != measured[1]["after"]
    text = page.read_text()
    # The plot of both, and that of each run's own evaluation.
    assert len(re.findall("<p>trade_off</p><img", text)) == 3
    for run in runs:
        assert f"<h2>{run.name}: consistency" in text


def test_a_recipe_records_the_trade_off_while_it_trains(videos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    backbone = {key: value for key, value in SETTINGS.items() if key != "image_size"}
    recipe.write_text(
        json.dumps(
            {
                "output": str(run),
                "device": "cpu",
                "backbone": backbone,
                "data": {"source": str(videos), "image_size": 64, "num_threads": 1},
                "train": {
                    "steps": 5, "batch_size": 3, "precision": "bf16", "log_every": 3, "tensorboard": False,
                },
                "eval": {"every": 2, "num_videos": 2, "num_frames": 8},
            }
        )
    )  # fmt: skip
    assert main([str(recipe)]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = {record["step"]: record for record in records if "after/intra_normalized_95" in record}
    # Between the steps that are logged, too, and at the last one.
    assert list(validated) == [2, 4, 5]
    for variant in ("before", "after"):
        for key in ("intra_normalized_95", "inter_normalized_95", "cycle_accuracy", "effective_rank"):
            assert f"{variant}/{key}" in validated[4]
    # The backbone is frozen, the projection learns.
    assert validated[2]["before/intra_normalized_95"] == validated[4]["before/intra_normalized_95"]
    assert validated[2]["after/intra_normalized_95"] != validated[4]["after/intra_normalized_95"]
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert "Learning curves" in page.read_text()


def write_history(run: Path, text: str) -> Path:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(text)
    return run


def labels_drawn(page: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The legends of the page's plots."""
    legends: list[list[str]] = []
    save = plots.save_figure

    def save_figure(figure: Any, path: Any) -> Path:
        legends.extend([text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes)
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", save_figure)
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    return legends


def test_runs_called_alike_or_oddly_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n'
    runs = [write_history(tmp_path / name, history) for name in ("one/mae", "two/mae", "_a", "$\\frac$")]
    legends = labels_drawn(tmp_path / "page.html", [*runs, tmp_path / "one" / "." / "mae"], monkeypatch)
    assert legends == [[str(runs[0]), str(runs[1]), " _a", r"\$\frac\$"]]


def test_a_run_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    run = write_history(tmp_path / os.fsdecode(b"run\xff"), '{"step": 1, "loss": 2}\n')
    write_evaluation(run, evaluation())
    (tmp_path / "link").symlink_to("page.html")
    assert main(["report", str(run), "--output", str(tmp_path / "link")]) == 0
    assert "<h2>run?: davis" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_run_that_was_cut_off_while_it_wrote(tmp_path: Path) -> None:
    whole = '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n'
    run = write_history(tmp_path / "run", whole + '\n{"step": 3, "lo')
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0


def test_the_trade_off_leaves_out_a_run_measured_on_one_video(videos: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    words = ["--run", str(run), "--root", str(videos), "--image-size", "64", "--device", "cpu"]
    assert main(["eval", "consistency", *words, "--num-videos", "1"]) == 0
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert "Trade-off" not in page.read_text()
    assert "<td>inter_normalized_95</td><td>–</td>" in page.read_text()


def evaluation(task: str = "davis", **changes: Any) -> dict[str, Any]:
    """As `eval` writes it, but for what the page does not show."""
    model = {"backbone": "dino", "weights": "random"}
    results = {"before": {"J": 0.5}, "after": {"J": 0.6}}
    found = {"task": task, "model": model, "data": {"videos": 3}, "pictures": [], "results": results}
    return {**found, **changes}


def write_evaluation(run: Path, found: dict[str, Any]) -> Path:
    path = run / "eval" / found["task"] / f"{found['task']}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(found))
    return run


def test_figures_that_are_no_numbers_have_no_place_in_the_trade_off(tmp_path: Path) -> None:
    numbers = {"intra_normalized_95": 0.2, "inter_normalized_95": 0.5}
    results = {"before": numbers, "after": {**numbers, "inter_normalized_95": None}}
    run = write_evaluation(tmp_path / "run", evaluation("consistency", results=results))
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert "Trade-off" not in page.read_text()
    assert "<td>–</td>" in page.read_text()


def test_a_run_evaluated_before_its_first_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = write_history(tmp_path / "run", ""), tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(page)]) == 2
    assert "train some steps first" in capsys.readouterr().err
    write_evaluation(run, evaluation())
    # What a Mac leaves beside a file that it copies.
    (run / "eval" / "davis" / "._davis.json").write_bytes(b"\0\5\x16\7")
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert "run: davis" in page.read_text()
    assert "Learning curves" not in page.read_text()


DAMAGED = (
    {**evaluation(), "task": 3},
    evaluation(model={"backbone": "dino"}),
    evaluation(pictures=["../elsewhere.png"]),
    evaluation(pictures=[3]),
    evaluation(results={}),
    evaluation(results={"before": {"J": 0.5}, "after": {"F": 0.5}}),
    evaluation(results={"before": {"J": "<b>"}}),
    evaluation("consistency", data={}),
)


@pytest.mark.parametrize(
    "text", ['{"task": "davis", "resu', "[]", "3", '{"task": "davis"}', *map(json.dumps, DAMAGED)]
)
def test_a_damaged_evaluation_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "run" / "eval" / "davis" / "davis.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text(text)
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 2
    assert str(damaged) in capsys.readouterr().err


def test_no_file_in_place_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_history(tmp_path / "run", '{"step": 1, "loss": 2}\n')
    os.mkfifo(tmp_path / "pipe")
    for place, what in ((tmp_path, "a folder"), (tmp_path / "pipe", "no file")):
        assert main(["report", str(run), "--output", str(place)]) == 2
        assert f"--output {place} is {what}" in capsys.readouterr().err


def test_a_folder_without_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nothing").mkdir()
    assert main(["report", str(tmp_path / "nothing"), "--output", str(tmp_path / "page.html")]) == 2
    assert "holds neither metrics.jsonl nor eval" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
