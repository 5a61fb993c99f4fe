"""Draw result files, each as a PNG beside it: `python -m benchmarks.plot results/step-cuda.json ...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# What is drawn of a row that a benchmark measured: the first that it has.
KEYS = ("ms", "pairs_per_second")


def panels(results: Any, title: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """Titles and bars (label -> figure), wherever there are rows beside each other."""
    if isinstance(results, list):
        results = {label(row): row for row in results if isinstance(row, dict)}
    rows = {name: row for name, row in results.items() if isinstance(row, dict)}
    for key in KEYS:
        bars = {name: row[key] for name, row in rows.items() if key in row}
        if bars:
            yield f"{title}: {key.replace('_', ' ')}", bars
            return
    for name, value in results.items():
        if isinstance(value, (dict, list)):
            yield from panels(value, f"{title} {name}".strip())


def label(row: dict[str, Any]) -> str:
    """A row of a list: its name, or the whole numbers that set it apart."""
    facts = [f"{key} {value}" for key, value in row.items() if isinstance(value, int)]
    return str(row.get("case", {}).get("name", ", ".join(facts)))


def plot(path: Path) -> Path:
    """Panels of bars, one below the other."""
    content = json.loads(path.read_text(encoding="utf-8"))
    drawn = list(panels(content))
    rows = [len(bars) + 1 for _, bars in drawn]
    figure = Figure(figsize=(9, 1 + 0.35 * sum(rows)), layout="constrained")
    axes = figure.subplots(len(drawn), squeeze=False, height_ratios=rows)
    for axis, (title, bars) in zip(axes[:, 0], drawn, strict=True):
        axis.bar_label(axis.barh(list(bars), list(bars.values())), fmt="%.4g", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel(title)
    environment = content["environment"]
    figure.suptitle(f"{path.stem}, {environment['device'] or environment['cpu']['model']}")
    figure.savefig(path.with_suffix(".png"), dpi=110)
    return path.with_suffix(".png")


if __name__ == "__main__":
    if not sys.argv[1:] or not all(argument.endswith(".json") for argument in sys.argv[1:]):
        sys.exit("usage: python -m benchmarks.plot benchmarks/results/NAME-DEVICE.json ...")
    for argument in sys.argv[1:]:
        print(plot(Path(argument)))
