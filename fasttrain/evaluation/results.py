"""The results of an evaluation: the difference between the variants, the JSON file and the table."""

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fasttrain
from fasttrain.files import printable, write_json

# Packages whose versions are recorded with the results.
PACKAGES = ("torch", "timm", "numpy", "scipy", "pillow")


def with_difference(by_variant: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Add `difference` (after minus before) if both variants were measured."""
    if set(by_variant) != {"before", "after"}:
        return by_variant
    difference = {key: by_variant["after"][key] - value for key, value in by_variant["before"].items()}
    return {**by_variant, "difference": difference}


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` and the package versions as JSON; non-finite numbers become null."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    versions = {"python": platform.python_version(), "fasttrain": fasttrain.__version__, **versions}
    text = json.dumps({**content, "versions": versions}, default=os.fspath)
    # Python's json module writes NaN and infinity, which JSON does not allow.
    write_json(path, json.loads(text, parse_constant=lambda name: None))


def print_table(title: str, by_variant: dict[str, dict[str, float]]) -> None:
    """Print one row per metric and one column per variant."""
    table = Table(title=escape("\n".join(map(printable, title.split("\n")))))
    table.add_column("metric")
    for variant in by_variant:
        table.add_column(variant, justify="right")
    for key in next(iter(by_variant.values())):
        table.add_row(
            escape(printable(key)), *(_cell(values[key], variant) for variant, values in by_variant.items())
        )
    Console().print(table)


def _cell(value: float, variant: str) -> str:
    return "-" if math.isnan(value) else format(value, "+.4f" if variant == "difference" else ".4f")
