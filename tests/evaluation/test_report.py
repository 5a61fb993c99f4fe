"""`fasttrain report`: curves, trade-off, tables, pictures and videos in one self-contained page."""

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
    """Write the parts of an evaluation's JSON file that the report uses."""
    model = {"backbone": "dino", "weights": "random"}
    results = {"before": {"J": 0.5}, "after": {"J": 0.6}}
    folder.mkdir(parents=True)
    content = {"task": "davis", "model": model, "pictures": [], "results": results, **changes}
    (folder / "task.json").write_text(json.dumps(content))


def test_run_with_history_and_evaluations(tmp_path: Path) -> None:
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
    # Two pictures drawn for the page, one of `consistency` and three of `davis`.
    assert text.count("src=") == text.count('src="data:') == 6

    # After an evaluation without pictures, the earlier ones are not shown.
    assert main([*davis, "--pictures", "0"]) == 0
    assert report(page, run) == 0
    assert page.read_text().count("src=") == 3


def test_evaluations_of_one_task_in_different_folders(tmp_path: Path) -> None:
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
    metrics = {"intra_normalized_95": 0.5, "inter_normalized_95": 0.7}
    # The inter-video distance of a single video is undefined.
    undefined = metrics | {"inter_normalized_95": None}
    runs = {"two/mae": metrics, "one/mae": metrics, "dino": undefined}
    for name, metrics_of_run in runs.items():
        folder = tmp_path / name / "eval" / "consistency"
        results = {"before": metrics_of_run, "after": metrics_of_run}
        write_evaluation(folder, task="consistency", results=results)
    assert plots.run_names([tmp_path / name for name in runs]) == [
        str(tmp_path / "two/mae"), str(tmp_path / "one/mae"), "dino",
    ]  # fmt: skip
    page = tmp_path / "page.html"
    assert report(page, *(tmp_path / name for name in runs)) == 0
    assert "<p>trade_off</p><img" in page.read_text()
    assert report(page, tmp_path / "dino") == 0
    assert "Trade-off" not in page.read_text()
    assert "<td>inter_normalized_95</td><td>–</td>" in page.read_text()


def test_run_with_a_truncated_history(tmp_path: Path) -> None:
    run = write_history(tmp_path / "$\\frac$", '{"step": 1, "loss": 2}\n\n{"step": 3, "lo')
    assert report(tmp_path / "page.html", run, write_history(tmp_path / "other")) == 0
    assert (tmp_path / "page.html").read_text().count("data:image/png;base64,") == 1


def test_invalid_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = write_history(tmp_path / "run"), tmp_path / "page.html"
    assert report(tmp_path, run) == 2
    assert f"--output: '{tmp_path}' is a folder" in capsys.readouterr().err
    assert report(page, write_history(tmp_path / "fresh", "")) == 2
    assert "no metrics in metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    assert report(page, tmp_path / "nothing") == 2
    assert "has neither metrics.jsonl nor eval" in capsys.readouterr().err
    (run / "eval" / "davis").mkdir(parents=True)
    (run / "eval" / "davis" / "davis.json").write_text('{"task":')
    assert report(page, run) == 2
    assert "davis.json' is not a result of `fasttrain eval`" in capsys.readouterr().err
    assert not page.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"pictures": ["../../../secret.png"]},
        {"pictures": ["/etc/passwd"]},
        {"results": {"before": {"J": "<script>"}}},
        {"model": "dino"},
    ],
)
def test_evaluations_of_strangers_are_refused(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    write_evaluation(tmp_path / "run" / "eval" / "davis", **changes)
    assert report(tmp_path / "page.html", tmp_path / "run") == 2
    assert "is not a result of `fasttrain eval`" in capsys.readouterr().err
