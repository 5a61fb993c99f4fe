"""Gather runs into one HTML page that opens without a network: curves, trade-off, tables, pictures, films."""

import argparse
import base64
import html
import json
from pathlib import Path
from typing import Any

from fasttrain.errors import InputError
from fasttrain.evaluation import plots
from fasttrain.files import write_atomically

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd}"
    "td+td,th+th{text-align:right}img,video{max-width:100%}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training run")
    parser.add_argument("--output", type=Path, default="report.html", help="page (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Write the page of all runs; pictures are drawn beside it and carried inside.

    Raises InputError where a run has neither a history nor evaluations.
    """
    output: Path = arguments.output
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; give the name of the page")
    recorded, evaluations = [], []
    for name, folder in zip(plots.run_names(arguments.runs), arguments.runs, strict=True):
        paths = sorted(folder.glob("eval/*/*.json"))
        evaluations += [(name, path, _read(path)) for path in paths]
        if (folder / "metrics.jsonl").is_file():
            recorded.append(folder)
        elif not paths:
            raise InputError(
                f"{folder} holds neither metrics.jsonl nor eval/*/*.json; give the folder of a run (of "
                f"several backbones: output/NAME)"
            )
    drawn = output.parent / f"{output.stem}_figures"
    sections = []
    if recorded:
        plots.learning_curves(recorded, drawn / "learning.png")
        sections.append(("Learning curves", _show(drawn / "learning.png")))
    points = [
        (name, found["results"]["before"], found["results"]["after"])
        for name, _, found in evaluations
        if found["task"] == "consistency" and plots.has_trade_off(found["results"])
    ]
    if points:
        plots.trade_off(points, drawn / "trade_off.png")
        sections.append(("Trade-off", _show(drawn / "trade_off.png")))
    for name, path, found in evaluations:
        task = " in ".join(dict.fromkeys((found["task"], path.parent.name)))
        title = f"{name}: {task} ({found['model']['backbone']}, {found['model']['weights']})"
        pictures = [path.parent / "figures" / picture for picture in found["pictures"]]
        # Stills, then films.
        pictures.sort(key=lambda picture: picture.suffix, reverse=True)
        shown = "".join(_show(picture) for picture in pictures if picture.is_file())
        sections.append((title, _table(found["results"]) + shown))
    body = "".join(f"<h2>{html.escape(title)}</h2>{content}" for title, content in sections)
    head = f'<!doctype html><meta charset="utf-8"><title>fasttrain</title><style>{STYLE}</style>'
    write_atomically(output, f"{head}<h1>fasttrain</h1>{body}\n".encode())
    print(f"written to {output}")


def _read(path: Path) -> dict[str, Any]:
    """The JSON that `fasttrain eval` wrote."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        return {key: found[key] for key in ("task", "model", "pictures", "results")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no results of `fasttrain eval` ({error!r}); remove it") from error


def _show(path: Path) -> str:
    """A picture or film as an element that holds its bytes: the page needs no other file."""
    name, content = html.escape(path.stem), base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".png":
        return f'<p>{name}</p><img alt="{name}" src="data:image/png;base64,{content}">'
    return f'<p>{name}</p><video controls loop muted src="data:video/mp4;base64,{content}"></video>'


def _table(results: dict[str, dict[str, float | None]]) -> str:
    rows = "".join(f"<th>{html.escape(variant)}</th>" for variant in ("", *results))
    for key in dict.fromkeys(key for figures in results.values() for key in figures):
        values = [figures.get(key) for figures in results.values()]
        cells = "".join(f"<td>{'–' if value is None else format(value, '.4f')}</td>" for value in values)
        rows += f"</tr><tr><td>{html.escape(key)}</td>{cells}"
    return f"<table><tr>{rows}</tr></table>"
