"""File access: atomic writes, file locks, and text files of the user."""

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
    """Write `content` to `path`, as `open_atomically` does."""
    with open_atomically(path, fsync=fsync) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, f"{json.dumps(value, indent=2)}\n".encode())


@contextmanager
def open_atomically(path: Path, *, fsync: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file for writing that replaces `path` when the context ends without an exception.

    Readers see either the old file or the complete new one. Missing parent folders are created. Several
    processes may write to the same path concurrently; the last one to finish wins. With `fsync`, the file and
    its directory entry are on disk when the context ends.
    """
    make_folder(path.parent)
    # Random, because processes in different containers may have the same process ID.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with naming(path):
        try:
            with partial.open("wb") as file:
                yield file
                if fsync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if fsync:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the OS errors of the context name `path`.

    Those of an open file name no file, and those of a temporary file name one that users do not know.
    """
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def make_folder(path: Path) -> None:
    """Create a folder and its parents, unless they exist. Raises InputError if the path cannot exist."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    # Raised although all parents are created, by file systems such as /proc.
    except FileNotFoundError:
        raise InputError(f"folder {str(path)!r} cannot be created there; use another path") from None


def file_lock(path: Path, refusal: str) -> AbstractContextManager[object]:
    """Lock the file `path`, creating it if necessary. Leaving the returned context releases the lock.

    The operating system also releases it when the process ends. The file itself is never deleted.

    Raises:
        InputError: Another process holds the lock. The message is `refusal`.
    """
    make_folder(path.parent)
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        raise InputError(refusal) from None


def read_lines(path: Path, expected: str = "a text file in UTF-8") -> list[str]:
    """Return the stripped, non-empty lines of a text file; raise InputError if it cannot be read.

    Lines end at line feeds only: `str.splitlines` also splits at characters such as U+2028, which occur in
    video titles.
    """
    try:
        # utf-8-sig skips a byte order mark, which some Windows editors write. Text mode reads \r\n as \n.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({os_reason(error)}); expected {expected}") from error
    return [line.strip() for line in lines if line.strip()]


def os_reason(error: Exception) -> str:
    """Return the reason for an OS error or an FFmpeg error in a few words, without the path."""
    return (getattr(error, "strerror", None) or str(error)).lower()
