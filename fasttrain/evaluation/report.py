"""Collect training runs and their evaluations in one self-contained HTML page.

The page shows learning curves, the trade-off of consistency and separability, tables, pictures and videos.
"""

import argparse
import base64
import html
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from fasttrain.errors import InputError
from fasttrain.evaluation import plots
from fasttrain.files import naming, write_atomically
from fasttrain.loggers import say

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd}"
    "td+td,th+th{text-align:right}img,video{max-width:100%}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training run")
    parser.add_argument(
        "--output",
        type=Path,
        default="report.html",
        metavar="FILE",
        help="HTML file to write (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the report of all runs.

    The plots are also kept as files in a folder next to it. Raises InputError if a run has neither a
    metrics.jsonl nor evaluations.
    """
    output: Path = arguments.output
    if output.is_dir():
        raise InputError(f"--output: '{output}' is a folder. Pass the name of an HTML file.")
    runs_with_history, evaluations = [], []
    for name, folder in zip(plots.run_names(arguments.runs), arguments.runs, strict=True):
        paths = sorted(folder.glob("eval/*/*.json"))
        evaluations += [(name, path, _read(path)) for path in paths]
        if (folder / "metrics.jsonl").is_file():
            runs_with_history.append(folder)
        elif not paths:
            raise InputError(
                f"'{folder}' has neither metrics.jsonl nor eval/*/*.json. Pass the output folder of a run; "
                "if it trained several backbones, pass OUTPUT/NAME of each."
            )
    drawn = output.parent / f"{output.stem}_figures"
    sections = []
    if runs_with_history:
        plots.learning_curves(runs_with_history, drawn / "learning.png")
        sections.append(("Learning curves", _show(drawn / "learning.png")))
    points = [
        (name, evaluation["results"]["before"], evaluation["results"]["after"])
        for name, _, evaluation in evaluations
        if evaluation["task"] == "consistency" and plots.has_trade_off(evaluation["results"])
    ]
    if points:
        plots.trade_off(points, drawn / "trade_off.png")
        sections.append(("Trade-off", _show(drawn / "trade_off.png")))
    for name, path, evaluation in evaluations:
        # The folder is named after the task unless the user chose another name.
        task = " in ".join(dict.fromkeys((evaluation["task"], path.parent.name)))
        model = evaluation["model"]
        title = f"{name}: {task} ({model['backbone']}, {model['weights']})"
        pictures = [path.parent / "figures" / picture for picture in evaluation["pictures"]]
        # Pictures first, then videos.
        pictures.sort(key=lambda picture: picture.suffix, reverse=True)
        shown = "".join(_show(picture) for picture in pictures if picture.is_file())
        sections.append((title, _table(evaluation["results"]) + shown))
    body = "".join(f"<h2>{html.escape(title)}</h2>{content}" for title, content in sections)
    head = f'<!doctype html><meta charset="utf-8"><title>fasttrain</title><style>{STYLE}</style>'
    write_atomically(output, f"{head}<h1>fasttrain</h1>{body}\n".encode())
    say(f"report written to {output}")


class _Model(BaseModel):
    backbone: str
    weights: str


class _Evaluation(BaseModel):
    """The part of the JSON file of an evaluation that the report shows."""

    task: str
    model: _Model
    # Names of files, not paths, which could embed any file of the user in the page.
    pictures: list[Annotated[str, Field(pattern=r"^[^/]+\.(png|mp4)$")]]
    results: dict[str, dict[str, float | None]]


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file that `fasttrain eval` wrote. Raises InputError for any other file."""
    try:
        with naming(path):
            return _Evaluation.model_validate_json(path.read_bytes()).model_dump()
    except ValueError as error:
        raise InputError(
            f"'{path}' is not a result of `fasttrain eval`, or is damaged. Remove it."
        ) from error


def _show(path: Path) -> str:
    """Return an HTML element that embeds a picture or video."""
    with naming(path):
        name, content = html.escape(path.stem), base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".png":
        return f'<p>{name}</p><img alt="{name}" src="data:image/png;base64,{content}">'
    return f'<p>{name}</p><video controls loop muted src="data:video/mp4;base64,{content}"></video>'


def _table(results: dict[str, dict[str, float | None]]) -> str:
    """Return an HTML table with one row per metric and one column per variant."""
    rows = "".join(f"<th>{html.escape(variant)}</th>" for variant in ("", *results))
    for key in dict.fromkeys(key for metrics in results.values() for key in metrics):
        values = [metrics.get(key) for metrics in results.values()]
        cells = "".join(f"<td>{'–' if value is None else format(value, '.4f')}</td>" for value in values)
        rows += f"</tr><tr><td>{html.escape(key)}</td>{cells}"
    return f"<table><tr>{rows}</tr></table>"
