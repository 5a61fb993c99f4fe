"""The packed format and its reader: tar shards of JPEG frames, beside each an index of byte ranges.

Written by pack.py, opened by sources.py. A set is one folder with, for part i of n (one part for each machine
that packed):

    pack-IofN.json            options, totals, what could not be read; `complete` when the part is done
    frames-IofN-000000.tar    NAME/000000.jpg, NAME/000001.jpg, ...: any WebDataset reader takes it
    frames-IofN-000000.npz    names and lengths of its videos, offset, size and CRC-32 of every frame

The index beside a shard is written after it, so a shard that has one is whole.

Frames are read by `pread`: where a shard is cut off or its disk fails, touching a memory map is SIGBUS, which
ends the process.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttrain.data.images import Bytes, UnreadableFrameError
from fasttrain.data.index import FrameIndex, Skipped, Storage
from fasttrain.errors import InputError
from fasttrain.files import os_reason

FORMAT = 2
TAR_BLOCK = 512
# Where a frame's bytes begin, in tar blocks; how many there are; their CRC-32.
FRAME = np.dtype([("block", np.uint32), ("size", np.int32), ("crc", np.uint32)])
# What the index of a shard holds as JSON, in this order.
_PLAIN_VALUES = ("names", "skipped", "videos_done", "num_bytes")
_MANIFEST = re.compile(r"pack-(\d+)of(\d+)\.json")
# What all manifests of a set have alike. The decoders may differ, for some machines have a GPU.
_SHARED = ("source", "frames", "short_side", "quality", "shard_bytes")


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, both from 1: what one machine packs into `folder`."""

    folder: Path
    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}of{self.count}"

    @property
    def manifest_path(self) -> Path:
        return self.folder / f"pack-{self}.json"

    def shard_path(self, number: int) -> Path:
        return self.folder / f"frames-{self}-{number:06d}.tar"

    def shard_paths(self) -> list[Path]:
        """The finished shards: those that have their index, up to the first that has not."""
        paths = map(self.shard_path, itertools.count())
        return list(itertools.takewhile(lambda path: path.with_suffix(".npz").exists(), paths))

    def read_manifest(self) -> dict[str, Any]:
        path = self.manifest_path
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}); pack again") from None
        if manifest.get("format") != FORMAT:
            raise InputError(f"{path} is not of format {FORMAT}, which this version reads; pack again")
        return manifest

    def is_complete(self) -> bool:
        """Whether this part was packed to its end and all its shards are there."""
        manifest = self.read_manifest()
        return bool(manifest["complete"]) and manifest["shards"] == len(self.shard_paths())


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds."""

    names: list[str]
    lengths: npt.NDArray[np.int32]
    """Frames of each video."""
    frames: npt.NDArray[np.void]
    """Of dtype FRAME, video by video."""
    skipped: Skipped
    """Files that could not be read, in the order of the source."""
    videos_done: int
    """Videos of the part, packed or skipped, up to the end of this shard."""
    num_bytes: int

    def to_bytes(self) -> bytes:
        """As a NumPy archive; the same index gives the same bytes."""
        values = {"format": FORMAT} | {key: getattr(self, key) for key in _PLAIN_VALUES}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            # A key of the format: old sets have it too.
            told=np.frombuffer(json.dumps(values).encode("ascii"), dtype=np.uint8),
            lengths=self.lengths,
            blocks=self.frames["block"],
            sizes=self.frames["size"],
            crcs=self.frames["crc"],
        )
        return buffer.getvalue()

    @classmethod
    def read(cls, shard: Path) -> ShardIndex:
        """The index beside a shard. Raises InputError if it cannot be read."""
        path = shard.with_suffix(".npz")
        try:
            with np.load(path, allow_pickle=False) as content:
                values = json.loads(content["told"].tobytes())
                frames = [content[key] for key in ("blocks", "sizes", "crcs")]
                return cls(
                    lengths=content["lengths"],
                    frames=np.rec.fromarrays(frames, dtype=FRAME),
                    **{key: values[key] for key in _PLAIN_VALUES},
                )
        except OSError as error:
            raise InputError(f"{path} cannot be read: {os_reason(error)}") from None
        # NumPy and zipfile raise errors of many kinds for a damaged archive, with misleading messages.
        except Exception:
            raise InputError(f"{path} is damaged; delete it and pack again") from None


def tar_header(video: str, frame: int, size: int) -> bytes:
    """What precedes a frame in its shard. Its name stays inside the folder that a tar is unpacked to."""
    folder = "/".join(name for name in video.split("/") if name not in ("", ".", ".."))
    member = tarfile.TarInfo(f"{folder}/{frame:06d}.jpg")
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def is_packed(path: Path) -> bool:
    """Whether a path is a packed set, finished or not."""
    return any(_parts_in(path))


def finished_parts(root: Path) -> list[Part]:
    """The parts of a packed set. Raises InputError if one is missing, unfinished or of another set."""
    parts = sorted(_parts_in(root), key=lambda part: (part.number, part.count))
    if not parts:
        raise InputError(f"{root} is not a packed set; expected what `fasttrain pack SOURCE {root}` writes")
    count = parts[0].count
    if [(part.number, part.count) for part in parts] != [(number, count) for number in range(1, count + 1)]:
        found = ", ".join(f"{part.number}/{part.count}" for part in parts)
        raise InputError(
            f"expected every part of one packed set in {root}, found {found}; pack what is missing with "
            "--shard I/N, and copy parts of several folders into one"
        )
    first = parts[0].read_manifest()
    for part in parts:
        if not part.is_complete():
            raise InputError(
                f"part {part.number} of {count} in {root} is not finished, or a shard is missing; run "
                f"`fasttrain pack` with --shard {part.number}/{count} again to continue it"
            )
        # Parts of another source or with other options would give videos twice, or not at all.
        manifest = part.read_manifest()
        if differing := [key for key in _SHARED if manifest[key] != first[key]]:
            raise InputError(
                f"{part.manifest_path} and that of part 1 differ in {', '.join(differing)}; pack all parts "
                "from the same files with the same options"
            )
    return parts


def _parts_in(root: Path) -> Iterator[Part]:
    for path in root.iterdir() if root.is_dir() else ():
        if match := _MANIFEST.fullmatch(path.name):
            yield Part(root, int(match[1]), int(match[2]))


class PackedIndex(FrameIndex):
    """A packed set: every frame is a byte range of a shard."""

    storage: Storage = "images"

    def __init__(self, root: Path) -> None:
        parts = finished_parts(root)
        skipped = [(name, reason) for part in parts for name, reason in part.read_manifest()["skipped"]]
        # Of each video its name, its shard and, as views of the shard's index, the byte ranges of its frames.
        videos: list[tuple[str, io.FileIO, npt.NDArray[np.void]]] = []
        for path in [path for part in parts for path in part.shard_paths()]:
            shard = ShardIndex.read(path)
            file = _open_shard(path, shard.num_bytes)
            ends = np.cumsum(shard.lengths).tolist()
            frames = [shard.frames[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            videos += [(name, file, ranges) for name, ranges in zip(shard.names, frames, strict=True)]
        if not videos:
            raise InputError(f"the packed set {root} holds no video ({len(skipped)} could not be read)")
        videos.sort(key=lambda video: video[0])
        super().__init__([name for name, _, _ in videos], (len(frames) for *_, frames in videos), skipped)
        self._videos = [(file, frames) for _, file, frames in videos]

    def read(self, video: int, frames: Sequence[int]) -> list[Bytes]:
        """The JPEG bytes of frames: the disk is asked for these ranges and no others."""
        file, ranges = self._videos[video]
        wanted = ranges[np.asarray(frames)].tolist()
        for block, size, _ in wanted:
            # The disk works on all of them before the first is waited for.
            os.posix_fadvise(file.fileno(), block * TAR_BLOCK, size, os.POSIX_FADV_WILLNEED)
        return [_read_frame(file, int(frame), *found) for frame, found in zip(frames, wanted, strict=True)]


def _read_frame(file: io.FileIO, frame: int, block: int, size: int, crc: int) -> Bytes:
    shard = os.path.basename(str(file.name))
    try:
        data = os.pread(file.fileno(), size, block * TAR_BLOCK)
    except OSError as error:
        raise UnreadableFrameError(f"{shard}: {os_reason(error)}", frame) from error
    if len(data) < size:
        raise UnreadableFrameError(f"{shard} was cut off", frame)
    if zlib.crc32(data) != crc:
        raise UnreadableFrameError(f"its bytes in {shard} are not what was packed", frame)
    return np.frombuffer(data, dtype=np.uint8)


def _open_shard(path: Path, num_bytes: int) -> io.FileIO:
    try:
        file = io.FileIO(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be opened: {os_reason(error)}; every shard is an open file: for very many raise "
            "`ulimit -n`, or pack with a larger --shard-size"
        ) from None
    size = os.fstat(file.fileno()).st_size
    if size != num_bytes:
        raise InputError(f"{path} has {size} bytes, expected {num_bytes}; run `fasttrain pack --check`")
    # Frames are far apart: reading ahead of one would fetch what nobody asked for.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def check_shard(path: Path) -> tuple[int, list[str]]:
    """The number of frames of a shard, and what is wrong with it."""
    try:
        index = ShardIndex.read(path)
    except InputError as error:
        return 0, [str(error)]
    names = [(name, k) for name, count in zip(index.names, index.lengths, strict=True) for k in range(count)]
    damage = []
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != index.num_bytes:
                return len(names), [f"{path.name}: {size} bytes, expected {index.num_bytes}"]
            for (name, frame), (block, size, crc) in zip(names, index.frames.tolist(), strict=True):
                header = tar_header(name, frame, size)
                file.seek(block * TAR_BLOCK - len(header))
                if file.read(len(header)) != header or zlib.crc32(file.read(size)) != crc:
                    damage.append(f"{path.name}: frame {frame} of {name} is not what was packed")
    except OSError as error:
        damage.append(f"{path.name}: {os_reason(error)}")
    return len(names), damage
