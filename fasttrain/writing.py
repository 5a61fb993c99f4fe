"""Writing into a folder of the user's: alone, and with one line where it cannot be written.

`trainer` and `data.pack` write for hours into a folder that a second process may be given by mistake.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fasttrain.errors import InputError


@contextmanager
def alone(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the file `lock`, made here and removed at the end. It is free as soon as its process is dead.

    Raises:
        InputError: `refusal`, where another process holds it.
    """
    with writing(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(refusal) from None
        # Some file systems of clusters know no locks; there nobody guards against a second process.
        except OSError:
            pass
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written is one line."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"{folder} cannot be written: {reason}; the same command goes on from there"
        ) from None
