"""`fasttrain report`: a table of runs, curves, tables, pictures and videos in one self-contained page."""

import html.parser
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from synthetic import (
    MODEL,
    SMALL,
    picture,
    result_of,
    write_davis,
    write_projection,
    write_videos,
)

from fasttrain.__main__ import main
from fasttrain.evaluation import plots
from fasttrain.recipe import recipe_from_dict, to_yaml

HISTORY = '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n'
PICTURE = picture(0, 0, 900, 3200)


def report(page: Path, *runs: Path) -> int:
    return main(["report", *map(str, runs), "--output", str(page)])


def write_history(run: Path, text: str = HISTORY) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text(text)
    return run


def write_evaluation(run: Path, name: str = "davis", **changes: Any) -> Path:
    """Write the parts of an evaluation's JSON file that the report uses. Returns the folder of pictures."""
    content = {
        "task": "davis",
        "model": {"backbone": "dino", "weights": "random"},
        "pictures": [],
        "results": {"before": {"J": 0.5}, "after": {"J": 0.6}},
        "settings": {"root": "data/DAVIS", "year": "2017", "run": str(run)},
        **changes,
    }
    figures = run / "eval" / name / "figures"
    figures.mkdir(parents=True)
    (run / "eval" / f"{name}.json").write_text(json.dumps(content))
    return figures


class Page(html.parser.HTMLParser):
    """The text of the elements of a page, by element, and the targets and anchors of its links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.sources: list[str] = []
        self.feed(path.read_text())
        assert not self.open
        for texts in self.texts.values():
            texts[:] = [" ".join(text.split()) for text in texts]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.texts.setdefault(tag, []).append("")
        for name, value in attrs:
            kept = {"href": self.links, "id": self.anchors, "src": self.sources}.get(name)
            if kept is not None:
                kept.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def test_run_with_history_and_evaluations(tmp_path: Path) -> None:
    run, page = write_history(tmp_path / "run"), tmp_path / "page" / "report.html"
    head = write_projection(tmp_path / "projection.safetensors")
    common = ("--projection", str(head), "--output", str(run / "eval"), *MODEL)
    davis = ["eval", "davis", "--root", str(write_davis(tmp_path / "DAVIS")), *SMALL["davis"], *common]
    assert main([*davis, "--pictures", "1"]) == 0
    videos = str(write_videos(tmp_path / "videos"))
    assert main(["eval", "consistency", "--root", videos, *common, "--image-size", "64"]) == 0
    assert report(page, run) == 0
    shown = sorted((result_of(run / "eval", "davis").with_suffix("") / "figures").iterdir())
    assert {path.name for path in shown} == {"alpha.png", "alpha.mp4", "alpha_arrows.png", "alpha_pca.png"}
    read = Page(page)
    assert read.texts["h3"] == ["consistency on videos", "davis"]
    captions = [caption.split(":")[0] for caption in read.texts["figcaption"]]
    assert captions[2:] == ["alpha"] * 4
    # Two pictures drawn for the page and four of `davis`.
    assert [source.split(";")[0] for source in read.sources] == ["data:image/webp"] * 5 + ["data:video/mp4"]
    assert {f"#{anchor}" for anchor in read.anchors} == set(read.links)
    assert any("J&F-Mean, higher is better" in text for text in read.texts["th"])


def test_summary_of_runs(tmp_path: Path) -> None:
    """Only results of the same data and settings are in the same column, and the best value is bold.

    Of two results of one run, the latest one counts.
    """
    values = {"one": 0.61, "two": 0.63}
    for name, value in values.items():
        run = write_history(tmp_path / name)
        results = {"before": {"J": 0.5}, "after": {"J": value}}
        write_evaluation(run, "b", results=results, date="2026-02-01T10:00:00+00:00")
        write_evaluation(run, "c", date="2026-01-01T10:00:00+00:00")
        recipe = recipe_from_dict({"seed": int(100 * value), "output": name})
        (run / "recipe.yaml").write_text(to_yaml(recipe))
    write_evaluation(tmp_path / "two", "other", settings={"root": "data/DAVIS", "year": "2016"})
    decay = {"before": {"J-Decay": 0.2}, "after": {"J-Decay": 0.4}}
    write_evaluation(tmp_path / "two", "mine", task="mine", results=decay, settings={})
    (tmp_path / "two" / "train.json").touch()
    assert report(tmp_path / "page.html", tmp_path / "one", tmp_path / "two") == 0
    page = Page(tmp_path / "page.html")
    # The contents of several runs are long. The table comes first.
    assert "<details open>" not in (tmp_path / "page.html").read_text()
    assert page.texts["tr"][:3] == [
        "run training davis, year=2017J, higher is better "
        "davis, year=2016J, higher is better mineJ-Decay, lower is better",
        "one unfinished, at step 2 0.5000 → 0.6100 – –",
        "two 2 steps 0.5000 → 0.6300 0.5000 → 0.6000 0.2000 → 0.4000",
    ]
    assert "davis, year=2017 (2026-01-01 10:00 UTC)" in page.texts["h3"]
    assert page.texts["b"] == ["0.6300", "0.6000", "0.2000"]
    # The recipes and what differs between them, which is not the folder.
    assert page.texts["tr"][-2:] == ["key one two", "seed 61 63"]
    assert len(page.texts["pre"]) == 2


def test_pictures_are_compressed_and_large_videos_left_out(tmp_path: Path) -> None:
    names = ["picture.png", "small.mp4", "large.mp4", "damaged.png", "missing.png"]
    figures = write_evaluation(tmp_path / "run", pictures=names)
    Image.fromarray(PICTURE).save(figures / "picture.png")
    for name, size in (("small.mp4", 100), ("large.mp4", 600_000)):
        (figures / name).write_bytes(bytes(size))
    (figures / "damaged.png").write_bytes((figures / "picture.png").read_bytes()[:500])
    # Not in the result.
    shutil.copy(figures / "picture.png", figures / "other.png")
    assert report(tmp_path / "page.html", tmp_path / "run") == 0
    page = Page(tmp_path / "page.html")
    assert [source.split(";")[0] for source in page.sources] == ["data:image/webp", "data:video/mp4"]
    assert len(page.sources[0]) < (figures / "picture.png").stat().st_size / 2
    assert [caption.split(":")[0] for caption in page.texts["figcaption"]] == ["picture", "small"]
    assert page.links[-1] == "run/eval/davis/figures/large.mp4"
    assert [text.split("figures/")[1].split(":")[0] for text in page.texts["li"][-2:]] == [
        "damaged.png' cannot be read",
        "missing.png' cannot be read",
    ]


def test_pictures_of_several_runs_are_bounded(tmp_path: Path) -> None:
    names = [f"a{end}" for end in (".mp4", ".png", "_arrows.png", "_pca.png")] + ["b.png"]
    for run in ("one", "two: #2"):
        figures = write_evaluation(tmp_path / run, pictures=[*names, "missing.png"])
        for name in names:
            Image.fromarray(PICTURE[:9, :9]).save(figures / name, "PNG")
    (tmp_path / "page").mkdir()
    assert report(tmp_path / "page/report.html", tmp_path / "one", tmp_path / "two: #2") == 0
    page = Page(tmp_path / "page/report.html")
    assert [caption.split(":")[0] for caption in page.texts["figcaption"]] == ["a"] * 6
    assert page.links[-2:] == [f"../two%3A%20%232/eval/davis/figures/{name}" for name in ("b.png", "a.mp4")]
    assert any("embeds the first 3 pictures of each evaluation" in text for text in page.texts["p"])
    assert sum("missing.png' cannot be read" in text for text in page.texts["li"]) == 2


@pytest.mark.parametrize("count", [2, 11])
def test_results_of_sequences(tmp_path: Path, count: int) -> None:
    """DAVIS has results of several objects per sequence. Undefined values are dashes."""

    def objects(*similarities: float) -> dict[str, Any]:
        return {str(number): {"J": {"mean": value}} for number, value in enumerate(similarities)}

    davis = {f"clip {n}": {"before": objects(0.2, 0.4), "after": objects(0.4, 0.6)} for n in range(count)}
    write_evaluation(tmp_path / "run", "a", per_sequence=davis)
    clip = {"wave": {"before": {"PCK@0.1": None, "PCK@0.2": 7}, "after": {"PCK@0.1": 5, "PCK@0.2": 7}}}
    results = {"before": {"PCK@0.1": 4}, "after": {"PCK@0.1": 5}}
    write_evaluation(tmp_path / "run", "b", task="jhmdb", results=results, per_sequence=clip)
    assert report(tmp_path / "page.html", tmp_path / "run") == 0
    page = Page(tmp_path / "page.html")
    assert page.texts["summary"].count("J of each sequence") == 1
    assert page.texts["summary"].count("PCK@0.1 of each sequence") == 1
    assert f"clip {count - 1} 0.3000 0.5000 +0.2000" in page.texts["tr"]
    assert "wave - 5.00 -" in page.texts["tr"]
    # The contents, the table of JHMDB and a short table of DAVIS.
    assert (tmp_path / "page.html").read_text().count("<details open>") == (3 if count <= 10 else 2)


def test_results_of_version_0_1_0(tmp_path: Path) -> None:
    """The JSON file was in the folder of the pictures."""
    figures = write_evaluation(tmp_path / "run", "davis", pictures=["a.png"])
    (tmp_path / "run/eval/davis.json").rename(figures.parent / "davis.json")
    Image.fromarray(PICTURE).save(figures / "a.png")
    assert report(tmp_path / "page.html", tmp_path / "run") == 0
    assert Page(tmp_path / "page.html").texts["figcaption"][0].startswith("a: ")


def test_trade_off_of_runs(tmp_path: Path) -> None:
    metrics = {"intra_normalized_95": 0.5, "inter_normalized_95": 0.7}
    # The inter-video distance of a single video is undefined.
    undefined = metrics | {"inter_normalized_95": None}
    runs = {"two/mae": metrics, "one/mae": metrics, "dino": undefined}
    for name, metrics_of_run in runs.items():
        results = {"before": metrics_of_run, "after": metrics_of_run}
        write_evaluation(tmp_path / name, task="consistency", results=results)
    assert plots.run_names([tmp_path / name for name in runs]) == [
        str(tmp_path / "two/mae"), str(tmp_path / "one/mae"), "dino",
    ]  # fmt: skip
    page = tmp_path / "page.html"
    assert report(page, *(tmp_path / name for name in runs)) == 0
    assert "Trade-off" in Page(page).texts["h2"]
    assert report(page, tmp_path / "dino") == 0
    assert "Trade-off" not in Page(page).texts["h2"]
    assert (
        "inter_normalized_95distance between videos, relative to the spread of tokens higher - -"
        in Page(page).texts["tr"]
    )


def test_trade_offs_on_different_data_are_not_compared(tmp_path: Path) -> None:
    metrics = {"intra_normalized_95": 0.5, "inter_normalized_95": 0.7}
    for name in ("a", "b"):
        write_evaluation(
            tmp_path / "run", name, task="consistency", pictures=["trade_off.png"],
            results={"before": metrics, "after": metrics}, settings={"root": f"data/{name}"},
        )  # fmt: skip
    assert report(tmp_path / "page.html", tmp_path / "run") == 0
    page = Page(tmp_path / "page.html")
    headings = [f"Trade-off: consistency on {name}" for name in ("a", "b")]
    assert page.texts["h2"] == ["Summary", *headings, "run"]
    # The pictures of the evaluations, which would repeat them, are not even read.
    assert len(page.sources) == 2
    assert "Not shown:" not in page.texts["p"]


def test_odd_folders_are_named_and_the_others_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_history(tmp_path / "$\\frac$", '{"step": 1, "loss": 2}\n\n{"step": 3, "lo')
    write_evaluation(good)
    (good / "eval" / "damaged.json").write_text('{"task":')
    (good / "recipe.yaml").write_text("trian: 1")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "a file").touch()
    fresh = write_history(tmp_path / "fresh", "")
    strange = write_history(tmp_path / "strange", "[1]\n")
    event = '{"step": 2, "event": "non-finite loss", "samples": [], "names": []}\n'
    dropped = write_history(tmp_path / "dropped", HISTORY + event)
    odd = [tmp_path / "nothing", tmp_path / "a file", tmp_path / "missing", fresh, strange]
    assert report(tmp_path / "page.html", *odd, good, dropped) == 0
    page = Page(tmp_path / "page.html")
    assert page.texts["h2"] == ["Summary", "Learning curves", "$\\frac$", "dropped"]
    assert "dropped dropped at step 2, because its loss was not finite –" in page.texts["tr"]
    printed = capsys.readouterr().out
    for path in odd:
        reason = (
            "has neither metrics in metrics.jsonl nor results in eval" if path.is_dir() else "is not a folder"
        )
        assert f"not shown: '{path}' {reason}" in printed
    for part in ("damaged.json' is not a result of `fasttrain eval`", "trian"):
        assert part in printed
        assert part in " ".join(page.texts["li"])


def test_invalid_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = write_history(tmp_path / "run"), tmp_path / "page.html"
    assert report(tmp_path, run) == 2
    assert f"--output: '{tmp_path}' is a folder" in capsys.readouterr().err
    assert report(page, write_history(tmp_path / "fresh", ""), tmp_path / "nothing") == 2
    error = capsys.readouterr().err
    assert "has neither metrics in metrics.jsonl nor results in eval" in error
    assert "nothing' is not a folder" in error
    assert error.count("\n") == 1
    assert not page.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"pictures": ["../../../secret.png"]},
        {"pictures": ["/etc/passwd"]},
        {"results": {"before": {"J": "<script>"}}},
        {"results": {}},
        {"model": "dino"},
        {"per_sequence": {"clip": {"before": {"1": {"J": "<script>"}}}}},
        {"per_sequence": {"clip": {"before": {"J": "<script>"}}}},
    ],
)
def test_evaluations_of_strangers_are_refused(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(PICTURE[:9, :9]).save(tmp_path / "secret.png")
    write_evaluation(tmp_path / "run", **changes)
    assert report(tmp_path / "page.html", tmp_path / "run") == 2
    assert "is not a result of `fasttrain eval`" in capsys.readouterr().err


def test_names_are_escaped(tmp_path: Path) -> None:
    markup = '<img src=x onerror="alert(1)">'
    names = dict.fromkeys(("task", "date", "device"), markup)
    model = {"backbone": markup, "weights": f"</title><script>{markup}", "projection_hash": markup}
    results = {markup: {f"</td>{markup}": 1.0}}
    settings, versions = {"root": markup, markup: {markup: [markup]}}, {markup: markup}
    write_evaluation(
        write_history(tmp_path / markup.replace("/", "")),
        **names, model=model, results=results, settings=settings, data=settings, versions=versions,
    )  # fmt: skip
    assert report(tmp_path / "page.html", tmp_path / markup) == 0
    page = Page(tmp_path / "page.html")
    assert "script" not in page.texts
    assert [source.split(";")[0] for source in page.sources] == ["data:image/webp"]
