"""The format of packed sets, and their index.

A packed set is a folder of shards: tar files of JPEG frames, each with an index of byte ranges. If N machines
pack a source together, each of them writes one share of the set. Share I of N consists of

    pack-IofN.json            the manifest: options, totals, skipped files, and whether the share is complete
    frames-IofN-000000.tar    the first shard: NAME/000000.jpg, NAME/000001.jpg, ..., readable as a WebDataset
    frames-IofN-000000.npz    its index: names and lengths of the videos; offset, size, CRC-32 of each frame

The index of a shard is written after the shard, so a shard with an index is complete.

Frames are read with `pread`, not through a memory map: if a shard is truncated or its disk fails, accessing a
memory map raises SIGBUS, which kills the process.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttrain.data.images import Bytes, UnreadableFrameError, as_regular
from fasttrain.data.index import FrameIndex, Skipped, Storage
from fasttrain.data.remote import READERS, FrameCache, RemoteFiles, cut, is_final
from fasttrain.errors import InputError, LocalInputError
from fasttrain.files import os_reason, parse_json, write_atomically

# macOS has no such call.
HAS_FADVISE = hasattr(os, "posix_fadvise")
FORMAT = 2
TAR_BLOCK = 512
# The position of a frame in its shard, in tar blocks; its size in bytes; its CRC-32.
FRAME = np.dtype([("block", np.uint32), ("size", np.int32), ("crc", np.uint32)])
# The fields of ShardIndex that are stored as JSON, in this order.
_JSON_FIELDS = ("names", "skipped", "videos_done", "num_bytes")
_MANIFEST = re.compile(r"pack-(\d+)of(\d+)\.json")
_FILE_OF_SET = re.compile(rf"{_MANIFEST.pattern}|frames-\d+of\d+-\d+\.(tar|npz)")
# An entry of dtype FRAME.
_Range = tuple[int, int, int]
# Keys on which all manifests of a set must agree. The decoder may differ, as not every machine has a GPU.
_COMMON_KEYS = ("source", "frames", "short_side", "quality", "shard_bytes")


@dataclass(frozen=True)
class Share:
    """Share `number` of `count`, counted from 1, of the packed set in `folder`. One machine packs it."""

    folder: Path
    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}of{self.count}"

    @property
    def description(self) -> str:
        """The name of this share in messages; the set alone if it has only one share."""
        folder = repr(str(self.folder))
        return folder if self.count == 1 else f"share {self.number} of {self.count} in {folder}"

    @property
    def manifest_path(self) -> Path:
        return self.folder / f"pack-{self}.json"

    def shard_path(self, number: int) -> Path:
        return self.folder / f"frames-{self}-{number:06d}.tar"

    def shard_paths(self) -> list[Path]:
        """Return the paths of the shards up to the first one whose tar file or index is missing."""
        paths = map(self.shard_path, itertools.count())
        return list(
            itertools.takewhile(lambda path: path.exists() and path.with_suffix(".npz").exists(), paths)
        )

    def read_manifest(self) -> dict[str, Any]:
        path = self.manifest_path
        try:
            manifest = parse_json(path.read_bytes())
            if not isinstance(manifest, dict):
                raise ValueError("not a JSON object")
        except OSError as error:
            raise InputError(f"{str(path)!r} cannot be read: {os_reason(error)}") from None
        except ValueError as error:
            raise InputError(
                f"{str(path)!r} is damaged ({error}). Delete it and run `fasttrain pack` again."
            ) from None
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"{str(path)!r} has format {str(manifest.get('format'))[:100]!r}, but this version reads "
                f"format {FORMAT}. Pack the source again into a new folder."
            )
        expected = {"complete", "skipped", *_COMMON_KEYS, *(["shards"] if manifest.get("complete") else [])}
        missing = sorted(expected - manifest.keys())
        problem = f"it has no {missing[0]!r}" if missing else ""
        if not problem and not _is_skipped(manifest["skipped"]):
            problem = "the list of skipped files is malformed"
        if not problem and not _is_left_out(manifest.setdefault("left_out", {})):
            problem = "the count of files left out is malformed"
        if problem:
            raise InputError(
                f"{str(path)!r} is damaged ({problem}). Delete it and run `fasttrain pack` again."
            )
        return manifest

    def is_complete(self) -> bool:
        """Whether packing finished and no shard is missing."""
        manifest = self.read_manifest()
        return bool(manifest["complete"]) and manifest["shards"] == len(self.shard_paths())


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard."""

    names: list[str]
    """Names of the videos."""
    lengths: npt.NDArray[np.int32]
    """Number of frames of each video."""
    frames: npt.NDArray[np.void]
    """Byte ranges of all frames, video by video, of dtype FRAME."""
    skipped: Skipped
    """Unreadable files, in the order of the source."""
    videos_done: int
    """Number of videos of the share, packed or skipped, up to the end of this shard."""
    num_bytes: int
    """Size of the tar file."""

    def to_bytes(self) -> bytes:
        """Serialise to a NumPy archive. Equal indexes give equal bytes."""
        values = {"format": FORMAT} | {key: getattr(self, key) for key in _JSON_FIELDS}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            # This key is part of the format, so it must not be renamed.
            told=np.frombuffer(json.dumps(values).encode("ascii"), dtype=np.uint8),
            lengths=self.lengths,
            blocks=self.frames["block"],
            sizes=self.frames["size"],
            crcs=self.frames["crc"],
        )
        return buffer.getvalue()

    def check(self) -> None:
        """Raise ValueError if the fields have other types than those written, or contradict each other."""
        counts = self.videos_done, self.num_bytes
        ends = TAR_BLOCK * self.frames["block"].astype(np.int64) + self.frames["size"]
        if not (
            isinstance(self.names, list)
            and all(isinstance(name, str) for name in self.names)
            and _is_skipped(self.skipped)
            and all(isinstance(count, int) and count >= 0 for count in counts)
            and self.lengths.dtype.kind == "i"
            and self.lengths.shape == (len(self.names),)
            and (self.lengths > 0).all()
            and self.frames.shape == (self.lengths.sum(),)
            and (self.frames["block"] > 0).all()
            and (self.frames["size"] >= 0).all()
            and (ends <= self.num_bytes).all()
        ):
            raise ValueError("inconsistent index")

    @classmethod
    def read(cls, shard: Path) -> ShardIndex:
        """Read the index of a shard. Raises InputError if it is missing or damaged."""
        path = shard.with_suffix(".npz")
        try:
            with zipfile.ZipFile(path) as archive:
                # A compressed index, which fasttrain never writes, could fill the memory.
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("compressed")
            with np.load(path, allow_pickle=False) as content:
                values = parse_json(content["told"].tobytes())
                frames = [content[key] for key in ("blocks", "sizes", "crcs")]
                index = cls(
                    lengths=content["lengths"],
                    frames=np.rec.fromarrays(frames, dtype=FRAME),
                    **{key: values[key] for key in _JSON_FIELDS},
                )
                index.check()
                return index
        except OSError as error:
            raise InputError(f"{str(path)!r} cannot be read: {os_reason(error)}") from None
        # For damaged archives, NumPy and zipfile raise exceptions of many types, with misleading messages.
        except Exception:
            raise InputError(f"{str(path)!r} is damaged. Delete it and run `fasttrain pack` again.") from None


def _is_skipped(value: Any) -> bool:
    """Whether a value from JSON is a list of names and reasons."""
    return isinstance(value, list) and all(
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)
        for entry in value
    )


def _is_left_out(value: Any) -> bool:
    """Whether a value from JSON maps kinds of files to their number and the first of them."""
    return isinstance(value, dict) and all(
        isinstance(entry, list) and [type(item) for item in entry] == [int, str] for entry in value.values()
    )


def tar_header(video: str, frame: int, size: int) -> bytes:
    """Return the tar header of a frame. On extraction, its path never leads out of the target folder."""
    folder = "/".join(name for name in video.split("/") if name not in ("", ".", ".."))
    member = tarfile.TarInfo(f"{folder}/{frame:06d}.jpg")
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def is_packed(path: Path) -> bool:
    """Whether a path is a packed set, complete or not."""
    return any(_shares_in(path))


def complete_shares(root: Path) -> list[Share]:
    """Return all shares of a packed set. Raises InputError if one is missing, incomplete or inconsistent."""
    shares = sorted(_shares_in(root), key=lambda share: (share.number, share.count))
    if not shares:
        raise InputError(f"{str(root)!r} is not a packed set. Create one with `fasttrain pack`.")
    count = shares[0].count
    present = [(share.number, share.count) for share in shares]
    if present != [(number, count) for number in range(1, count + 1)]:
        names = ", ".join(f"{number}/{count}" for number, count in present)
        raise InputError(
            f"{str(root)!r}: expected all shares of one packed set, but found {names}. Pack the missing "
            "shares with --shard I/N, or copy the files of all shares into this folder."
        )
    first = shares[0].read_manifest()
    for share in shares:
        if not share.is_complete():
            option = "" if count == 1 else f" with --shard {share.number}/{count}"
            raise InputError(
                f"{share.description} is incomplete or has a missing shard. Run `fasttrain pack` "
                f"again{option} to complete it."
            )
        # If sources or options differed, a video could be in the set twice or not at all.
        manifest = share.read_manifest()
        if differing := [key for key in _COMMON_KEYS if manifest[key] != first[key]]:
            raise InputError(
                f"{str(share.manifest_path)!r} and the manifest of share 1 differ in {', '.join(differing)}. "
                "Pack all shares from the same files with the same options."
            )
    return shares


def _shares_in(root: Path) -> Iterator[Share]:
    for path in root.iterdir() if root.is_dir() else ():
        if match := _MANIFEST.fullmatch(path.name):
            yield Share(root, int(match[1]), int(match[2]))


class PackedIndex(FrameIndex):
    """An index of a packed set, in which every frame is a byte range of a shard."""

    storage: Storage = "images"
    _per_video = ("_videos",)

    def __init__(self, root: Path) -> None:
        shares = complete_shares(root)
        manifests = [share.read_manifest() for share in shares]
        skipped = [(name, reason) for manifest in manifests for name, reason in manifest["skipped"]]
        # Only the first share has any.
        left_out = {kind: (count, first) for kind, (count, first) in manifests[0]["left_out"].items()}
        # For each video: its name, its shard, and the byte ranges of its frames.
        videos: list[tuple[str, io.FileIO, npt.NDArray[np.void]]] = []
        for path in [path for share in shares for path in share.shard_paths()]:
            shard = ShardIndex.read(path)
            file = _open_shard(path, shard.num_bytes)
            ends = np.cumsum(shard.lengths).tolist()
            frames = [shard.frames[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            videos += [(name, file, ranges) for name, ranges in zip(shard.names, frames, strict=True)]
        if not videos:
            raise InputError(
                f"{str(root)!r} contains no videos, because no file of its source was readable "
                f"({len(skipped)} skipped). Pack a source with readable videos."
            )
        videos.sort(key=lambda video: video[0])
        names, lengths = [name for name, _, _ in videos], (len(frames) for *_, frames in videos)
        super().__init__(names, lengths, skipped, left_out)
        self._videos = [(file, frames) for _, file, frames in videos]

    def read(self, video: int, frames: Sequence[int]) -> list[Bytes]:
        """Read the JPEG bytes of frames. Raises UnreadableFrameError."""
        file, all_ranges = self._videos[video]
        ranges = all_ranges[np.asarray(frames)].tolist()
        contents = self._read_ranges(file, ranges)
        shard, read = os.path.basename(str(file.name)), []
        for frame, (_, size, crc), data in zip(map(int, frames), ranges, contents, strict=True):
            if isinstance(data, OSError):
                raise UnreadableFrameError(f"{shard}: {os_reason(data)}", frame) from data
            if len(data) < size:
                raise UnreadableFrameError(f"{shard} is truncated", frame)
            if zlib.crc32(data) != crc:
                raise UnreadableFrameError(f"checksum mismatch in {shard}", frame)
            read.append(as_regular(data, frame))
        return read

    def _read_ranges(self, file: io.FileIO, ranges: Sequence[_Range]) -> list[bytes | OSError]:
        """Read byte ranges of a shard, or the error of each. The checksums are not compared."""
        for block, size, _ in ranges if HAS_FADVISE else ():
            # Announce all reads first, so that the disk can serve them at the same time.
            os.posix_fadvise(file.fileno(), block * TAR_BLOCK, size, os.POSIX_FADV_WILLNEED)
        return [_pread(file, block * TAR_BLOCK, size) for block, size, _ in ranges]


class RemotePackedIndex(PackedIndex):
    """An index of a packed set at a URL. The folder in the cache has copies of its manifests and indexes."""

    is_remote = True

    def __init__(self, url: str, cache_size: float) -> None:
        self._files = RemoteFiles(url)
        listed = _files_of_set(self._files)
        with ThreadPoolExecutor(READERS) as pool:
            states = dict(zip(listed, pool.map(self._files.state, listed, listed.values()), strict=True))
        self._cache = FrameCache([url, sorted(states.items())], int(cache_size * 2**30))
        folder = self._cache.folder
        self._cache.make_room(sum(size for size, _ in states.values()))
        for name, (size, _) in states.items():
            if name.endswith(".tar"):
                self._cache.create(name, size)
        missing = [name for name in states if not (folder / name).exists()]
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(lambda name: write_atomically(folder / name, self._files.read(name)), missing):
                pass
        try:
            super().__init__(folder)
        except InputError as error:
            # Name the files that the user knows.
            raise InputError(str(error).replace(str(folder), self._files.url)) from None

    def _read_ranges(self, file: io.FileIO, ranges: Sequence[_Range]) -> list[bytes | OSError]:
        contents = super()._read_ranges(file, ranges)
        name = os.path.basename(str(file.name))
        # Data that were damaged on their way are read once more.
        for _ in range(2):
            missing = [
                i
                for i, (data, entry) in enumerate(zip(contents, ranges, strict=True))
                if not _is_intact(data, entry)
            ]
            if not missing:
                break
            places = {i: (ranges[i][0] * TAR_BLOCK, ranges[i][0] * TAR_BLOCK + ranges[i][1]) for i in missing}
            spans = self._files.read_spans(name, places.values())
            for i, place in places.items():
                contents[i] = cut(spans, *place)
            self._cache.write(name, spans)
        return contents


def _files_of_set(files: RemoteFiles) -> dict[str, dict[str, Any] | None]:
    """List the files of a packed set, and what the file system says about them.

    A web server may not list its files. The manifest of a set with a single share tells their names.
    """
    try:
        entries = files.entries()
    except LocalInputError as error:
        if not is_final(error.__cause__):
            raise
        entries = {}
    listed = {name: info for name, info in (entries or {}).items() if _FILE_OF_SET.fullmatch(name)}
    if any(map(_MANIFEST.fullmatch, listed)):
        return {**listed}
    name = "pack-1of1.json"
    try:
        shards = parse_json(files.read(name))["shards"]
    except LocalInputError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        reason = f"it has no {name}"
        if entries is None:
            reason = "no such bucket or folder; check the URL"
    except (LookupError, TypeError, ValueError):
        reason = f"its {name} is damaged"
    else:
        paths = [Share(Path(), 1, 1).shard_path(number) for number in range(shards)]
        indexes = [path.with_suffix(".npz") for path in paths]
        return dict.fromkeys([name, *(path.name for path in paths + indexes)])
    raise InputError(
        f"{files.url!r} is not a packed set ({reason}). Create one with `fasttrain pack`, and copy all its "
        "files there. A set of several shares needs a server that lists its files."
    )


def _is_intact(data: bytes | OSError, entry: _Range) -> bool:
    return not isinstance(data, OSError) and zlib.crc32(data) == entry[2]


def _pread(file: io.FileIO, start: int, size: int) -> bytes | OSError:
    try:
        return os.pread(file.fileno(), size, start)
    except OSError as error:
        return error


def _open_shard(path: Path, num_bytes: int) -> io.FileIO:
    try:
        file = io.FileIO(path)
    except OSError as error:
        advice = ""
        if error.errno == errno.EMFILE:
            advice = ". All shards stay open: raise `ulimit -n`, or pack again with a larger --shard-size."
        raise InputError(f"{str(path)!r} cannot be opened: {os_reason(error)}{advice}") from None
    size = os.fstat(file.fileno()).st_size
    if size != num_bytes:
        raise InputError(
            f"{str(path)!r} has {size} bytes, expected {num_bytes}. Delete it and run `fasttrain pack` again."
        )
    if HAS_FADVISE:
        # The frames of a pair are far apart, so read-ahead would fetch unneeded data.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def check_shard(path: Path) -> tuple[int, list[str]]:
    """Verify a shard. Returns its number of frames and a description of each problem."""
    try:
        index = ShardIndex.read(path)
    except InputError:
        return 0, [f"{path.with_suffix('.npz').name} is damaged or cannot be read"]
    names = [(name, k) for name, count in zip(index.names, index.lengths, strict=True) for k in range(count)]
    problems = []
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != index.num_bytes:
                return len(names), [f"{path.name}: the file has {size} bytes, expected {index.num_bytes}"]
            for (name, frame), (block, size, crc) in zip(names, index.frames.tolist(), strict=True):
                header = tar_header(name, frame, size)
                file.seek(block * TAR_BLOCK - len(header))
                if file.read(len(header)) != header or zlib.crc32(file.read(size)) != crc:
                    problems.append(f"{path.name}: frame {frame} of {name!r} is damaged")
    except OSError as error:
        problems.append(f"{path.name}: {os_reason(error)}")
    return len(names), problems
