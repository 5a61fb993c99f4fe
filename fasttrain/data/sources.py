"""Index a data source: frame folders, a frame list, video files or a packed set.

The index lists the videos in a stable order and records the skipped ones. This module does not import DALI,
because evaluation also uses it.
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

_EXPECTED = (
    "Expected a folder of frame folders (.jpg, .jpeg, .png) or video files, a text file that lists either, a "
    "video file, or a packed set."
)
_MISSING = "does not exist"


@dataclass(frozen=True)
class SourceFiles:
    """The frame folders or video files of a source, by video name. No video has been opened yet."""

    folders: FrameFolders
    videos: dict[str, Path]
    skipped: Skipped


def open_source(source: str | Path, *, kind: Kind = "auto", world: World | None = None) -> FrameIndex:
    """Index the videos of a source.

    The kinds of sources are:

    - folders: frame folders (.jpg, .jpeg, .png) at any depth. The frames are in natural order of their names.
    - list: a text file with one frame folder or video file per line, as an absolute path or relative to the
      text file. A number after a frame folder limits the frames used; a number after a video file is ignored,
      because lists of labelled videos put the label there.
    - videos: a folder of video files at any depth, or a single video file.
    - packed: a packed set written by `fasttrain pack`.
    - auto: detect the kind.

    The processes of `world` divide the scan of the video files among themselves, and all return the same
    index. Raises InputError if the source does not exist, is not of this kind or has no readable video.
    """
    path = Path(os.path.expanduser(source))
    if kind == "packed" or (kind == "auto" and is_packed(path)):
        return PackedIndex(path)
    files = find_source(path, kind=kind)
    if files.videos:
        index: FrameIndex = _scan_videos(path, files, world or World.single())
    else:
        index = FolderIndex(files.folders, files.skipped)
    if not len(index):
        count = len(index.skipped)
        first = "".join(f" ({count} skipped, first {name}: {reason})" for name, reason in index.skipped[:1])
        raise InputError(f"{str(source)!r} contains no readable video{first}. {_EXPECTED}")
    return index


def find_source(path: Path, *, kind: Kind = "auto") -> SourceFiles:
    """List the frame folders or video files of a source without opening them.

    Raises InputError if the source does not exist or is not of this kind.
    """
    if not path.exists():
        raise InputError(f"{str(path)!r} does not exist. {_EXPECTED}")
    if path.is_dir():
        return _search_folder(path, kind)
    is_video = path.suffix.lower() in VIDEO_SUFFIXES
    if kind == "videos" or (kind == "auto" and is_video):
        return SourceFiles({}, {path.name: path}, [])
    if kind == "folders":
        raise InputError(
            f"{str(path)!r} is a file, but the kind is 'folders'. Pass a folder, or another kind."
        )
    if is_video:
        raise InputError(
            f"{str(path)!r} is a video file, but the kind is 'list'. Pass a text file, or another kind."
        )
    return _read_list(path)


def _search_folder(root: Path, kind: Kind) -> SourceFiles:
    """Find all frame folders and video files below `root`. Their names are their paths relative to it."""
    if kind == "list":
        raise InputError(
            f"{str(root)!r} is a folder, but the kind is 'list'. Pass a text file, or another kind."
        )
    source = SourceFiles({}, {}, [])
    # Videos of equal length usually have the same file names, so store each distinct tuple only once.
    shared_names: dict[tuple[str, ...], tuple[str, ...]] = {}

    def visit(folder: Path, relative: str, ancestors: frozenset[tuple[int, int]]) -> None:
        name = relative or root.resolve().name
        try:
            status = folder.stat()
            entries = _list_folder(folder)
        except OSError as error:
            source.skipped.append((name, os_reason(error)))
            return
        identity = (status.st_dev, status.st_ino)
        # A symbolic link to an ancestor would lead to infinite recursion.
        if identity in ancestors:
            return
        files = _frame_files(entries)
        if files and kind != "videos":
            source.folders[name] = folder, shared_names.setdefault(files, files)
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir():
                visit(Path(entry.path), path, ancestors | {identity})
            elif kind != "folders" and _suffix(entry.name) in VIDEO_SUFFIXES:
                source.videos[path] = Path(entry.path)

    visit(root, "", frozenset())
    if source.folders and source.videos:
        raise InputError(
            f"{str(root)!r} contains both images and video files. Choose one: data.kind=folders or "
            "data.kind=videos in training, --kind folders or --kind videos in pack."
        )
    return source


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _list_folder(folder: str | Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder, sorted by name, without hidden ones. Raises OSError."""
    with os.scandir(folder) as entries:
        visible = (entry for entry in entries if not entry.name.startswith("."))
        return sorted(visible, key=lambda entry: entry.name)


def _frame_files(entries: Iterable[os.DirEntry[str]]) -> tuple[str, ...]:
    """Select the image files among the sorted entries of a folder, in natural order."""
    names = [entry.name for entry in entries if _suffix(entry.name) in IMAGE_SUFFIXES]
    # Names of equal length are already in natural order; otherwise frame9 must precede frame10.
    return tuple(names if len({len(name) for name in names}) == 1 else sorted(names, key=_natural_key))


def _natural_key(name: str) -> list[str | int]:
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _read_list(path: Path) -> SourceFiles:
    """Read a list of frame folders or video files. A path may contain spaces, and a number may follow it."""
    source = SourceFiles({}, {}, [])
    for line in read_lines(path, "a video file or a text file that lists frame folders or video files"):
        # Only "# " starts a comment, because names in HMDB51 may start with "#".
        if line.startswith("# "):
            continue
        # os.path.exists returns False for a name that is too long; Path.exists raises.
        parts = line.rsplit(maxsplit=1)
        # int() refuses numbers of thousands of digits, and no video has a billion frames.
        has_number = (
            len(parts) == 2 and re.fullmatch(r"\d{1,9}", parts[1]) and not os.path.exists(path.parent / line)
        )
        name, limit = (parts[0], int(parts[1])) if has_number else (line, None)
        # Normalise ./video and video/ to video.
        name = Path(name).as_posix()
        reason = _add_listed(source, name, path.parent / name, limit)
        if reason:
            source.skipped.append((name, reason))
    missing = sum(reason == _MISSING for _, reason in source.skipped)
    if missing and missing == len(source.skipped) and not source.folders and not source.videos:
        raise InputError(
            f"{str(path)!r} was read as a list of frame folders or video files, but no line is an existing "
            f"path, absolute or relative to the list (lines: {missing}, first: "
            f"{source.skipped[0][0][:100]!r}). Correct the paths, or pass another source. {_EXPECTED}"
        )
    if source.folders and source.videos:
        raise InputError(f"{str(path)!r} lists both frame folders and video files. Split it into two lists.")
    return source


def _add_listed(source: SourceFiles, name: str, path: Path, limit: int | None) -> str | None:
    """Add a video file, or the first `limit` frames of a frame folder. Returns a reason if it is skipped."""
    if name in source.folders or name in source.videos:
        return "duplicate entry in the list"
    if not os.path.exists(path):
        return _MISSING
    if not os.path.isdir(path):
        source.videos[name] = path
        return None
    try:
        files = _frame_files(_list_folder(path))
    except OSError as error:
        return os_reason(error)
    if not files:
        return "contains no .jpg, .jpeg or .png files"
    if limit is not None and not 0 < limit <= len(files):
        return f"the list specifies {limit} frames, but the folder contains {len(files)}"
    source.folders[name] = path, files[:limit]
    return None


def _scan_videos(path: Path, source: SourceFiles, world: World) -> VideoIndex:
    """Scan all video files that are not in the cache, in parallel. Unreadable files are skipped."""
    cached = read_cache(path)

    def scan(name: str) -> tuple[FileState, VideoInfo] | str:
        video = source.videos[name]
        try:
            state = file_state(video)
            cached_state, info = cached.get(name, (None, None))
            if info and cached_state == state:
                return state, replace(info, path=video)
            return state, probe_video(video)
        except OSError as error:
            return os_reason(error)
        except UnreadableFrameError as error:
            return str(error)

    share = world.shard(list(source.videos))
    with ThreadPoolExecutor(max_workers=min(32, len(os.sched_getaffinity(0)) * 2)) as pool:
        scanned = dict(zip(share, pool.map(scan, share), strict=True))
    scanned = world.merge(scanned)
    readable = {name: result for name, result in scanned.items() if not isinstance(result, str)}
    changed = any(cached.get(name, (None,))[0] != state for name, (state, _) in readable.items())
    if world.is_main and changed:
        write_cache(path, readable)
    unreadable = [(name, reason) for name, reason in scanned.items() if isinstance(reason, str)]
    return VideoIndex({name: info for name, (_, info) in readable.items()}, source.skipped + unreadable)
