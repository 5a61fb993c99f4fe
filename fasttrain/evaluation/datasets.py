"""Where published data sets keep their lists, labels and videos.

Videos with a label: training and test lists, and where their videos lie.

    ucf101    ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt     UCF-101/CLASS/NAME.avi
    hmdb51    testTrainMulti_7030_splits/CLASS_test_split1.txt           hmdb51_org/CLASS/NAME.avi
    kinetics  annotations/{train,val}.csv                                {train,val}/ID_START_END.mp4
    ssv2      labels/{labels,train,validation}.json                      20bn-something-something-v2/ID.webm
    list      --train-list and --test-list: `path label` per line        path

The lists lie in the root or in a folder of it. The videos lie anywhere below it, or in a packed set: a listed
video is the one whose path ends with the listed path. A folder of frames stands in for a video file of its
name, and so does a file with another suffix. Folders of classes may be absent, except for plain lists.

Videos with a label for every frame: Breakfast, GTEA and 50Salads as MS-TCN publishes them
(github.com/yabufarha/ms-tcn).

    mapping.txt                        NUMBER LABEL per line
    groundTruth/NAME.txt               a label per frame of the video
    splits/train.split1.bundle         NAME.txt per line; test.split1.bundle likewise
    NAME.mp4                           or as above; Breakfast also as it is published: P03/cam01/P03_tea.avi

Shape suffix: T frames.
"""

import argparse
import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fasttrain.data.index import FolderIndex, FrameIndex
from fasttrain.data.packed import PackedIndex, is_packed
from fasttrain.data.sources import find_source
from fasttrain.data.video import VIDEO_SUFFIXES
from fasttrain.errors import InputError
from fasttrain.files import read_lines

Row = TypeVar("Row")
Parsed = TypeVar("Parsed")
Labels = npt.NDArray[np.int64]

# A video file, or an index of frame folders or of a packed set and the video's number there.
StoredVideo = Path | tuple[FrameIndex, int]


@dataclass(frozen=True)
class LabelledVideo:
    """A video of a list: its name there, where it lies, and the numbers of its classes."""

    name: str
    path: StoredVideo
    labels_T: Labels
    """Of each frame, or one of the whole video."""

    @property
    def label(self) -> int:
        return int(self.labels_T[0])


@dataclass(frozen=True, kw_only=True)
class VideoSplit:
    """Training and test videos, and the classes in the order of their numbers."""

    layout: str
    classes: list[str]
    train: list[LabelledVideo]
    test: list[LabelledVideo]
    missing: list[str]
    """Listed, but not there; only with `allow_missing`."""


def add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """For videos with a label."""
    layouts = ("auto", *(layout for layout in _LAYOUTS if layout != "frames"))
    parser.add_argument(
        "--dataset", choices=layouts, default="auto", help="layout of the lists (default: look)"
    )
    parser.add_argument(
        "--split", type=int, choices=(1, 2, 3), default=1, help="of UCF101 or HMDB51 (default: 1)"
    )
    _add_list_arguments(parser, "`path label` per line, or a CSV of Kinetics or JSON of ssv2")
    parser.add_argument(
        "--allow-missing", action="store_true", help="skip listed videos that are not there, and count them"
    )


def add_frame_arguments(parser: argparse.ArgumentParser) -> None:
    """For videos with a label for every frame."""
    parser.set_defaults(dataset="frames", allow_missing=False)
    parser.add_argument("--split", default="1", help="of splits/train.splitN.bundle (default: 1)")
    _add_list_arguments(parser, "another list than splits/train.splitN.bundle")
    parser.add_argument(
        "--background", nargs="*", default=None, metavar="LABEL",
        help="labels whose segments do not count (default: `background`, as MS-TCN has it); none: count all",
    )  # fmt: skip


def _add_list_arguments(parser: argparse.ArgumentParser, lists: str) -> None:
    parser.epilog = __doc__
    parser.add_argument("--train-list", type=Path, help=lists)
    parser.add_argument("--test-list", type=Path, help="as --train-list")
    parser.add_argument(
        "--videos", type=Path, help="folder or packed set of the videos, if they are not in --root"
    )


def read_split(arguments: argparse.Namespace) -> VideoSplit:
    """The lists that the command line names, with every video found.

    Raises InputError where the layout is not known, a list is absent, empty or damaged, or a video is not
    there (all of them even with `allow_missing`).
    """
    layout = _find_layout(arguments)
    read, _ = _LAYOUTS[layout]
    classes, *lists = read(arguments)
    train_names, test_names = ({entry.name for entry in entries} for entries in lists)
    if not train_names or not test_names:
        raise InputError(f"the {'test' if train_names else 'training'} list is empty; it must name a video")
    shared = train_names & test_names
    if shared:
        raise InputError(
            f"{min(shared)} is in both lists ({len(shared)} such videos); a test video must not be trained on"
        )
    numbers = {label: number for number, label in enumerate(classes)}
    root = arguments.videos or arguments.root
    by_end = _videos_by_end(root)
    found: list[list[LabelledVideo]] = [[], []]
    missing = []
    for videos, entries in zip(found, lists, strict=True):
        for entry in entries:
            unknown = set(entry.labels) - set(numbers)
            if unknown:
                raise InputError(f"{entry.name} is of class {min(unknown)!r}; expected one of {len(classes)}")
            path = _find_video(root, entry.name, by_end) or _find_video(root, entry.alias, by_end)
            if path is None:
                missing.append(entry.name)
            else:
                labels_T = np.array([numbers[label] for label in entry.labels])
                videos.append(LabelledVideo(entry.name, path, labels_T))
    if missing and not (arguments.allow_missing and all(found)):
        raise InputError(
            f"{len(missing)} listed videos are not under {root}, or more than once, such as "
            f"{', '.join(missing[:3])}; give their folder with --videos"
            + ("" if layout == "frames" else "; or skip them with --allow-missing")
        )
    return VideoSplit(layout=layout, classes=classes, train=found[0], test=found[1], missing=missing)


def background_numbers(classes: Sequence[str], wanted: Sequence[str] | None) -> list[int]:
    """Numbers of the background labels; None means `background` where there is one."""
    if wanted is None:
        wanted = ["background"] if "background" in classes else []
    for name in wanted:
        if name not in classes:
            raise InputError(f"--background {name}: not in mapping.txt, which has {', '.join(classes)}")
    return [classes.index(name) for name in wanted]


# --- the lists ---


class _Entry(NamedTuple):
    """A video of a list: its path as it is listed, and as it may be."""

    name: str
    labels: Sequence[str]
    """Of each frame, or one of the whole video."""
    alias: str = ""


# The classes in the order of their numbers, the training list and the test list.
_Lists = tuple[list[str], list[_Entry], list[_Entry]]


def _find_layout(arguments: argparse.Namespace) -> str:
    if arguments.dataset != "auto":
        return str(arguments.dataset)
    if arguments.train_list and arguments.test_list:
        return {".csv": "kinetics", ".json": "ssv2"}.get(arguments.train_list.suffix.lower(), "list")
    found = [name for name, (_, sign) in _LAYOUTS.items() if sign and _find_lists(arguments.root, sign)]
    if len(found) != 1:
        raise InputError(
            f"{arguments.root} holds the lists of {' and '.join(found) or 'no layout that is known'}; choose "
            "with --dataset, or give --train-list and --test-list"
        )
    return found[0]


def _find_lists(root: Path, pattern: str) -> list[Path]:
    """Files of the root, or else of its folders."""
    return sorted(root.glob(pattern)) or sorted(root.glob(f"*/{pattern}"))


def _find_list(arguments: argparse.Namespace, name: str) -> Path:
    """The published list of this name."""
    found = _find_lists(arguments.root, name)
    if not found:
        raise InputError(f"no {name} in {arguments.root} or a folder of it; --root must hold the lists")
    return found[0]


def _parse(path: Path, rows: Iterable[Row], parse: Callable[[Row], Parsed], expected: str) -> list[Parsed]:
    """What every row of a list says. Raises InputError for a row that is not as expected."""
    parsed = []
    for row in rows:
        try:
            parsed.append(parse(row))
        except InputError:
            raise
        # TypeError: the fields that a short row of a CSV lacks are None.
        except (LookupError, ValueError, TypeError) as error:
            raise InputError(f"{path}: {row!r}; expected {expected}") from error
    return parsed


def _read_both(
    arguments: argparse.Namespace,
    names: tuple[str, str],
    load: Callable[[Path], Iterable[Any]],
    parse: Callable[[Any], _Entry],
    expected: str,
) -> tuple[list[_Entry], list[_Entry]]:
    """The training and the test list, those that were given or else the published ones of these names."""
    train = arguments.train_list or _find_list(arguments, names[0])
    test = arguments.test_list or _find_list(arguments, names[1])
    return _parse(train, load(train), parse, expected), _parse(test, load(test), parse, expected)


def _read_ucf(arguments: argparse.Namespace) -> _Lists:
    """`1 Archery`; `Archery/v_Archery_g08_c01.avi 1`, without the number in test lists."""

    def parse(line: str) -> _Entry:
        name = line.split()[0]
        label, file = name.split("/")
        return _Entry(name, [label], file)

    classes = [line.split()[-1] for line in read_lines(_find_list(arguments, "classInd.txt"))]
    names = f"trainlist{arguments.split:02d}.txt", f"testlist{arguments.split:02d}.txt"
    return classes, *_read_both(arguments, names, read_lines, parse, "CLASS/NAME.avi")


def _read_hmdb(arguments: argparse.Namespace) -> _Lists:
    """One file per class, `NAME.avi MARK`; 1: training, 2: test, 0: in neither."""
    if arguments.train_list or arguments.test_list:
        raise InputError("hmdb51 has a list for each class; --train-list and --test-list are for others")
    ending = f"_test_split{arguments.split}.txt"
    classes: list[str] = []
    marked: dict[str, list[_Entry]] = {"0": [], "1": [], "2": []}

    def parse(line: str) -> None:
        video, mark = line.rsplit(maxsplit=1)
        marked[mark].append(_Entry(f"{classes[-1]}/{video}", classes[-1:], video))

    for path in sorted(_find_list(arguments, f"*{ending}").parent.glob(f"*{ending}")):
        classes.append(path.name.removesuffix(ending))
        _parse(path, read_lines(path), parse, "a video and 0, 1 or 2")
    return classes, marked["1"], marked["2"]


def _read_kinetics(arguments: argparse.Namespace) -> _Lists:
    """label,youtube_id,time_start,time_end,split, with a header line."""

    def parse(row: dict[str, str]) -> _Entry:
        start, end = int(row["time_start"]), int(row["time_end"])
        file = f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
        return _Entry(f"{row['label']}/{file}", [row["label"]], file)

    names, expected = ("train.csv", "val.csv"), "the columns label, youtube_id, time_start, time_end"
    train, test = _read_both(arguments, names, lambda path: csv.DictReader(read_lines(path)), parse, expected)
    return sorted({entry.labels[0] for entry in train}), train, test


def _read_ssv2(arguments: argparse.Namespace) -> _Lists:
    """{"template": "number"}; [{"id": "1", "template": "Moving [something] up"}, ...]."""

    def load(path: Path) -> Any:
        try:
            return json.loads("\n".join(read_lines(path)))
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error})") from error

    def parse(row: dict[str, str]) -> _Entry:
        return _Entry(f"{row['id']}.webm", [re.sub(r"[\[\]]", "", row["template"])])

    numbers = load(_find_list(arguments, "labels.json"))
    expected = "objects with id and template"
    lists = _read_both(arguments, ("train.json", "validation.json"), load, parse, expected)
    return sorted(numbers, key=lambda template: int(numbers[template])), *lists


def _read_plain(arguments: argparse.Namespace) -> _Lists:
    """`path label` per line. `# ` begins a comment; names in HMDB51 begin with # and a digit."""
    if not (arguments.train_list and arguments.test_list):
        raise InputError("--dataset list needs both --train-list and --test-list: `path label` per line")

    def load(path: Path) -> list[str]:
        return [line for line in read_lines(path) if not line.startswith("# ")]

    def parse(line: str) -> _Entry:
        path, label = line.rsplit(maxsplit=1)
        return _Entry(path, [label])

    train, test = _read_both(arguments, ("", ""), load, parse, "`path label`")
    labels = {entry.labels[0] for entry in train + test}
    numbered = all(label.isdecimal() for label in labels)
    return sorted(labels, key=int if numbered else str), train, test


def _read_frames(arguments: argparse.Namespace) -> _Lists:
    """mapping.txt, groundTruth/NAME.txt and splits/*.bundle, which name the label files."""

    def parse_class(line: str) -> tuple[int, str]:
        number, name = line.split(maxsplit=1)
        return int(number), name

    def parse(line: str) -> _Entry:
        name = line.removesuffix(".txt")
        labels = read_lines(arguments.root / f"groundTruth/{name}.txt")
        return _Entry(name, labels, _breakfast_path(name))

    path = arguments.root / "mapping.txt"
    classes = _parse(path, read_lines(path), parse_class, "`NUMBER LABEL`")
    names = f"train.split{arguments.split}.bundle", f"test.split{arguments.split}.bundle"
    lists = _read_both(arguments, names, read_lines, parse, "NAME.txt")
    return [name for _, name in sorted(classes)], *lists


def _breakfast_path(name: str) -> str:
    """P03_cam01_P03_tea is P03/cam01/P03_tea.avi, and P03_stereo01_P03_tea is P03/stereo/P03_tea_ch0.avi."""
    path = name.replace("_", "/", 2)
    return re.sub(r"/stereo0([12])/(.+)", lambda match: f"/stereo/{match[2]}_ch{int(match[1]) - 1}", path)


# How each layout is read, and a list that no other has.
_LAYOUTS: dict[str, tuple[Callable[[argparse.Namespace], _Lists], str | None]] = {
    "ucf101": (_read_ucf, "classInd.txt"),
    "hmdb51": (_read_hmdb, "*_test_split1.txt"),
    "kinetics": (_read_kinetics, "train.csv"),
    "ssv2": (_read_ssv2, "labels.json"),
    "list": (_read_plain, None),
    "frames": (_read_frames, None),
}


# --- where videos lie ---


def _videos_by_end(root: Path) -> dict[str, list[StoredVideo]]:
    """The videos below a folder or of a packed set, by every end of their path: `c`, `b/c`, `a/b/c`."""
    if not root.is_dir():
        raise InputError(f"--videos {root} is not a folder; give the one that holds the videos")
    is_set = is_packed(root)
    index = PackedIndex(root) if is_set else FolderIndex(find_source(root, kind="folders").folders, [])
    found: dict[str, StoredVideo] = {name: (index, video) for video, name in enumerate(index.names)}
    if not is_set:
        found |= find_source(root, kind="videos").videos
    by_end = defaultdict(list)
    for name, stored in found.items():
        parts = _without_suffix(name).split("/")
        for start in range(len(parts)):
            by_end["/".join(parts[start:])].append(stored)
    return by_end


def _find_video(root: Path, name: str, by_end: Mapping[str, list[StoredVideo]]) -> StoredVideo | None:
    """The file of this path, absolute or from the root, or else the one video whose path ends with it."""
    path = root / name
    if path.is_file():
        return path
    found = by_end.get(_without_suffix(os.path.relpath(path, root)), [])
    return found[0] if len(found) == 1 else None


def _without_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in VIDEO_SUFFIXES else name
