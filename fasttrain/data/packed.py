"""The packed format: tar shards of JPEG frames, and beside each an index of byte ranges.

Written by pack.py, opened by sources.py. A set is one folder (or, by a list, several) with, for part i of n
(one part for each machine that packed):

    pack-IofN.json            options, totals, what could not be read; `complete` when the part is done
    frames-IofN-000000.tar    NAME/000000.jpg, NAME/000001.jpg, ...: any WebDataset reader takes it
    frames-IofN-000000.npz    names and lengths of its videos, place, size and CRC-32 of every frame

The index beside a shard is written after it, so a shard that has one is whole.

A frame is read by `pread` of its byte range, from the page cache that a memory map would use too. A map would
save a copy of 20 KB, but it can end the process: where a shard is cut off or its disk fails, touching the map
is SIGBUS, which no handler survives, while `pread` gives an error like any other.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import resource
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fasttrain.data.images import Bytes, UnreadableFrameError
from fasttrain.data.index import FrameIndex, Skipped, Storage
from fasttrain.errors import InputError
from fasttrain.files import os_reason

FORMAT = 2
TAR_BLOCK = 512
# Options in which the parts of a set may differ: of the machines that packed them, some had a GPU.
_OWN_TO_A_PART = frozenset({"decoder"})
_PART = re.compile(r"pack-(\d+)of(\d+)\.json")


@dataclass(frozen=True)
class ShardIndex:
    """What is in a shard: per video (V,) its name and length, per frame (F,) its place."""

    names: list[str]
    lengths: npt.NDArray[np.int32]
    blocks: npt.NDArray[np.uint32]
    """Where a frame's bytes begin, in tar blocks of 512 bytes."""
    sizes: npt.NDArray[np.int32]
    crcs: npt.NDArray[np.uint32]
    skipped: Skipped
    """Files that could not be read, in the order of the source."""
    videos_done: int
    """Videos of this part that are behind the writer, packed or skipped, when this shard is done."""
    num_bytes: int

    def to_bytes(self) -> bytes:
        """As a NumPy archive; the same index gives the same bytes."""
        told = {
            "format": FORMAT,
            "names": self.names,
            "skipped": self.skipped,
            "videos_done": self.videos_done,
            "num_bytes": self.num_bytes,
        }
        buffer = io.BytesIO()
        np.savez(
            buffer,
            told=np.frombuffer(json.dumps(told).encode("ascii"), dtype=np.uint8),
            lengths=self.lengths,
            blocks=self.blocks,
            sizes=self.sizes,
            crcs=self.crcs,
        )
        return buffer.getvalue()


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
        return bool(manifest["complete"]) and manifest["shards"] == sum(1 for _ in self.paths(root))

    def shards(self, root: Path) -> Iterator[tuple[Path, ShardIndex]]:
        """The finished shards, in order."""
        for path in self.paths(root):
            yield path, read_shard_index(path.with_suffix(".npz"))

    def files(self, root: Path) -> Iterator[Path]:
        """Whatever is called a shard of this part."""
        return root.glob(f"frames-{self.number}of{self.count}-*.tar")

    def paths(self, root: Path) -> Iterator[Path]:
        """The shards that have their index, up to the first that has not."""
        paths = (self.shard(root, number) for number in itertools.count())
        return itertools.takewhile(lambda path: path.with_suffix(".npz").exists(), paths)


def is_packed(path: Path) -> bool:
    """Whether a path is a packed set, finished or not."""
    return os.path.isdir(path) and bool(_parts(path))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a part. Raises InputError if it is not one of ours."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
        expected = {"complete", "skipped"} | ({"shards"} if manifest["complete"] else set())
        if known and not expected <= manifest.keys():
            raise ValueError(f"expected the keys {', '.join(sorted(expected))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); pack again") from None
    if not known:
        raise InputError(f"{path} has format {manifest['format']}, this version reads {FORMAT}; pack again")
    return dict(manifest)


def read_shard_index(path: Path) -> ShardIndex:
    """The index beside a shard. Raises InputError if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            told = json.loads(content["told"].tobytes())
            index = ShardIndex(
                names=told["names"],
                lengths=content["lengths"],
                blocks=content["blocks"],
                sizes=content["sizes"],
                crcs=content["crcs"],
                skipped=[(name, reason) for name, reason in told["skipped"]],
                videos_done=told["videos_done"],
                num_bytes=told["num_bytes"],
            )
            if not _agrees(index):
                raise ValueError("its parts contradict one another")
            return index
    except OSError as error:
        raise InputError(f"{path} cannot be read: {os_reason(error)}") from None
    # What NumPy says of a file that is no archive of its own leads nobody anywhere. RuntimeError: a flipped
    # bit in a zip header asks for a password, or for what no zip file has yet.
    except (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"{path} is damaged; delete it and pack again") from None


def _agrees(index: ShardIndex) -> bool:
    """Whether an index could have been written so. Raises TypeError for some that could not."""
    arrays = (index.lengths, index.blocks, index.sizes, index.crcs)
    ends = index.blocks.astype(np.int64) * TAR_BLOCK + index.sizes
    return (
        [array.dtype for array in arrays] == [np.int32, np.uint32, np.int32, np.uint32]
        and all(array.ndim == 1 for array in arrays)
        and all(isinstance(name, str) for name in index.names)
        and len(index.names) == len(set(index.names)) == len(index.lengths) <= index.videos_done
        and int(index.lengths.sum()) == len(index.blocks) == len(index.sizes) == len(index.crcs)
        and bool((index.lengths > 0).all() and (index.sizes > 0).all() and (ends <= index.num_bytes).all())
    )


def finished_parts(roots: Sequence[Path]) -> list[tuple[Path, Part]]:
    """All parts of a set, each with its folder. Raises InputError if one is missing or foreign."""
    found: dict[Part, Path] = {}
    for root in roots:
        parts = _parts(root) if root.is_dir() else []
        if not parts:
            raise InputError(f"{root} is no packed set; expected what `fasttrain pack SOURCE {root}` writes")
        for part in parts:
            if part in found:
                raise InputError(
                    f"part {part.number} of {part.count} is in {found[part]} and in {root}; expected the "
                    "parts of one set, each packed with a --shard I/N of its own"
                )
            found[part] = root
    counts = {part.count for part in found}
    place = ", ".join(map(str, roots))
    if len(counts) > 1:
        raise InputError(
            f"{place} mixes parts of {sorted(counts)} machines; pack each set into its own folder"
        )
    (count,) = counts
    for number in range(1, count + 1):
        part = Part(number, count)
        if part not in found or not part.is_complete(found[part]):
            raise InputError(
                f"part {number} of {count} of the packed set {place} is not finished, or a shard is missing "
                f"or surplus; run `fasttrain pack` with --shard {number}/{count} again, it goes on where it "
                "was; a text file with a folder per line joins parts in several folders"
            )
    _check_one_set(found)
    return sorted(((root, part) for part, root in found.items()), key=lambda entry: entry[1])


def _check_one_set(found: dict[Part, Path]) -> None:
    """Parts of another source or with other options would give videos twice, or not at all."""
    first, *rest = sorted(found)
    expected = _identity(read_manifest(first.manifest(found[first])))
    for part in rest:
        manifest = part.manifest(found[part])
        identity = _identity(read_manifest(manifest))
        for key, value in expected.items():
            if identity.get(key) != value:
                raise InputError(
                    f"{manifest} was packed with {key}={identity.get(key)}, part {first.number} with "
                    f"{key}={value}; pack all parts from the same files with the same options"
                )


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    results = {"shards", "total_frames", "total_bytes", "complete", "skipped"}
    return {key: value for key, value in manifest.items() if key not in results | _OWN_TO_A_PART}


class PackedIndex(FrameIndex):
    """A packed set: every frame is a byte range of a shard."""

    kind = "packed"
    storage: Storage = "images"

    def __init__(self, *roots: Path) -> None:
        parts = finished_parts(roots)
        skipped = [
            (name, reason)
            for root, part in parts
            for name, reason in read_manifest(part.manifest(root))["skipped"]
        ]
        paths: list[Path] = []
        shards: list[ShardIndex] = []
        for root, part in parts:
            for path, shard in part.shards(root):
                paths.append(path)
                shards.append(shard)
        names = [name for shard in shards for name in shard.names]
        if not names:
            raise InputError(
                f"the packed set {', '.join(map(str, roots))} holds no video "
                f"({len(skipped)} could not be read)"
            )
        lengths = np.concatenate([shard.lengths for shard in shards]).astype(np.int64)
        by_name = np.array(sorted(range(len(names)), key=names.__getitem__))
        super().__init__([names[i] for i in by_name], lengths[by_name], skipped)
        # Frame k of video v is entry _first[v] + k of these, in shard _shard[v]: 12 bytes a frame.
        self._blocks = np.concatenate([shard.blocks for shard in shards])
        self._sizes = np.concatenate([shard.sizes for shard in shards])
        self._crcs = np.concatenate([shard.crcs for shard in shards])
        self._first = (np.cumsum(lengths) - lengths)[by_name]
        self._shard = np.repeat(np.arange(len(shards)), [len(shard.names) for shard in shards])[by_name]
        _allow_open_files(len(shards))
        self._files = [_open_shard(path, shard.num_bytes) for path, shard in zip(paths, shards, strict=True)]

    def read(self, video: int, frames: Sequence[int]) -> list[Bytes]:
        """The JPEG bytes of frames: the disk is asked for these ranges and no others."""
        file = self._files[self._shard[video]]
        first = int(self._first[video])
        ranges = []
        for frame in frames:
            entry = first + int(frame)
            offset, size = int(self._blocks[entry]) * TAR_BLOCK, int(self._sizes[entry])
            ranges.append((int(frame), offset, size, int(self._crcs[entry])))
            # The disk works on all of them before the first is waited for.
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
        return [_read_range(file, *place) for place in ranges]


def _read_range(file: io.FileIO, frame: int, offset: int, size: int, crc: int) -> Bytes:
    shard = os.path.basename(str(file.name))
    try:
        data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise UnreadableFrameError(f"{shard}: {os_reason(error)}", frame) from error
    if len(data) < size:
        raise UnreadableFrameError(f"{shard} was cut off", frame)
    if zlib.crc32(data) != crc:
        raise UnreadableFrameError(f"its bytes in {shard} are not what was packed", frame)
    return np.frombuffer(data, dtype=np.uint8)


def _parts(root: Path) -> list[Part]:
    matches = (_PART.fullmatch(path.name) for path in root.iterdir())
    return sorted(Part(int(match[1]), int(match[2])) for match in matches if match)


def _allow_open_files(number: int) -> None:
    """Raise this process's own limit, where it is too low for so many shards and may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Python, PyTorch and DALI need some too.
    wanted = number + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _open_shard(path: Path, num_bytes: int) -> io.FileIO:
    try:
        file = io.FileIO(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be opened: {os_reason(error)}; with very many shards raise `ulimit -n`, or pack "
            "with a larger --shard-size"
        ) from None
    size = os.fstat(file.fileno()).st_size
    if size != num_bytes:
        raise InputError(f"{path} has {size} bytes, expected {num_bytes}; run `fasttrain pack --check`")
    # Frames are far apart: reading ahead of one would fetch what nobody asked for.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


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
        _appear(self._partial(), path)
        index = ShardIndex(
            names=shard.names,
            lengths=np.array(shard.lengths, dtype=np.int32),
            blocks=np.array(shard.blocks, dtype=np.uint32),
            sizes=np.array(shard.sizes, dtype=np.int32),
            crcs=np.array(shard.crcs, dtype=np.uint32),
            skipped=shard.skipped,
            videos_done=self.videos_done,
            num_bytes=size,
        )
        _write_atomically(path.with_suffix(".npz"), index.to_bytes())
        self.number += 1
        self.num_frames += len(shard.sizes)
        self.num_bytes += size
        self._shard = _OpenShard()

    def _partial(self) -> Path:
        return self._part.shard(self._root, self.number).with_suffix(".tar.partial")


@dataclass
class _OpenShard:
    file: BinaryIO | None = None
    names: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    skipped: Skipped = field(default_factory=list)

    def append(self, name: str, frames: Sequence[bytes]) -> None:
        assert self.file is not None
        self.names.append(name)
        self.lengths.append(len(frames))
        for number, data in enumerate(frames):
            member = tarfile.TarInfo(f"{_member_folder(name)}/{number:06d}.jpg")
            member.size = len(data)
            self.file.write(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
            self.blocks.append(self.file.tell() // TAR_BLOCK)
            self.sizes.append(len(data))
            self.crcs.append(zlib.crc32(data))
            self.file.write(data + bytes(-len(data) % TAR_BLOCK))


def check_shard(path: Path) -> tuple[int, list[str]]:
    """The number of frames of a shard, and what is wrong with it."""
    try:
        index = read_shard_index(path.with_suffix(".npz"))
    except InputError as error:
        return 0, [str(error)]
    frames = [
        (name, k) for name, length in zip(index.names, index.lengths, strict=True) for k in range(length)
    ]
    expected = zip(frames, index.blocks.tolist(), index.sizes.tolist(), index.crcs.tolist(), strict=True)
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            if path.stat().st_size != index.num_bytes:
                return len(frames), [f"{path.name}: {path.stat().st_size} bytes, expected {index.num_bytes}"]
            damage = []
            for ((name, k), block, size, crc), member in zip(expected, tar, strict=True):
                offset = block * TAR_BLOCK
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


def misplaced_shards(root: Path, part: Part) -> list[str]:
    """Shards that are whole but cannot stand where they do: copied or renamed."""
    found: list[str] = []
    behind: int | None = 0
    for path in part.paths(root):
        try:
            index = read_shard_index(path.with_suffix(".npz"))
        except InputError:
            # `check_shard` tells.
            behind = None
            continue
        packed = len(index.names)
        passed = packed if behind is None else index.videos_done - behind
        # A video that could not be packed left a word in `skipped`, or several.
        if not packed <= passed <= packed + len(index.skipped):
            found.append(f"{path}: not the shard of that number, its videos are those of another")
        behind = index.videos_done
    return found


def write_manifest(path: Path, content: dict[str, Any], *, complete: bool, skipped: Skipped) -> None:
    manifest = {"format": FORMAT, **content, "complete": complete, "skipped": skipped}
    _write_atomically(path, (json.dumps(manifest, indent=1) + "\n").encode("ascii"))


def _member_folder(name: str) -> str:
    """A video's folder in the tar: its name, kept inside the folder that somebody may unpack it to."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    file = partial.open("wb")
    file.write(content)
    _sync_and_close(file)
    _appear(partial, path)


def _appear(partial: Path, path: Path) -> None:
    """Give a written file its name, on the disk before anything later."""
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
