"""What is known of video files from an earlier look: a file per source in the user's cache.

A look into a video reads all of its packets. The next start skips it wherever the file's size and time of
change are the same; what could not be read is looked into again. The cache is in
$XDG_CACHE_HOME/fasttrain/videos (~/.cache by default) and may be removed at any time.
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

import av
import numpy as np

from fasttrain.data.video import VideoInfo
from fasttrain.files import write_atomically

# A file's size and the time of its last change, in bytes and nanoseconds.
FileState = tuple[int, int]
# By name: a readable video, and its file's state then.
KnownVideos = dict[str, tuple[FileState, VideoInfo]]

# Nothing is known from a cache of another layout or of another ffmpeg.
_HEADER = {"format": 2, "av": av.__version__, "fields": [field.name for field in fields(VideoInfo)]}


def file_state(path: Path) -> FileState:
    """Raises OSError where the file cannot be looked at."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def cache_path(source: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()
    return home / "fasttrain" / "videos" / f"{digest[:32]}.json.gz"


def read_cache(source: Path) -> KnownVideos:
    """What is known of the videos of a source; nothing where the cache is missing or damaged."""
    try:
        content = json.loads(gzip.decompress(cache_path(source).read_bytes()))
        entries = content["videos"] if content["header"] == _HEADER else {}
    except (OSError, EOFError, ValueError, zlib.error):
        return {}
    return {name: (tuple(entry["state"]), _from_json(entry["info"])) for name, entry in entries.items()}


def write_cache(source: Path, videos: KnownVideos) -> None:
    """Remember all videos of a source; where the cache cannot be written, a warning says so."""
    known = {name: {"state": state, "info": vars(info)} for name, (state, info) in sorted(videos.items())}
    content = json.dumps({"header": _HEADER, "videos": known}, default=_as_json).encode()
    path = cache_path(source)
    try:
        write_atomically(path, gzip.compress(content, compresslevel=1))
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error}); the next start looks again", stacklevel=2)


def _as_json(value: Any) -> Any:
    """What JSON does not know of a VideoInfo: its path and its times."""
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
