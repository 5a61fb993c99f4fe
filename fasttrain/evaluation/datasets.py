"""Layouts of the supported datasets.

Datasets with a label per video, their training and test lists and the paths of their videos:

    ucf101    ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt     UCF-101/CLASS/NAME.avi
    hmdb51    testTrainMulti_7030_splits/CLASS_test_split1.txt           hmdb51_org/CLASS/NAME.avi
    kinetics  annotations/{train,val}.csv                                {train,val}/ID_START_END.mp4
    ssv2      labels/{labels,train,validation}.json                      20bn-something-something-v2/ID.webm
    list      --train-list and --test-list, `path label` per line        path

The lists may be in --root or in a folder directly below it, the videos anywhere below --root or --videos, or
in a packed set. A listed video matches the stored video whose path ends with the listed path; if there is
none, its case is ignored, because published copies of UCF101 spell HandstandPushups in two ways. A frame
folder, or a file with another suffix, can replace a video file of the same name. The class folders may be
missing, except in plain lists.

Datasets with a label per frame: Breakfast, GTEA and 50Salads as published with MS-TCN
(github.com/yabufarha/ms-tcn).

    mapping.txt                        NUMBER LABEL per line
    groundTruth/NAME.txt               one label per line, for each frame of the video
    splits/train.split1.bundle         NAME.txt per line; likewise test.split1.bundle
    NAME.mp4                           anywhere, as above; for Breakfast also P03/cam01/P03_tea.avi
"""

# Shape suffix: T frames.

import argparse
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fasttrain.data.index import FolderIndex, FrameIndex
from fasttrain.data.packed import PackedIndex, is_packed
from fasttrain.data.sources import find_source, kinetics_clip, kinetics_rows, open_source
from fasttrain.data.video import VIDEO_SUFFIXES
from fasttrain.errors import InputError
from fasttrain.files import parse_json, parse_rows, read_lines

Labels = npt.NDArray[np.int64]

# A video file, or an index (of frame folders or a packed set) and the video's position in it.
StoredVideo = Path | tuple[FrameIndex, int]


@dataclass(frozen=True)
class LabelledVideo:
    """A listed video: its name in the list, its location and its class numbers."""

    name: str
    path: StoredVideo
    labels_T: Labels
    """One class number per frame, or one for the whole video."""

    @property
    def label(self) -> int:
        """The class number of a video with a single label."""
        return int(self.labels_T[0])


@dataclass(frozen=True, kw_only=True)
class VideoSplit:
    """Training and test videos, and the names of the classes by number."""

    layout: str
    classes: list[str]
    train: list[LabelledVideo]
    test: list[LabelledVideo]
    missing: list[str]
    """Listed videos that were not found, some with a reason; empty unless `--allow-missing` is set."""


def read_split(arguments: argparse.Namespace) -> VideoSplit:
    """Read the lists that the options select and find their videos.

    Raises InputError if the layout is unknown, a list is missing, empty or malformed, or a video is missing.
    With `--allow-missing`, missing videos are skipped, but at least one video of each list must exist.
    """
    layout = _find_layout(arguments)
    read, _ = _LAYOUTS[layout]
    classes, *lists = read(arguments)
    train_names, test_names = ({entry.name for entry in entries} for entries in lists)
    if not train_names or not test_names:
        raise InputError(
            f"the {'test' if train_names else 'training'} list is empty; expected at least one video"
        )
    shared = train_names & test_names
    if shared:
        raise InputError(
            f"video {min(shared)!r} is in both the training and the test list ({len(shared)} in total). "
            "Remove it from one of them."
        )
    numbers = {label: number for number, label in enumerate(classes)}
    root = arguments.videos or arguments.root
    stored = _StoredVideos(root)
    train: list[LabelledVideo] = []
    test: list[LabelledVideo] = []
    missing = []
    for videos, entries in zip((train, test), lists, strict=True):
        for entry in entries:
            unknown = set(entry.labels) - set(numbers)
            if unknown:
                raise InputError(
                    f"video {entry.name!r} has label {min(unknown)!r}; expected a label of the dataset "
                    f"({len(classes)} in total)"
                )
            path = stored.find(entry.name, entry.alias)
            if path is None or isinstance(path, str):
                missing.append(f"{entry.name}: {path}" if path else entry.name)
            else:
                labels_T = np.array([numbers[label] for label in entry.labels])
                videos.append(LabelledVideo(entry.name, path, labels_T))
    if missing and not (arguments.allow_missing and train and test):
        raise InputError(
            f"listed videos that are missing in '{root}' or match several files: {len(missing)} (for example "
            f"{', '.join(missing[:3])}). Pass their folder as --videos"
            + ("." if layout == "frames" else ", or skip them with --allow-missing.")
        )
    return VideoSplit(layout=layout, classes=classes, train=train, test=test, missing=missing)


def background_numbers(classes: Sequence[str], names: Sequence[str] | None) -> list[int]:
    """Return the numbers of the background labels. None selects the label `background`, if there is one."""
    if names is None:
        names = ["background"] if "background" in classes else []
    for name in names:
        if name not in classes:
            raise InputError(f"--background: {name!r} is not one of the labels: {', '.join(classes)}")
    return [classes.index(name) for name in names]


# --- reading lists ---


class _Entry(NamedTuple):
    """An entry of a list: the path of a video and its labels."""

    name: str
    labels: Sequence[str]
    """One label per frame, or one for the whole video."""
    alias: str = ""
    """Another path that the video may have."""


# The names of the classes by number, the training list and the test list.
_Lists = tuple[list[str], list[_Entry], list[_Entry]]


def _find_layout(arguments: argparse.Namespace) -> str:
    if arguments.dataset != "auto":
        return str(arguments.dataset)
    if arguments.train_list and arguments.test_list:
        return {".csv": "kinetics", ".json": "ssv2"}.get(arguments.train_list.suffix.lower(), "list")
    layouts = [
        name for name, (_, pattern) in _LAYOUTS.items() if pattern and _find_lists(arguments.root, pattern)
    ]
    if len(layouts) != 1:
        lists = f"the lists of {' and '.join(layouts)}" if layouts else "no lists of a supported dataset"
        raise InputError(
            f"--root: '{arguments.root}' contains {lists}. Choose the layout with --dataset, or pass "
            "--train-list and --test-list."
        )
    return layouts[0]


def _find_lists(root: Path, pattern: str) -> list[Path]:
    """Find the files that match a pattern in the root or, if there are none, in its folders."""
    return sorted(root.glob(pattern)) or sorted(root.glob(f"*/{pattern}"))


def _find_list(arguments: argparse.Namespace, name: str) -> Path:
    """Find the published list of this name."""
    paths = _find_lists(arguments.root, name)
    if not paths:
        raise InputError(
            f"--root: there is no {name} in '{arguments.root}' or its folders. Pass the folder of the lists."
        )
    return paths[0]


def _read_both(
    arguments: argparse.Namespace,
    names: tuple[str, str],
    load: Callable[[Path], Iterable[Any]],
    parse: Callable[[Any], _Entry],
    expected: str,
) -> tuple[list[_Entry], list[_Entry]]:
    """Read the training and the test list: those passed as options, else the published ones (`names`)."""
    train = arguments.train_list or _find_list(arguments, names[0])
    test = arguments.test_list or _find_list(arguments, names[1])
    return parse_rows(train, load(train), parse, expected), parse_rows(test, load(test), parse, expected)


def _read_ucf(arguments: argparse.Namespace) -> _Lists:
    """Read UCF101: `1 Archery` in classInd.txt; `Archery/v_Archery_g08_c01.avi 1` in the lists.

    The test lists omit the class number.
    """

    def parse(line: str) -> _Entry:
        name = line.split()[0]
        label, file = name.split("/")
        return _Entry(name, [label], file)

    classes = [line.split()[-1] for line in read_lines(_find_list(arguments, "classInd.txt"))]
    names = f"trainlist{arguments.split:02d}.txt", f"testlist{arguments.split:02d}.txt"
    return classes, *_read_both(arguments, names, read_lines, parse, "CLASS/NAME.avi")


def _read_hmdb(arguments: argparse.Namespace) -> _Lists:
    """Read HMDB51: a file per class, `NAME.avi MARK` per line. MARK is 1 (training), 2 (test) or 0."""
    if arguments.train_list or arguments.test_list:
        raise InputError("hmdb51 has a list per class. Leave out --train-list and --test-list.")
    ending = f"_test_split{arguments.split}.txt"
    classes: list[str] = []
    marked: dict[str, list[_Entry]] = {"0": [], "1": [], "2": []}

    def parse(line: str) -> None:
        video, mark = line.rsplit(maxsplit=1)
        marked[mark].append(_Entry(f"{classes[-1]}/{video}", classes[-1:], video))

    for path in sorted(_find_list(arguments, f"*{ending}").parent.glob(f"*{ending}")):
        classes.append(path.name.removesuffix(ending))
        parse_rows(path, read_lines(path), parse, "a video and 0, 1 or 2")
    return classes, marked["1"], marked["2"]


def _read_kinetics(arguments: argparse.Namespace) -> _Lists:
    """Read Kinetics: CSV files with the columns label, youtube_id, time_start, time_end and split."""

    def parse(row: dict[str, str]) -> _Entry:
        file = f"{kinetics_clip(row)}.mp4"
        return _Entry(f"{row['label']}/{file}", [row["label"]], file)

    names, expected = ("train.csv", "val.csv"), "the columns label, youtube_id, time_start, time_end"
    train, test = _read_both(
        arguments, names, lambda path: kinetics_rows(path, read_lines(path)), parse, expected
    )
    return sorted({entry.labels[0] for entry in train}), train, test


def _read_ssv2(arguments: argparse.Namespace) -> _Lists:
    """Read Something-Something V2.

    labels.json is `{"Moving something up": "0", ...}`; the lists are
    `[{"id": "1", "template": "Moving [something] up"}, ...]`.
    """

    def load(path: Path, kind: type = list) -> Any:
        lines = read_lines(path)
        try:
            value = parse_json("\n".join(lines))
        except ValueError as error:
            raise InputError(f"'{path}' is not valid JSON ({error})") from error
        if not isinstance(value, kind):
            raise InputError(f"'{path}': expected a JSON {'array' if kind is list else 'object'}")
        return value

    def parse(row: dict[str, str]) -> _Entry:
        return _Entry(f"{row['id']}.webm", [re.sub(r"[\[\]]", "", row["template"])])

    labels = _find_list(arguments, "labels.json")
    numbers = parse_rows(
        labels,
        load(labels, dict).items(),
        lambda entry: (int(entry[1]), entry[0]),
        "templates with their numbers",
    )
    expected = "objects with id and template"
    lists = _read_both(arguments, ("train.json", "validation.json"), load, parse, expected)
    return [template for _, template in sorted(numbers)], *lists


def _read_plain(arguments: argparse.Namespace) -> _Lists:
    """Read lists with `path label` per line. Lines that begin with `# ` are comments."""
    if not (arguments.train_list and arguments.test_list):
        raise InputError("--dataset list: pass --train-list and --test-list, with `path label` per line.")

    def load(path: Path) -> list[str]:
        # The space matters: some file names of HMDB51 begin with # and a digit.
        return [line for line in read_lines(path) if not line.startswith("# ")]

    def parse(line: str) -> _Entry:
        path, label = line.rsplit(maxsplit=1)
        return _Entry(path, [label])

    train, test = _read_both(arguments, ("", ""), load, parse, "`path label`")
    labels = {entry.labels[0] for entry in train + test}
    # Python refuses to convert thousands of digits.
    are_numbers = all(label.isdecimal() and len(label) < 19 for label in labels)
    return sorted(labels, key=int if are_numbers else str), train, test


def _read_frames(arguments: argparse.Namespace) -> _Lists:
    """Read mapping.txt, splits/*.bundle and the label files of the listed videos, groundTruth/NAME.txt."""

    def parse_class(line: str) -> tuple[int, str]:
        number, name = line.split(maxsplit=1)
        return int(number), name

    def parse(line: str) -> _Entry:
        name = line.removesuffix(".txt")
        labels = read_lines(arguments.root / f"groundTruth/{name}.txt")
        return _Entry(name, labels, _breakfast_path(name))

    path = arguments.root / "mapping.txt"
    classes = parse_rows(path, read_lines(path), parse_class, "`NUMBER LABEL`")
    names = f"train.split{arguments.split}.bundle", f"test.split{arguments.split}.bundle"
    lists = _read_both(arguments, names, read_lines, parse, "NAME.txt")
    return [name for _, name in sorted(classes)], *lists


def _breakfast_path(name: str) -> str:
    """Convert MS-TCN's name of a Breakfast video to its published path, without the suffix.

    P03_cam01_P03_tea becomes P03/cam01/P03_tea; P03_stereo01_P03_tea becomes P03/stereo/P03_tea_ch0.
    """
    path = name.replace("_", "/", 2)
    return re.sub(r"/stereo0([12])/(.+)", lambda match: f"/stereo/{match[2]}_ch{int(match[1]) - 1}", path)


# By layout: the function that reads it and the name of a list that no other layout has.
_LAYOUTS: dict[str, tuple[Callable[[argparse.Namespace], _Lists], str | None]] = {
    "ucf101": (_read_ucf, "classInd.txt"),
    "hmdb51": (_read_hmdb, "*_test_split1.txt"),
    "kinetics": (_read_kinetics, "train.csv"),
    "ssv2": (_read_ssv2, "labels.json"),
    "list": (_read_plain, None),
    "frames": (_read_frames, None),
}


# --- finding videos ---


class _StoredVideos:
    """The videos below a folder or in a packed set."""

    def __init__(self, root: Path | str) -> None:
        files: dict[str, Path] = {}
        if isinstance(root, str):
            index: FrameIndex = open_source(root)
        elif not root.is_dir():
            raise InputError(f"'{root}' is not a folder. Pass a folder or packed set of videos as --videos.")
        elif is_packed(root):
            index = PackedIndex(root)
        else:
            source = find_source(root, kind="folders")
            index = FolderIndex(source.folders, source.skipped)
            files = find_source(root, kind="videos").videos
        # A packed set at a URL has no files on this machine.
        self._root = Path(os.devnull) if isinstance(root, str) else root
        self._reasons = dict(index.skipped)
        self._videos = {name: (index, video) for video, name in enumerate(index.names)} | files
        # By every end of the path in lower case: `c`, `b/c`, `a/b/c`.
        self._names = defaultdict(list)
        for name in dict.fromkeys([*self._videos, *self._reasons]):
            parts = _without_suffix(name).lower().split("/")
            for start in range(len(parts)):
                self._names["/".join(parts[start:])].append(name)

    def find(self, *names: str) -> StoredVideo | str | None:
        """Find the file at a path (absolute or from the root), else the only video whose path ends with it.

        The first of `names` that is found counts. If no video has any of them, their case is ignored. Returns
        a reason if several videos match, or if the one that matches was skipped.
        """
        reason = None
        for same_case in (True, False):
            if reason:
                break
            for path in [self._root / name for name in names if name]:
                if path.is_file():
                    return path
                end = _without_suffix(os.path.relpath(path, self._root))
                matches = self._names.get(end.lower(), [])
                if same_case:
                    matches = [name for name in matches if f"/{_without_suffix(name)}".endswith(f"/{end}")]
                found = [name for name in matches if name in self._videos]
                if len(found) == 1:
                    return self._videos[found[0]]
                if found:
                    reason = f"matches {found[0]} and {found[1]}"
                elif matches and not reason:
                    reason = self._reasons[matches[0]]
        return reason


def _without_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in VIDEO_SUFFIXES else name
