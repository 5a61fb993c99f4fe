"""Frame folders, text lists, video files, packed sets -> one index of videos and their frames.

`open_source` looks once at everything there is, in a stable order, and names what it had to skip. No DALI
here: evaluation reads through this module too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fasttrain.data.images import IMAGE_SUFFIXES, UnreadableFrameError
from fasttrain.data.index import FolderIndex, FrameFolders, FrameIndex, Skipped, VideoIndex
from fasttrain.data.packed import PackedIndex, is_packed
from fasttrain.data.video import VIDEO_SUFFIXES, VideoInfo, probe_video
from fasttrain.data.video_cache import FileState, file_state, read_cache, write_cache
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.files import os_reason, read_lines

Kind = Literal["auto", "folders", "list", "videos", "packed"]

_WANTED = (
    "expected frame folders (jpg, jpeg, png), video files, a text file that lists either, or a packed set"
)


@dataclass(frozen=True)
class Found:
    """What a source holds before any video is opened: frame folders or video files, by name."""

    folders: FrameFolders
    videos: dict[str, Path]
    skipped: Skipped


def open_source(source: str | Path, *, kind: Kind = "auto", world: World | None = None) -> FrameIndex:
    """Index the videos of a source.

    folders: frame folders (jpg, jpeg, png) at any depth, frames in natural order of their names; list: a
    text file with a frame folder or a video file per line, absolute or relative to the list, a frame folder
    optionally followed by the number of frames to use (behind a video file, a number is a label and means
    nothing); videos: a folder of video files at any depth, or one file; packed: what `fasttrain pack` wrote.
    `auto` looks which it is. The processes of `world` share the work of looking into videos and get the same
    index. Raises InputError where the source is missing, is not of the kind, or holds nothing that can be
    read.
    """
    path = Path(source).expanduser()
    if kind == "packed" or (kind == "auto" and is_packed(path)):
        return PackedIndex(path)
    found = find_source(path, kind=kind)
    if found.videos:
        index: FrameIndex = _probe_videos(path, found, world or World.single())
    else:
        index = FolderIndex(found.folders, found.skipped)
    if not len(index):
        reasons = "".join(f", {name}: {reason}" for name, reason in index.skipped[:1])
        raise InputError(
            f"nothing in {source} can be read ({len(index.skipped)} skipped{reasons}); {_WANTED}"
        )
    return index


def find_source(path: Path, *, kind: Kind = "auto") -> Found:
    """Find frame folders or video files by name, opening none. Raises InputError as open_source does."""
    if not path.exists():
        raise InputError(f"the data source {path} does not exist; {_WANTED}")
    if path.is_dir():
        return _find_in_folder(path, kind)
    is_video = path.suffix.lower() in VIDEO_SUFFIXES
    if kind == "videos" or (kind == "auto" and is_video):
        return Found({}, {path.name: path}, [])
    if kind == "folders" or is_video:
        raise InputError(f"{path} is a file, but the kind is {kind}; {_WANTED}")
    return _read_list(path)


def _find_in_folder(root: Path, kind: Kind) -> Found:
    """All frame folders and video files under a root, by their path relative to it."""
    if kind == "list":
        raise InputError(f"{root} is a folder, but the kind is list; expected a text file")
    found = Found({}, {}, [])
    # Videos of one length mostly share their file names: kept once, they cost nothing.
    known_files: dict[tuple[str, ...], tuple[str, ...]] = {}

    def enter(folder: Path, name: str, ancestors: frozenset[tuple[int, int]]) -> None:
        shown = name or root.resolve().name
        try:
            status = folder.stat()
            entries = _entries(folder)
        except OSError as error:
            found.skipped.append((shown, os_reason(error)))
            return
        identity = (status.st_dev, status.st_ino)
        # A link to a folder above would be followed for ever.
        if identity in ancestors:
            return
        files = _frame_files(entries)
        if files and kind != "videos":
            found.folders[shown] = folder, known_files.setdefault(files, files)
        for entry in entries:
            path = f"{name}/{entry.name}" if name else entry.name
            if entry.is_dir():
                enter(Path(entry.path), path, ancestors | {identity})
            elif kind != "folders" and _suffix(entry.name) in VIDEO_SUFFIXES:
                found.videos[path] = Path(entry.path)

    enter(root, "", frozenset())
    if found.folders and found.videos:
        raise InputError(
            f"{root} holds both images and video files; choose folders or videos (data.kind in training, "
            f"--kind in pack)"
        )
    return found


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder, in the order of the names, without hidden files. Raises OSError."""
    with os.scandir(folder) as entries:
        return sorted((one for one in entries if not one.name.startswith(".")), key=lambda one: one.name)


def _frame_files(entries: Iterable[os.DirEntry[str]]) -> tuple[str, ...]:
    """The image files among a folder's entries, in the order of their numbers."""
    names = [entry.name for entry in entries if _suffix(entry.name) in IMAGE_SUFFIXES]
    # Names of one length are in order; frame9 before frame10 needs the numbers.
    return tuple(names if len({len(name) for name in names}) == 1 else sorted(names, key=_natural_key))


def _natural_key(name: str) -> list[str | int]:
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _read_list(path: Path) -> Found:
    """What a text file lists. A path may hold spaces, and a number may follow it."""
    found = Found({}, {}, [])
    for line in read_lines(path, "a video file, or a text file that lists videos or folders"):
        # Names of HMDB51 begin with #, comments with a space behind it.
        if line.startswith("# "):
            continue
        # Unlike Path's, os.path's take a line that is too long for a name as one that is not there.
        parts = line.rsplit(maxsplit=1)
        counts = len(parts) == 2 and parts[1].isdecimal() and not os.path.exists(path.parent / line)
        name, limit = (parts[0], int(parts[1])) if counts else (line, None)
        # ./video and video/ are the same as video.
        name = Path(name).as_posix()
        reason = _add(found, name, path.parent / name, limit)
        if reason:
            found.skipped.append((name, reason))
    if found.folders and found.videos:
        raise InputError(f"{path} lists both frame folders and video files; put them into two lists")
    return found


def _add(found: Found, name: str, path: Path, limit: int | None) -> str | None:
    """Add what a list names, of a frame folder the first `limit` frames; returns why it is left out."""
    if name in found.folders or name in found.videos:
        return "listed before"
    if not os.path.exists(path):
        return "does not exist"
    if not os.path.isdir(path):
        found.videos[name] = path
        return None
    try:
        files = _frame_files(_entries(path))
    except OSError as error:
        return os_reason(error)
    if not files:
        return "no jpg, jpeg or png in it"
    if limit is not None and not 0 < limit <= len(files):
        return f"the list says {limit} frames, the folder holds {len(files)}"
    found.folders[name] = path, files[:limit]
    return None


def _probe_videos(path: Path, found: Found, world: World) -> VideoIndex:
    """Look into every file not known from before, in parallel; what cannot be read is skipped and named."""
    known = read_cache(path)

    def probe(name: str) -> tuple[FileState, VideoInfo] | str:
        video = found.videos[name]
        try:
            state = file_state(video)
            before, info = known.get(name, (None, None))
            return state, (replace(info, path=video) if info and before == state else probe_video(video))
        except OSError as error:
            return os_reason(error)
        except UnreadableFrameError as error:
            return str(error)

    mine = world.shard(list(found.videos))
    with ThreadPoolExecutor(max_workers=min(32, len(os.sched_getaffinity(0)) * 2)) as pool:
        probed = dict(zip(mine, pool.map(probe, mine), strict=True))
    probed = world.merge(probed)
    readable = {name: one for name, one in probed.items() if not isinstance(one, str)}
    changed = any(known.get(name, (None,))[0] != state for name, (state, _) in readable.items())
    if world.is_main and changed:
        write_cache(path, readable)
    bad = [(name, reason) for name, reason in probed.items() if isinstance(reason, str)]
    return VideoIndex({name: info for name, (_, info) in readable.items()}, found.skipped + bad)
