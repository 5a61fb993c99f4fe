"""The packed format: tar shards of JPEG frames, and beside each an index of byte ranges.

Written by pack.py, opened by sources.py. A set is a folder with, for part i of n (one part for each machine
that packed):

    pack-IofN.json            options, totals, what could not be read; `complete` when the part is done
    frames-IofN-000000.tar    NAME/000000.jpg, NAME/000001.jpg, ...: any WebDataset reader takes it
    frames-IofN-000000.json   names and lengths of its videos, offset, size and CRC-32 of every frame

The JSON beside a shard is written after it, so a shard that has one is whole.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttrain.data.images import Bytes
from fasttrain.data.index import FrameIndex, Skipped, Storage, os_reason
from fasttrain.errors import InputError

FORMAT = 1
TAR_BLOCK = 512
_PART = re.compile(r"pack-(\d+)of(\d+)\.json")


@dataclass(frozen=True)
class ShardIndex:
    """What is in a shard: per video its name and length, per frame its place."""

    names: list[str]
    lengths: list[int]
    offsets: list[int]
    sizes: list[int]
    crcs: list[int]
    skipped: Skipped
    """Files that could not be read, in the order of the source."""
    videos_done: int
    """Videos of this part that are behind the writer, packed or skipped, when this shard is done."""
    num_bytes: int

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":")) + "\n"


@dataclass(frozen=True, order=True)
class Part:
    """Part `number` of `count`, both from 1."""

    number: int
    count: int

    def manifest(self, root: Path) -> Path:
        return root / f"pack-{self.number}of{self.count}.json"

    def shard(self, root: Path, number: int) -> Path:
        return root / f"frames-{self.number}of{self.count}-{number:06d}.tar"

    def is_complete(self, root: Path) -> bool:
        """Whether this part was packed to its end and all its shards are there."""
        manifest = read_manifest(self.manifest(root))
        return bool(manifest["complete"]) and manifest["shards"] == sum(1 for _ in self._indexed(root))

    def shards(self, root: Path) -> Iterator[tuple[Path, ShardIndex]]:
        """The finished shards, in order."""
        for path in self._indexed(root):
            yield path, read_shard_index(path.with_suffix(".json"))

    def _indexed(self, root: Path) -> Iterator[Path]:
        """The shards that have their index, up to the first that has not."""
        paths = (self.shard(root, number) for number in itertools.count())
        return itertools.takewhile(lambda path: path.with_suffix(".json").exists(), paths)


def is_packed(path: Path) -> bool:
    """Whether a path is a packed set, finished or not."""
    return path.is_dir() and bool(_parts(path))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a part. Raises InputError if it is not one of ours."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); pack again") from None
    if not known:
        raise InputError(f"{path} has format {manifest['format']}, this version reads {FORMAT}; pack again")
    return dict(manifest)


def read_shard_index(path: Path) -> ShardIndex:
    """The index beside a shard. Raises InputError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        del content["format"]
        content["skipped"] = [(name, reason) for name, reason in content["skipped"]]
        return ShardIndex(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and pack again") from None


def finished_parts(root: Path) -> list[Part]:
    """All parts of a set. Raises InputError if one is missing or not finished."""
    parts = _parts(root) if root.is_dir() else []
    if not parts:
        raise InputError(f"{root} is no packed set; expected what `fasttrain pack SOURCE {root}` writes")
    counts = {part.count for part in parts}
    if len(counts) > 1:
        raise InputError(
            f"{root} mixes parts of {sorted(counts)} machines; pack each set into its own folder"
        )
    (count,) = counts
    for number in range(1, count + 1):
        part = Part(number, count)
        if part not in parts or not part.is_complete(root):
            raise InputError(
                f"part {number} of {count} of the packed set {root} is not finished, or a shard is missing; "
                f"run `fasttrain pack` with --shard {number}/{count} again, it goes on where it was"
            )
    return parts


class PackedIndex(FrameIndex):
    """A packed set: every frame is a byte range of a memory-mapped shard."""

    kind = "packed"
    storage: Storage = "images"

    def __init__(self, root: Path) -> None:
        parts = finished_parts(root)
        shards = [shard for part in parts for shard in part.shards(root)]
        skipped = [
            (name, reason) for part in parts for name, reason in read_manifest(part.manifest(root))["skipped"]
        ]
        names = [name for _, shard in shards for name in shard.names]
        if not names:
            raise InputError(f"the packed set {root} holds no video ({len(skipped)} could not be read)")
        lengths = np.array([length for _, shard in shards for length in shard.lengths], dtype=np.int64)
        by_name = np.array(sorted(range(len(names)), key=names.__getitem__))
        super().__init__([names[i] for i in by_name], lengths[by_name], skipped)
        # Frame k of video v is entry _first[v] + k of these, in shard _shard[v].
        self._offsets = np.concatenate([np.array(shard.offsets, dtype=np.int64) for _, shard in shards])
        self._sizes = np.concatenate([np.array(shard.sizes, dtype=np.int32) for _, shard in shards])
        self._first = (np.cumsum(lengths) - lengths)[by_name]
        self._shard = np.repeat(np.arange(len(shards)), [len(shard.names) for _, shard in shards])[by_name]
        self._maps = [_map(path, shard.num_bytes) for path, shard in shards]
        self._views = [np.frombuffer(content, dtype=np.uint8) for content in self._maps]

    def read(self, video: int, frames: Sequence[int]) -> list[Bytes]:
        """The JPEG bytes of frames, views of the shard: the disk is asked for these ranges and no others."""
        entries = [int(self._first[video]) + int(frame) for frame in frames]
        shard = self._shard[video]
        for entry in entries:
            page = self._offsets[entry] // mmap.PAGESIZE * mmap.PAGESIZE
            length = int(self._offsets[entry] + self._sizes[entry] - page)
            # Reading starts now, in the kernel; the decoder's threads find the pages there.
            self._maps[shard].madvise(mmap.MADV_WILLNEED, int(page), length)
        return [self._view(shard, entry) for entry in entries]

    def _view(self, shard: int, entry: int) -> npt.NDArray[np.uint8]:
        offset = int(self._offsets[entry])
        return self._views[shard][offset : offset + int(self._sizes[entry])]


def _parts(root: Path) -> list[Part]:
    matches = (_PART.fullmatch(path.name) for path in root.iterdir())
    return sorted(Part(int(match[1]), int(match[2])) for match in matches if match)


def _map(path: Path, num_bytes: int) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size != num_bytes:
                raise InputError(
                    f"{path} has {size} bytes, expected {num_bytes}; run `fasttrain pack --check`"
                )
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(
            f"{path} cannot be opened: {os_reason(error)}; with very many shards raise `ulimit -n`, or pack "
            "with a larger --shard-size"
        ) from None
    # Frames are far apart: reading ahead of one would fetch what nobody asked for.
    content.madvise(mmap.MADV_RANDOM)
    return content


class ShardWriter:
    """Appends videos to tar shards; a shard appears under its name when it is whole."""

    def __init__(self, root: Path, part: Part, shard_bytes: int, done: Sequence[ShardIndex]) -> None:
        self._root, self._part, self._limit = root, part, shard_bytes
        self.number = len(done)
        self.videos_done = done[-1].videos_done if done else 0
        self.num_frames = sum(len(shard.sizes) for shard in done)
        self.num_bytes = sum(shard.num_bytes for shard in done)
        self.all_skipped: Skipped = [bad for shard in done for bad in shard.skipped]
        self._shard = _OpenShard()

    def add(self, name: str, frames: Sequence[bytes], skipped: Skipped) -> None:
        """Append the next video of the part: its JPEG frames, none if it cannot be read."""
        self.videos_done += 1
        self.all_skipped += skipped
        shard = self._shard
        shard.skipped += skipped
        if frames:
            if shard.file is None:
                shard.file = self._partial().open("wb")
            shard.append(name, frames)
        if shard.file is not None and shard.file.tell() >= self._limit:
            self.close()

    def close(self) -> None:
        """Finish the shard that is open, if any: its bytes reach the disk before its name appears."""
        shard = self._shard
        if shard.file is None:
            return
        shard.file.write(bytes(2 * TAR_BLOCK))
        size = shard.file.tell()
        _sync_and_close(shard.file)
        path = self._part.shard(self._root, self.number)
        self._partial().replace(path)
        index = ShardIndex(
            names=shard.names,
            lengths=shard.lengths,
            offsets=shard.offsets,
            sizes=shard.sizes,
            crcs=shard.crcs,
            skipped=shard.skipped,
            videos_done=self.videos_done,
            num_bytes=size,
        )
        _write_atomically(path.with_suffix(".json"), index.to_json())
        self.number += 1
        self.num_frames += len(shard.sizes)
        self.num_bytes += size
        self._shard = _OpenShard()

    def _partial(self) -> Path:
        return self._part.shard(self._root, self.number).with_suffix(".tar.partial")


@dataclass
class _OpenShard:
    file: Any = None
    names: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    skipped: Skipped = field(default_factory=list)

    def append(self, name: str, frames: Sequence[bytes]) -> None:
        self.names.append(name)
        self.lengths.append(len(frames))
        for number, data in enumerate(frames):
            member = tarfile.TarInfo(f"{_member_folder(name)}/{number:06d}.jpg")
            member.size = len(data)
            self.file.write(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
            self.offsets.append(self.file.tell())
            self.sizes.append(len(data))
            self.crcs.append(zlib.crc32(data))
            self.file.write(data + bytes(-len(data) % TAR_BLOCK))


def check_shard(path: Path) -> tuple[int, list[str]]:
    """The number of frames of a shard, and what is wrong with it."""
    index = read_shard_index(path.with_suffix(".json"))
    frames = [
        (name, k) for name, length in zip(index.names, index.lengths, strict=True) for k in range(length)
    ]
    expected = zip(frames, index.offsets, index.sizes, index.crcs, strict=True)
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            if path.stat().st_size != index.num_bytes:
                return len(frames), [f"{path.name}: {path.stat().st_size} bytes, expected {index.num_bytes}"]
            damage = []
            for ((name, k), offset, size, crc), member in zip(expected, tar, strict=True):
                place = (f"{_member_folder(name)}/{k:06d}.jpg", offset, size)
                file.seek(offset)
                if (
                    zlib.crc32(file.read(size)) != crc
                    or (member.name, member.offset_data, member.size) != place
                ):
                    damage.append(f"{path.name}: frame {k} of {name} is not what was packed")
            return len(frames), damage
    except (OSError, tarfile.TarError, ValueError) as error:
        return len(frames), [f"{path.name}: {error}"]


def write_manifest(path: Path, content: dict[str, Any], *, complete: bool, skipped: Skipped) -> None:
    manifest = {"format": FORMAT, **content, "complete": complete, "skipped": skipped}
    _write_atomically(path, json.dumps(manifest, indent=1) + "\n")


def _member_folder(name: str) -> str:
    """A video's folder in the tar: its name, kept inside the folder that somebody may unpack it to."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    file = partial.open("wb")
    file.write(text.encode("utf-8"))
    _sync_and_close(file)
    partial.replace(path)


def _sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
