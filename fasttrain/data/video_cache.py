"""What is known of video files from an earlier look: a file per source in the user's cache.

A look into a video reads all of its packets. At the next start this file spares it wherever the size and the
time of the last change are still the same; what could not be read is looked into again. It lies in
$XDG_CACHE_HOME/fasttrain/videos (~/.cache by default) and may be removed at any time.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import av
import numpy as np

from fasttrain.data.video import VideoInfo
from fasttrain.files import write_atomically

# A file's size and the time of its last change, in bytes and nanoseconds.
FileState = tuple[int, int]

# What another layout, or another ffmpeg, wrote is read as nothing known.
_HEADER = {"format": 2, "av": av.__version__, "fields": [field.name for field in fields(VideoInfo)]}


def file_state(path: Path) -> FileState:
    """Raises OSError where the file cannot be looked at."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class VideoCache:
    """The videos of one source that were readable, by name, each as its file then was."""

    def __init__(self, source: Path) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        digest = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()
        self.path = home / "fasttrain" / "videos" / f"{digest[:32]}.json.gz"
        self._known: dict[str, Any] = {}
        try:
            content = json.loads(gzip.decompress(self.path.read_bytes()))
            if content["header"] == _HEADER:
                self._known = content["videos"]
        except (OSError, EOFError, ValueError, zlib.error):
            return

    def find(self, name: str, path: Path, state: FileState) -> VideoInfo | None:
        """What is known of a file that is now in this state; None where nothing is."""
        entry = self._known.get(name)
        if entry is None or tuple(entry["state"]) != state:
            return None
        times = entry["info"]["times"]
        if isinstance(times, dict):
            times = range(times["start"], times["stop"], times["step"])
        elif times is not None:
            times = np.array(times, dtype=np.int64)
        return VideoInfo(**entry["info"] | {"path": path, "times": times})

    def write(self, videos: Mapping[str, tuple[FileState, VideoInfo]]) -> None:
        """Remember these videos, all of the source; where the cache cannot be written, a warning says so."""
        before = {name: tuple(entry["state"]) for name, entry in self._known.items()}
        if before == {name: state for name, (state, _) in videos.items()}:
            return
        known = {
            name: {"state": state, "info": _as_json(info)} for name, (state, info) in sorted(videos.items())
        }
        content = json.dumps({"header": _HEADER, "videos": known}).encode()
        try:
            write_atomically(self.path, gzip.compress(content, compresslevel=1))
        except OSError as error:
            warnings.warn(
                f"{self.path} cannot be written ({error}); the next start looks again", stacklevel=2
            )


def _as_json(info: VideoInfo) -> dict[str, Any]:
    times: Any = info.times
    if isinstance(times, range):
        times = {"start": times.start, "stop": times.stop, "step": times.step}
    elif times is not None:
        times = [int(time) for time in times]
    return vars(info) | {"path": None, "times": times}
