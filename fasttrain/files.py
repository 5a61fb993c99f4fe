"""File access: atomic writes, file locks, and text files of the user."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fasttrain.errors import InputError

Row = TypeVar("Row")
Parsed = TypeVar("Parsed")

# The suffix of temporary files.
PARTIAL = ".partial"
# A URL such as s3://bucket/folder, or several, such as zip://folder::s3://bucket/file.zip.
_URL = re.compile(r"[A-Za-z][\w+.-]+(::[\w+.-]+)*://")


def is_url(location: object) -> bool:
    """Whether a string is a URL rather than a path."""
    return isinstance(location, str) and _URL.match(location) is not None


def cache_folder(name: str) -> Path:
    """Return the path of a folder in the user's cache. Raises OSError if the user has no home folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise OSError(errno.ENOENT, "this user has no home folder", home)
    return Path(home) / "fasttrain" / name


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`, as `open_atomically` does."""
    with open_atomically(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, f"{json.dumps(value, indent=2)}\n".encode())


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing that replaces `path` when the context ends without an exception.

    Readers see either the old file or the complete new one, even after a loss of power: the file and its
    directory entry are on disk when the context ends. Missing parent folders are created. Several processes
    may write to the same path concurrently; the last one to finish wins.
    """
    make_folder(path.parent)
    _remove_abandoned(path)
    # Random, because processes in different containers may have the same process ID.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    with naming(path):
        try:
            with _open_locked(partial) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                # Before the lock is released, because an unlocked temporary file may be removed.
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _fsync_folder(path.parent)


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


def _open_locked(path: Path) -> BinaryIO:
    """Create a file and lock it until it is closed, which marks it as being written."""
    while True:
        file = path.open("xb")
        # File systems without locks refuse. On these, no temporary file is ever removed.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        # Another process removed the file before it was locked.
        file.close()


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` that no process is writing, because it was killed."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        with suppress(OSError), partial.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def make_folder(path: Path) -> None:
    """Create a folder and its parents, unless they exist, so that they are on disk.

    Raises InputError if the path cannot exist.
    """
    if path.is_dir():
        return
    if not path.parent.exists():
        make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
    # Raised although all parents are created, by file systems such as /proc.
    except FileNotFoundError:
        raise InputError(f"folder {str(path)!r} cannot be created there; use another path") from None
    _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    # A folder in which files may be created, but not listed.
    except PermissionError:
        return
    with naming(folder):
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot do this for folders.
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


@contextmanager
def file_lock(path: Path, refusal: str) -> Iterator[None]:
    """Lock the file `path` within the context, creating it if necessary.

    The operating system also releases it when the process ends. The file itself is never deleted.

    Raises:
        InputError: Another process holds the lock. The message is `refusal`.
    """
    # Imported on demand, because --help does not need it.
    from filelock import FileLock, Timeout

    make_folder(path.parent)
    lock = FileLock(path)
    try:
        with naming(path):
            lock.acquire(timeout=0)
    # Timeout is an OSError, too.
    except Timeout:
        raise InputError(refusal) from None
    try:
        yield
    finally:
        with naming(path):
            lock.release()


def read_lines(path: Path, expected: str = "a text file in UTF-8") -> list[str]:
    """Return the stripped, non-empty lines of a text file; raise InputError if it cannot be read.

    Lines end at line feeds only: `str.splitlines` also splits at characters such as U+2028, which occur in
    video titles.
    """
    try:
        return split_lines(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({os_reason(error)}); expected {expected}") from error


def split_lines(content: bytes) -> list[str]:
    """Return the lines of a text in UTF-8 as `read_lines` does. Raises UnicodeDecodeError."""
    # utf-8-sig skips a byte order mark, which some Windows editors write, as they do \r.
    lines = content.decode("utf-8-sig").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def parse_rows(
    path: Path, rows: Iterable[Row], parse: Callable[[Row], Parsed], expected: str
) -> list[Parsed]:
    """Parse the rows of a list. Raises InputError for a malformed row."""
    parsed = []
    for row in rows:
        try:
            parsed.append(parse(row))
        except InputError:
            raise
        # TypeError, because the missing fields of a short CSV row are None.
        except (LookupError, ValueError, TypeError) as error:
            raise InputError(f"'{path}': malformed row {row!r}; expected {expected}") from error
    return parsed


def printable(text: str) -> str:
    """Escape characters that a terminal would obey, as the name of a video may contain, and line feeds."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def os_reason(error: Exception) -> str:
    """Return the reason for an OS error or an FFmpeg error in a few words, without the path."""
    return (getattr(error, "strerror", None) or str(error)).lower()
