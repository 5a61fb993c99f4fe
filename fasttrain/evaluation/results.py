"""The results of an evaluation: the difference between the variants, TASK.json, the table that is printed."""

import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fasttrain.files import write_json

PACKAGES = ("fasttrain", "torch", "timm", "numpy", "scipy", "pillow")


def with_difference(by_variant: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Adds after - before where both were measured."""
    if set(by_variant) != {"before", "after"}:
        return by_variant
    difference = {key: by_variant["after"][key] - value for key, value in by_variant["before"].items()}
    return {**by_variant, "difference": difference}


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with the installed versions of what computed it; what is not a finite number is null."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        # fasttrain itself is not installed where it runs from a checkout, as `make gpu-check` lets it.
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    write_json(path, _finite({**content, "versions": versions}))


def print_table(title: str, by_variant: dict[str, dict[str, float]]) -> None:
    table = Table(title=escape(title))
    table.add_column("measure")
    for variant in by_variant:
        table.add_column(variant, justify="right")
    for key in next(iter(by_variant.values())):
        table.add_row(key, *(_cell(values[key], variant) for variant, values in by_variant.items()))
    Console().print(table)


def _cell(value: float, variant: str) -> str:
    return "-" if math.isnan(value) else format(value, "+.4f" if variant == "difference" else ".4f")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
