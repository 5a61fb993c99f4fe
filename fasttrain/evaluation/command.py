"""Measure a run on a benchmark, before and after its projection: `python -m fasttrain eval TASK`.

Writes OUTPUT/TASK.json, pictures and, for DAVIS, the masks; prints a table. Under torchrun the sequences or
videos are spread over the processes; `--` keeps torchrun from taking --run for an option of its own:

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

# In the order of the help: the module and what it measures.
TASKS: dict[str, tuple[ModuleType, str]] = {
    "davis": (davis, "video object segmentation by label propagation: J and F"),
    "vip": (vip, "body part segmentation by label propagation: mean IoU and each class"),
    "jhmdb": (jhmdb, "human pose by label propagation: PCK, mean and each joint"),
    "consistency": (consistency, "the paper's trade-off: distances within and between videos"),
    "retrieval": (retrieval, "nearest videos: recall at 1, 5 and 10 in percent"),
    "probe": (classification, "classification: weighted k-NN and a linear probe, accuracy in percent"),
    "localization": (localization, "actions in time: frames, segments and detections, in percent"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True, metavar="{" + ",".join(TASKS) + "}")
    for name, (task, meaning) in TASKS.items():
        of_task = tasks.add_parser(
            name,
            help=meaning,
            description=task.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        of_task.add_argument("--root", type=Path, required=True, help="the data set")
        model.add_arguments(of_task)
        of_task.add_argument("--output", type=Path, help="folder for the results (default: eval/TASK in RUN)")
        task.add_arguments(of_task)


def run(arguments: argparse.Namespace) -> None:
    """Raises InputError for a data set or an encoder that cannot be had."""
    task, meaning = TASKS[arguments.task]
    output = arguments.output or (arguments.run or Path()) / "eval" / arguments.task
    begun, earlier = time.perf_counter(), _pictures(output)
    with distributed.start(arguments.device) as world:
        evaluated = world.run_on_all(lambda: _prepare(arguments, output, world))
        found = task.run(arguments, evaluated, output, world)
    if found is None:
        return
    results = with_difference(found["results"])
    encoder, projection = evaluated.encoder, evaluated.projection
    about = {
        "task": arguments.task,
        "settings": vars(arguments),
        "model": {
            "backbone": encoder.name,
            "weights": encoder.weights,
            "weights_hash": encoder.weights_hash,
            "head": projection.head if projection else None,
        },
        # The folder may also hold those of an earlier evaluation, of other sequences.
        "pictures": [name for name, written in _pictures(output).items() if written != earlier.get(name)],
        "seconds": time.perf_counter() - begun,
    }
    path = output / f"{arguments.task}.json"
    write_results(path, {**about, **found, "results": results})
    print_table(f"{arguments.task}: {meaning}\n{encoder.name}, {encoder.weights}", results)
    print(f"written to {path}")


def _prepare(arguments: argparse.Namespace, output: Path, world: World) -> model.EvaluatedModel:
    """What may fail before the work of hours: the paths and the encoder."""
    if not arguments.root.exists():
        raise InputError(f"--root {arguments.root} does not exist; give the folder of the data set")
    evaluated = model.load_model(arguments, world.device)
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise InputError(f"{output} cannot be written to; give another --output")
    return evaluated


def _pictures(output: Path) -> dict[str, int]:
    """Names in the folder of pictures, in order, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(output.glob("figures/*"))}
