"""Draw result files as bar charts: `python -m benchmarks.plot benchmarks/results/step-cpu.json ...`.

Each chart is written as a PNG next to its JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from fasttrain.evaluation.plots import OKABE_ITO, PAGE, STYLE

# Metrics that can be drawn, in order of preference.
METRICS = {
    "ms": "time in ms (lower is better)",
    "pairs_per_second": "frame pairs per second (higher is better)",
}
# JSON keys that are left out of titles.
CONTAINERS = ("cases", "rows", "time", "timings")

Rows = dict[str, dict[str, Any]]


def panels(results: Any, title: str = "") -> Iterator[tuple[str, str, Rows]]:
    """Yield each group of comparable rows: a title, the metric to draw, and the rows by name."""
    if isinstance(results, list):
        results = {label(row): row for row in results if isinstance(row, dict)}
    rows = {name: row for name, row in results.items() if isinstance(row, dict)}
    for metric in METRICS:
        measured = {name: row for name, row in rows.items() if metric in row}
        if measured:
            yield title, metric, measured
            return
    for name, value in results.items():
        if isinstance(value, (dict, list)):
            prefix = "" if name in CONTAINERS else name.replace("_", " ")
            yield from panels(value, prefix if prefix.startswith(title) else f"{title} {prefix}".strip())


def label(row: dict[str, Any]) -> str:
    """Name of a row in a list: that of its case, or the integers that distinguish it from other rows."""
    case = row.get("case")
    integers = [f"{key} {value}" for key, value in row.items() if isinstance(value, int)]
    return str(case["name"]) if isinstance(case, dict) else ", ".join(integers)


def spread(row: dict[str, Any], metric: str) -> tuple[float, float]:
    """Distances of the lowest and the highest round from the median."""
    rounds = [one[metric] for one in row.get("rounds", ()) if metric in one] or [row[metric]]
    lowest, highest = row.get(f"{metric}_least", min(rounds)), row.get(f"{metric}_most", max(rounds))
    return row[metric] - lowest, highest - row[metric]


@rc_context(STYLE)
def plot(path: Path) -> Path:
    """Draw a result file and return the path of the picture. Raises ValueError if the file has no timings."""
    content = json.loads(path.read_text(encoding="utf-8"))
    groups = list(panels(content))
    # Panels with a single bar compare nothing, so they are drawn only if there are no others.
    drawn = [group for group in groups if len(group[2]) > 1] or groups
    if not drawn:
        raise ValueError(f"{path} has no timings to draw")
    columns = 2 if len(drawn) > 1 else 1
    length = -(-len(drawn) // columns)
    longest = [max(len(rows) for _, _, rows in drawn[i::length]) for i in range(length)]
    figure = Figure(figsize=(PAGE * (0.4 + 0.3 * columns), 0.42 * sum(longest) + 0.5 * length + 1))
    grid = figure.subplots(length, columns, squeeze=False, height_ratios=longest).T.flatten()
    units = list(dict.fromkeys(METRICS[metric] for _, metric, _ in drawn))
    for number, (axes, (title, metric, rows)) in enumerate(zip(grid, drawn, strict=False)):
        values = [row[metric] for row in rows.values()]
        is_ours = [name == "fused" or name.startswith("ours") for name in rows]
        colors = [OKABE_ITO[0] if ours or not any(is_ours) else "0.7" for ours in is_ours]
        errors = list(zip(*(spread(row, metric) for row in rows.values()), strict=True))
        bars = axes.barh(
            list(rows), values, color=colors, xerr=errors, error_kw={"capsize": 4, "elinewidth": 1.5}
        )
        axes.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}", padding=4)
        axes.set_title(title[:1].upper() + title[1:] if len(drawn) > 1 else "")
        axes.set_xlabel(METRICS[metric] if len(units) > 1 else "")
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.spines["left"].set_bounds(-0.5, len(rows) - 0.5)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.15)
        axes.set_ylim(longest[number % length] - 0.5, -0.5)
    for axes in grid[len(drawn) :]:
        axes.axis("off")
    environment = content["environment"]
    device = environment["device"] or environment["cpu"]["model"]
    unit = units[0] if len(units) == 1 else "speed"
    figure.suptitle(
        f"{path.stem} on {device}: {unit}\nbars: median of the rounds; whiskers: fastest and slowest round"
    )
    figure.savefig(path.with_suffix(".png"))
    return path.with_suffix(".png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON file of a benchmark")
    for file in parser.parse_args().files:
        if file.suffix != ".json" or not file.is_file():
            parser.error(f"{str(file)!r} is not a JSON file. Pass a file of benchmarks/results.")
        try:
            print(plot(file))
        except ValueError as error:
            print(error, file=sys.stderr)
