"""Where published data sets keep their lists, labels and videos.

Videos with a label: training and test lists, and where their videos lie.

    ucf101    ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt     UCF-101/CLASS/NAME.avi
    hmdb51    testTrainMulti_7030_splits/CLASS_test_split1.txt           hmdb51_org/CLASS/NAME.avi
    kinetics  annotations/{train,val}.csv                                {train,val}/ID_START_END.mp4
    ssv2      labels/{labels,train,validation}.json                      20bn-something-something-v2/ID.webm
    list      --train-list and --test-list: `path label` per line        path

The lists may also lie in the root, and the videos in the root, in `videos`, or in a packed set. A folder of
frames stands in for a video file of its name, and so does a file with another suffix. Folders of classes may
be absent, except for plain lists.

Videos with a label for every frame: Breakfast, GTEA and 50Salads as MS-TCN publishes them
(github.com/yabufarha/ms-tcn).

    mapping.txt                        NUMBER LABEL per line
    groundTruth/NAME.txt               a label per frame of the video
    splits/train.split1.bundle         NAME.txt per line; test.split1.bundle likewise
    videos/NAME.mp4                    or as above; Breakfast also as it is published: P03/cam01/P03_tea.avi

Shape suffix: T frames.
"""

import argparse
import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fasttrain.data.packed import PackedIndex, is_packed
from fasttrain.data.video import VIDEO_SUFFIXES
from fasttrain.errors import InputError
from fasttrain.files import read_lines

Row = TypeVar("Row")
Parsed = TypeVar("Parsed")
Labels = npt.NDArray[np.int64]

# The published annotations differ from their videos by a few frames, not by a frame rate.
_MAX_DIFFERENCE = 0.1


@dataclass(frozen=True)
class PackedVideo:
    """A video of a packed set: the set, and the video's number there."""

    index: PackedIndex
    video: int


# A video file, a folder of frames, or a video of a packed set.
VideoPath = Path | PackedVideo


@dataclass(frozen=True)
class LabelledVideo:
    """A video of a list: its name there, where it lies, and the numbers of its classes."""

    name: str
    path: VideoPath
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
    parser.add_argument(
        "--dataset",
        choices=("auto", *(name for name in _LAYOUTS if name != "frames")),
        default="auto",
        help="layout of the lists (default: look)",
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
    name = _find_layout(arguments)
    layout = _LAYOUTS[name]
    classes, train, test = layout.read(arguments, layout.lists)
    if not train or not test:
        raise InputError(f"the {'test' if train else 'training'} list is empty; it must name a video")
    shared = {entry.name for entry in train} & {entry.name for entry in test}
    if shared:
        raise InputError(
            f"{min(shared)} is in both lists ({len(shared)} such videos); a test video must not be trained on"
        )
    numbers = {label: number for number, label in enumerate(classes)}
    finder = _VideoFinder(arguments.videos or arguments.root, layout.videos)
    missing: list[str] = []

    def locate(entries: Sequence[_Entry]) -> list[LabelledVideo]:
        found = []
        for entry in {entry.name: entry for entry in entries}.values():
            unknown = set(entry.labels) - set(numbers)
            if unknown:
                raise InputError(f"{entry.name} is of class {min(unknown)!r}; expected one of {len(classes)}")
            path = finder.find(entry.name) or (finder.find(entry.alias) if entry.alias else None)
            if path is None:
                missing.append(entry.name)
            else:
                labels_T = np.array([numbers[label] for label in entry.labels])
                found.append(LabelledVideo(entry.name, path, labels_T))
        return found

    split = VideoSplit(layout=name, classes=classes, train=locate(train), test=locate(test), missing=missing)
    if missing and not (arguments.allow_missing and split.train and split.test):
        raise InputError(
            f"{len(missing)} listed videos are not under {finder.root}, such as {', '.join(missing[:3])}; "
            "give their folder with --videos"
            + ("; or skip them with --allow-missing" if name != "frames" else "")
        )
    return split


def fit_to_frames(
    videos: Sequence[LabelledVideo], num_frames: Mapping[str, int]
) -> tuple[list[LabelledVideo], list[str]]:
    """The videos with their labels cut to their frames, and those with quite another number of labels."""
    fitting, skipped = [], []
    for video in videos:
        frames, labels = num_frames[video.name], len(video.labels_T)
        if abs(frames - labels) > _MAX_DIFFERENCE * labels:
            skipped.append(f"{video.name}: {frames} frames, but {labels} labels; expected a label per frame")
        else:
            fitting.append(replace(video, labels_T=video.labels_T[:frames]))
    return fitting, skipped


def background_numbers(classes: Sequence[str], wanted: Sequence[str] | None) -> list[int]:
    """Numbers of the background labels; None means `background` where there is one."""
    names = [name for name in ("background",) if name in classes] if wanted is None else wanted
    for name in names:
        if name not in classes:
            raise InputError(f"--background {name}: not in mapping.txt, which has {', '.join(classes)}")
    return [classes.index(name) for name in names]


# --- the layouts ---


@dataclass(frozen=True)
class _Entry:
    """A video of a list: its path relative to the folder of videos, as it is listed and as it may be."""

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
    found = [
        name
        for name, layout in _LAYOUTS.items()
        if layout.sign and _find_lists(arguments.root, layout.lists, layout.sign)
    ]
    if len(found) != 1:
        raise InputError(
            f"{arguments.root} holds {'the lists of ' + ' and '.join(found) if found else 'no lists'} that "
            "are known; choose with --dataset, or give --train-list and --test-list"
        )
    return found[0]


def _find_lists(root: Path, folder: str, pattern: str) -> list[Path]:
    """Files of the folder of lists, or else of the root."""
    return sorted((root / folder).glob(pattern)) or sorted(root.glob(pattern))


def _list_path(arguments: argparse.Namespace, folder: str, name: str, which: str = "") -> Path:
    """The list that was given as `which`, or else the published one."""
    given: Path | None = getattr(arguments, f"{which}_list", None)
    if given:
        return given
    found = _find_lists(arguments.root, folder, name)
    if not found:
        raise InputError(
            f"no {name} in {arguments.root} or its {folder}; --root must hold the lists as they are published"
        )
    return found[0]


def _parse(path: Path, rows: Iterable[Row], parse: Callable[[Row], Parsed], expected: str) -> list[Parsed]:
    """What every row of a list says. Raises InputError for a row that is not as expected."""
    parsed = []
    for row in rows:
        try:
            parsed.append(parse(row))
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: {row!r}; expected {expected}") from error
    return parsed


def _read_ucf(arguments: argparse.Namespace, folder: str) -> _Lists:
    """`1 Archery`; `Archery/v_Archery_g08_c01.avi 1`, without the number in test lists."""
    classes = [line.split()[-1] for line in read_lines(_list_path(arguments, folder, "classInd.txt"))]

    def parse(line: str) -> _Entry:
        label, name = line.split()[0].split("/")
        return _Entry(f"{label}/{name}", [label], name)

    def read(which: str) -> list[_Entry]:
        path = _list_path(arguments, folder, f"{which}list{arguments.split:02d}.txt", which)
        return _parse(path, read_lines(path), parse, "CLASS/NAME.avi")

    return classes, read("train"), read("test")


def _read_hmdb(arguments: argparse.Namespace, folder: str) -> _Lists:
    """One file per class, `NAME.avi MARK`; 1: training, 2: test, 0: in neither."""
    if arguments.train_list or arguments.test_list:
        raise InputError(
            "hmdb51 has a list for each class; with --train-list and --test-list, --dataset list"
        )
    ending = f"_test_split{arguments.split}.txt"
    _list_path(arguments, folder, f"*{ending}")
    classes: list[str] = []
    marked: dict[str, list[_Entry]] = {"0": [], "1": [], "2": []}

    def parse(line: str) -> None:
        video, mark = line.rsplit(maxsplit=1)
        marked[mark].append(_Entry(f"{classes[-1]}/{video}", classes[-1:], video))

    for path in _find_lists(arguments.root, folder, f"*{ending}"):
        classes.append(path.name.removesuffix(ending))
        _parse(path, read_lines(path), parse, "a video and 0, 1 or 2")
    return classes, marked["1"], marked["2"]


def _read_kinetics(arguments: argparse.Namespace, folder: str) -> _Lists:
    """label,youtube_id,time_start,time_end,split, with a header line."""

    def parse(row: dict[str, str]) -> _Entry:
        start, end = int(row["time_start"]), int(row["time_end"])
        file = f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
        return _Entry(f"{row['label']}/{file}", [row["label"]], file)

    def read(which: str, name: str) -> list[_Entry]:
        path = _list_path(arguments, folder, name, which)
        rows = csv.DictReader(read_lines(path))
        return _parse(path, rows, parse, "the columns label, youtube_id, time_start, time_end")

    train = read("train", "train.csv")
    return sorted({entry.labels[0] for entry in train}), train, read("test", "val.csv")


def _read_ssv2(arguments: argparse.Namespace, folder: str) -> _Lists:
    """{"template": "number"}; [{"id": "1", "template": "Moving [something] up"}, ...]."""

    def load(path: Path) -> Any:
        try:
            return json.loads("\n".join(read_lines(path)))
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error})") from error

    def parse(row: dict[str, str]) -> _Entry:
        return _Entry(f"{row['id']}.webm", [row["template"].replace("[", "").replace("]", "")])

    def read(which: str, name: str) -> list[_Entry]:
        path = _list_path(arguments, folder, name, which)
        return _parse(path, load(path), parse, "objects with id and template")

    path = _list_path(arguments, folder, "labels.json")
    numbers = load(path)
    classes = _parse(path, numbers, lambda template: (int(numbers[template]), template), "a number for each")
    return [name for _, name in sorted(classes)], read("train", "train.json"), read("test", "validation.json")


def _read_plain(arguments: argparse.Namespace, folder: str) -> _Lists:
    """`path label` per line. `# ` begins a comment; names of HMDB51 begin with # and a digit."""

    def parse(line: str) -> _Entry:
        path, label = line.rsplit(maxsplit=1)
        return _Entry(path, [label])

    def read(path: Path | None) -> list[_Entry]:
        if path is None:
            raise InputError("--dataset list needs both --train-list and --test-list: `path label` per line")
        lines = [line for line in read_lines(path) if not line.startswith("# ")]
        return _parse(path, lines, parse, "`path label`")

    train, test = read(arguments.train_list), read(arguments.test_list)
    labels = {entry.labels[0] for entry in train + test}
    numbered = all(label.isdecimal() for label in labels)
    return sorted(labels, key=int if numbered else str), train, test


def _read_frames(arguments: argparse.Namespace, folder: str) -> _Lists:
    """mapping.txt, groundTruth/NAME.txt and splits/*.bundle, which name the label files."""
    root: Path = arguments.root

    def parse(line: str) -> tuple[int, str]:
        number, name = line.split(maxsplit=1)
        return int(number), name

    def read(which: str) -> list[_Entry]:
        path = _list_path(arguments, folder, f"{which}.split{arguments.split}.bundle", which)
        # Some have a path before the name.
        names = [Path(line).name.removesuffix(".txt") for line in read_lines(path)]
        return [
            _Entry(name, read_lines(root / f"groundTruth/{name}.txt"), _breakfast_path(name))
            for name in names
        ]

    mapping = _parse(root / "mapping.txt", read_lines(root / "mapping.txt"), parse, "`NUMBER LABEL`")
    return [name for _, name in sorted(mapping)], read("train"), read("test")


def _breakfast_path(name: str) -> str:
    """P03_cam01_P03_tea is P03/cam01/P03_tea.avi, and P03_stereo01_P03_tea is P03/stereo/P03_tea_ch0.avi."""
    path = name.replace("_", "/", 2)
    return re.sub(r"/stereo0([12])/(.+)", lambda match: f"/stereo/{match[2]}_ch{int(match[1]) - 1}", path)


@dataclass(frozen=True)
class _Layout:
    """Where a data set keeps its lists and videos, and how its lists are read."""

    read: Callable[[argparse.Namespace, str], _Lists]
    lists: str = "."
    sign: str = ""
    """A list that no other layout has; none: it is not looked for."""
    videos: tuple[str, ...] = ()


_LAYOUTS = {
    "ucf101": _Layout(_read_ucf, "ucfTrainTestlist", "classInd.txt", ("UCF-101",)),
    "hmdb51": _Layout(_read_hmdb, "testTrainMulti_7030_splits", "*_test_split1.txt", ("hmdb51_org",)),
    # videos/train: sorted into classes by its publishers' tool, with whole files for damaged ones.
    "kinetics": _Layout(
        _read_kinetics, "annotations", "train.csv", ("videos/train", "videos/val", "train", "val")
    ),
    "ssv2": _Layout(_read_ssv2, "labels", "labels.json", ("20bn-something-something-v2",)),
    "list": _Layout(_read_plain),
    "frames": _Layout(_read_frames, "splits", videos=("BreakfastII_15fps_qvga_sync",)),
}


# --- where videos lie ---


class _VideoFinder:
    """Looks listed names up in a folder of videos or a packed set; every directory is read once."""

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        self.root = root
        if not self.root.is_dir():
            raise InputError(f"--videos {self.root} is not a folder; give the one that holds the videos")
        self.folders = (".", "videos", *folders)
        self.is_packed = is_packed(self.root)
        # By folder: its videos by their names without the suffix.
        self.entries: dict[Path, dict[str, VideoPath]] = {}
        if self.is_packed:
            index = PackedIndex(self.root)
            for video, name in enumerate(index.names):
                self.entries.setdefault(Path(name).parent, {})[_stem(Path(name))] = PackedVideo(index, video)

    def find(self, name: str) -> VideoPath | None:
        """The video of this name, or else of this stem: a file of another suffix, a folder of frames."""
        for path in (Path(folder, name) for folder in self.folders):
            if path.parent not in self.entries:
                self.entries[path.parent] = {} if self.is_packed else _list_videos(self.root / path.parent)
            entries = self.entries[path.parent]
            found = entries.get(path.name) or entries.get(_stem(path))
            if found is not None:
                return found
        return None


def _list_videos(folder: Path) -> dict[str, VideoPath]:
    """Video files by name and by stem, folders by name."""
    entries: dict[str, VideoPath] = {}
    for path in sorted(folder.iterdir()) if os.path.isdir(folder) else ():
        if path.suffix.lower() in VIDEO_SUFFIXES:
            entries[path.name] = path
        elif not path.is_dir():
            continue
        entries.setdefault(_stem(path), path)
    return entries


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name
