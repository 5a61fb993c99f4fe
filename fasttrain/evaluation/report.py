"""Gather runs into one HTML page that opens without a network: curves, trade-off, tables, pictures, films."""

import argparse
import base64
import html
from pathlib import Path

from pydantic import BaseModel

from fasttrain.errors import InputError
from fasttrain.evaluation import plots
from fasttrain.files import write_atomically

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd}"
    "td+td,th+th{text-align:right}img,video{max-width:100%}"
)


class Model(BaseModel):
    backbone: str
    weights: str


class Evaluation(BaseModel):
    """What the page shows of the JSON file that `eval` writes."""

    task: str
    model: Model
    pictures: list[str]
    results: dict[str, dict[str, float | None]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training run")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="page (default: report.html)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Raises InputError where a run has neither a history nor evaluations."""
    write_report(arguments.runs, arguments.output)
    print(f"written to {arguments.output}")


def write_report(runs: list[Path], output: Path) -> None:
    """The page of all runs, each once; pictures are drawn beside it and carried inside."""
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; give the name of the page")
    runs = list({folder.resolve(): folder for folder in runs}.values())
    names = dict(zip(runs, plots.run_names(runs), strict=True))
    recorded = [folder for folder in runs if (folder / "metrics.jsonl").is_file()]
    evaluations = [
        (folder, path, _read_evaluation(path))
        for folder in runs
        for path in sorted(folder.glob("eval/*/*.json"))
    ]
    empty = set(runs) - set(recorded) - {folder for folder, _, _ in evaluations}
    if empty:
        raise InputError(
            f"{min(empty)} holds neither metrics.jsonl nor eval/*/*.json; give the folder of a run"
        )
    drawn = output.parent / f"{output.stem}_figures"
    body = []
    if recorded:
        plots.learning_curves(recorded, drawn / "learning.png")
        body.append(_section("Learning curves", _image(drawn / "learning.png")))
    points = [
        (names[folder], found.results["before"], found.results["after"])
        for folder, _, found in evaluations
        if found.task == "consistency"
        and {"before", "after"} <= set(found.results)
        and plots.has_trade_off(found.results["before"], found.results["after"])
    ]
    if points:
        plots.trade_off(points, drawn / "trade_off.png")
        body.append(_section("Trade-off", _image(drawn / "trade_off.png")))
    for folder, path, found in evaluations:
        task = " in ".join(dict.fromkeys((found.task, path.parent.name)))
        title = f"{names[folder]}: {task} ({found.model.backbone}, {found.model.weights})"
        pictures = [path.parent / "figures" / Path(name).name for name in found.pictures]
        shown = "".join(
            _image(picture) if picture.suffix == ".png" else _film(picture)
            for picture in sorted(pictures, key=lambda picture: picture.suffix, reverse=True)
            if picture.is_file()
        )
        body.append(_section(title, _table(found.results) + shown))
    head = f'<!doctype html><meta charset="utf-8"><title>fasttrain</title><style>{STYLE}</style>'
    write_atomically(output, f"{head}<h1>fasttrain</h1>{''.join(body)}\n".encode())


def _read_evaluation(path: Path) -> Evaluation:
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} holds no figures of `fasttrain eval`; evaluate again or remove it"
        ) from error


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}"


def _image(path: Path) -> str:
    name = html.escape(path.stem)
    return f'<p>{name}</p><img alt="{name}" src="{_inline(path, "image/png")}">'


def _film(path: Path) -> str:
    name = html.escape(path.stem)
    return f'<p>{name}</p><video controls loop muted src="{_inline(path, "video/mp4")}"></video>'


def _inline(path: Path, kind: str) -> str:
    """The file as an address that holds its bytes: the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _table(results: dict[str, dict[str, float | None]]) -> str:
    rows = "".join(f"<th>{html.escape(variant)}</th>" for variant in ("", *results))
    for key in dict.fromkeys(key for figures in results.values() for key in figures):
        values = [figures.get(key) for figures in results.values()]
        cells = "".join(f"<td>{'–' if value is None else format(value, '.4f')}</td>" for value in values)
        rows += f"</tr><tr><td>{html.escape(key)}</td>{cells}"
    return f"<table><tr>{rows}</tr></table>"
