"""The page that gathers runs: curves, trade-off, tables, pictures and films, and nothing from elsewhere."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import MODEL, SMALL, write_davis, write_projection, write_videos

from fasttrain.__main__ import main
from fasttrain.evaluation import plots

HISTORY = '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n'


def report(page: Path, *runs: Path) -> int:
    return main(["report", *map(str, runs), "--output", str(page)])


def write_history(run: Path, text: str = HISTORY) -> Path:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(text)
    return run


def write_evaluation(folder: Path, **changes: Any) -> None:
    """As `eval` writes it, except for what the page does not show."""
    model = {"backbone": "dino", "weights": "random"}
    results = {"before": {"J": 0.5}, "after": {"J": 0.6}}
    folder.mkdir(parents=True)
    content = {"task": "davis", "model": model, "pictures": [], "results": results, **changes}
    (folder / "task.json").write_text(json.dumps(content))


def test_a_run_with_everything(tmp_path: Path) -> None:
    run, page = write_history(tmp_path / "run"), tmp_path / "page" / "report.html"
    head = write_projection(tmp_path / "projection.safetensors")
    davis = ["eval", "davis", "--root", str(write_davis(tmp_path / "davis")), *MODEL, *SMALL["davis"]]
    davis += ["--projection", str(head), "--output", str(run / "eval/davis")]
    assert main([*davis, "--pictures", "1"]) == 0
    videos = write_videos(tmp_path / "videos")
    words = ("--root", str(videos), "--output", str(run / "eval/consistency"), "--projection", str(head))
    assert main(["eval", "consistency", *words, *MODEL, "--image-size", "64"]) == 0
    assert report(page, run) == 0
    text = page.read_text()
    for heading in ("Learning curves", "Trade-off", "run: davis", "run: consistency"):
        assert f"<h2>{heading}" in text
    shown = sorted((run / "eval/davis/figures").iterdir())
    assert {path.name for path in shown} == {"alpha.png", "alpha.mp4", "alpha_arrows.png"}
    for path in shown:
        assert base64.b64encode(path.read_bytes()).decode() in text
    assert "J&amp;F-Mean" in text
    # Two drawn for the page, one of the consistency, three of DAVIS.
    assert text.count("src=") == text.count('src="data:') == 6

    # Evaluated again without pictures, it does not show the earlier ones.
    assert main([*davis, "--pictures", "0"]) == 0
    assert report(page, run) == 0
    assert page.read_text().count("src=") == 3


def test_evaluations_with_folders_of_their_own(tmp_path: Path) -> None:
    for name in ("davis", "few keys"):
        folder = tmp_path / "run" / "eval" / name
        write_evaluation(folder, pictures=["a.png"])
        (folder / "figures").mkdir()
        (folder / "figures" / "a.png").write_bytes(name.encode())
    assert report(tmp_path / "report.html", tmp_path / "run") == 0
    first, second = (tmp_path / "report.html").read_text().split("<h2>")[1:]
    assert first.startswith("run: davis (")
    assert second.startswith("run: davis in few keys (")
    for name, text in (("davis", first), ("few keys", second)):
        assert base64.b64encode(name.encode()).decode() in text


def test_trade_off_of_runs(tmp_path: Path) -> None:
    figures = {"intra_normalized_95": 0.5, "inter_normalized_95": 0.7}
    # Measured on one video it says nothing of others.
    alone = figures | {"inter_normalized_95": None}
    runs = {"two/mae": figures, "one/mae": figures, "dino": alone}
    for name, found in runs.items():
        folder = tmp_path / name / "eval" / "consistency"
        write_evaluation(folder, task="consistency", results={"before": found, "after": found})
    assert plots.run_names([tmp_path / name for name in runs]) == [
        str(tmp_path / "two/mae"), str(tmp_path / "one/mae"), "dino",
    ]  # fmt: skip
    page = tmp_path / "page.html"
    assert report(page, *(tmp_path / name for name in runs)) == 0
    assert "<p>trade_off</p><img" in page.read_text()
    assert report(page, tmp_path / "dino") == 0
    assert "Trade-off" not in page.read_text()
    assert "<td>inter_normalized_95</td><td>–</td>" in page.read_text()


def test_a_run_that_was_cut_off_while_it_wrote(tmp_path: Path) -> None:
    run = write_history(tmp_path / "$\\frac$", '{"step": 1, "loss": 2}\n\n{"step": 3, "lo')
    assert report(tmp_path / "page.html", run, write_history(tmp_path / "other")) == 0
    assert (tmp_path / "page.html").read_text().count("data:image/png;base64,") == 1


def test_what_makes_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = write_history(tmp_path / "run"), tmp_path / "page.html"
    assert report(tmp_path, run) == 2
    assert f"--output {tmp_path} is a folder" in capsys.readouterr().err
    assert report(page, write_history(tmp_path / "fresh", "")) == 2
    assert "train some steps first" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    assert report(page, tmp_path / "nothing") == 2
    assert "holds neither metrics.jsonl nor eval" in capsys.readouterr().err
    (run / "eval" / "davis").mkdir(parents=True)
    (run / "eval" / "davis" / "davis.json").write_text('{"task":')
    assert report(page, run) == 2
    assert "davis.json holds no results of `fasttrain eval`" in capsys.readouterr().err
    assert not page.exists()
