"""Experiment trackers: trackio and Weights & Biases, whose packages have the same interface."""

from __future__ import annotations

import contextvars
import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fasttrain.errors import InputError, pip_install
from fasttrain.files import parse_json, write_json
from fasttrain.loggers import metric_numbers, read_records

# In the run folder: for each package, the ID of the run and the last step that has been sent to it.
TRACKER_FILE = "tracker.json"


def check_installed(package: str) -> None:
    """Raise InputError if the package of a tracker is not installed."""
    spec = importlib.util.find_spec(package)
    # Without an origin, it is a folder of this name, such as the one in which wandb keeps its files.
    if spec is None or spec.origin is None:
        raise InputError(
            f"train.tracker: package {package!r} is not installed. Install it with: {pip_install(package)}"
        )


class Tracker:
    """A run of an experiment tracker, which shows the metrics and pictures of a run folder.

    A resumed run continues the same one. Neither package replaces a step that it has, so the steps after the
    checkpoint, which are trained again, are not sent again. Those that it lacks are sent from metrics.jsonl.
    A failure after the start is printed once, and training continues.

    Args:
        package: `trackio` or `wandb`.
        folder: The run folder.
        config: The resolved recipe.
        completed_steps: Number of completed steps.
        group: Name of the group of runs to which the run belongs.
        say: Prints a line.

    Raises:
        InputError: The tracker cannot be started.
    """

    def __init__(
        self,
        package: str,
        folder: Path,
        *,
        config: dict[str, Any],
        completed_steps: int,
        group: str | None,
        say: Callable[[str], None],
    ) -> None:
        self._package, self._say, self._failed = package, say, False
        path, records = folder / TRACKER_FILE, read_records(folder / "metrics.jsonl")
        runs = parse_json(path.read_bytes()) if path.exists() else {}
        earlier = runs.get(package)
        sent = max([earlier["step"], *(record["step"] for record in records)]) if earlier else -1
        identifier = earlier["id"] if earlier else secrets.token_hex(4)
        name = folder.resolve().name
        if package == "wandb":
            own: dict[str, Any] = {"id": identifier, "name": name, "reinit": "create_new"}
            own["dir"] = os.environ.get("WANDB_DIR", str(folder))
            # Without a network, it would wait for ever. What it has not sent remains in its folder.
            own["settings"] = {"finish_timeout": 300.0}
        else:
            # trackio finds a run that is resumed by its name, which must therefore be unique.
            own = {"name": f"{name}-{identifier}"}
        project = os.environ.get(f"{package.upper()}_PROJECT", "fasttrain")
        try:
            self._module = importlib.import_module(package)
            # trackio has one run per context, but several backbones have a run each.
            self._run = contextvars.copy_context().run(
                self._module.init, project=project, group=group, config=config, resume="allow", **own
            )
        # Anything may be raised if the network, the login or the settings of the package are wrong.
        except Exception as error:
            raise InputError(
                f"train.tracker: {package} cannot be started ({_one_line(error)}). Check its login, its "
                f"environment variables ({package.upper()}_...) and the network, or use "
                f"train.tracker=none"
            ) from error
        # Metrics of steps after the checkpoint are about to be removed from metrics.jsonl.
        write_json(path, runs | {package: {"id": identifier, "step": sent}})
        # The packages send from buffers, of which a killed process loses the rest.
        if package == "wandb":
            self._next = sent + 1 if self._run.offline else self._run.starting_step
        else:
            self._next = getattr(self._run, "_next_step", sent + 1)
        for record in records:
            if record["step"] <= completed_steps:
                self.write(record["step"], metric_numbers(record))

    def write(self, completed_steps: int, numbers: Mapping[str, float]) -> None:
        if completed_steps >= self._next:
            self._try(lambda: self._run.log(dict(numbers), step=completed_steps))

    def add_pictures(self, completed_steps: int, pictures: Mapping[str, Path]) -> None:
        self._try(
            lambda: self._run.log(
                {name: self._module.Image(str(path)) for name, path in pictures.items()}, step=completed_steps
            )
        )

    def close(self, *, failed: bool) -> None:
        # trackio has no failed runs.
        options = {"exit_code": 1} if failed and self._package == "wandb" else {}
        self._try(lambda: self._run.finish(**options))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        # A tracker must not end hours of training.
        except Exception as error:
            if not self._failed:
                self._say(
                    f"warning: {self._package} does not get all metrics and pictures ({_one_line(error)}); "
                    f"they are in the run folder"
                )
            self._failed = True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
