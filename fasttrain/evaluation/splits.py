"""Training and test lists of video-classification data sets, in the layouts in which they are published.

    ucf101    ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt     CLASS/NAME.avi
    hmdb51    testTrainMulti_7030_splits/CLASS_test_split1.txt           CLASS/NAME.avi
    kinetics  annotations/{train,val}.csv                                CLASS/ID_START_END.mp4
    ssv2      labels/{labels,train,validation}.json                      ID.webm
    list      --train-list and --test-list: `path label` per line        path

Lists may also lie in the root itself, videos in the root or in one of the folders that the archives make, or
in a packed set. A folder of frames stands in for a video file of its name, and so does a file with another
suffix; folders of classes may have `_` where the label has another character, and may be absent but for plain
lists, as they are in the archives of Kinetics and in frames of UCF101 and HMDB51 that others have published.
"""

import argparse
import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from fasttrain.data.packed import PackedIndex, is_packed
from fasttrain.data.video import VIDEO_SUFFIXES
from fasttrain.errors import InputError
from fasttrain.evaluation.features import PackedVideo, Place
from fasttrain.files import read_lines

Layout = Literal["auto", "ucf101", "hmdb51", "kinetics", "ssv2", "list"]
# (path relative to the folder of videos, class) in the order of the list.
Entries = list[tuple[str, str]]

# Folders that the published archives make, or that people commonly sort videos into.
_VIDEO_FOLDERS = (
    ".", "videos", "videos/train", "videos/val", "UCF-101", "hmdb51_org", "hmdb51",
    "20bn-something-something-v2", "train", "train_256", "val", "val_256", "validate", "test", "frames",
    "rawframes",
)  # fmt: skip
_MOST_NAMED = 3


@dataclass(frozen=True)
class LabelledVideo:
    """A video of a list: its name there, where it lies, and the number of its class."""

    name: str
    place: Place
    label: int


@dataclass(frozen=True, kw_only=True)
class VideoSplit:
    """Training and test videos, and the classes in the order of their numbers."""

    layout: str
    classes: list[str]
    train: list[LabelledVideo]
    test: list[LabelledVideo]
    missing: list[str]
    """Listed, but not there; only with `allow_missing`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = __doc__
    parser.add_argument(
        "--dataset", choices=get_args(Layout), default="auto", help="layout of the lists (default: look)"
    )
    parser.add_argument(
        "--split", type=int, choices=(1, 2, 3), default=1, help="of UCF101 or HMDB51 (default: 1)"
    )
    parser.add_argument(
        "--train-list", type=Path, help="`path label` per line, or a CSV of Kinetics or JSON of ssv2"
    )
    parser.add_argument("--test-list", type=Path, help="as --train-list")
    parser.add_argument(
        "--videos", type=Path, help="folder or packed set of the videos, if they are not in --root"
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="skip listed videos that are not there, and count them"
    )


def read_split(arguments: argparse.Namespace) -> VideoSplit:
    """The lists that the command line names, with every video found.

    Raises InputError where the layout is not known, a list is absent, empty or damaged, a video is not there
    (all of them even with `allow_missing`), or a class of the test list has no training video.
    """
    root: Path = arguments.root
    layout = _find_layout(root, arguments)
    read = _READERS[layout]
    classes, train, test = read(root, arguments)
    train, test = _checked(train, "training", classes), _checked(test, "test", classes)
    shared = {video for video, _ in train} & {video for video, _ in test}
    if shared:
        raise InputError(
            f"{min(shared)} is in both lists ({len(shared)} such videos); a test video must not be trained on"
        )
    untrained = sorted({name for _, name in test} - {name for _, name in train})
    if untrained:
        raise InputError(
            f"class {untrained[0]!r} is in the test list, but not in the training list "
            f"({len(untrained)} such classes); take both lists from one split"
        )
    if arguments.videos and not arguments.videos.is_dir():
        raise InputError(f"--videos {arguments.videos} is not a folder; give the one that holds the videos")
    finder = _Finder(arguments.videos or root)
    numbers = {name: number for number, name in enumerate(classes)}
    missing: list[str] = []

    def locate(entries: Entries) -> list[LabelledVideo]:
        found = []
        for name, label in entries:
            place = finder.find(name, unsorted=layout != "list")
            if place is None:
                missing.append(name)
            else:
                found.append(LabelledVideo(name, place, numbers[label]))
        return found

    split = VideoSplit(
        layout=layout, classes=classes, train=locate(train), test=locate(test), missing=missing
    )
    if missing and not (arguments.allow_missing and split.train and split.test):
        looked = arguments.videos or root
        raise InputError(
            f"{len(missing)} of {len(train) + len(test)} listed videos are not under {looked}, such as "
            f"{', '.join(missing[:_MOST_NAMED])}; give their folder with --videos"
            + ("" if arguments.allow_missing else ", or skip them with --allow-missing")
        )
    return split


def describe_split(split: VideoSplit) -> dict[str, Any]:
    """For the JSON: what the figures were measured on."""
    return {
        "layout": split.layout,
        "classes": len(split.classes),
        "train_videos": len(split.train),
        "test_videos": len(split.test),
        "missing": split.missing,
    }


class _Finder:
    """Looks listed names up in a folder of videos or a packed set; every directory is read once."""

    def __init__(self, root: Path) -> None:
        self._root, self._is_packed = root, is_packed(root)
        self._listings: dict[Path, dict[str, Place]] = {}
        if self._is_packed:
            index = PackedIndex(root)
            for video, name in enumerate(index.names):
                path = Path(name)
                self._listings.setdefault(path.parent, {})[_stem(path)] = PackedVideo(index, video)

    def find(self, name: str, *, unsorted: bool) -> Place | None:
        """The video of this name, or else of this stem: a file of another suffix, a folder of frames.

        unsorted: it may also lie outside the folder of its class.
        """
        folder, _, file = name.rpartition("/")
        spellings = dict.fromkeys((folder, folder.replace(" ", "_"), re.sub(r"[^\w/]", "_", folder)))
        spellings |= {"": None} if unsorted else {}
        for base in _VIDEO_FOLDERS:
            for spelling in spellings:
                path = Path(base, spelling, file)
                entries = self._entries(path.parent)
                found = entries.get(path.name) or entries.get(_stem(path))
                if found is not None:
                    return found
        return None

    def _entries(self, folder: Path) -> dict[str, Place]:
        if folder not in self._listings:
            self._listings[folder] = {} if self._is_packed else _list_videos(self._root / folder)
        return self._listings[folder]


def _list_videos(folder: Path) -> dict[str, Place]:
    """Video files by name and by stem, folders by name."""
    entries: dict[str, Place] = {}
    if os.path.isdir(folder):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                entries[path.name] = path
                entries.setdefault(path.stem, path)
            elif path.is_dir():
                entries.setdefault(path.name, path)
    return entries


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name


def _find_layout(root: Path, arguments: argparse.Namespace) -> str:
    if arguments.dataset != "auto":
        return str(arguments.dataset)
    if arguments.train_list and arguments.test_list:
        return {".csv": "kinetics", ".json": "ssv2"}.get(arguments.train_list.suffix.lower(), "list")
    signs = {
        "ucf101": _first(root, ("ucfTrainTestlist", "."), ("classInd.txt",)),
        "hmdb51": next(iter(_hmdb_files(root, arguments.split)), None),
        "ssv2": _first(root, _SSV2_FOLDERS, _SSV2_FILES["labels"]),
        "kinetics": _first(root, _KINETICS_FOLDERS, _KINETICS_FILES["train"]),
    }
    found = [layout for layout, path in signs.items() if path is not None]
    if len(found) != 1:
        raise InputError(
            f"{root} holds {'the lists of ' + ' and '.join(found) if found else 'no lists'} that are known; "
            "choose with --dataset, or give --train-list and --test-list"
        )
    return found[0]


def _first(root: Path, folders: Iterable[str], names: Iterable[str]) -> Path | None:
    names = list(names)
    paths = (root / folder / name for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def _required(root: Path, folders: Iterable[str], names: Sequence[str], given: Path | None = None) -> Path:
    """The list that was given, or the first that is found. Raises InputError where there is none."""
    path = given or _first(root, folders, names)
    if path is None or not path.is_file():
        wanted = given or f"{names[0]} in {root} or its {next(iter(folders))}"
        raise InputError(f"list {wanted} does not exist; --root must hold the lists as they are published")
    return path


def _checked(entries: Entries, which: str, classes: Sequence[str]) -> Entries:
    """The entries, each once. Raises InputError where there is none, or a class is unknown or ambiguous."""
    if not entries:
        raise InputError(f"the {which} list is empty; it must name at least one video")
    unknown = {label for _, label in entries} - set(classes)
    if unknown:
        raise InputError(
            f"class {min(unknown)!r} of the {which} list is not among the {len(classes)} classes"
        )
    once: dict[str, str] = {}
    for video, label in entries:
        if once.setdefault(video, label) != label:
            raise InputError(f"the {which} list names {video} as {once[video]!r} and as {label!r}; keep one")
    return list(once.items())


# UCF101: `1 Archery`; `Archery/v_Archery_g08_c01.avi 1`, without the number in test lists.
def _read_ucf(root: Path, arguments: argparse.Namespace) -> tuple[list[str], Entries, Entries]:
    folders = ("ucfTrainTestlist", ".")
    number = f"{arguments.split:02d}"
    classes = [line.split()[-1] for line in read_lines(_required(root, folders, ["classInd.txt"]))]

    def read(name: str, given: Path | None) -> Entries:
        path = _required(root, folders, [name], given)
        videos = [line.split()[0] for line in read_lines(path)]
        for video in videos:
            if "/" not in video:
                raise InputError(f"list {path}: {video!r}; expected CLASS/NAME.avi")
        return [(video, video.split("/")[0]) for video in videos]

    train = read(f"trainlist{number}.txt", arguments.train_list)
    return classes, train, read(f"testlist{number}.txt", arguments.test_list)


# HMDB51: one file per class, `NAME.avi MARK`; 1: training, 2: test, 0: in neither.
def _hmdb_files(root: Path, split: int) -> list[Path]:
    for folder in ("testTrainMulti_7030_splits", "splits", "."):
        # Copies made on a Mac have `._NAME` beside every NAME.
        files = sorted((root / folder).glob(f"[!.]*_test_split{split}.txt"))
        if files:
            return files
    return []


def _read_hmdb(root: Path, arguments: argparse.Namespace) -> tuple[list[str], Entries, Entries]:
    if arguments.train_list or arguments.test_list:
        raise InputError(
            "hmdb51 has a list for each class; with --train-list and --test-list, --dataset list"
        )
    files = _hmdb_files(root, arguments.split)
    if not files:
        raise InputError(
            f"no CLASS_test_split{arguments.split}.txt in {root / 'testTrainMulti_7030_splits'}; "
            "--root must hold the lists as they are published"
        )
    classes = [path.name.removesuffix(f"_test_split{arguments.split}.txt") for path in files]
    marked: dict[str, Entries] = {"0": [], "1": [], "2": []}
    for path, name in zip(files, classes, strict=True):
        for line in read_lines(path):
            video, _, mark = line.rpartition(" ")
            if mark not in marked or not video:
                raise InputError(f"list {path}: {line!r}; expected a video and 0, 1 or 2")
            marked[mark].append((f"{name}/{video.strip()}", name))
    return classes, marked["1"], marked["2"]


# Kinetics: label,youtube_id,time_start,time_end,split with a header line.
_KINETICS_FOLDERS = ("annotations", ".", "labels")
_KINETICS_FILES = {
    "train": ("train.csv", "kinetics_train.csv", "kinetics-400_train.csv"),
    "val": ("val.csv", "validate.csv", "kinetics_val.csv", "kinetics-400_val.csv"),
}


def _read_kinetics(root: Path, arguments: argparse.Namespace) -> tuple[list[str], Entries, Entries]:
    def read(which: str, given: Path | None) -> Entries:
        path = _required(root, _KINETICS_FOLDERS, _KINETICS_FILES[which], given)
        reader = csv.DictReader(read_lines(path))
        rows, columns = list(reader), reader.fieldnames or []
        # A list without its line of names would seem to be short of its first video, or empty.
        if columns and not {"label", "youtube_id", "time_start", "time_end"} <= set(columns):
            raise InputError(
                f"list {path} begins with {','.join(columns)!r}; expected the columns label, youtube_id, "
                "time_start, time_end; other lists are read with --dataset list"
            )
        try:
            return [
                (
                    f"{row['label']}/{row['youtube_id']}_{int(row['time_start']):06d}"
                    f"_{int(row['time_end']):06d}.mp4",
                    row["label"],
                )
                for row in rows
            ]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"list {path}: {error}; expected the columns label, youtube_id, time_start, time_end"
            ) from error

    train, val = read("train", arguments.train_list), read("val", arguments.test_list)
    classes = sorted({label for _, label in train})
    return classes, train, val


# Something-Something V2: {"template": "number"}; [{"id": "1", "template": "Moving [something] up"}, ...].
_SSV2_FOLDERS = ("labels", ".", "annotations")
_SSV2_FILES = {
    name: (f"{name}.json", f"something-something-v2-{name}.json")
    for name in ("labels", "train", "validation")
}


def _read_ssv2(root: Path, arguments: argparse.Namespace) -> tuple[list[str], Entries, Entries]:
    def load(which: str, given: Path | None = None) -> tuple[Path, Any]:
        path = _required(root, _SSV2_FOLDERS, _SSV2_FILES[which], given)
        try:
            return path, json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InputError(f"list {path} cannot be read ({error})") from error

    path, labels = load("labels")
    try:
        classes = sorted(labels, key=lambda name: int(labels[name]))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f'list {path}: {error}; expected {{"template": "number", ...}}') from error

    def read(which: str, given: Path | None) -> Entries:
        path, rows = load(which, given)
        try:
            return [(f"{row['id']}.webm", row["template"].replace("[", "").replace("]", "")) for row in rows]
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"list {path}: no {error}; expected objects with id and template") from error

    return classes, read("train", arguments.train_list), read("validation", arguments.test_list)


def _read_lists(root: Path, arguments: argparse.Namespace) -> tuple[list[str], Entries, Entries]:
    if not (arguments.train_list and arguments.test_list):
        raise InputError("--dataset list needs both --train-list and --test-list: `path label` per line")

    @cache
    def finder() -> _Finder:
        return _Finder(arguments.videos or root)

    def read(given: Path) -> Entries:
        entries = []
        for line in read_lines(given):
            parts = line.rsplit(maxsplit=1)
            # A comment, unless it names a video: those of HMDB51 may begin with #.
            if line.startswith("#") and finder().find(parts[0], unsorted=False) is None:
                continue
            if len(parts) != 2:
                raise InputError(f"list {given}: {line!r}; expected `path label`")
            entries.append((parts[0], parts[1]))
        return entries

    train, test = read(arguments.train_list), read(arguments.test_list)
    labels = {label for _, label in train + test}
    numbered = all(label.isdecimal() for label in labels)
    return sorted(labels, key=int if numbered else str), train, test


_READERS: dict[str, Callable[[Path, argparse.Namespace], tuple[list[str], Entries, Entries]]] = {
    "ucf101": _read_ucf,
    "hmdb51": _read_hmdb,
    "kinetics": _read_kinetics,
    "ssv2": _read_ssv2,
    "list": _read_lists,
}
