"""Checkpoints, such as checkpoints/step_00000500.pt after 500 completed steps.

A checkpoint contains only tensors, numbers and strings, so that `torch.load(weights_only=True)` can read it.
It is written atomically.
"""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from fasttrain.errors import InputError
from fasttrain.files import PARTIAL, naming, write_atomically

_NAME = re.compile(r"step_(\d{8})\.pt")


def save_checkpoint(folder: Path, completed_steps: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint of `completed_steps` steps and return its path."""
    path = _path(folder, completed_steps)
    # Serialised in memory first, because torch.save masks OS errors, such as a full disk.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())
    return path


def drop_checkpoints(folder: Path, completed_steps: int, *, keep: int) -> None:
    """Delete all but the latest `keep` checkpoints up to `completed_steps`, and all later ones.

    Later checkpoints were written by a run that was interrupted before all its backbones had one. The
    temporary files of a killed run are deleted, too, so no other process may be writing to the folder.
    """
    steps = saved_steps(folder)
    kept = [saved for saved in steps if saved <= completed_steps][-keep:]
    for dropped in set(steps) - set(kept):
        _path(folder, dropped).unlink()
    for partial in folder.glob(f".*{PARTIAL}"):
        partial.unlink()


def saved_steps(folder: Path) -> list[int]:
    """List the numbers of completed steps for which `folder` has a checkpoint, in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def load_checkpoint(folder: Path, completed_steps: int) -> dict[str, Any]:
    """Read the checkpoint of `completed_steps` steps onto the CPU; raise InputError if it is damaged."""
    path = _path(folder, completed_steps)
    # Read first, so that an error of the disk is not taken for damage. The checkpoint may be intact.
    with naming(path):
        content = io.BytesIO(path.read_bytes())
    try:
        # torch.load does not verify the checksums of the archive.
        with zipfile.ZipFile(content) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed")
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        content.seek(0)
        state: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
        facts = {name: value for name, value in state.items() if name != "losses"}
        if "projection" not in state or any(map(torch.is_tensor, facts.values())):
            raise ValueError("it is not a checkpoint of a training run")
        if not isinstance(state.get("bad_samples", 0), int):
            raise ValueError("its count of unreadable samples is not a number")
    # Damaged files raise exceptions of any type.
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"checkpoint {str(path)!r} cannot be read ({first_line}); delete it to resume from an earlier one"
        ) from error
    return state


def _path(folder: Path, completed_steps: int) -> Path:
    return folder / f"step_{completed_steps:08d}.pt"
