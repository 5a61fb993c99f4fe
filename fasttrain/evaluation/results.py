"""The results of evaluations: their files, the table in the terminal, and how their metrics are read."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, Field
from rich.markup import escape
from rich.table import Table

import fasttrain
from fasttrain.errors import InputError
from fasttrain.files import naming, printable, write_json
from fasttrain.loggers import EnduringConsole, say

if TYPE_CHECKING:
    from fasttrain.backbones import Backbone
    from fasttrain.projection import Projection

# Packages whose versions are recorded with the results.
PACKAGES = ("torch", "timm", "numpy", "scipy", "pillow")
# The metrics that summarise a benchmark. Those of other benchmarks are their first one.
HEADLINES = {
    "probe": ("linear top-1",),
    "consistency": ("intra_normalized_95", "inter_normalized_95"),
    "analyse": ("intra_relative", "inter_relative"),
}
# What metrics mean, by the beginning of their names. The longest one that fits counts.
MEANINGS = {
    "J": "overlap of propagated and true masks (IoU), from 0 to 1",
    "J-Recall": "share of frames with J above 0.5",
    "J-Decay": "loss of J from the first to the last quarter of a video",
    "F-": "agreement of propagated and true contours, from 0 to 1",
    "F-Recall": "share of frames with F above 0.5",
    "F-Decay": "loss of F from the first to the last quarter of a video",
    "J&F": "mean of J and F",
    "mIoU": "overlap of propagated and true parts, mean over the classes, from 0 to 1",
    "PCK": "joints found within this distance, relative to the size of the person, in percent",
    "R@": "videos with one of the same class among the k nearest, in percent",
    "linear": "accuracy of a linear classifier, in percent",
    "NN": "accuracy of the votes of the k nearest videos, in percent",
    "frame accuracy": "frames with the correct label, in percent",
    "edit": "agreement of the order of segments, in percent",
    "F1@": "F1 of segments that overlap by this percentage or more, in percent",
    "mAP": "average precision of segments at this overlap (IoU), mean over the actions, in percent",
    "intra_original": "distance between matching tokens of two frames; depends on the scale of the features",
    "intra_diameter": "spread of the tokens of a video, which is the scale of the features",
    "intra_normalized": "distance within a video, relative to the spread of tokens",
    "inter_original": "distance between videos; depends on the scale of the features",
    "inter_diameter": "spread of the tokens of all videos, which is the scale of the features",
    "inter_normalized": "distance between videos, relative to the spread of tokens",
    "intra_relative": "squared distance between matching tokens, relative to the spread of tokens of a frame",
    "inter_relative": "squared distance between videos, relative to the spread of tokens",
    "effective_rank": "share of the dimensions that the features use, from 0 to 1",
    "cycle_accuracy": "share of tokens found again after a walk to a frame and back",
}  # fmt: skip
# Settings that say which model is measured, on which machine or what is drawn, but not what is measured.
_NOT_PROTOCOL = (
    *("task", "output", "run", "backbone", "weights", "projection"),
    *("num_heads", "activation", "layer_norm_eps", "mean", "std"),
    *("baseline_only", "projection_only", "device", "cache", "workers", "batch_size", "pictures"),
)
# Settings that say where the model, the results and cached features are. The model is known by its hashes.
_LOCATIONS = ("output", "run", "weights", "projection", "cache")

ByVariant = Mapping[str, Mapping[str, float | None]]


# --- files ---------------------------------------------------------------------------------------------


def identify(
    task: str, settings: Mapping[str, Any], encoder: Backbone, projection: Projection | None
) -> dict[str, Any]:
    """Return what identifies an evaluation: the task, its settings and the model.

    The paths of data become absolute. A list, which may change in place, is identified by its hash as well.

    Args:
        task: The name of the benchmark.
        settings: The settings. `root` is the path of the data set.
        encoder: The frozen backbone.
        projection: The projection, if there is one.
    """
    # Imported on demand, because it needs timm, which takes seconds to load. The report does not need either.
    from fasttrain.encoder_options import describe_model

    recorded = dict(settings)
    for name, path in settings.items():
        if isinstance(path, Path) and name not in _LOCATIONS:
            recorded[name] = os.fspath(path.resolve())
            if path.is_file():
                recorded[f"{name}_hash"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return {"task": task, "settings": recorded, "model": describe_model(encoder, projection)}


def result_path(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Return the file for the results of an evaluation: FOLDER/TASK-DATASET-HASH.json.

    The hash stands for the identity, except for the places of the model and the results, so only a repetition
    of the same evaluation has the same file. Pictures and predictions belong in the folder of the same name
    without `.json`.

    Args:
        folder: The folder of all results, such as RUN/eval.
        identity: The identity of the evaluation, from `identify`.
    """
    task, settings, model = identity["task"], identity["settings"], identity["model"]
    key = [
        task,
        {name: value for name, value in settings.items() if name not in _LOCATIONS},
        {name: value for name, value in model.items() if name not in _LOCATIONS},
    ]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    data = re.sub(r"[^\w.-]+", "_", Path(settings["root"]).name)[:40]
    return folder / f"{'-'.join(filter(None, (task, data, digest)))}.json"


def write_results(
    path: Path, identity: Mapping[str, Any], content: Mapping[str, Any], device: torch.device
) -> None:
    """Write the results of an evaluation as JSON, atomically; non-finite numbers become null.

    Args:
        path: The file, from `result_path` with the same identity.
        identity: The identity of the evaluation, from `identify`.
        content: `results` (the metrics by variant), `pictures` (the names of the files in the folder
            `figures`) and anything else that JSON can hold.
        device: The device that encoded the frames.
    """
    whole = {
        **identity,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **content,
        "versions": {
            "python": platform.python_version(),
            "fasttrain": fasttrain.__version__,
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }
    # Python's json module writes NaN and infinity, which JSON does not allow.
    text = json.dumps(whole, default=os.fspath)
    write_json(path, json.loads(text, parse_constant=lambda name: None))


class Model(BaseModel):
    """The model of a result."""

    backbone: str
    weights: str
    projection_hash: str | None = None


def _first_metric(per_sequence: Any) -> Any:
    """Return the first metric of all sequences by variant; of several objects (DAVIS), the mean J."""
    by_variant: dict[str, dict[str, float]] = {}
    try:
        for name, variants in per_sequence.items():
            for variant, scores in variants.items():
                first = next(iter(scores.values()))
                if isinstance(first, dict):
                    first = fmean(of_object["J"]["mean"] for of_object in scores.values())
                by_variant.setdefault(variant, {})[name] = nan if first is None else first
        return with_difference(by_variant)
    except (AttributeError, KeyError, StopIteration, TypeError) as error:
        raise ValueError("per_sequence is damaged") from error


class Result(BaseModel):
    """The parts of a result that are shown. Results of version 0.1.0 lack those that have a default."""

    task: str
    model: Model
    # Names of files, not paths, which could embed any file of the user in the report.
    pictures: list[Annotated[str, Field(pattern=r"^[^/]+\.(png|mp4)$")]]
    results: Annotated[dict[str, dict[str, float | None]], Field(min_length=1)]
    date: str = ""
    device: str = ""
    settings: dict[str, Any] = {}
    data: dict[str, Any] = {}
    per_sequence: dict[str, Any] = {}
    by_sequence: Annotated[
        dict[str, dict[str, float]], Field(validation_alias="per_sequence"), BeforeValidator(_first_metric)
    ] = {}
    """The metric `sequence_metric` by variant, which may be `difference`, and sequence."""
    seconds: float | None = None
    versions: dict[str, str] = {}

    @property
    def protocol(self) -> dict[str, Any]:
        """The settings that say what is measured. Results with the same ones can be compared."""
        return {name: value for name, value in self.settings.items() if name not in _NOT_PROTOCOL}

    @property
    def headlines(self) -> tuple[str, ...]:
        """The metrics that summarise the result."""
        metrics = next(iter(self.results.values()))
        return tuple(name for name in HEADLINES.get(self.task, ()) if name in metrics) or tuple(metrics)[:1]

    @property
    def sequence_metric(self) -> str:
        """The metric of single sequences."""
        return "J" if self.task == "davis" else self.headlines[0]

    def values(self, metric: str) -> dict[str, float]:
        """The values of a metric before and after the projection, as far as they were measured."""
        values = {variant: self.results.get(variant, {}).get(metric) for variant in ("before", "after")}
        return {variant: value for variant, value in values.items() if value is not None}


def find_results(folder: Path) -> list[Path]:
    """Return the JSON files in a folder of results, or in a folder of it, as in version 0.1.0."""
    return sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])


def read_result(path: Path) -> Result:
    """Read a JSON file that `write_results` wrote. Raises InputError for any other file."""
    try:
        with naming(path):
            return Result.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise InputError(
            f"'{path}' is not a result of `fasttrain eval`, or is damaged. Remove it."
        ) from error


# --- metrics -------------------------------------------------------------------------------------------


def with_difference(by_variant: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Add `difference` (after minus before) if both variants were measured."""
    if set(by_variant) != {"before", "after"}:
        return by_variant
    difference = {key: by_variant["after"][key] - value for key, value in by_variant["before"].items()}
    return {**by_variant, "difference": difference}


def better(metric: str) -> str:
    """Return `higher` or `lower`, whichever is better, or nothing if neither is."""
    is_scale = metric.endswith("_original") or "_diameter_" in metric
    if is_scale or metric in ("lambda", "cosine_distance"):
        return ""
    is_loss = metric in ("loss", "cycle", "separability") or metric.endswith("-Decay")
    return "lower" if is_loss or metric.startswith("intra_") else "higher"


def meaning(metric: str) -> str:
    """Return what a metric means in a few words, or nothing if that is not known."""
    # The names of k-NN metrics begin with k.
    metric = metric.lstrip("0123456789-")
    return MEANINGS.get(max((name for name in MEANINGS if metric.startswith(name)), key=len, default=""), "")


def distinguish(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe what distinguishes each of several settings from the others, such as `year=2016`."""
    names = dict.fromkeys(name for one in settings for name in one)
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]
    return [", ".join(f"{name}={one[name]}" for name in differing if name in one) for one in settings]


# --- the terminal --------------------------------------------------------------------------------------


def print_table(by_variant: ByVariant) -> None:
    """Print one row per metric, with the direction that is better and one column per variant."""
    table = Table()
    table.add_column("metric")
    table.add_column("better")
    for variant in by_variant:
        table.add_column(variant, justify="right")
    for key in next(iter(by_variant.values())):
        cells = [format_value(values[key], key, variant) for variant, values in by_variant.items()]
        table.add_row(escape(printable(key)), better(key), *cells)
    EnduringConsole().print(table)


def format_value(value: float | None, metric: str, variant: str = "") -> str:
    """Format a metric for a table; `difference` has a sign, and an undefined value is a dash."""
    if value is None or not isfinite(value):
        return "-"
    decimals = 2 if meaning(metric).endswith("in percent") else 4
    return format(value, f"{'+' * (variant == 'difference')}.{decimals}f")


def print_others(path: Path) -> None:
    """Print the result in `path` and those of the same benchmark in its folder, oldest first."""
    results = {}
    for other in {path, *find_results(path.parent)}:
        try:
            results[other] = read_result(other)
        except InputError:
            continue
    task = results[path].task
    shown = sorted((result.date, other) for other, result in results.items() if result.task == task)
    if len(shown) < 2:
        return
    say(f"all results of {task} in {path.parent} (* this one):")
    others = [results[other] for _, other in shown]
    differences = distinguish(
        [
            {
                **result.protocol,
                "backbone": result.model.backbone,
                "weights": result.model.weights,
                "projection": (result.model.projection_hash or "none")[:8],
            }
            for result in others
        ]
    )
    for (date, other), result, difference in zip(shown, others, differences, strict=True):
        values = [
            f"{metric} "
            f"{' -> '.join(format_value(value, metric) for value in result.values(metric).values()) or '-'}"
            for metric in result.headlines
        ]
        mark, when = "*" if other == path else " ", date[:16].replace("T", " ") or "no date".ljust(16)
        say("  ".join((mark, when, *values, os.path.relpath(other, path.parent), difference)).rstrip())
