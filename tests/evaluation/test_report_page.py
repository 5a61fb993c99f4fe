"""The page that gathers runs: curves, trade-off, tables, pictures and films, and nothing from elsewhere."""

import base64
import json
from pathlib import Path

import pytest
from synthetic import MODEL, SMALL, write_davis, write_jhmdb, write_projection, write_videos

from fasttrain.__main__ import main

WRITERS = {"davis": write_davis, "jhmdb": write_jhmdb}


def test_a_run_with_everything(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": step, "loss": 1 / step, "after/cycle_accuracy": 0.1 * step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    head = write_projection(tmp_path / "projection.safetensors")
    for task, write in WRITERS.items():
        root = write(tmp_path / task)
        places = ("--root", str(root), "--output", str(run / "eval" / task), "--projection", str(head))
        assert main(["eval", task, *places, *MODEL, *SMALL[task], "--pictures", "1"]) == 0
    videos = write_videos(tmp_path / "videos")
    places = ("--root", str(videos), "--output", str(run / "eval/consistency"), "--projection", str(head))
    assert main(["eval", "consistency", *places, *MODEL, "--image-size", "64"]) == 0

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
        places = ("--root", str(root), "--output", str(run / "eval" / name), "--topk", topk)
        assert main(["eval", "davis", *places, *MODEL, *SMALL["davis"], "--pictures", "1"]) == 0
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    first, second = (tmp_path / "report.html").read_text().split("<h2>")[1:]
    assert first.startswith("run: davis (")
    assert second.startswith("run: davis in few keys (")
    for name, text in (("davis", first), ("few keys", second)):
        shown = base64.b64encode((run / "eval" / name / "figures" / "alpha.png").read_bytes()).decode()
        assert shown in text

    # Evaluated again without pictures, one does not show the earlier ones.
    places = ("--root", str(root), "--output", str(run / "eval" / "few keys"), "--pictures", "0")
    assert main(["eval", "davis", *places, *MODEL, *SMALL["davis"]]) == 0
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    first, second = (tmp_path / "report.html").read_text().split("<h2>")[1:]
    assert "src=" in first
    assert "src=" not in second


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "report.html")]) == 2
    assert "holds neither metrics.jsonl nor" in capsys.readouterr().err
