"""Index a data source: frame folders, a frame list, video files or a packed set.

The index lists the videos in a stable order and records the skipped ones. This module does not import DALI,
because evaluation also uses it.
"""

from __future__ import annotations

import csv
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from fasttrain.data.images import IMAGE_SUFFIXES, UnreadableFrameError
from fasttrain.data.index import (
    FolderIndex,
    FrameFolders,
    FrameIndex,
    LeftOut,
    ListedFile,
    RemoteFolderIndex,
    Skipped,
    VideoIndex,
)
from fasttrain.data.packed import PackedIndex, RemotePackedIndex, is_packed
from fasttrain.data.remote import READERS, RemoteFiles, version
from fasttrain.data.video import VIDEO_SUFFIXES, VideoInfo, probe_video, skipped_frames
from fasttrain.data.video_cache import FileState, file_state, read_cache, write_cache
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.files import is_url, os_reason, parse_rows, read_lines, split_lines
from fasttrain.launcher import available_cores
from fasttrain.recipe import DataRecipe

Kind = Literal["auto", "folders", "list", "videos", "packed"]

_EXPECTED = (
    "Expected a folder of frame folders (images) or video files, a text file that lists either, a video "
    "file, or a packed set. WebDataset tars must be packed first, with `fasttrain pack`."
)
_MISSING = "does not exist"
_DUPLICATE = "duplicate entry in the list"
_IS_IMAGE = "is an image; list the folder of its video instead"
# The columns of the lists of Kinetics by which they are recognised, and the folder of the archive with which
# the CVD Foundation replaces corrupted videos of Kinetics-400, which have the same names.
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
REPLACEMENTS = "replacement_for_corrupted_k400"
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_LIST_SUFFIXES = (".txt", ".csv")
_ONLY_FRAMES = (
    "only packed sets and lists of frame folders are read from URLs. Pack the videos with `fasttrain pack` "
    "and copy the packed set there, or mount or copy their folder."
)

# The number of kinds of files that are counted separately, and the number that one line names.
MAX_KINDS, MAX_LISTED = 100, 5

# Words in the names of images that are not frames, such as flow_x_00001.jpg, 1_mask.png or cover.jpg.
_NO_FRAME = re.compile(
    r"(?<![a-z])(flow|masks?|depth|disparity|seg|segmentation|annotations?|labels?|gt|thumb|thumbnail|cover|poster)"
    r"(?![a-z])"
)
_SAME_SUFFIX = {".jpeg": ".jpg", ".tiff": ".tif"}
_ALL_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)

# How video files begin: MP4 and MOV, Matroska and WebM, AVI, FLV, ASF and WMV, MPEG-1, MPEG-2, H.264 and
# HEVC, DAV, Ogg, GIF, MXF, Y4M, RealMedia, IVF, and MPEG-TS, whose packets of 188 bytes may follow time
# stamps of 4 bytes. Each packet begins with a G. The lines of a list may do so as well, but a text contains
# no zero byte.
_VIDEO_START = re.compile(
    rb"[^ -~].{3}(ftyp|moov|mdat|wide)|\x1aE\xdf\xa3|RIFF.{4}AVI |FLV\x01|0&\xb2u\x8ef\xcf\x11"
    rb"|\0?\0\0\x01[\xb3\xba\x09\x67\x40]|DHAV|OggS\0|GIF8[79]a|\x06\x0e\x2b\x34|YUV4MPEG2|\.RMF|DKIF\0"
    rb"|(?=.*\0)(.{4})?G(.{187}G.{187}G|.{191}G.{191}G)",
    re.DOTALL,
)

# Suffix in lower case -> the names of the files with it, in order.
_BySuffix = dict[str, list[str]]
# Videos of equal length usually have the same file names, so each distinct tuple is stored only once.
_SharedNames = dict[tuple[str, ...], tuple[str, ...]]
# The entries of a folder at a URL by name. That of a subfolder is None.
_Listing = dict[str, ListedFile | None]


@dataclass(frozen=True)
class SourceFiles:
    """The frame folders or video files of a source, by video name. No video has been opened yet."""

    folders: FrameFolders = field(default_factory=dict)
    videos: dict[str, Path] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=list)
    left_out: LeftOut = field(default_factory=dict)
    urls: Sequence[str] = ()
    """The lines of a list of URLs. It has neither folders nor videos."""

    def leave_out(self, kind: str, folder: str, names: Sequence[str]) -> None:
        """Count files of a folder, all of one kind, that are neither taken nor skipped with a reason."""
        if not names:
            return
        if kind not in self.left_out and len(self.left_out) >= MAX_KINDS:
            kind = "of other kinds"
        count, first = self.left_out.get(kind, (0, posixpath.join(folder, names[0])))
        self.left_out[kind] = count + len(names), first


def open_source(
    source: str | Path,
    *,
    kind: Kind = "auto",
    world: World | None = None,
    cache_size: float = DataRecipe.cache_size,
) -> FrameIndex:
    """Index the videos of a source.

    The kinds of sources are:

    - folders: frame folders (folders of images) at any depth. The frames are the images whose names differ in
      digits only, in the order of these numbers. See `docs/data.md` for folders with other images.
    - list: a text file with one frame folder or video file per line, as an absolute path or relative to the
      text file. A number after a frame folder limits the frames used; a number after a video file is ignored,
      because lists of labelled videos put the label there. A list of Kinetics selects the videos below its
      folder. Frame folders, but not video files, may be at URLs, as may their list.
    - videos: a folder of video files at any depth, or a single video file.
    - packed: a packed set written by `fasttrain pack`. It may be at a URL.
    - auto: detect the kind. At a URL, `.txt` and `.csv` are lists, and all others packed sets.

    fsspec opens the URLs, and a local cache of at most `cache_size` GiB keeps their frames. The index counts
    all other visible files in `left_out`. The processes of `world` divide the scan of the video files, and of
    the folders at URLs, among themselves, and all return the same index. Raises InputError if the source does
    not exist, is not of this kind or has no readable video.
    """
    if isinstance(source, str) and is_url(source):
        return _open_url(source, kind, world or World.single(), cache_size)
    path = Path(os.path.expanduser(source))
    if kind == "packed" or (kind == "auto" and is_packed(path)):
        return PackedIndex(path)
    files = find_source(path, kind=kind)
    if files.urls:
        return _open_list(str(source), "", files.urls, world or World.single(), cache_size)
    if files.videos:
        index: FrameIndex = _scan_videos(path, files, world or World.single())
    else:
        index = FolderIndex(files.folders, files.skipped, files.left_out)
    _refuse_empty(str(source), index)
    return index


def _refuse_empty(source: str, index: FrameIndex) -> None:
    if not len(index):
        raise InputError(f"{source!r} {describe_unreadable(index.skipped, index.left_out)}. {_EXPECTED}")


def _open_url(url: str, kind: Kind, world: World, cache_size: float) -> FrameIndex:
    """Index the packed set, or the list of frame folders, at a URL."""
    if kind == "list" or (kind == "auto" and url.endswith(_LIST_SUFFIXES)):
        content = world.run_on_all(lambda: RemoteFiles(url).read())
        try:
            lines = split_lines(content)
        except UnicodeDecodeError as error:
            raise InputError(f"{url!r} is not a text in UTF-8 ({error.reason}); expected a list") from None
        if _is_kinetics(lines):
            raise InputError(f"{url!r} is a list of Kinetics: {_ONLY_FRAMES}")
        return _open_list(url, posixpath.dirname(url), lines, world, cache_size)
    if kind not in ("auto", "packed") or file_suffix(url) in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        raise InputError(f"{url!r}: {_ONLY_FRAMES}")
    return RemotePackedIndex(url, cache_size)


def describe_unreadable(skipped: Skipped, left_out: LeftOut) -> str:
    """Say that a source contains no readable video, and what it contains instead."""
    found = [f"{len(skipped)} skipped, first {name}: {reason}" for name, reason in skipped[:1]]
    found += [describe_left_out(left_out)] if left_out else []
    return "contains no readable video" + (f" ({'; '.join(found)})" if found else "")


def describe_left_out(left_out: LeftOut) -> str:
    """Say how many files of a source were left out, by kind, and name the first of each kind."""
    kinds = sorted(left_out.items(), key=lambda item: -item[1][0])
    listed = [f"{count} {kind} (first {first})" for kind, (count, first) in kinds[:MAX_LISTED]]
    others = sum(count for _, (count, _) in kinds[MAX_LISTED:])
    listed += [f"{others} others"] if others else []
    return f"files left out: {sum(count for count, _ in left_out.values())}, of which {', '.join(listed)}"


def find_source(path: Path, *, kind: Kind = "auto") -> SourceFiles:
    """List the frame folders or video files of a source without opening them.

    Raises InputError if the source does not exist or is not of this kind.
    """
    if not path.exists():
        raise InputError(f"{str(path)!r} does not exist. {_EXPECTED}")
    if path.is_dir():
        return _search_folder(path, kind)
    if is_tar(path.name):
        raise InputError(
            f"{str(path)!r} is a tar file. Pack it first with `fasttrain pack {path} DESTINATION`, and pass "
            "DESTINATION instead."
        )
    is_video = file_suffix(path.name) in VIDEO_SUFFIXES or _starts_as_video(path)
    if kind == "videos" or (kind == "auto" and is_video):
        return SourceFiles(videos={path.name: path})
    if kind == "folders":
        raise InputError(
            f"{str(path)!r} is a file, but the kind is 'folders'. Pass a folder, or another kind."
        )
    if is_video:
        raise InputError(
            f"{str(path)!r} is a video file, but the kind is 'list'. Pass a text file, or another kind."
        )
    if file_suffix(path.name) in IMAGE_SUFFIXES:
        raise InputError(f"{str(path)!r} is an image. Pass the folder of a video's frames, or of several.")
    lines = read_lines(path, "a video file or a text file that lists frame folders or video files")
    return _read_kinetics(path, lines) if _is_kinetics(lines) else _read_list(path, lines)


def _search_folder(root: Path, kind: Kind) -> SourceFiles:
    """Find all frame folders and video files below `root`. Their names are their paths relative to it."""
    if kind == "list":
        raise InputError(
            f"{str(root)!r} is a folder, but the kind is 'list'. Pass a text file, or another kind."
        )
    source = SourceFiles()
    shared_names: _SharedNames = {}
    first_image = ""
    # Images below a folder such as Annotations. They are frames only if the source has no others.
    set_aside: list[tuple[str, str, Path, str, list[str]]] = []

    def visit(folder: Path, relative: str, ancestors: frozenset[tuple[int, int]]) -> None:
        nonlocal first_image
        name = relative or root.resolve().name
        try:
            status = folder.stat()
            subfolders, files = _list_folder(folder)
        except OSError as error:
            source.skipped.append((name, os_reason(error)))
            return
        identity = (status.st_dev, status.st_ino)
        # A symbolic link to an ancestor would lead to infinite recursion.
        if identity in ancestors:
            return
        images = _take_images(files) if kind != "videos" else []
        if images:
            first_image = first_image or posixpath.join(relative, images[0])
            if word := annotation_word(relative):
                set_aside.append((word, name, folder, relative, images))
            elif reason := add_frames(source, name, folder, relative, images, shared_names):
                source.skipped.append((name, reason))
        # Each folder of a large set of frames may contain a file without a suffix. These are not opened.
        opened = kind == "videos" or (kind == "auto" and not images)
        for suffix, names in files.items():
            videos: list[str] = []
            if suffix in VIDEO_SUFFIXES and kind != "folders":
                videos, names = names, []
            elif not suffix and opened:
                videos = [file for file in names if _starts_as_video(folder / file)]
                names = sorted(set(names) - set(videos))
            source.videos.update((posixpath.join(relative, file), folder / file) for file in videos)
            source.leave_out(suffix or "without suffix", relative, names)
        for subfolder in subfolders:
            visit(folder / subfolder, posixpath.join(relative, subfolder), ancestors | {identity})

    visit(root, "", frozenset())
    has_frames = bool(source.folders)
    for word, name, folder, relative, images in set_aside:
        if has_frames:
            source.leave_out(f"images below {word}", relative, images)
        elif reason := add_frames(source, name, folder, relative, images, shared_names):
            source.skipped.append((name, reason))
    if first_image and source.videos:
        raise InputError(
            f"{str(root)!r} contains both images (first: {first_image}) and video files (first: "
            f"{next(iter(source.videos))}). Move one kind to another folder, or choose: data.kind=folders or "
            "data.kind=videos in training, --kind folders or --kind videos in pack."
        )
    return source


def file_suffix(name: str) -> str:
    """Return the suffix of a file name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def is_tar(name: str) -> bool:
    """Whether the name of a file is that of a tar that `fasttrain pack` reads."""
    return name.lower().endswith(TAR_SUFFIXES)


def annotation_word(relative: str) -> str | None:
    """Return the first folder of a path whose images are usually not frames, such as Annotations."""
    return next((part for part in relative.split("/") if _NO_FRAME.fullmatch(part.lower())), None)


def _starts_as_video(path: Path) -> bool:
    """Whether a file without a known suffix begins like a video file."""
    # Opening a named pipe would wait for its writer.
    if not path.is_file():
        return False
    try:
        with path.open("rb", buffering=0) as file:
            return _VIDEO_START.match(file.read(512)) is not None
    except OSError:
        return False


def _list_folder(folder: Path) -> tuple[list[str], _BySuffix]:
    """List the subfolders and the files of a folder, sorted by name, without hidden ones. Raises OSError."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), _by_suffix(files)


def _by_suffix(files: Iterable[str]) -> _BySuffix:
    by_suffix: _BySuffix = {}
    for name in sorted(files):
        by_suffix.setdefault(file_suffix(name), []).append(name)
    return by_suffix


def _take_images(files: _BySuffix) -> list[str]:
    """Remove the images from the files of a folder and return them."""
    return [name for suffix in sorted(IMAGE_SUFFIXES & files.keys()) for name in files.pop(suffix)]


def add_frames(
    source: SourceFiles,
    name: str,
    folder: Path,
    relative: str,
    images: Sequence[str],
    shared_names: _SharedNames,
    limit: int | None = None,
) -> str | None:
    """Add the first `limit` frames among the images of a folder. Returns a reason if it is skipped.

    Frames are the images of one pattern: their names differ only in digits, in case and in the spelling of
    the suffix. The pattern must have more than half of the images, without those whose names say that they
    are none.
    """
    # Names of one form have equally many digits in every number.
    forms: dict[bytes, list[str]] = {}
    for image in images:
        form = image.encode("utf-8", "surrogateescape").translate(_ALL_ZEROS)
        forms.setdefault(form, []).append(image)
    patterns: dict[str, list[list[str]]] = {}
    for same in forms.values():
        stem, suffix = os.path.splitext(same[0])
        suffix = _SAME_SUFFIX.get(suffix.lower(), suffix)
        patterns.setdefault((re.sub("[0-9]+", "*", stem) + suffix).lower(), []).append(same)
    counts = {pattern: sum(map(len, groups)) for pattern, groups in patterns.items()}
    eligible = [pattern for pattern in counts if not _NO_FRAME.search(pattern)] or list(counts)
    pattern = max(eligible, key=lambda pattern: counts[pattern])
    is_majority = 2 * counts[pattern] > sum(counts[pattern] for pattern in eligible)
    # A lone image beside a sequence is not the video, whatever the words in the names of the sequence.
    if not is_majority or counts[pattern] == 1 < max(counts.values()):
        most = sorted(counts, key=lambda pattern: -counts[pattern])
        listed = ", ".join(f"{counts[pattern]} {pattern}" for pattern in most[:MAX_LISTED])
        return (
            "contains several kinds of images, and it is not clear which are the frames: "
            f"{listed}{', ...' if most[MAX_LISTED:] else ''}. Move all but the frames to another folder, or "
            "number the frames"
        )
    groups = patterns.pop(pattern)
    # Names of one form are already in natural order; otherwise frame9 must precede frame10.
    frames = tuple(groups[0] if len(groups) == 1 else sorted(chain(*groups), key=_natural_key))
    if limit is not None and not 0 < limit <= len(frames):
        return f"the list specifies {limit} frames, but the folder contains {len(frames)}"
    for other, groups in patterns.items():
        source.leave_out(other, relative, list(chain(*groups)))
    frames = frames[:limit]
    source.folders[name] = folder, shared_names.setdefault(frames, frames)
    return None


def _natural_key(name: str) -> list[str | int]:
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _is_kinetics(lines: Sequence[str]) -> bool:
    return bool(lines) and set(KINETICS_COLUMNS) <= set(lines[0].replace('"', "").split(","))


def kinetics_rows(path: Path, lines: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a published list of Kinetics by column. Raises InputError."""
    try:
        return list(csv.DictReader(lines))
    except csv.Error as error:
        raise InputError(f"{str(path)!r} is not a valid CSV file ({error})") from None


def kinetics_clip(row: Mapping[str, str]) -> str:
    """Return the file name of a clip of Kinetics, without the suffix, from its row of a published list.

    Raises LookupError, TypeError or ValueError if the row is malformed.
    """
    start, end = int(row["time_start"]), int(row["time_end"])
    return f"{row['youtube_id']}_{start:06d}_{end:06d}"


def _read_kinetics(path: Path, lines: Sequence[str]) -> SourceFiles:
    """Read a list of Kinetics. Its videos or frame folders are at any depth below the folder of the list.

    If this is `annotations`, as in the published copies, they are below the folder above it.
    """
    folder = path.absolute().parent
    root = folder.parent if folder.name == "annotations" else folder
    files = _search_folder(root, "auto")
    stored: dict[str, str] = {}
    for name in sorted(files.folders or files.videos):
        clip = posixpath.basename(name) if files.folders else Path(name).stem
        if clip not in stored or REPLACEMENTS in name.split("/"):
            stored[clip] = name
    clips = parse_rows(
        path, kinetics_rows(path, lines), kinetics_clip, f"the columns {', '.join(KINETICS_COLUMNS)}"
    )
    listed = dict.fromkeys(stored[clip] for clip in clips if clip in stored)
    missing = [clip for clip in clips if clip not in stored]
    if not listed:
        raise InputError(
            f"{str(path)!r} is a list of Kinetics, but none of its videos is below {str(root)!r} (listed: "
            f"{len(clips)}{f', first: {missing[0]}.mp4' if missing else ''}). Move the list to the folder of "
            "the videos, or to a folder `annotations` in it."
        )
    if missing:
        reason = (
            f"lists videos that do not exist below {str(root)!r}: {len(missing)} of {len(clips)}, such as "
        )
        files.skipped.append((path.name, f"{reason}{missing[0]}.mp4"))
    if files.folders:
        return SourceFiles(folders={name: files.folders[name] for name in listed}, skipped=files.skipped)
    return SourceFiles(videos={name: files.videos[name] for name in listed}, skipped=files.skipped)


def _split_line(line: str, exists: Callable[[str], bool]) -> tuple[str, int | None]:
    """Split a line of a list into a path and the number of frames to use, if it has one.

    Any path may contain spaces and commas, so the longest one that exists counts.
    """
    for path, limit in _splits(line):
        if exists(path):
            return path, limit
    # No path exists. Name the one that is most likely meant.
    return (match[1] if (match := re.fullmatch(r"(.*\S)\s+\d{1,9}", line)) else line), None


def _splits(line: str) -> Iterator[tuple[str, int | None]]:
    """Yield the ways to split a line of a list, the longest path first.

    The lists of MMAction2 have the columns `path label`, or `path frames label` for frame folders; those of
    others, `path,label`.
    """
    path, numbers = line, list[int]()
    while True:
        yield path, numbers[-1] if numbers else None
        # int() refuses numbers of thousands of digits, and no video has a billion frames.
        if match := re.fullmatch(r"(.*\S)\s+(\d{1,9})", path):
            numbers.append(int(match[2]))
        elif not (match := re.fullmatch(r"(.*\S)\s*,[^,]*", path)):
            return
        path = match[1]


def _is_comment(line: str) -> bool:
    # Only "# " starts a comment, because names in HMDB51 may start with "#".
    return line.startswith("# ")


def _read_list(path: Path, lines: Sequence[str]) -> SourceFiles:
    """Read a list of frame folders or video files. A path may contain spaces, and numbers may follow it."""
    source = SourceFiles()
    shared_names: _SharedNames = {}
    lines = [line for line in lines if not _is_comment(line)]
    if urls := [line for line in lines if is_url(line)]:
        if len(urls) < len(lines):
            raise InputError(
                f"{str(path)!r} lists both URLs (first: {urls[0][:100]!r}) and paths. Copy or mount the "
                "folders at URLs, or split the list into two."
            )
        return SourceFiles(urls=urls)
    for line in lines:
        # os.path.exists returns False for a name that is too long; Path.exists raises.
        name, limit = _split_line(line, lambda name: os.path.exists(path.parent / name))
        # Normalise ./video and video/ to video.
        name = Path(name).as_posix()
        reason = _add_listed(source, name, path.parent / name, shared_names, limit)
        if reason:
            source.skipped.append((name, reason))
    _refuse_missing(str(path), source)
    if source.folders and source.videos:
        raise InputError(f"{str(path)!r} lists both frame folders and video files. Split it into two lists.")
    return source


def _refuse_missing(location: str, source: SourceFiles) -> None:
    missing = sum(reason == _MISSING for _, reason in source.skipped)
    if missing and missing == len(source.skipped) and not source.folders and not source.videos:
        raise InputError(
            f"{location!r} was read as a list of frame folders or video files, but no line is an existing "
            f"path, absolute or relative to the list (lines: {missing}, first: "
            f"{source.skipped[0][0][:100]!r}). Correct the paths, or pass another source. {_EXPECTED}"
        )


def _add_listed(
    source: SourceFiles, name: str, path: Path, shared_names: _SharedNames, limit: int | None
) -> str | None:
    """Add a video file, or the first `limit` frames of a frame folder. Returns a reason if it is skipped."""
    if name in source.folders or name in source.videos:
        return _DUPLICATE
    if not os.path.exists(path):
        return _MISSING
    if not os.path.isdir(path):
        if file_suffix(name) in IMAGE_SUFFIXES:
            return _IS_IMAGE
        if is_tar(name):
            return "is a tar file; pack it first, or list only tar files and pack the list"
        source.videos[name] = path
        return None
    try:
        _, files = _list_folder(path)
    except OSError as error:
        return os_reason(error)
    return _add_folder(source, name, path, files, shared_names, limit)


def _add_folder(
    source: SourceFiles,
    name: str,
    path: Path,
    files: _BySuffix,
    shared_names: _SharedNames,
    limit: int | None,
) -> str | None:
    """Add the first `limit` frames of a listed folder with these files. Returns a reason if it is skipped."""
    images = _take_images(files)
    if not images:
        return "contains no images; to list its video files, give the path of each"
    reason = add_frames(source, name, path, name, images, shared_names, limit)
    if not reason:
        for suffix, names in files.items():
            source.leave_out(suffix or "without suffix", name, names)
    return reason


def _open_list(
    source: str, base: str, lines: Sequence[str], world: World, cache_size: float
) -> RemoteFolderIndex:
    """Index a list of frame folders at URLs. `base` is the URL to which other lines are relative."""
    lines = [line for line in lines if not _is_comment(line)]
    urls = {path: _join(base, path) for line in lines for path, _ in _splits(line)}
    # The folders that contain the listed ones tell which exist, in few requests.
    parents = _list_urls({posixpath.dirname(url) for url in urls.values()}, world)

    def entries_beside(path: str) -> _Listing:
        return parents[posixpath.dirname(urls[path])] or {}

    def exists(path: str) -> bool:
        return posixpath.basename(urls[path]) in entries_beside(path)

    listed = [_split_line(line, exists) for line in lines]
    folders = {
        urls[path]
        for path, _ in listed
        if exists(path) and entries_beside(path)[posixpath.basename(urls[path])] is None
    }
    listings = _list_urls(folders, world)
    found = SourceFiles()
    shared_names: _SharedNames = {}
    frames: dict[str, tuple[str, dict[str, ListedFile]]] = {}
    for path, limit in listed:
        url, name = urls[path], path.rstrip("/") if is_url(path) else Path(path).as_posix()
        files = {file: state for file, state in (listings.get(url) or {}).items() if state is not None}
        by_suffix = _by_suffix(file for file in files if not file.startswith("."))
        if name in frames:
            reason: str | None = _DUPLICATE
        elif not exists(path):
            reason = _MISSING
        elif url not in listings and file_suffix(url) in IMAGE_SUFFIXES:
            reason = _IS_IMAGE
        elif url not in listings or (
            VIDEO_SUFFIXES & by_suffix.keys() and not IMAGE_SUFFIXES & by_suffix.keys()
        ):
            raise InputError(f"{source!r} lists {path[:100]!r}: {_ONLY_FRAMES}")
        else:
            reason = _add_folder(found, name, Path(name), by_suffix, shared_names, limit)
        if reason:
            found.skipped.append((name, reason))
        else:
            frames[name] = url, {file: files[file] for file in found.folders[name][1]}
    _refuse_missing(source, found)
    index = RemoteFolderIndex(frames, found.skipped, found.left_out, cache_size=cache_size)
    _refuse_empty(source, index)
    return index


def _join(base: str, path: str) -> str:
    """Return the URL of a path relative to the URL `base`, or of a URL, without `.` and `..`."""
    scheme, _, rest = (path if is_url(path) else f"{base}/{path}").partition("://")
    return f"{scheme}://{posixpath.normpath(rest)}"


def _list_urls(urls: Iterable[str], world: World) -> dict[str, _Listing | None]:
    """List folders at URLs, in parallel. The listing of a folder that does not exist is None."""
    share = world.shard(sorted(urls))

    def listing(files: RemoteFiles) -> _Listing | None:
        entries = files.entries()
        if entries is None:
            return None
        return {
            name: None if entry["type"] == "directory" else (entry.get("size"), version(entry))
            for name, entry in entries.items()
        }

    def list_share() -> dict[str, _Listing | None]:
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(share, pool.map(listing, map(RemoteFiles, share)), strict=True))

    return world.merge(world.run_on_all(list_share))


def _scan_videos(path: Path, source: SourceFiles, world: World) -> VideoIndex:
    """Scan all video files that are not in the cache, in parallel. Unreadable files are skipped."""
    cached = read_cache(path)

    def scan(name: str) -> tuple[FileState, VideoInfo] | str:
        video = source.videos[name]
        try:
            state = file_state(video)
            cached_state, info = cached.get(name, (None, None))
            if info and cached_state == state:
                return state, replace(info, path=video)
            return state, probe_video(video)
        except OSError as error:
            return os_reason(error)
        except UnreadableFrameError as error:
            return str(error)

    share = world.shard(list(source.videos))
    with ThreadPoolExecutor(max_workers=min(32, available_cores() * 2)) as pool:
        scanned = dict(zip(share, pool.map(scan, share), strict=True))
    scanned = world.merge(scanned)
    readable = {name: result for name, result in scanned.items() if not isinstance(result, str)}
    changed = any(cached.get(name, (None,))[0] != state for name, (state, _) in readable.items())
    if world.is_main and changed:
        write_cache(path, readable)
    unreadable = [(name, reason) for name, reason in scanned.items() if isinstance(reason, str)]
    videos = {name: info for name, (_, info) in readable.items()}
    cut = [entry for name, info in videos.items() for entry in skipped_frames(name, info)]
    return VideoIndex(videos, source.skipped + unreadable + cut, source.left_out)
