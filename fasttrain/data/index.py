"""The index of a source: V videos, how long they are, and their frames as they are stored."""

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

# How frames are stored. images: encoded JPEG or PNG (n,); frames: RGB (H, W, 3); clips: a Matroska file
# (n,) for the GPU's decoder and the numbers of the frames in it.
Storage = Literal["images", "frames", "clips"]
# The frames asked for, one item each; of a clip the file and the numbers instead.
StoredFrames = Sequence[npt.NDArray[Any]]
Skipped = list[tuple[str, str]]
# By name: the folder and the file names of its frames.
FrameFolders = dict[str, tuple[Path, tuple[str, ...]]]


class FrameIndex(ABC):
    """V videos and their frames, in the order of their names."""

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
    def read(self, video: int, frames: Sequence[int]) -> StoredFrames:
        """The frames of these numbers as they are stored: see `storage`. Raises UnreadableFrameError."""

    def read_frame(self, video: int, frame: int) -> Frame:
        """One frame, (H, W, 3) uint8 RGB. Raises UnreadableFrameError."""
        (stored,) = self.read(video, [frame])
        return decode_image(stored) if self.storage == "images" else stored


class FolderIndex(FrameIndex):
    """A folder of image files per video."""

    storage: Storage = "images"

    def __init__(self, folders: FrameFolders, skipped: Skipped) -> None:
        names = sorted(folders)
        self._folders = [folders[name] for name in names]
        super().__init__(names, (len(files) for _, files in self._folders), skipped)

    def read(self, video: int, frames: Sequence[int]) -> list[Bytes]:
        folder, files = self._folders[video]
        return [read_encoded(os.path.join(folder, files[frame]), int(frame)) for frame in frames]


class VideoIndex(FrameIndex):
    """A video file per video."""

    storage: Storage = "frames"

    def __init__(self, videos: dict[str, VideoInfo], skipped: Skipped) -> None:
        names = sorted(videos)
        self.videos = [videos[name] for name in names]
        super().__init__(names, (video.num_frames for video in self.videos), skipped)

    def read(self, video: int, frames: Sequence[int]) -> StoredFrames:
        return read_video_frames(self.videos[video], [int(frame) for frame in frames])


class ClipIndex(VideoIndex):
    """A video file per video, read as packets for the GPU's decoder."""

    storage: Storage = "clips"

    def read(self, video: int, frames: Sequence[int]) -> StoredFrames:
        data, numbers = cut_clip(self.videos[video], [int(frame) for frame in frames])
        return [data, np.array(numbers, dtype=np.int32)]
