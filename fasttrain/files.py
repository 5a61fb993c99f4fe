"""Files of a user's folder: whole or not at all, written by one process alone, one line where that fails.

Also how lists are read. What must be on the disk before anything later is written, checkpoints and packed
shards, has its own way.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fasttrain.errors import InputError


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a name of its own, then rename; the folder of `path` is made if need be.

    Any number of processes may write the same file at once; those of two containers may have one number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the file `lock`, made here and removed at the end. It is free as soon as its process is dead.

    Raises:
        InputError: `refusal`, where another process holds it.
    """
    with writing(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, refusal):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(lock: Path, refusal: str) -> BinaryIO:
    for _ in range(100):
        with writing(lock.parent):
            file = lock.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(refusal) from None
        # Some file systems of clusters know no locks; there nobody guards against a second process.
        except OSError:
            return file
        # Its holder may have removed it since it was opened: then it is nobody's lock any more.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()
    # Nor can it be guarded where what is open is never the file of that name.
    return lock.open("ab")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written is one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {os_reason(error)}; the same command goes on from there"
        ) from None


def text_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8 that say something, stripped. Raises OSError, UnicodeDecodeError.

    Lines end as files end them. `str.splitlines` would also break at marks that titles of videos hold, such
    as U+2028.
    """
    # -sig: editors on Windows begin a file with a byte order mark. In text mode \r\n is \n.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [line.strip() for line in lines if line.strip()]


def os_reason(error: OSError) -> str:
    """What went wrong with a file, in a few words."""
    return (error.strerror or str(error)).lower()
