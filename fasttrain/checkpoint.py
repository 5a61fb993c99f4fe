"""Checkpoints: `checkpoints/step_00000500.pt` holds tensors, numbers and text only.

`torch.load(weights_only=True)` reads it. A file appears under its name only when it is whole.
"""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from fasttrain.errors import InputError
from fasttrain.files import write_atomically

_NAME = re.compile(r"step_(\d{8})\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint after `step` optimiser steps."""
    path = folder / f"step_{step:08d}.pt"
    # First to memory: on a full disk torch hides the system's error.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer(), fsync=True)
    return path


def drop_checkpoints(folder: Path, step: int, *, keep: int) -> None:
    """Leave the newest `keep` checkpoints up to `step`: later ones are of a run that was cut off."""
    steps = saved_steps(folder)
    kept = [saved for saved in steps if saved <= step][-keep:]
    for dropped in set(steps) - set(kept):
        (folder / f"step_{dropped:08d}.pt").unlink()


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def load_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """Read the checkpoint of `step` onto the CPU; InputError if it is damaged."""
    path = folder / f"step_{step:08d}.pt"
    try:
        # torch does not compare damaged numbers with the checksums that the archive holds.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes lead Python's and torch's readers to errors of any kind.
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"checkpoint {str(path)!r} cannot be read ({first_line}); delete it to resume from the one before"
        ) from error
    return state
