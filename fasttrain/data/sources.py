"""Frame folders, text lists, video files, packed sets -> one index of videos and their frames.

`open_source` looks once at everything there is, in a stable order, and names what it had to skip. No DALI
here: evaluation reads through this module too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fasttrain.data.images import IMAGE_SUFFIXES, UnreadableFrameError
from fasttrain.data.index import FolderIndex, FrameFolders, FrameIndex, Skipped, VideoIndex
from fasttrain.data.packed import PackedIndex, is_packed
from fasttrain.data.probes import ProbeCache, State, state_of
from fasttrain.data.video import VIDEO_SUFFIXES, VideoInfo, probe_video
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
    nothing); videos: a folder of video files at any depth, or one file; packed: what `fasttrain pack` wrote,
    or a text file that lists the folders of its parts. `auto` looks which it is. The processes of `world`
    share the work of looking into videos and get the same index. Raises InputError where the source is
    missing, is not of the kind, or holds nothing that can be read.
    """
    path = Path(source).expanduser()
    may_be_packed = kind in ("auto", "packed") or (kind == "list" and path.is_file())
    packed = packed_folders(path) if may_be_packed else []
    if packed or kind == "packed":
        return PackedIndex(*(packed or [path]))
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


def packed_folders(path: Path) -> list[Path]:
    """The folders of a packed set: itself, or those that a list names; none where it is something else."""
    if path.is_dir():
        return [path] if is_packed(path) else []
    if not path.is_file() or path.suffix.lower() in VIDEO_SUFFIXES:
        return []
    try:
        folders = [path.parent / entry for entry in _list_entries(path)]
    except InputError:
        return []
    # One look is enough: a list of 240,000 frame folders shall not be looked through twice.
    return folders if folders and is_packed(folders[0]) else []


def find_source(path: Path, *, kind: Kind = "auto") -> Found:
    """Find frame folders or video files by name, opening none. Raises InputError as open_source does."""
    if kind not in get_args(Kind):
        raise InputError(f"data.kind={kind} is not known; expected one of {', '.join(get_args(Kind))}")
    if not path.exists():
        raise InputError(f"the data source {path} does not exist; {_WANTED}")
    return _find_in_folder(path, kind) if path.is_dir() else _find_in_file(path, kind)


def _find_in_file(path: Path, kind: Kind) -> Found:
    is_video = path.suffix.lower() in VIDEO_SUFFIXES
    if kind == "folders" or (kind == "list" and is_video):
        raise InputError(f"{path} is a file, but data.kind={kind}; {_WANTED}")
    if is_video or kind == "videos":
        return Found({}, {path.name: path}, [])
    return _read_list(path)


def _find_in_folder(path: Path, kind: Kind) -> Found:
    if kind == "list":
        raise InputError(f"{path} is a folder, but data.kind=list; expected a text file")
    scan = _Scan(path)
    if kind == "auto" and scan.frame_folders and scan.videos:
        raise InputError(
            f"{path} holds both images and video files; choose with data.kind=folders or data.kind=videos"
        )
    return Found(
        scan.frame_folders if kind != "videos" else {}, scan.videos if kind != "folders" else {}, scan.skipped
    )


class _Scan:
    """All frame folders and video files under a root, by their path relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.frame_folders: FrameFolders = {}
        self.videos: dict[str, Path] = {}
        self.skipped: Skipped = []
        # Videos of one length mostly share their file names: kept once, they cost nothing.
        self._known_files: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._enter(root, frozenset())

    def _enter(self, folder: Path, ancestors: frozenset[tuple[int, int]]) -> None:
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            self.skipped.append((self._name(folder), os_reason(error)))
            return
        identity = (status.st_dev, status.st_ino)
        # A link to a folder above would be followed for ever.
        if identity in ancestors:
            return
        files = _frame_files(entries)
        if files:
            self.frame_folders[self._name(folder)] = folder, self._known_files.setdefault(files, files)
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                self._enter(path, ancestors | {identity})
            elif path.suffix.lower() in VIDEO_SUFFIXES:
                self.videos[self._name(path)] = path

    def _name(self, path: Path) -> str:
        return self.root.resolve().name if path == self.root else path.relative_to(self.root).as_posix()


def _frame_files(entries: Iterable[os.DirEntry[str]]) -> tuple[str, ...]:
    """The image files among a folder's entries, in the order of their numbers; hidden ones left out."""
    names = [
        entry.name
        for entry in entries
        if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and not entry.name.startswith(".")
    ]
    # Names of one length sort as they are; frame10 after frame9 takes a look at the numbers.
    if len({len(name) for name in names}) == 1:
        return tuple(sorted(names))
    return tuple(sorted(names, key=_natural_key))


def _natural_key(name: str) -> list[str | int]:
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _list_entries(path: Path) -> list[str]:
    """The lines of a list that say something, without comments: `#` and what names no file."""
    lines = read_lines(path, "a video file, or a text file that lists videos or folders")
    # Names of HMDB51 begin with #.
    return [
        line
        for line in lines
        if not line.startswith("#") or os.path.exists(path.parent / _list_entry(path.parent, line)[0])
    ]


def _read_list(path: Path) -> Found:
    skipped: Skipped = []
    folders: FrameFolders = {}
    videos: dict[str, Path] = {}
    for entry in _list_entries(path):
        name, limit = _list_entry(path.parent, entry)
        place = path.parent / name
        if name in folders or name in videos:
            skipped.append((name, "listed before"))
        # Unlike Path's, these take a line that is too long for a name as one that is not there.
        elif os.path.isdir(place):
            try:
                files = _frame_files(os.scandir(place))
            except OSError as error:
                skipped.append((name, os_reason(error)))
                continue
            if not files:
                skipped.append((name, "no jpg, jpeg or png in it"))
            elif limit is not None and not 0 < limit <= len(files):
                skipped.append((name, f"the list says {limit} frames, the folder holds {len(files)}"))
            else:
                folders[name] = place, files[:limit]
        elif os.path.exists(place):
            videos[name] = place
        else:
            skipped.append((name, "does not exist"))
    if folders and videos:
        raise InputError(f"{path} lists both frame folders and video files; put them into two lists")
    return Found(folders, videos, skipped)


def _list_entry(root: Path, entry: str) -> tuple[str, int | None]:
    """A line -> its path, and the number of frames if it ends in one. A path may hold spaces.

    ./video and video/ are the same as video.
    """
    parts = entry.rsplit(maxsplit=1)
    if len(parts) == 2 and parts[1].isdecimal() and not os.path.exists(root / entry):
        return Path(parts[0]).as_posix(), int(parts[1])
    return Path(entry).as_posix(), None


def _probe_videos(path: Path, source: Found, world: World) -> VideoIndex:
    """Look into every file not known from before, in parallel; what cannot be read is skipped and named."""
    cache = ProbeCache(path)

    def probe(name: str) -> tuple[State, VideoInfo] | str:
        video = source.videos[name]
        try:
            state = state_of(video)
            return state, cache.find(name, video, state) or probe_video(video)
        except OSError as error:
            return os_reason(error)
        except UnreadableFrameError as error:
            return str(error)

    mine = world.shard(list(source.videos))
    with ThreadPoolExecutor(max_workers=min(32, len(os.sched_getaffinity(0)) * 2)) as pool:
        probed = dict(zip(mine, pool.map(probe, mine), strict=True))
    found = {name: one for share in world.gather(probed) for name, one in share.items()}
    readable = {name: one for name, one in found.items() if not isinstance(one, str)}
    if world.is_main:
        cache.write(readable)
    bad = sorted((name, reason) for name, reason in found.items() if isinstance(reason, str))
    return VideoIndex({name: info for name, (_, info) in readable.items()}, source.skipped + bad)
