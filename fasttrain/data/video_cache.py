"""A cache of video metadata for each source, so that later runs need not scan unchanged files again.

Scanning a video reads all of its packets. A file counts as unchanged if its size and modification time are
the same. Unreadable files are not cached, so every run scans them again. The cache is in
$XDG_CACHE_HOME/fasttrain/videos (by default ~/.cache/fasttrain/videos) and may be deleted at any time.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import warnings
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.video import HAS_PYAV, VideoInfo
from fasttrain.errors import InputError
from fasttrain.files import cache_folder, write_atomically

if HAS_PYAV:
    import av

# The size of a file in bytes, and its modification time in nanoseconds.
FileState = tuple[int, int]
# Video name -> the state of the file when it was scanned, and its metadata.
CachedVideos = dict[str, tuple[FileState, VideoInfo]]

# A cache with a different header, such as one from another version of PyAV, is ignored.
_HEADER = {
    "format": 2,
    "av": av.__version__ if HAS_PYAV else None,
    "fields": [field.name for field in fields(VideoInfo)],
}


def file_state(path: Path) -> FileState:
    """Return the size and modification time of a file. Raises OSError."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def cache_path(source: Path) -> Path:
    """Return the path of the cache file for a source. Raises OSError if the user has no cache folder."""
    digest = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()
    return cache_folder("videos") / f"{digest[:32]}.json.gz"


def read_cache(source: Path) -> CachedVideos:
    """Read the cached videos of a source.

    Returns an empty dictionary if the cache is missing or damaged, or if another user has written it, who
    could make training read other frames.
    """
    try:
        with cache_path(source).open("rb") as file:
            if os.fstat(file.fileno()).st_uid not in (os.geteuid(), 0):
                return {}
            content = json.loads(gzip.decompress(file.read()))
        entries = content["videos"] if content["header"] == _HEADER else {}
        return {name: (tuple(entry["state"]), _from_json(entry["info"])) for name, entry in entries.items()}
    except (OSError, EOFError, AttributeError, LookupError, TypeError, ValueError, zlib.error):
        return {}


def write_cache(source: Path, videos: CachedVideos) -> None:
    """Replace the cache of a source. Warns, and does not raise, if the cache cannot be written."""
    entries = {name: {"state": state, "info": vars(info)} for name, (state, info) in sorted(videos.items())}
    content = json.dumps({"header": _HEADER, "videos": entries}, default=_as_json).encode()
    try:
        write_atomically(cache_path(source), gzip.compress(content, compresslevel=1))
    except (OSError, InputError) as error:
        warnings.warn(
            f"Cannot write the video cache ({error}). The next run will scan the "
            "videos again. Set XDG_CACHE_HOME to a writable folder to avoid this.",
            stacklevel=2,
        )


def _as_json(value: Any) -> Any:
    """Convert the fields of a VideoInfo that JSON cannot represent: its path and its times."""
    if isinstance(value, range):
        return {"start": value.start, "stop": value.stop, "step": value.step}
    return value.tolist() if isinstance(value, np.ndarray) else os.fsdecode(value)


def _from_json(info: dict[str, Any]) -> VideoInfo:
    times = info["times"]
    if isinstance(times, dict):
        times = range(times["start"], times["stop"], times["step"])
    elif times is not None:
        times = np.array(times, dtype=np.int64)
    return VideoInfo(**info | {"times": times})
