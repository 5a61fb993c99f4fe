"""Indexes of videos: their names, their numbers of frames, and access to the stored frames."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fasttrain.data.images import Bytes, Frame, UnreadableFrameError, as_intact, decode_image, read_encoded
from fasttrain.data.nvdec import cut_clip
from fasttrain.data.remote import FrameCache, RemoteFiles
from fasttrain.data.video import VideoInfo, read_video_frames

# The form in which an index returns a frame. images: an encoded JPEG or PNG (n,); frames: RGB (H, W, 3);
# clips: a Matroska file (n,) for the GPU's decoder, with the numbers of the requested frames in that file.
Storage = Literal["images", "frames", "clips"]
# One array per requested frame. For clips: the file and the array of frame numbers.
StoredFrames = Sequence[npt.NDArray[Any]]
# The name of each skipped video or frame, and the reason.
Skipped = list[tuple[str, str]]
# Kind of file (its suffix or the pattern of its name) -> how many files were left out, and the first one.
LeftOut = dict[str, tuple[int, str]]
# Video name -> its folder and the file names of its frames.
FrameFolders = dict[str, tuple[Path, tuple[str, ...]]]
# The size of a file at a URL, if the server lists sizes, and a text that changes when the file is replaced.
ListedFile = tuple[int | None, str]

# The file of the cache with frames of frame folders, and the size of the checksum after each frame.
_CACHE_FILE, _CRC_BYTES = "frames", 4


class FrameIndex(ABC):
    """An index of V videos, sorted by name."""

    storage: Storage
    is_remote: bool = False
    """Whether reading waits for a server, so that many threads should read."""
    _per_video: tuple[str, ...] = ()
    """The names of further attributes that have an entry for each video."""

    def __init__(
        self,
        names: Sequence[str],
        num_frames: Iterable[int],
        skipped: Skipped,
        left_out: LeftOut | None = None,
    ) -> None:
        self.names: list[str] = list(names)
        self.num_frames: npt.NDArray[np.int64] = np.fromiter(num_frames, dtype=np.int64)
        self.skipped = skipped
        self.left_out = left_out or {}

    def __len__(self) -> int:
        return len(self.names)

    def select(self, videos: Sequence[int]) -> FrameIndex:
        """Return an index of some of the videos, in the given order."""
        chosen = copy.copy(self)
        for name in ("names", *self._per_video):
            entries = getattr(self, name)
            setattr(chosen, name, [entries[video] for video in videos])
        chosen.num_frames = self.num_frames[np.asarray(videos, dtype=np.int64)]
        return chosen

    def fingerprint(self) -> str:
        """Hash the names and lengths of the videos. A run can resume only on data with the same hash."""
        digest = hashlib.sha256()
        for name, frames in zip(self.names, self.num_frames, strict=True):
            digest.update(f"{name}\0{frames}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]

    @abstractmethod
    def read(self, video: int, frames: Sequence[int]) -> StoredFrames:
        """Read frames by number, in the form given by `storage`. Raises UnreadableFrameError."""

    def read_frame(self, video: int, frame: int) -> Frame:
        """Read and decode one frame, (H, W, 3) uint8 RGB. Raises UnreadableFrameError."""
        (stored,) = self.read(video, [frame])
        return decode_image(stored) if self.storage == "images" else stored


class FolderIndex(FrameIndex):
    """An index of videos stored as frame folders."""

    storage: Storage = "images"
    _per_video = ("_folders",)

    def __init__(self, folders: FrameFolders, skipped: Skipped, left_out: LeftOut | None = None) -> None:
        names = sorted(folders)
        self._folders = [folders[name] for name in names]
        super().__init__(names, (len(files) for _, files in self._folders), skipped, left_out)

    def read(self, video: int, frames: Sequence[int]) -> list[Bytes]:
        folder, files = self._folders[video]
        return [read_encoded(os.path.join(folder, files[frame]), int(frame)) for frame in frames]


class RemoteFolderIndex(FrameIndex):
    """An index of videos stored as frame folders at URLs: for each name, a URL and the frames by file name.

    The cache has one sparse file for all frames. Each frame has a place there, followed by its checksum. The
    sizes of the files tell the places, so nothing is cached if the server does not list them.
    """

    storage: Storage = "images"
    is_remote = True
    _per_video = ("_folders", "_starts")

    def __init__(
        self,
        folders: Mapping[str, tuple[str, Mapping[str, ListedFile]]],
        skipped: Skipped,
        left_out: LeftOut | None = None,
        *,
        cache_size: float,
    ) -> None:
        names = sorted(folders)
        self._folders = [(RemoteFiles(url), (*files,)) for url, files in map(folders.__getitem__, names)]
        super().__init__(names, (len(files) for _, files in self._folders), skipped, left_out)
        self._starts = np.cumsum([0, *self.num_frames])
        self._cache: FrameCache | None = None
        listed = [list(folders[name][1].values()) for name in names]
        sizes = [size for files in listed for size, _ in files if size is not None]
        if not names or len(sizes) < self._starts[-1]:
            return
        self._places = np.cumsum([0, *(size + _CRC_BYTES for size in sizes)])
        states = [
            hashlib.sha256(repr(folders[name]).encode("utf-8", "replace")).hexdigest() for name in names
        ]
        self._cache = FrameCache(["frames", states], int(cache_size * 2**30))
        self._cache.make_room(int(self._places[-1]))
        self._cache.create(_CACHE_FILE, int(self._places[-1]))
        self._file = io.FileIO(self._cache.folder / _CACHE_FILE)

    def read(self, video: int, frames: Sequence[int]) -> list[Bytes]:
        files, names = self._folders[video]
        contents = {int(frame): self._cached(video, int(frame)) for frame in frames}
        missing = [frame for frame, content in contents.items() if content is None]
        read = files.read_files([names[frame] for frame in missing]) if missing else []
        for frame, content in zip(missing, read, strict=True):
            if isinstance(content, FileNotFoundError):
                raise UnreadableFrameError(f"{names[frame]} does not exist", frame) from content
            contents[frame] = content
            self._store(video, frame, content)
        return [as_intact(contents[int(frame)] or b"", int(frame)) for frame in frames]

    def _place(self, video: int, frame: int) -> tuple[int, int]:
        number = self._starts[video] + frame
        return int(self._places[number]), int(self._places[number + 1])

    def _cached(self, video: int, frame: int) -> bytes | None:
        if self._cache is None:
            return None
        start, end = self._place(video, frame)
        try:
            entry = os.pread(self._file.fileno(), end - start, start)
        except OSError:
            return None
        content = entry[:-_CRC_BYTES]
        return content if entry == _with_crc(content) else None

    def _store(self, video: int, frame: int, content: bytes) -> None:
        if self._cache is None:
            return
        start, end = self._place(video, frame)
        # The file may have been replaced since it was listed.
        if len(content) + _CRC_BYTES == end - start:
            self._cache.write(_CACHE_FILE, [(start, _with_crc(content))])


def _with_crc(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(_CRC_BYTES, "big")


class VideoIndex(FrameIndex):
    """An index of video files, which are decoded on the CPU."""

    storage: Storage = "frames"
    _per_video = ("videos",)

    def __init__(
        self, videos: dict[str, VideoInfo], skipped: Skipped, left_out: LeftOut | None = None
    ) -> None:
        names = sorted(videos)
        self.videos = [videos[name] for name in names]
        super().__init__(names, (video.num_frames for video in self.videos), skipped, left_out)

    def read(self, video: int, frames: Sequence[int]) -> StoredFrames:
        return read_video_frames(self.videos[video], [int(frame) for frame in frames])


class ClipIndex(VideoIndex):
    """An index of video files whose packets are read for the GPU's decoder."""

    storage: Storage = "clips"

    def read(self, video: int, frames: Sequence[int]) -> StoredFrames:
        data, numbers = cut_clip(self.videos[video], [int(frame) for frame in frames])
        return [data, np.array(numbers, dtype=np.int32)]

    def read_frame(self, video: int, frame: int) -> Frame:
        (decoded,) = super().read(video, [frame])
        return decoded
