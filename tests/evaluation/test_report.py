"""The page that gathers runs: curves, trade-off, tables, pictures and films, and nothing from elsewhere."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from synthetic import MODEL, SMALL, write_davis, write_jhmdb, write_projection, write_run, write_videos

from fasttrain.__main__ import main
from fasttrain.evaluation import plots

WRITERS = {"davis": write_davis, "jhmdb": write_jhmdb}


def report(page: Path, *runs: Path) -> int:
    return main(["report", *map(str, runs), "--output", str(page)])


def test_a_run_with_everything(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": step, "loss": 1 / step, "after/cycle_accuracy": 0.1 * step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    head = write_projection(tmp_path / "projection.safetensors")
    for task, write in WRITERS.items():
        root = write(tmp_path / task)
        words = ("--root", str(root), "--output", str(run / "eval" / task), "--projection", str(head))
        assert main(["eval", task, *words, *MODEL, *SMALL[task], "--pictures", "1"]) == 0
    videos = write_videos(tmp_path / "videos")
    words = ("--root", str(videos), "--output", str(run / "eval/consistency"), "--projection", str(head))
    assert main(["eval", "consistency", *words, *MODEL, "--image-size", "64"]) == 0

    page = tmp_path / "page" / "report.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    text = page.read_text()
    for heading in ("Learning curves", "Trade-off", "run: davis", "run: jhmdb", "run: consistency"):
        assert f"<h2>{heading}" in text
    for task in WRITERS:
        shown = sorted((run / "eval" / task / "figures").iterdir())
        assert {path.name for path in shown} == {"alpha.png", "alpha.mp4", "alpha_arrows.png"}
        for path in shown:
            assert base64.b64encode(path.read_bytes()).decode() in text
    assert "J&amp;F-Mean" in text
    assert "PCK@0.1 neck" in text
    assert text.count("src=") == text.count('src="data:')


def test_an_evaluation_with_a_folder_of_its_own_shows_its_own_pictures(tmp_path: Path) -> None:
    root, run = write_davis(tmp_path / "davis"), tmp_path / "run"
    for name, topk in (("davis", "7"), ("few keys", "1")):
        words = ("--root", str(root), "--output", str(run / "eval" / name), "--topk", topk)
        assert main(["eval", "davis", *words, *MODEL, *SMALL["davis"], "--pictures", "1"]) == 0
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    first, second = (tmp_path / "report.html").read_text().split("<h2>")[1:]
    assert first.startswith("run: davis (")
    assert second.startswith("run: davis in few keys (")
    for name, text in (("davis", first), ("few keys", second)):
        shown = base64.b64encode((run / "eval" / name / "figures" / "alpha.png").read_bytes()).decode()
        assert shown in text

    # Evaluated again without pictures, one does not show the earlier ones.
    words = ("--root", str(root), "--output", str(run / "eval" / "few keys"), "--pictures", "0")
    assert main(["eval", "davis", *words, *MODEL, *SMALL["davis"]]) == 0
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    first, second = (tmp_path / "report.html").read_text().split("<h2>")[1:]
    assert "src=" in first
    assert "src=" not in second


def test_trade_off_of_two_runs(tmp_path: Path) -> None:
    videos = write_videos(tmp_path / "videos")
    runs = [write_run(tmp_path / f"run{seed}", seed=seed) for seed in (1, 2)]
    for run in runs:
        words = ["--run", str(run), "--root", str(videos), "--image-size", "64", "--device", "cpu"]
        assert main(["eval", "consistency", *words]) == 0
    measured = [
        json.loads((run / "eval" / "consistency" / "consistency.json").read_text())["results"] for run in runs
    ]
    # One encoder, two projections.
    assert measured[0]["before"] == measured[1]["before"]
    assert measured[0]["after"] != measured[1]["after"]
    page = tmp_path / "pages" / "report.html"
    assert report(page, *runs) == 0
    # The plot of both, and that of each run's own evaluation.
    assert len(re.findall("<p>trade_off</p><img", page.read_text())) == 3
    # Measured on one video it says nothing of others.
    assert main(["eval", "consistency", *words, "--num-videos", "1"]) == 0
    assert report(page, runs[1]) == 0
    assert "Trade-off" not in page.read_text()
    assert "<td>inter_normalized_95</td><td>–</td>" in page.read_text()


def test_runs_called_alike_are_error_apart(tmp_path: Path) -> None:
    runs = [tmp_path / "one/mae", tmp_path / "two/mae", tmp_path / "dino"]
    assert plots.run_names(runs) == [str(runs[0]), str(runs[1]), "dino"]


def write_history(run: Path, text: str = '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n') -> Path:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(text)
    return run


def test_a_run_that_was_cut_off_while_it_wrote(tmp_path: Path) -> None:
    run = write_history(tmp_path / "$\\frac$", '{"step": 1, "loss": 2}\n\n{"step": 3, "lo')
    page = tmp_path / "page.html"
    assert report(page, run, run / ".." / run.name, write_history(tmp_path / "other")) == 0
    assert page.read_text().count("data:image/png;base64,") == 1


def evaluation(**changes: Any) -> dict[str, Any]:
    """As `eval` writes it, except for what the page does not show."""
    model = {"backbone": "dino", "weights": "random"}
    results = {"before": {"J": 0.5}, "after": {"J": 0.6}}
    return {"task": "davis", "model": model, "pictures": [], "results": results, **changes}


@pytest.mark.parametrize(
    "text",
    [
        '{"task": "davis", "resu',
        "[]",
        *map(
            json.dumps,
            (
                {"task": "davis"},
                evaluation(task=3),
                evaluation(model={"backbone": "dino"}),
                evaluation(pictures=[3]),
                evaluation(results={"before": {"J": "<b>"}}),
            ),
        ),
    ],
)
def test_a_damaged_evaluation_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "run" / "eval" / "davis" / "davis.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text(text)
    assert report(tmp_path / "page.html", tmp_path / "run") == 2
    assert str(damaged) in capsys.readouterr().err


def test_what_makes_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = write_history(tmp_path / "run"), tmp_path / "page.html"
    assert report(tmp_path, run) == 2
    assert f"--output {tmp_path} is a folder" in capsys.readouterr().err
    assert report(page, write_history(tmp_path / "fresh", "")) == 2
    assert "train some steps first" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    assert report(page, tmp_path / "nothing") == 2
    assert "holds neither metrics.jsonl nor eval" in capsys.readouterr().err
    assert not page.exists()
