"""Indexes of videos: their names, their numbers of frames, and access to the stored frames."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fasttrain.data.images import Bytes, Frame, decode_image, read_encoded
from fasttrain.data.nvdec import cut_clip
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


class FrameIndex(ABC):
    """An index of V videos, sorted by name."""

    storage: Storage
    is_remote: bool = False
    """Whether reading waits for a server, so that many threads should read."""

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

    def __init__(self, folders: FrameFolders, skipped: Skipped, left_out: LeftOut | None = None) -> None:
        names = sorted(folders)
        self._folders = [folders[name] for name in names]
        super().__init__(names, (len(files) for _, files in self._folders), skipped, left_out)

    def read(self, video: int, frames: Sequence[int]) -> list[Bytes]:
        folder, files = self._folders[video]
        return [read_encoded(os.path.join(folder, files[frame]), int(frame)) for frame in frames]


class VideoIndex(FrameIndex):
    """An index of video files, which are decoded on the CPU."""

    storage: Storage = "frames"

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
