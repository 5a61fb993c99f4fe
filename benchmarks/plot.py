"""Draw the plot of a result file beside it: `python -m benchmarks.plot results/step-cuda.json ...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Panels = dict[str, dict[str, float]]


def panels(content: dict[str, Any]) -> Panels:
    """What each panel shows -> label -> figure, of any benchmark; those of other benchmarks are empty."""
    rate = "pairs_per_second"
    grown = content.get("scaling", {})
    loader_rate = rate if content["environment"]["device"] else "pairs_per_cpu_second"
    cases = {case["case"]["name"]: case for case in content.get("cases", ())}
    shapes = {label: row for label, row in content.items() if label.startswith("B ")}
    # A contender's own time on the GPU where a graph was recorded, else Python's.
    kernels = {label: {**row["step"], **row["graph"]} for label, row in shapes.items()}
    return {
        "pairs/s on resident frames": column(content.get("steps", {}).get("timings", {}), rate),
        "pairs/s with data": column(content.get("end_to_end", {}).get("timings", {}), rate),
        "pairs/s with one switch of the encoder changed": column(content.get("switches", {}), rate),
        "pairs/s by pairs in a batch": {str(row["batch"]): row[rate] for row in grown.get("batch", ())},
        "pairs/s by tokens of a frame": {
            str(row["tokens"]): row[rate] for row in grown.get("resolution", ())
        },
        loader_rate.replace("_", " "): column(content.get("loaders", {}), loader_rate),
        "times the script's speed": {name: case["time"]["speedup"]["wall"] for name, case in cases.items()},
        "times less memory": {name: case["memory"]["script_over_ours"] for name, case in cases.items()},
        **{
            f"{name}, ms, linear layer to gradients": {
                label: row[name]["ms"] for label, row in kernels.items() if name in row
            }
            for name in ("fused", "compiled", "eager")
        },
    }


def column(rows: dict[str, dict[str, float]], key: str) -> dict[str, float]:
    return {name: row[key] for name, row in rows.items()}


def plot(path: Path) -> Path:
    """A PNG beside the JSON file: panels of bars, one below the other."""
    content = json.loads(path.read_text(encoding="utf-8"))
    drawn = {meaning: bars for meaning, bars in panels(content).items() if bars}
    rows = [len(bars) + 1 for bars in drawn.values()]
    figure = Figure(figsize=(9, 1 + 0.35 * sum(rows)), layout="constrained")
    axes = figure.subplots(len(drawn), squeeze=False, height_ratios=rows)
    for axis, (meaning, bars) in zip(axes[:, 0], drawn.items(), strict=True):
        container = axis.barh(list(bars), list(bars.values()))
        axis.invert_yaxis()
        axis.bar_label(
            container, fmt=lambda value: f"{value:.3g}" if value < 100 else f"{value:.0f}", padding=3
        )
        axis.margins(x=0.12)
        axis.set_xlabel(meaning)
    environment = content["environment"]
    figure.suptitle(f"{path.stem}, {environment['device'] or environment['cpu']['model']}")
    figure.savefig(path.with_suffix(".png"), dpi=110)
    return path.with_suffix(".png")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(plot(Path(argument)))
