"""Evaluate a training run on a benchmark, before and after its projection.

Prints a table and writes the results to OUTPUT/TASK-DATASET-HASH.json. The hash stands for the weights and
the settings, so that no other evaluation has the same file. Pictures and the predicted masks (davis, vip) or
poses (jhmdb) are in the folder of the same name without `.json`. Under torchrun, the processes divide the
sequences or videos among themselves. The `--` keeps torchrun from reading --run as one of its own options:

    torchrun --nproc-per-node=8 -m -- fasttrain eval probe --run RUN --root DATASET
"""

import argparse
import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from fasttrain import distributed
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel, load_model
from fasttrain.errors import InputError, needing_eval
from fasttrain.evaluation.results import (
    Result,
    identify,
    print_others,
    print_table,
    read_result,
    result_path,
    with_difference,
    write_results,
)
from fasttrain.files import is_url, make_folder
from fasttrain.loggers import say
from fasttrain.options import TASKS

# The function `run` of a task: see "Add an evaluation" in docs/architecture.md.
Measure = Callable[[argparse.Namespace, EvaluatedModel, Path, World], dict[str, Any] | None]


def run(arguments: argparse.Namespace) -> None:
    """Evaluate the encoder on one task; write and print the results. Raises InputError as `evaluate`."""
    evaluated = evaluate(arguments)
    if evaluated is None:
        return
    path, result = evaluated
    _, description, _ = TASKS[result.task]
    say(f"{result.task}: {description}")
    say(f"{result.model.backbone}, {result.model.weights}")
    print_table(result.results)
    print_others(path)
    say(f"results written to {path}")


def evaluate(arguments: argparse.Namespace, measure: Measure | None = None) -> tuple[Path, Result] | None:
    """Evaluate the encoder on one task and write the results.

    `measure` takes the place of the function `run` of the task's module. Returns the file and its content on
    the main process, and None on the others. Raises InputError if the dataset or the encoder cannot be
    loaded.
    """
    if measure is None:
        with needing_eval():
            measure = import_module(TASKS[arguments.task].module).run
    # A run on the Hub has no folder for results.
    has_folder = arguments.run is not None and Path(arguments.run).is_dir()
    folder = arguments.output or Path(arguments.run if has_folder else "") / "eval"
    start = time.perf_counter()
    with distributed.start(arguments.device) as world:
        evaluated = world.run_on_all(lambda: _prepare(arguments, folder, world))
        identity = identify(arguments.task, vars(arguments), evaluated.encoder, evaluated.projection)
        path = result_path(folder, identity)
        content = measure(arguments, evaluated, path.with_suffix(""), world)
    if content is None:
        return None
    content |= {
        "results": with_difference(content["results"]),
        "pictures": sorted(picture.name for picture in path.with_suffix("").glob("figures/[!.]*")),
        "seconds": time.perf_counter() - start,
    }
    write_results(path, identity, content, world.device)
    return path, read_result(path)


def _prepare(arguments: argparse.Namespace, folder: Path, world: World) -> EvaluatedModel:
    """Check the paths and load the encoder, so that bad input fails before the evaluation begins."""
    if not is_url(arguments.root) and not arguments.root.exists():
        raise InputError(f"'{arguments.root}' does not exist. Pass the path of the dataset.")
    evaluated = load_model(arguments, world.device)
    make_folder(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output: '{folder}' is not writable. Pass another folder.")
    return evaluated
