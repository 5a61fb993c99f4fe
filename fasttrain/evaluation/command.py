"""Evaluate a training run on a benchmark, before and after its projection.

Prints a table and writes the results to OUTPUT/TASK.json, together with pictures and the predicted masks
(davis, vip) or poses (jhmdb). Under torchrun, the processes divide the sequences or videos among
themselves. The `--` keeps torchrun from reading --run as one of its own options:

    torchrun --nproc-per-node=8 -m -- fasttrain eval probe --run RUN --root DATASET
"""

import argparse
import os
import time
from pathlib import Path
from types import ModuleType

from fasttrain import distributed
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import (
    classification,
    consistency,
    davis,
    jhmdb,
    localization,
    model,
    retrieval,
    vip,
)
from fasttrain.evaluation.results import print_table, with_difference, write_results
from fasttrain.files import make_folder
from fasttrain.loggers import say

# By name, in the order of the help: the task's module and a description for the help and the table.
TASKS: dict[str, tuple[ModuleType, str]] = {
    "davis": (davis, "video object segmentation by label propagation (J and F)"),
    "vip": (vip, "body part segmentation by label propagation (mean IoU, IoU per class)"),
    "jhmdb": (jhmdb, "human pose tracking by label propagation (PCK, mean and per joint)"),
    "consistency": (consistency, "consistency and separability (distances within and between videos)"),
    "retrieval": (retrieval, "video retrieval by nearest neighbours (recall at 1, 5 and 10 in percent)"),
    "probe": (classification, "video classification by k-NN and a linear probe (accuracy in percent)"),
    "localization": (localization, "temporal action localisation (frame accuracy, F1, edit, mAP in percent)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True, metavar="{" + ",".join(TASKS) + "}")
    for name, (task, description) in TASKS.items():
        task_parser = tasks.add_parser(
            name,
            help=description,
            description=task.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        task_parser.add_argument(
            "--root", type=Path, required=True, metavar="DATASET", help="path of the dataset"
        )
        model.add_arguments(task_parser)
        task_parser.add_argument(
            "--output",
            type=Path,
            metavar="FOLDER",
            help=f"folder for the results (default: eval/{name} in RUN or, without --run, in the working "
            "directory)",
        )
        task.add_arguments(task_parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate the encoder on one task; write and print the results.

    Raises InputError if the dataset or the encoder cannot be loaded.
    """
    task, description = TASKS[arguments.task]
    output = arguments.output or (arguments.run or Path()) / "eval" / arguments.task
    start, old_pictures = time.perf_counter(), _pictures(output)
    with distributed.start(arguments.device) as world:
        evaluated = world.run_on_all(lambda: _prepare(arguments, output, world))
        report = task.run(arguments, evaluated, output, world)
    if report is None:
        return
    results = with_difference(report["results"])
    encoder, projection = evaluated.encoder, evaluated.projection
    context = {
        "task": arguments.task,
        "settings": vars(arguments),
        "model": {
            "backbone": encoder.name,
            "weights": encoder.weights,
            "weights_hash": encoder.weights_hash,
            "mean": encoder.mean,
            "std": encoder.std,
            "head": projection.head if projection else None,
        },
        # The folder may also contain pictures of other sequences, drawn by an earlier evaluation.
        "pictures": [name for name, mtime in _pictures(output).items() if mtime != old_pictures.get(name)],
        "seconds": time.perf_counter() - start,
    }
    path = output / f"{arguments.task}.json"
    write_results(path, {**context, **report, "results": results})
    print_table(f"{arguments.task}: {description}\n{encoder.name}, {encoder.weights}", results)
    say(f"results written to {path}")


def _prepare(arguments: argparse.Namespace, output: Path, world: World) -> model.EvaluatedModel:
    """Check the paths and load the encoder, so that bad input fails before the evaluation begins."""
    if not arguments.root.exists():
        raise InputError(f"--root: '{arguments.root}' does not exist. Pass the path of the dataset.")
    evaluated = model.load_model(arguments, world.device)
    make_folder(output)
    if not os.access(output, os.W_OK):
        raise InputError(f"--output: '{output}' is not writable. Pass another folder.")
    return evaluated


def _pictures(output: Path) -> dict[str, int]:
    """Return the modification time of each picture in the output folder, sorted by name."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(output.glob("figures/*"))}
