"""The run folder before training: whether a recipe may use or resume it, its lock, and leftover files."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fasttrain.checkpoint import drop_checkpoints, saved_steps
from fasttrain.errors import InputError
from fasttrain.files import file_lock, is_url, naming
from fasttrain.recipe import Recipe, differences, load_recipe, recipe_hash


def check_run_folder(recipe: Recipe) -> Recipe | None:
    """Return the recipe of the run in the run folder, if there is one.

    Raises InputError if it must not be resumed with this recipe.
    """
    if is_url(recipe.output):
        raise InputError(f"output: {recipe.output!r} is a URL; expected a folder, such as a mounted one")
    folder = Path(recipe.output)
    path = folder / "recipe.yaml"
    if not path.exists():
        return None
    if recipe.resume == "never":
        raise InputError(
            f"output: {str(folder)!r} already holds a run. Continue it with resume=auto, or use another "
            f"output=DIR"
        )
    with naming(path):
        content = path.read_bytes()
    if not content.strip(b"\0"):
        # Version 0.1.0 did not wait until this file was on disk. Some file systems fill it with zeros.
        raise InputError(
            f"output: {str(path)!r} is empty, as after a loss of power. If this command is the one that "
            f"started the run, delete the file and repeat the command; otherwise use another output=DIR"
        )
    try:
        existing = load_recipe(path)
    except InputError as error:
        raise InputError(
            f"output: {str(path)!r} is not a recipe of this version ({error}). Use another output=DIR"
        ) from None
    if recipe_hash(existing) != recipe_hash(recipe):
        changed = "; ".join(differences(existing, recipe)[:4])
        raise InputError(
            f"output: {str(folder)!r} holds a run of another recipe ({changed}). Use another output=DIR"
        )
    return existing


def newest_common(saved: Mapping[str, Sequence[int]], output: str) -> int:
    """Return the step of the newest of the checkpoints `saved` that all backbones have; 0 if none has any.

    Raises InputError if some backbones in the folder `output` have checkpoints, but none in common.
    """
    common = set.intersection(*(set(steps) for steps in saved.values()))
    if not common and any(saved.values()):
        last = ", ".join(f"{name}: {max(steps, default='none')}" for name, steps in saved.items())
        raise InputError(
            f"output: the backbones in {output!r} have no checkpoint in common (last steps: {last}). Use "
            f"backbones=[NAME,...] to select those that can continue together, or use another output=DIR"
        )
    return max(common, default=0)


def check_facts(
    folder: Path, state: Mapping[str, Any], facts: Mapping[str, Any], earlier: Mapping[str, Any]
) -> None:
    """Raise InputError if the run of a checkpoint was trained with other facts than `facts`.

    Checkpoints of earlier versions lack some of them; `earlier` has the values of those versions.
    """
    for key, value in facts.items():
        trained = state.get(key, earlier.get(key, value))
        if trained != value:
            same = "Use the same global batch, data, loader (install or remove DALI) and weights"
            if key.startswith("backbone."):
                same = f"Set {key}={json.dumps(trained, separators=(',', ':'))}"
            raise InputError(
                f"output: the run in {str(folder)!r} was trained with {key} {trained!r}, but this command "
                f"has {value!r}. {same}, or use another output=DIR"
            )


def check_length(
    recipe: Recipe, earlier: Recipe, completed_steps: int, total_steps: int, say: Callable[[str], None]
) -> None:
    """Say that the length of the run has changed, or raise InputError if it has completed more steps."""
    if completed_steps > total_steps:
        raise InputError(
            f"train.steps: the run in {recipe.output!r} has completed {completed_steps} steps, but this "
            f"command has {total_steps}. Raise train.steps or train.epochs, or use another output=DIR"
        )
    length = operator.attrgetter("train.steps", "train.epochs")
    if length(earlier) != length(recipe) and completed_steps:
        say(
            f"the length of the run has changed: from step {completed_steps} on, the learning rate follows "
            f"the schedule of {total_steps} steps"
        )


@contextmanager
def lock_run_folder(folder: Path, saved: Sequence[int], completed_steps: int, *, keep: int) -> Iterator[None]:
    """Lock a run folder, and delete the checkpoints that a killed run has left over.

    Raises InputError if another run has the lock, or has written checkpoints since the list `saved` was read.
    """
    # Two runs in one folder would overwrite each other's files.
    refusal = (
        f"output: another run is writing to {str(folder)!r}. Wait until it ends, or use another output=DIR"
    )
    with file_lock(folder / "run.lock", refusal):
        if saved_steps(folder / "checkpoints") != saved:
            raise InputError(
                f"output: another run has written to {str(folder)!r} since this command started. Repeat the "
                f"command"
            )
        drop_checkpoints(folder / "checkpoints", completed_steps, keep=keep)
        yield
