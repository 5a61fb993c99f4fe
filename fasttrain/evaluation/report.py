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
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="page (default: report.html)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Raises InputError where a run has neither a history nor evaluations."""
    path = write_report(arguments.runs, arguments.output)
    print(f"written to {path}")


def write_report(runs: list[Path], output: Path) -> Path:
    """The page of all runs, each once; pictures are drawn beside it and carried inside."""
    if output.exists() and not output.is_file():
        what = "a folder" if output.is_dir() else "no file"
        raise InputError(f"--output {output} is {what}; give the name of the page")
    runs = list({folder.resolve(): folder for folder in runs}.values())
    names = dict(zip(runs, plots.run_names(runs), strict=True))
    evaluations = {folder: _evaluations(folder) for folder in runs}
    recorded = [folder for folder in runs if (folder / "metrics.jsonl").is_file()]
    for folder in runs:
        if folder not in recorded and not evaluations[folder]:
            raise InputError(
                f"{folder} holds neither metrics.jsonl nor eval/*/*.json; give the folder of a run"
            )
    pictures = output.parent / f"{output.stem}_figures"
    body = []
    if recorded:
        try:
            curves = plots.learning_curves(recorded, pictures / "learning.png")
            body.append(_section("Learning curves", _image(curves)))
        # No step is recorded yet; what was evaluated is shown all the same.
        except InputError:
            if not any(evaluations.values()):
                raise
    points = [
        (names[folder], found["results"]["before"], found["results"]["after"])
        for folder, found_all in evaluations.items()
        for found in found_all.values()
        if found["task"] == "consistency"
        and {"before", "after"} <= set(found["results"])
        # One video alone has no distance to others; features that are all alike have no diameter.
        and found["data"]["videos"] > 1
        and all(map(plots.has_trade_off, found["results"].values()))
    ]
    if points:
        body.append(_section("Trade-off", _image(plots.trade_off(points, pictures / "trade_off.png"))))
    for folder, found_all in evaluations.items():
        for path, found in found_all.items():
            about = f"{found['model']['backbone']}, {found['model']['weights']}"
            task = " in ".join(dict.fromkeys((found["task"], path.parent.name)))
            title = f"{names[folder]}: {task} ({about})"
            drawn = [path.parent / "figures" / name for name in found["pictures"]]
            images = "".join(_image(one) for one in drawn if one.suffix == ".png" and one.is_file())
            films = "".join(_film(one) for one in drawn if one.suffix == ".mp4" and one.is_file())
            body.append(_section(title, _table(found["results"]) + images + films))
    head = f'<!doctype html><meta charset="utf-8"><title>fasttrain</title><style>{STYLE}</style>'
    page = f"{head}<h1>fasttrain</h1>{''.join(body)}\n"
    # A link's file is written, not the link. A folder's name may be no UTF-8.
    write_atomically(output.resolve(), page.encode("utf-8", "replace"))
    return output


def _evaluations(folder: Path) -> dict[Path, dict[str, Any]]:
    """The figures of a run's evaluations by file."""
    return {path: _read_evaluation(path) for path in sorted(folder.glob("eval/*/[!.]*.json"))}


def _read_evaluation(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = _is_evaluation(found)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); evaluate again or remove it") from error
    if not whole:
        raise InputError(f"{path} holds no figures of `fasttrain eval`; evaluate again or remove it")
    return dict(found)


def _is_evaluation(found: Any) -> bool:
    """Whether JSON has what the page shows: what `eval` writes has; other files may lie beside it."""
    try:
        variants = list(found["results"].values())
        return (
            isinstance(found["task"], str)
            and all(isinstance(found["model"][key], str) for key in ("backbone", "weights"))
            and all(isinstance(name, str) and "/" not in name for name in found["pictures"])
            and (found["task"] != "consistency" or isinstance(found["data"]["videos"], int))
            and bool(variants)
            and all(variant.keys() == variants[0].keys() for variant in variants)
            and all(
                value is None or isinstance(value, int | float)
                for variant in variants
                for value in variant.values()
            )
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}"


def _image(path: Path) -> str:
    name = html.escape(path.stem)
    return f'<p>{name}</p><img alt="{name}" src="{_carried(path, "image/png")}">'


def _film(path: Path) -> str:
    name = html.escape(path.stem)
    return f'<p>{name}</p><video controls loop muted src="{_carried(path, "video/mp4")}"></video>'


def _carried(path: Path, kind: str) -> str:
    """The file as an address that holds its bytes: the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _table(results: dict[str, dict[str, float | None]]) -> str:
    head = "".join(f"<th>{html.escape(variant)}</th>" for variant in results)
    rows = []
    for key in next(iter(results.values())):
        values = [figures_of[key] for figures_of in results.values()]
        cells = "".join(f"<td>{'–' if value is None else format(value, '.4f')}</td>" for value in values)
        rows.append(f"<tr><td>{html.escape(key)}</td>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
