"""Collect training runs and their evaluations in one self-contained HTML page.

The page begins with a table of all runs, and shows learning curves, the trade-off of consistency and
separability, tables, pictures, short videos and recipes. What cannot be shown is named with the reason.
"""

import argparse
import base64
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment
from PIL import Image

import fasttrain
from fasttrain.data.images import UnreadableFrameError, decode_image, read_encoded
from fasttrain.errors import InputError
from fasttrain.evaluation import plots, results
from fasttrain.evaluation.results import Result
from fasttrain.evaluation.validation import describe_kept
from fasttrain.files import os_reason, write_atomically
from fasttrain.loggers import NON_FINITE, read_records, say
from fasttrain.projection import FIT_FILE
from fasttrain.recipe import Recipe, load_recipe, to_dict, to_yaml

# Twice the width at which most pictures are shown, so that they are sharp on dense screens.
PICTURE_WIDTH = 1400
# Larger videos are linked instead of embedded.
MAX_VIDEO_BYTES = 500_000
# A page of several runs embeds so many pictures of each result, which are those of one sequence, and no
# video, because it would otherwise become too large. The others are linked.
EMBEDDED = 3
# What pictures show, by their names.
CAPTIONS = {
    "learning.png": "Metrics of training and of validation. Long curves are means, above the values in pale.",
    "trade_off.png": "Further left, a video is more consistent; further up, videos are easier to tell apart.",
    "predicted_trade_off.png": "What a projection in closed form can reach, relative to the frozen encoder.",
    "retrieval.png": "Test videos and the most similar training videos.",
    "confusion.png": "Predictions of the linear probe, as fractions of each true class.",
    "segments.png": "True and predicted actions over time.",
}
# What pictures of sequences show, by what follows the name of the sequence. The first one that fits counts.
SEQUENCE_CAPTIONS = {
    "_arrows.png": "tokens of the first frame, joined with the most similar ones of another frame",
    "_pca.png": "the first three principal components of the tokens as colours",
    ".png": "what is given in the first frame, propagated before and after the projection, and the truth",
    ".mp4": "what is propagated, before (left) and after (right)",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run and its results, oldest first."""

    name: str
    folder: Path
    status: str
    """How far the training is."""
    has_metrics: bool
    recipe: Recipe | None
    results: list[tuple[Path, Result]]


class Media(NamedTuple):
    """A picture or a video."""

    name: str
    caption: str
    data: str
    """Its content as a URL."""
    width: int = 0
    """The width at which a picture is shown, in CSS pixels."""
    is_video: bool = False


def run(arguments: argparse.Namespace) -> None:
    """Write the report of all runs.

    The plots that compare them are also kept as files in a folder next to it. Raises InputError if no run has
    anything to show.
    """
    output: Path = arguments.output
    if output.is_dir():
        raise InputError(f"--output: '{output}' is a folder. Pass the name of an HTML file.")
    problems: list[str] = []
    named = zip(plots.run_names(arguments.runs), arguments.runs, strict=True)
    runs = [run for name, folder in named if (run := _read_run(name, folder, problems))]
    if not runs:
        raise InputError(" ".join(problems))
    titles = _titles([result for run in runs for _, result in run.results])
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    text = template.render(
        now=_minutes(datetime.now(timezone.utc).isoformat()),
        version=fasttrain.__version__,
        runs=[(run, _sections(run, titles, output.parent, len(runs) > 1, problems)) for run in runs],
        embedded=EMBEDDED,
        summary=_summary(runs, titles),
        plots=_draw_plots(runs, titles, output.parent / f"{output.stem}_figures", problems),
        recipes={run.name: to_yaml(run.recipe) for run in runs if run.recipe},
        differences=_recipe_differences(runs),
        # The list is complete by now, because the template is rendered last.
        problems=problems,
        better=results.better,
        meaning=results.meaning,
        format_value=results.format_value,
    )
    write_atomically(output, text.encode())
    for problem in problems:
        say(f"not shown: {problem}")
    say(f"report written to {output} ({output.stat().st_size / 1e6:.1f} MB)")


# --- reading -------------------------------------------------------------------------------------------


def _read_run(name: str, folder: Path, problems: list[str]) -> Run | None:
    """Read a run folder. What cannot be read is added to `problems`; None if there is nothing to show."""
    evaluated: list[tuple[Path, Result]] = []
    records: list[dict[str, Any]] = []
    recipe = None
    if not os.path.isdir(folder):
        problems.append(f"'{folder}' is not a folder. Pass the output folder of a run.")
        return None
    for path in results.find_results(folder / "eval"):
        with _noting(problems):
            evaluated.append((path, results.read_result(path)))
    with _noting(problems):
        records = read_records(folder / "metrics.jsonl")
        if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
            records = []
            raise InputError(f"'{folder / 'metrics.jsonl'}' is not a log of fasttrain.")
    with _noting(problems):
        if (path := folder / "recipe.yaml").exists():
            recipe = load_recipe(path)
    if not records and not evaluated:
        problems.append(
            f"'{folder}' has neither metrics in metrics.jsonl nor results in eval. Pass the output folder of "
            "a run; if it trained several backbones, pass OUTPUT/NAME of each."
        )
        return None
    return Run(
        name=name,
        folder=folder,
        status=_status(folder, records),
        has_metrics=bool(records),
        recipe=recipe,
        results=sorted(evaluated, key=lambda one: (one[1].task, one[1].date)),
    )


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Add bad input that is met within the context to `problems`."""
    try:
        yield
    # ValueError: InputError, and text in another encoding.
    except ValueError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"'{error.filename}' cannot be read: {os_reason(error)}.")


def _status(folder: Path, records: list[dict[str, Any]]) -> str:
    if not records:
        is_fit = (folder / FIT_FILE).exists()
        return "a projection in closed form (`fasttrain fit`)" if is_fit else "no training metrics"
    step = records[-1].get("step")
    if records[-1].get("event") == NON_FINITE:
        return f"dropped at step {step}, because its loss was not finite"
    if not (folder / "train.json").exists():
        return f"unfinished, at step {step}"
    kept = describe_kept(records[-1])
    return f"{step} steps; keeps {kept}" if kept else f"{step} steps"


# --- tables --------------------------------------------------------------------------------------------


def _titles(evaluated: list[Result]) -> dict[str, str]:
    """Name what each result measures (`_measured`): the benchmark, the data set and what distinguishes it."""
    roots = list(dict.fromkeys(Path(result.settings.get("root", "")) for result in evaluated))
    names = dict(zip(roots, plots.run_names(roots), strict=True))
    titles = {}
    distinct = {_measured(result): result for result in evaluated}
    for _, group in groupby(sorted(distinct.items(), key=lambda one: one[1].task), lambda one: one[1].task):
        keys, members = zip(*group, strict=True)
        protocols = [result.protocol for result in members]
        differences = results.distinguish(
            [{key: value for key, value in protocol.items() if key != "root"} for protocol in protocols]
        )
        for key, result, difference in zip(keys, members, differences, strict=True):
            root = result.settings.get("root")
            data = names[Path(root)] if root else ""
            # Not "davis on DAVIS".
            titles[key] = result.task + (f" on {data}" if data.lower() not in ("", result.task) else "")
            titles[key] += f", {difference}" if difference else ""
    return titles


def _measured(result: Result) -> str:
    """Return a key that results share if they can be compared."""
    return json.dumps([result.task, result.protocol], sort_keys=True)


def _summary(
    runs: list[Run], titles: Mapping[str, str]
) -> tuple[list[tuple[str, str]], list[list[list[tuple[str, float, bool]]]]]:
    """Return the columns of the table of all runs, as title and metric, and the rows.

    Each cell is a list of variants: its name, its value, and whether it is the best value of the column.
    """
    columns = dict.fromkeys(
        (_measured(result), metric)
        for run in runs
        for _, result in run.results
        for metric in result.headlines
    )
    # Of several results of a run, the latest one counts.
    latest = [{_measured(result): result for _, result in run.results} for run in runs]
    rows: list[list[list[tuple[str, float, bool]]]] = [[] for _ in runs]
    for key, metric in columns:
        cells = [of_run[key].values(metric) if key in of_run else {} for of_run in latest]
        values = [value for cell in cells for value in cell.values()]
        direction = results.better(metric)
        best = max(values, default=None) if direction == "higher" else min(values, default=None)
        for row, cell in zip(rows, cells, strict=True):
            row.append(
                [(variant, value, bool(direction) and value == best) for variant, value in cell.items()]
            )
    return [(titles[key], metric) for key, metric in columns], rows


def _recipe_differences(runs: list[Run]) -> dict[str, list[str]]:
    """Return the recipe keys that differ between the runs, except `output`, with the value in each run."""
    flat = [_flatten(to_dict(run.recipe)) if run.recipe else {} for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one if key != "output")
    rows = {key: [json.dumps(one[key]) if key in one else "" for one in flat] for key in keys}
    return {key: row for key, row in rows.items() if len({value for value in row if value}) > 1}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# --- sections ------------------------------------------------------------------------------------------


def _sections(
    run: Run, titles: Mapping[str, str], folder: Path, is_one_of_several: bool, problems: list[str]
) -> list[dict[str, Any]]:
    """Return what the template shows of each result of a run. Links are relative to `folder`."""
    sections = []
    measured = [_measured(result) for _, result in run.results]
    for path, result in run.results:
        title = titles[_measured(result)]
        # Another projection, or other settings that do not matter to the results.
        if measured.count(_measured(result)) > 1:
            title += f" ({_minutes(result.date)})"
        # In version 0.1.0, pictures were in the folder of the JSON file.
        folders = path.with_suffix("") / "figures", path.parent / "figures"
        figures = next((folder for folder in folders if folder.is_dir()), folders[0])
        # The trade-off of all runs is above.
        names = [name for name in result.pictures if (result.task, name) != ("consistency", "trade_off.png")]
        media, links = [], {}
        # Pictures first, then videos.
        for number, name in enumerate(sorted(names, key=lambda name: name.endswith(".mp4"))):
            picture = figures / name
            is_video = picture.suffix == ".mp4"
            is_linked = is_one_of_several and (is_video or number >= EMBEDDED)
            if picture.is_file() and (is_linked or (is_video and picture.stat().st_size > MAX_VIDEO_BYTES)):
                links[name] = quote(os.path.relpath(picture, folder))
            else:
                media.append(_embed(picture, _caption(name), problems))
        facts = {
            "date": _minutes(result.date),
            "device": result.device,
            "seconds": f"{result.seconds:.0f}" if result.seconds is not None else "",
            "backbone": result.model.backbone,
            "weights": result.model.weights,
            "projection": (result.model.projection_hash or "")[:8],
            **result.versions,
        }
        sections.append(
            {
                "title": title,
                "facts": {name: fact for name, fact in facts.items() if fact},
                "results": result.results,
                "by_sequence": result.by_sequence,
                "sequence_metric": result.sequence_metric,
                "metrics": dict.fromkeys(key for metrics in result.results.values() for key in metrics),
                "settings": _flatten(result.settings),
                "data": _flatten(result.data),
                "media": [each for each in media if each],
                "links": links,
                "path": path,
            }
        )
    return sections


def _draw_plots(
    runs: list[Run], titles: Mapping[str, str], folder: Path, problems: list[str]
) -> dict[str, Media | None]:
    """Draw the plots that compare the runs; return them by title."""
    drawn: dict[str, Media | None] = {}
    trained = [run.folder for run in runs if run.has_metrics]
    if trained:
        path = folder / "learning.png"
        try:
            plots.learning_curves(trained, path)
        except InputError as error:
            problems.append(str(error))
        else:
            drawn["Learning curves"] = _embed(path, CAPTIONS[path.name], problems)
    # Distances on different data cannot be compared. Of several results of a run, the latest one counts.
    consistency: dict[str, dict[str, Result]] = {}
    for run in runs:
        for _, result in run.results:
            if result.task == "consistency" and plots.has_trade_off(result.results):
                consistency.setdefault(titles[_measured(result)], {})[run.name] = result
    for number, (title, by_run) in enumerate(consistency.items(), start=1):
        path = folder / ("trade_off.png" if number == 1 else f"trade_off_{number}.png")
        plots.trade_off(
            [(name, result.results["before"], result.results["after"]) for name, result in by_run.items()],
            path,
        )
        heading = "Trade-off" if len(consistency) == 1 else f"Trade-off: {title}"
        drawn[heading] = _embed(path, CAPTIONS["trade_off.png"], problems)
    return drawn


def _caption(name: str) -> str:
    """Say what a picture or video of a result shows."""
    if name in CAPTIONS:
        return CAPTIONS[name]
    end = next(end for end in SEQUENCE_CAPTIONS if name.endswith(end))
    return f"{name.removesuffix(end)}: {SEQUENCE_CAPTIONS[end]}"


def _embed(path: Path, caption: str, problems: list[str]) -> Media | None:
    """Return a picture, compressed, or a video; None and a problem if it cannot be read."""
    name = path.stem.replace("_", " ")
    try:
        if path.suffix == ".mp4":
            return Media(name, caption, _url("video/mp4", path.read_bytes()), is_video=True)
        picture = Image.fromarray(decode_image(read_encoded(path)))
    except (OSError, UnreadableFrameError) as error:
        problems.append(f"'{path}' cannot be read: {os_reason(error)}.")
        return None
    width = picture.width // 2
    picture.thumbnail((PICTURE_WIDTH, picture.height))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return Media(name, caption, _url("image/webp", buffer.getvalue()), width)


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _minutes(date: str) -> str:
    """Shorten a date in ISO format, in UTC."""
    return f"{date[:16].replace('T', ' ')} UTC" if date else ""
