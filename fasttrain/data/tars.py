"""WebDatasets as a source of `fasttrain pack`: tar files whose members are video files, or frames.

    00000.tar         000000000.mp4, 000000000.json, 000000000.txt, ...  a video per key, as of video2dataset
    part_12.tar.gz    0347ZoDXyP0_000095_000105.mp4, ...                 video files, as of Kinetics
    shard-0.tar       NAME/000000.jpg, NAME/000001.jpg, ...              folders of frames, as packed sets
    shard-0.tar       NAME.0001.jpg, NAME.0002.jpg, ..., NAME.json, ...  frames with one key

The headers of each tar are read once. Members of an uncompressed tar are then read by byte range, in any
order. A tar compressed with gzip is decompressed twice: for its headers, and in the order of its members
while packing, when each video is copied to a temporary file. No name in a tar becomes the path of a file.
"""

from __future__ import annotations

import errno
import gzip
import itertools
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from fasttrain.data.images import IMAGE_SUFFIXES, Bytes, UnreadableFrameError, as_intact
from fasttrain.data.index import LeftOut
from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.sources import (
    REPLACEMENTS,
    TAR_SUFFIXES,
    Kind,
    SourceFiles,
    add_frames,
    annotation_word,
    file_suffix,
    find_source,
    is_tar,
)
from fasttrain.data.video import VIDEO_SUFFIXES
from fasttrain.errors import InputError
from fasttrain.files import naming, os_reason, read_lines
from fasttrain.loggers import Progress

CHUNK = 2**20
# An image with a number between its key and its suffix, such as clip.0001.jpg or clip.frame_01.png.
_NUMBERED = re.compile(r"\.[^/.]*\d[^/.]*\.[^/.]+$")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Member(NamedTuple):
    """A member of a tar: its name without folders, and its byte range in the uncompressed tar."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarVideo:
    """A video file, or the frames of a video in order, as byte ranges of a file."""

    name: str
    path: Path
    """The tar, or a temporary file with the members of a compressed tar."""
    members: tuple[Member, ...]
    is_frames: bool
    is_compressed: bool

    @property
    def url(self) -> Path:
        """What FFmpeg opens to read the only member: a byte range of the file."""
        (member,) = self.members
        end = member.offset + member.size
        return Path(f"subfile,,start,{member.offset},end,{end},,:{self.path.absolute()}")

    def read_frame(self, member: Member) -> Bytes:
        """Read an image, as `read_encoded` does. Raises UnreadableFrameError."""
        try:
            with self.path.open("rb") as file:
                file.seek(member.offset)
                content = file.read(member.size)
        except OSError as error:
            raise UnreadableFrameError(os_reason(error)) from error
        return as_intact(content)

    def read_through(self) -> None:
        """Read the members once, to find out whether the disk fails. Raises OSError."""
        with naming(self.path), self.path.open("rb") as file:
            for member in self.members:
                for _ in _chunks(file, member):
                    pass


@dataclass(frozen=True)
class TarFiles(SourceFiles):
    """The videos of tars by name, in the order of the tars and of their first members."""

    tars: dict[str, TarVideo] = field(default_factory=dict)


class _Tar(NamedTuple):
    """The members of a tar by path, as its headers tell them, and its problem, if it has one."""

    label: str
    """The path of the tar relative to the folder that contains all tars."""
    path: Path
    is_compressed: bool
    members: dict[str, Member]
    others: list[str]
    """Links and special files."""
    problem: str | None


def find_packable(source: Path, destination: Path, *, kind: Kind = "auto", workers: int = 1) -> SourceFiles:
    """List the videos of any source that can be packed: tars, or what `find_source` finds.

    Tars are a tar, a folder of tars, a pattern such as `train-{000000..000009}.tar`, or a text file with a
    tar or a pattern per line. In a folder with video files or images, tars count as files left out. Raises
    InputError.
    """
    left_out: LeftOut = {}
    tars = _listed_tars(source)
    if tars is None:
        files = find_source(source, kind=kind)
        if files.urls:
            raise InputError(
                f"{str(source)!r} lists URLs, but only files of this machine are packed. Copy or mount the "
                "folders, and list their paths."
            )
        if files.folders or files.videos or not source.is_dir():
            return files
        tars = _tars_below(source, destination)
        if not tars:
            return files
        left_out = {suffix: count for suffix, count in files.left_out.items() if suffix not in _SUFFIXES}
    if any(tar.resolve().parent == destination.resolve() for tar in tars):
        raise InputError(f"{str(destination)!r} contains the tar files of SOURCE. Use another DESTINATION.")
    root = Path(os.path.commonpath([tar.parent.absolute() for tar in tars]))
    labels = [tar.absolute().relative_to(root).as_posix() for tar in tars]
    read = []
    with Progress("tar files", len(tars)) as progress:
        for tar in map_ahead(_read_headers, zip(labels, tars, strict=True), workers=workers):
            read.append(tar)
            progress.advance()
    return _group(read, kind, left_out, source)


# --- finding tars ---

_SUFFIXES = frozenset({".tar", ".gz", ".tgz"})


def _listed_tars(source: Path) -> list[Path] | None:
    """Return the tars that a path, a pattern or a text file names; None if it is another kind of source."""
    if is_tar(source.name) and not source.is_dir():
        tars = [source] if source.exists() else _expand(str(source))
    elif source.is_file() and _lists_tars(source):
        lines = [line for line in read_lines(source) if not line.startswith("# ")]
        tars = [tar for line in lines for tar in _expand(str(source.parent / os.path.expanduser(line)))]
    else:
        return None
    if missing := [tar for tar in tars if not tar.exists()]:
        raise InputError(
            f"{str(missing[0])!r} does not exist (missing tar files: {len(missing)} of {len(tars)}). "
            "Expected a tar file, or a pattern of tar files that all exist, such as {000..009}.tar."
        )
    return list(dict.fromkeys(tars))


def _lists_tars(path: Path) -> bool:
    """Whether the first entry of a text file is the path of a tar."""
    with path.open("rb") as file:
        lines = file.read(2**12).decode("utf-8-sig", "replace").split("\n")
    return is_tar(next((line.strip() for line in lines if line.strip() and not line.startswith("# ")), ""))


def _expand(pattern: str) -> list[Path]:
    """Expand ranges such as {000000..000009}, as webdataset and shells do."""
    match = _RANGE.search(pattern)
    if match is None:
        return [Path(pattern)]
    numbers = range(int(match[1]), int(match[2]) + 1)
    texts = [f"{number:0{len(match[1])}d}" for number in numbers]
    return [
        tar for text in texts for tar in _expand(pattern[: match.start()] + text + pattern[match.end() :])
    ]


def _tars_below(root: Path, destination: Path) -> list[Path]:
    """Return all tars below a folder in order of their paths, but for those of the packed set itself."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if is_tar(name) and not name.startswith(".")]
    if root.resolve() != destination.resolve():
        found = [tar for tar in found if tar.parent.resolve() != destination.resolve()]
    return sorted(found)


# --- reading headers ---


def _read_headers(labelled: tuple[str, Path]) -> _Tar:
    """Read the headers of a tar. If it is damaged, the members before the damage are listed.

    Raises OSError if the disk fails.
    """
    label, path = labelled
    members: dict[str, Member] = {}
    others: list[str] = []
    is_compressed, problem = False, None
    try:
        with path.open("rb") as raw:
            is_compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_compressed else raw
            for member in _iterate(file):
                parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
                if member.isdir() or not parts or any(part.startswith(".") for part in parts):
                    continue
                name = "/".join(parts)
                if member.isreg() and not member.issparse():
                    members[name] = Member(parts[-1], member.offset_data, member.size)
                else:
                    others.append(name)
    except OSError as error:
        # gzip raises an OSError without a number for damaged data. A header may claim an impossible size.
        if error.errno not in (None, errno.EINVAL):
            with naming(path):
                raise
        problem = os_reason(error)
    # For damaged tars, tarfile and zlib raise exceptions of many types.
    except Exception as error:
        problem = str(error) or type(error).__name__
    if problem is not None:
        problem = f"damaged tar file ({problem}); members read: {len(members)}"
    return _Tar(label, path, is_compressed, members, others, problem)


def _iterate(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members whose data are complete. Raises exceptions of many types if the tar is damaged."""
    with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar:
        while member := tar.next():
            # Older versions of Python would read the same headers again and again.
            if member.size < 0:
                raise tarfile.ReadError("a member has a negative size")
            if member.size and not member.issparse() and member.isreg():
                end = member.offset_data + member.size
                file.seek(end - 1)
                if not file.read(1):
                    raise tarfile.ReadError("unexpected end of data")
            yield member
            # tarfile would keep the headers of all members in memory.
            tar.members.clear()  # type: ignore[attr-defined]
        # tarfile takes any damaged header but the first for the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
        # The checksum of gzip is at its end.
        while isinstance(file, gzip.GzipFile) and file.read(CHUNK):
            pass


# --- grouping members into videos ---


def _group(tars: list[_Tar], kind: Kind, left_out: LeftOut, source: Path) -> TarFiles:
    """Group the members of tars into videos."""
    grouped = TarFiles(left_out=left_out)
    videos = [(tar, *video) for tar in tars for video in _videos(tar, kind, grouped)]
    files = [f"{tar.label}/{name}" for tar, name, _, is_frames in videos if not is_frames]
    frames = [name for _, name, _, is_frames in videos if is_frames]
    # As in folders, images below Annotations, for example, count as frames only if all images are there.
    if not all(map(annotation_word, frames)):
        for tar, name, members, is_frames in videos:
            if is_frames and (word := annotation_word(name)):
                label = f"{tar.label}/{name}"
                grouped.leave_out(f"images below {word}", label, [member.name for member in members])
        videos = [video for video in videos if not (video[3] and annotation_word(video[1]))]
    if files and frames:
        first = next(f"{tar.label}/{name}" for tar, name, _, is_frames in videos if is_frames)
        raise InputError(
            f"{str(source)!r} contains both images (first: {first}) and video files (first: {files[0]}). "
            "Choose one: --kind folders or --kind videos."
        )
    # Keys often begin anew in every tar.
    is_ambiguous = any(count > 1 for count in Counter(name for _, name, *_ in videos).values())
    replaced = {os.path.basename(name) for _, name, *_ in videos if REPLACEMENTS in name.split("/")}
    for tar, name, members, is_frames in videos:
        if os.path.basename(name) in replaced and REPLACEMENTS not in name.split("/"):
            grouped.leave_out("replaced", tar.label, [name])
            continue
        if is_ambiguous:
            name = f"{_without_suffix(tar.label)}/{name}"
        if name in grouped.tars:
            grouped.skipped.append((name, "several videos have this name"))
            continue
        grouped.tars[name] = TarVideo(name, tar.path, members, is_frames, tar.is_compressed)
    return grouped


def _videos(tar: _Tar, kind: Kind, grouped: TarFiles) -> list[tuple[str, tuple[Member, ...], bool]]:
    """Return name, members and whether they are frames of each video in a tar, in order of first members."""
    if tar.problem:
        grouped.skipped.append((tar.label, tar.problem))
    grouped.leave_out("links or special files", tar.label, tar.others)
    # The names of the images by key (the path up to the first dot of the name), and of others by suffix.
    images: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    found: list[tuple[str, tuple[Member, ...], bool]] = []
    accompanied = set()
    for name, member in tar.members.items():
        suffix, key = file_suffix(name), _key(name)
        if suffix in IMAGE_SUFFIXES and kind != "videos":
            images.setdefault(key, []).append(name)
            continue
        accompanied.add(key)
        if suffix in VIDEO_SUFFIXES and kind != "folders":
            found.append((name, (member,), False))
        else:
            others.setdefault(suffix or "without suffix", []).append(name)
    for suffix, names in others.items():
        grouped.leave_out(suffix, tar.label, names)
    folders: dict[str, list[str]] = {}
    for key, names in images.items():
        if sum(_NUMBERED.search(name) is not None for name in names) > 1:
            folders.setdefault(key, []).extend(names)
        # An image with a text or a label is a sample, and a thumbnail belongs to a video.
        elif key in accompanied:
            grouped.leave_out("single images with a text, a label or a video", tar.label, names)
        else:
            folder = os.path.dirname(names[0]) or os.path.basename(_without_suffix(tar.label))
            folders.setdefault(folder, []).extend(names)
    for folder, names in folders.items():
        by_name = {os.path.basename(name): tar.members[name] for name in names}
        scratch = SourceFiles(left_out=grouped.left_out)
        label = f"{tar.label}/{folder}"
        if reason := add_frames(scratch, folder, tar.path, label, list(by_name), {}):
            grouped.skipped.append((label, reason))
        else:
            found.append((folder, tuple(by_name[name] for name in scratch.folders[folder][1]), True))
    return sorted(found, key=lambda video: min(member.offset for member in video[1]))


def _key(name: str) -> str:
    """Return the key of a member in a WebDataset: its path up to the first dot of its name."""
    folder, file = os.path.split(name)
    return os.path.join(folder, file.split(".")[0])


def _without_suffix(label: str) -> str:
    return next(label[: -len(suffix)] for suffix in TAR_SUFFIXES if label.lower().endswith(suffix))


# --- reading compressed tars ---


def uncompressed(videos: Iterable[TarVideo], folder: Path) -> Iterator[TarVideo]:
    """Yield the videos in a form that can be read by byte range, in their order.

    Those of compressed tars are copied to files in `folder`, one per video, which the caller deletes. Raises
    InputError if a tar has changed since its headers were read.
    """
    numbers = itertools.count()
    for (path, is_compressed), group in itertools.groupby(videos, lambda it: (it.path, it.is_compressed)):
        if not is_compressed:
            yield from group
            continue
        with gzip.open(path) as stream:
            for video in group:
                try:
                    yield _copy(video, cast(BinaryIO, stream), folder / str(next(numbers)))
                except (EOFError, gzip.BadGzipFile, zlib.error):
                    raise InputError(f"{str(path)!r} has changed. Run the same command again.") from None


def _copy(video: TarVideo, stream: BinaryIO, path: Path) -> TarVideo:
    """Copy the members of a video from a decompressed stream to a file."""
    copies: dict[Member, Member] = {}
    with path.open("xb") as file, naming(path):
        for member in sorted(video.members, key=lambda member: member.offset):
            copies[member] = member._replace(offset=file.tell())
            for chunk in _chunks(stream, member):
                file.write(chunk)
            if file.tell() < copies[member].offset + member.size:
                raise EOFError
    return replace(video, path=path, members=tuple(copies[member] for member in video.members))


def _chunks(file: BinaryIO, member: Member) -> Iterator[bytes]:
    """Yield the bytes of a member, fewer if the file ends before."""
    file.seek(member.offset)
    for start in range(0, member.size, CHUNK):
        yield file.read(min(CHUNK, member.size - start))
