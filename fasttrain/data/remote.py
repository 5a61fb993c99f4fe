"""Files at URLs that fsspec can open, and the local cache of the byte ranges that were read from them.

The cache of a source is a folder of sparse files. A byte range is stored at the place that it has in the
remote file; the rest are holes, which read as zeros. The checksum of a frame tells whether the frame is
stored, so processes share the files without locks or an index. All frames are equally likely to be read next,
so a full cache keeps what it has and stores no more. To make room for a new source, the folders of others are
removed, the least recently used first, unless a process uses them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fasttrain.errors import InputError, LocalInputError
from fasttrain.files import cache_folder, make_folder, naming

Result = TypeVar("Result")
# The size of a file in bytes, and a text that changes when the file is replaced.
RemoteState = tuple[int, str]
# Contiguous bytes of a file, and where they begin.
Span = tuple[int, bytes]

# The number of threads of a process that read from a server. They wait for it most of the time.
READERS = 32
# Pauses between attempts in seconds, in addition to those of s3fs and other file systems.
PAUSES = (1, 2, 4, 8)
# Ranges with a smaller gap are read as one, because a request costs more than these bytes.
MAX_GAP = 2**17
# The size of the cache is measured again after a process has written this many bytes.
MEASURE_EVERY = 2**26
# What file systems say about the version of a file, under different names.
_VERSION = (
    *("ETag", "etag", "md5Hash", "generation", "blob_id"),
    *("LastModified", "last_modified", "Last-Modified", "mtime", "created"),
)


class RemoteFiles:
    """The files in the folder at a URL, or the single file at a URL, whose name is empty.

    Requests are repeated if the connection fails. Then, as for all other errors, LocalInputError is raised.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._open()

    def _open(self) -> None:
        # Imported on demand, because local sources do not need it.
        from fsspec.core import url_to_fs

        try:
            self._fs, self._path = url_to_fs(self.url)
        except ImportError as error:
            # The extras of fsspec are named after its protocols.
            extra = self.url.partition("://")[0].replace("https", "http")
            raise InputError(f"{self.url!r}: {_reason(error)}. Run: pip install 'fsspec[{extra}]'") from None
        except Exception as error:
            raise InputError(f"{self.url!r} cannot be opened: {_reason(error)}") from None
        # s3fs opens at most 10 connections by default. The two frames of a pair are two requests.
        getattr(self._fs, "config_kwargs", {}).setdefault("max_pool_connections", 2 * READERS)
        self._pid = os.getpid()

    def location(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}" if name else self.url

    def entries(self) -> dict[str, dict[str, Any]] | None:
        """Return what the file system says about each entry of the folder, by name; None if there is none."""

        def request(fs: Any) -> list[dict[str, Any]] | None:
            # Listings are cached in the process, but the folder may have changed.
            fs.invalidate_cache()
            try:
                return fs.ls(self._path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return None

        entries = self._request(request)
        if entries is None:
            return None
        paths = [(entry["name"].rstrip("/"), entry) for entry in entries]
        # Empty objects of S3 may stand for folders, which then contain themselves.
        return {path.rpartition("/")[2]: entry for path, entry in paths if path != self._path}

    def state(self, name: str, info: dict[str, Any] | None = None) -> RemoteState:
        """Return the state of a file. `info` is what `entries` says about it, if anything."""
        if info is None or info.get("size") is None:
            info = self._request(lambda fs: fs.info(self._name(name)), name)
        if not isinstance(info.get("size"), int):
            raise InputError(f"{self.location(name)!r}: the server does not tell the size of the file")
        return info["size"], version(info)

    def read(self, name: str = "") -> bytes:
        """Read a whole file."""
        return self._request(lambda fs: fs.cat_file(self._name(name), **_unbuffered(fs)), name)

    def read_files(self, names: Sequence[str]) -> list[bytes | FileNotFoundError]:
        """Read whole files at the same time."""

        def request(fs: Any) -> list[bytes | FileNotFoundError]:
            paths = [self._name(name) for name in names]
            contents = fs.cat_ranges(paths, None, None, **_unbuffered(fs))
            for content in contents:
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
            return contents

        return self._request(request)

    def read_spans(self, name: str, ranges: Iterable[tuple[int, int]]) -> list[Span]:
        """Read byte ranges (start, end) of a file at the same time, with the bytes between close ranges.

        A span is shorter than requested if the file ends there.
        """
        merged: list[list[int]] = []
        for start, end in sorted(ranges):
            if merged and start - merged[-1][1] <= MAX_GAP:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        starts, ends = ([*side] for side in zip(*merged, strict=True))
        paths = [self._name(name)] * len(merged)
        contents = self._request(
            lambda fs: fs.cat_ranges(paths, starts, ends, on_error="raise", **_unbuffered(fs)), name
        )
        if any(
            len(content) > end - start for start, end, content in zip(starts, ends, contents, strict=True)
        ):
            raise LocalInputError(
                f"{self.location(name)!r}: the server sends whole files instead of byte ranges. Use another "
                "server, or copy the files to a disk"
            )
        return list(zip(starts, contents, strict=True))

    def _name(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _request(self, request: Callable[[Any], Result], name: str = "") -> Result:
        if self._pid != os.getpid():
            # fsspec's thread, which handles the connections, does not exist after a fork.
            self._open()
        for pause in (*PAUSES, None):
            try:
                return request(self._fs)
            except Exception as error:
                if pause is None or is_final(error):
                    raise LocalInputError(
                        f"{self.location(name)!r} cannot be read: {_reason(error)}. Check the URL, the "
                        "credentials and the network, and repeat the command"
                    ) from error
                # Python shows the same warning only once.
                warnings.warn(
                    f"{self.location(name)!r} cannot be read now: {_reason(error)}. Trying again, up to "
                    f"{len(PAUSES)} times.",
                    stacklevel=2,
                )
                time.sleep(pause)
        raise AssertionError


def cut(spans: Iterable[Span], start: int, end: int) -> bytes:
    """Return the bytes of a range that one of the spans contains."""
    first, content = next(span for span in reversed(list(spans)) if span[0] <= start)
    return content[start - first : end - first]


def _unbuffered(fs: Any) -> dict[str, str]:
    """Return the option that keeps a file system without asyncio from reading more than it is asked for."""
    return {} if fs.async_impl else {"cache_type": "none"}


def version(info: dict[str, Any]) -> str:
    """Return a text that changes when a file is replaced, from what the file system says about the file."""
    return str([info[key] for key in _VERSION if key in info])


def is_final(error: BaseException | None) -> bool:
    """Whether a repeated request would fail as well."""
    status = getattr(error, "status", 0)
    return (
        isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError)
        or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
        or (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))
    )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:200].rstrip(". ")


class FrameCache:
    """The folder of one source in the cache, in which all sources together may occupy `limit` bytes.

    `identity` must change when the source does. Other processes cannot remove the folder while this object
    exists.
    """

    def __init__(self, identity: Any, limit: int) -> None:
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        try:
            self._root = cache_folder("frames")
        except OSError as error:
            raise InputError(
                f"the cache has no folder: {error.strerror}. Set XDG_CACHE_HOME to a folder"
            ) from None
        self.folder, self._limit = self._root / digest[:32], limit
        # Bytes that may be written before the cache is measured again; None: the cache is full.
        self._allowance: int | None = 0
        self._mutex = threading.Lock()
        self._in_use = _lock_shared(self.folder)
        if self.folder.stat().st_uid not in (os.geteuid(), 0):
            # They could make training read other frames.
            raise InputError(
                f"{str(self.folder)!r} belongs to another user. Set XDG_CACHE_HOME to a folder of your own"
            )
        # The time of its last use.
        os.utime(self.folder)

    def make_room(self, size: int) -> None:
        """Remove other sources so that a source of `size` bytes fits, if it can."""
        usage = {folder: _usage(folder) for folder in self._root.iterdir() if folder != self.folder}
        excess = sum(usage.values()) + min(size, self._limit) - self._limit
        for folder in sorted(usage, key=_last_use):
            if self._limit and excess > 0 and _remove_unused(folder):
                excess -= usage[folder]

    def create(self, name: str, size: int) -> None:
        """Create a file of holes, unless it exists."""
        path = self.folder / name
        with naming(path), path.open("ab") as file:
            if os.fstat(file.fileno()).st_size != size:
                file.truncate(size)

    def write(self, name: str, spans: Iterable[Span]) -> None:
        """Store bytes of a file, unless the cache is full."""
        for start, content in spans:
            if not self._allows(len(content)):
                return
            try:
                # Without a buffer, so that the bytes are written at once.
                with (self.folder / name).open("r+b", buffering=0) as file:
                    file.seek(start)
                    file.write(content)
            except OSError as error:
                self._allowance = None
                warnings.warn(
                    f"Cannot write to the cache of frames ({error}). This process stores no more. Free some "
                    "space, lower data.cache_size, or set XDG_CACHE_HOME to another folder.",
                    stacklevel=2,
                )
                return

    def _allows(self, size: int) -> bool:
        with self._mutex:
            if self._allowance is not None and self._allowance < size:
                left = self._limit - sum(map(_usage, self._root.iterdir()))
                self._allowance = min(left, MEASURE_EVERY) if left >= size else None
            if self._allowance is None:
                return False
            self._allowance -= size
            return True


def _lock_shared(folder: Path) -> BinaryIO:
    """Create a folder, and lock it against its removal until the returned file is closed."""
    while True:
        make_folder(folder)
        path = folder / "lock"
        try:
            with naming(path):
                file = path.open("ab")
        # Another process has just removed the folder.
        except FileNotFoundError:
            continue
        # File systems without locks refuse.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink:
            return file
        # Another process removed the folder before it was locked.
        file.close()


def _remove_unused(folder: Path) -> bool:
    """Remove the folder of a source unless a process uses it."""
    with suppress(OSError), (folder / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Unless another process has removed the folder meanwhile. It may exist again.
        if os.fstat(file.fileno()).st_nlink:
            # The lock is removed last. Until then, other processes wait before they create files.
            for path in folder.iterdir():
                if path.name != "lock":
                    path.unlink()
            shutil.rmtree(folder, ignore_errors=True)
        return True
    return False


def _usage(folder: Path) -> int:
    """Return the disk space that the files of a folder occupy, in bytes."""
    total = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            # Another process may remove it.
            with suppress(OSError):
                total += entry.stat().st_blocks * 512
    return total


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0
