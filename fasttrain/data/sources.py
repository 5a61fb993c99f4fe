"""Frame folders, text lists, video files, packed sets -> one index of videos and their frames.

`open_source` looks once at everything there is, in a stable order, and names what it had to skip. After that
a frame is (number of the video, number of the frame), whatever it is stored in. No DALI here: evaluation
reads through this module too.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from fasttrain.data.images import IMAGE_SUFFIXES, Bytes, UnreadableFrameError, check_encoded, decode_image
from fasttrain.data.videos import (
    VIDEO_SUFFIXES,
    VideoInfo,
    cut_clip,
    nvdec_decodes,
    probe_video,
    read_video_frames,
)
from fasttrain.errors import InputError

Kind = Literal["auto", "folders", "list", "videos", "packed"]
# What `read` gives: images, encoded JPEG or PNG (n,); frames, RGB (H, W, 3); clips, a Matroska file (n,) for
# the GPU's decoder and the numbers of the frames in it.
Storage = Literal["images", "frames", "clips"]
StoredPair = Sequence[npt.NDArray[Any]]
Skipped = list[tuple[str, str]]
# By name: the folder and the file names of its frames.
FrameFolders = dict[str, tuple[Path, tuple[str, ...]]]

_WANTED = (
    "expected frame folders (jpg, jpeg, png), video files, a text file that lists either, or a packed set"
)


class FrameIndex(ABC):
    """V videos and their frames, in the order of their names."""

    kind: str
    storage: Storage

    def __init__(self, names: Sequence[str], num_frames: Iterable[int], skipped: Skipped) -> None:
        self.names: list[str] = list(names)
        self.num_frames: npt.NDArray[np.int64] = np.fromiter(num_frames, dtype=np.int64)
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> str:
        """Identity of the list of names and lengths: a run may not be resumed on another."""
        digest = hashlib.sha256()
        for name, frames in zip(self.names, self.num_frames, strict=True):
            digest.update(f"{name}\0{frames}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]

    @abstractmethod
    def read(self, video: int, frames: Sequence[int]) -> StoredPair:
        """The frames of these numbers as they are stored: see `storage`. Raises UnreadableFrameError."""

    def read_frame(self, video: int, frame: int) -> npt.NDArray[np.uint8]:
        """One frame, (H, W, 3) uint8 RGB. Raises UnreadableFrameError."""
        (stored,) = self.read(video, [frame])
        return decode_image(stored) if self.storage == "images" else stored


class FolderIndex(FrameIndex):
    """A folder of image files per video."""

    kind = "folders"
    storage: Storage = "images"

    def __init__(self, folders: FrameFolders, skipped: Skipped) -> None:
        names = sorted(folders)
        self._folders = [str(folders[name][0]) for name in names]
        self._files = [folders[name][1] for name in names]
        super().__init__(names, map(len, self._files), skipped)

    def read(self, video: int, frames: Sequence[int]) -> list[Bytes]:
        return [self._read_file(video, int(frame)) for frame in frames]

    def _read_file(self, video: int, frame: int) -> Bytes:
        try:
            data = np.fromfile(os.path.join(self._folders[video], self._files[video][frame]), dtype=np.uint8)
            check_encoded(data)
        except OSError as error:
            raise UnreadableFrameError(os_reason(error), frame) from error
        except UnreadableFrameError as error:
            raise UnreadableFrameError(str(error), frame) from error
        return data


class VideoIndex(FrameIndex):
    """A video file per video."""

    kind = "videos"
    storage: Storage = "frames"

    def __init__(self, videos: dict[str, VideoInfo], skipped: Skipped) -> None:
        names = sorted(videos)
        self.videos = [videos[name] for name in names]
        super().__init__(names, (video.num_frames for video in self.videos), skipped)

    def read(self, video: int, frames: Sequence[int]) -> StoredPair:
        return read_video_frames(self.videos[video], [int(frame) for frame in frames])

    def as_clips(self) -> ClipIndex:
        """The same videos for a GPU's decoder. Raises InputError if there is one that it cannot decode."""
        for name, video in zip(self.names, self.videos, strict=True):
            if not nvdec_decodes(video):
                raise InputError(
                    f"{name} ({video.codec}, {video.pix_fmt}, {video.width} x {video.height}) is not for "
                    "NVDEC; use data.decoder=auto or cpu"
                )
        return ClipIndex(dict(zip(self.names, self.videos, strict=True)), self.skipped)


class ClipIndex(VideoIndex):
    """Video files whose frames are decoded on the GPU: `read` gives the packets that this takes."""

    storage: Storage = "clips"

    def read(self, video: int, frames: Sequence[int]) -> StoredPair:
        data, numbers = cut_clip(self.videos[video], [int(frame) for frame in frames])
        return [data, np.array(numbers)]

    def read_frame(self, video: int, frame: int) -> npt.NDArray[np.uint8]:
        (rgb,) = read_video_frames(self.videos[video], [frame])
        return rgb


def os_reason(error: OSError) -> str:
    """What went wrong with a file, in a few words."""
    return (error.strerror or str(error)).lower()


def open_source(source: str | Path, *, kind: Kind = "auto") -> FrameIndex:
    """Index the videos of a source.

    folders: frame folders (jpg, jpeg, png) at any depth, frames in natural order of their names; list: a
    text file with a frame folder or a video file per line, absolute or relative to the list, optionally
    followed by the number of frames to use; videos: a folder of video files at any depth, or one file;
    packed: what `fasttrain pack` wrote. `auto` looks which it is. Raises InputError where the source is
    missing, is not of the kind, or holds nothing that can be read.
    """
    if kind not in get_args(Kind):
        raise InputError(f"data.kind={kind} is not known; expected one of {', '.join(get_args(Kind))}")
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"the data source {source} does not exist; {_WANTED}")
    index = _open_folder(path, kind) if path.is_dir() else _open_file(path, kind)
    if not len(index):
        reasons = "".join(f", {name}: {reason}" for name, reason in index.skipped[:1])
        raise InputError(
            f"nothing in {source} can be read ({len(index.skipped)} skipped{reasons}); {_WANTED}"
        )
    return index


def _open_file(path: Path, kind: Kind) -> FrameIndex:
    is_video = path.suffix.lower() in VIDEO_SUFFIXES
    if kind in ("folders", "packed") or (kind == "list" and is_video):
        raise InputError(f"{path} is a file, but data.kind={kind}; {_WANTED}")
    if is_video or kind == "videos":
        return _probe_videos({path.name: path}, [])
    return _open_list(path)


def _open_folder(path: Path, kind: Kind) -> FrameIndex:
    if kind == "list":
        raise InputError(f"{path} is a folder, but data.kind=list; expected a text file")
    scan = _Scan(path)
    if kind == "auto":
        if scan.frame_folders and scan.videos:
            raise InputError(
                f"{path} holds both images and video files; choose with data.kind=folders or data.kind=videos"
            )
        kind = "videos" if scan.videos else "folders"
    if kind == "videos":
        return _probe_videos(scan.videos, scan.skipped)
    return FolderIndex(scan.frame_folders, scan.skipped)


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


def _open_list(path: Path) -> FrameIndex:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is neither a video file nor a text file that lists folders: {error}"
        ) from None
    skipped: Skipped = []
    folders: FrameFolders = {}
    videos: dict[str, Path] = {}
    for line in lines:
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, limit = _list_entry(path.parent, entry)
        place = path.parent / name
        if place.is_dir():
            files = _frame_files(os.scandir(place))
            if not files:
                skipped.append((name, "no jpg, jpeg or png in it"))
            elif limit is not None and limit > len(files):
                skipped.append((name, f"the list says {limit} frames, the folder holds {len(files)}"))
            else:
                folders[name] = place, files[:limit]
        elif place.exists():
            videos[name] = place
        else:
            skipped.append((name, "does not exist"))
    if folders and videos:
        raise InputError(f"{path} lists both frame folders and video files; put them into two lists")
    return _probe_videos(videos, skipped) if videos else FolderIndex(folders, skipped)


def _list_entry(root: Path, entry: str) -> tuple[str, int | None]:
    """A line -> its path, and the number of frames if it ends in one. A path may hold spaces."""
    parts = entry.rsplit(maxsplit=1)
    if len(parts) == 2 and parts[1].isdecimal() and not (root / entry).exists():
        return parts[0], int(parts[1])
    return entry, None


def _probe_videos(videos: dict[str, Path], skipped: Skipped) -> VideoIndex:
    """Look into every file, in parallel; what cannot be read is skipped and named."""

    def probe(path: Path) -> VideoInfo | UnreadableFrameError:
        try:
            return probe_video(path)
        except UnreadableFrameError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(32, len(os.sched_getaffinity(0)) * 2)) as pool:
        found = dict(zip(videos, pool.map(probe, videos.values()), strict=True))
    readable = {name: info for name, info in found.items() if isinstance(info, VideoInfo)}
    bad = [(name, str(info)) for name, info in found.items() if isinstance(info, UnreadableFrameError)]
    return VideoIndex(readable, skipped + bad)
