"""Files of a user's folder: written whole or not at all, by one process at a time, with clear errors."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from fasttrain.errors import InputError


def write_atomically(path: Path, content: bytes | memoryview, *, fsync: bool = False) -> None:
    """Write `content` so that `path` is either the old file or the whole new one; makes the folder."""
    with open_atomically(path, fsync=fsync) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, as `write_atomically` does."""
    write_atomically(path, f"{json.dumps(value, indent=2)}\n".encode())


@contextmanager
def open_atomically(path: Path, *, fsync: bool = False) -> Iterator[BinaryIO]:
    """A file to write that gets the name `path` at the end; an exception removes it. Makes the folder.

    Any number of processes may write the same path at once: the last one wins.

    fsync: the file and its name are on the disk when this returns, before anything that is written later.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number: those of two containers may be the same.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        # The system names no file where the disk is full, and no user has heard of the partial one.
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)
    if fsync:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def file_lock(path: Path, refusal: str) -> AbstractContextManager[object]:
    """Take the lock file `path`, which is made here and stays; the context that is returned frees it.

    A lock is also free as soon as its process is dead.

    Raises:
        InputError: `refusal`, where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        raise InputError(refusal) from None


def read_lines(path: Path, expected: str = "a text file in UTF-8") -> list[str]:
    """The non-empty lines of a text file, stripped; InputError where it cannot be read.

    Lines end at line feeds only. `str.splitlines` would also break at characters that titles of videos
    contain, such as U+2028.
    """
    try:
        # -sig: editors on Windows begin a file with a byte order mark. In text mode \r\n is \n.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected {expected}") from error
    return [line.strip() for line in lines if line.strip()]


def os_reason(error: Exception) -> str:
    """What went wrong with a file, in a few words. ffmpeg's errors have a `strerror`, too."""
    return (getattr(error, "strerror", None) or str(error)).lower()
