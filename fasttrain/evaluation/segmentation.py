"""Videos with a label for every frame, in the layout in which MS-TCN's authors published three data sets.

Breakfast, GTEA and 50Salads (github.com/yabufarha/ms-tcn):

    mapping.txt                        NUMBER LABEL per line
    groundTruth/NAME.txt               a label per frame of the video
    splits/train.split1.bundle         NAME.txt per line; test.split1.bundle likewise
    videos/NAME.mp4                    or .avi, or a folder of frames; also Breakfast's P03/cam01/P03_tea.avi

or, with --videos, a packed set of the videos that has all of their frames. Shape suffix: T frames.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fasttrain.data.packed import PackedIndex, is_packed
from fasttrain.data.sources import find_source
from fasttrain.data.video import VIDEO_SUFFIXES
from fasttrain.errors import InputError
from fasttrain.evaluation.features import PackedVideo, Place
from fasttrain.files import read_lines

Labels = npt.NDArray[np.int64]

# The published annotations differ from their videos by a few frames, not by a frame rate.
_MOST_DIFFERENT = 0.1


@dataclass(frozen=True)
class LabelledFrames:
    """A video and the class of each of its frames."""

    name: str
    place: Place
    labels_T: Labels


@dataclass(frozen=True)
class Dataset:
    """Training and test videos, and the classes by number."""

    classes: list[str]
    train: list[LabelledFrames]
    test: list[LabelledFrames]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = __doc__
    parser.add_argument("--split", default="1", help="of splits/train.splitN.bundle (default: 1)")
    parser.add_argument("--train-list", type=Path, help="another list than splits/train.splitN.bundle")
    parser.add_argument("--test-list", type=Path, help="another list than splits/test.splitN.bundle")
    parser.add_argument(
        "--videos", type=Path, help="folder or packed set of the videos, if they are not in --root"
    )
    parser.add_argument(
        "--background", nargs="*", default=None, metavar="LABEL",
        help="labels whose segments do not count (default: `background`, as MS-TCN has it); none: count all",
    )  # fmt: skip


def read_dataset(arguments: argparse.Namespace) -> Dataset:
    """Lists, labels and videos. Raises InputError, naming the path, where one is absent, empty or damaged."""
    root: Path = arguments.root
    mapping = _lines(root / "mapping.txt")
    classes = _read_mapping(root / "mapping.txt", mapping)
    numbers = {name: number for number, name in enumerate(classes)}
    lists = {
        "train": arguments.train_list or root / "splits" / f"train.split{arguments.split}.bundle",
        "test": arguments.test_list or root / "splits" / f"test.split{arguments.split}.bundle",
    }
    # Lists name the label files, some with a path before them.
    names = {
        which: [Path(line).name.removesuffix(".txt") for line in _lines(path)]
        for which, path in lists.items()
    }
    shared = set(names["train"]) & set(names["test"])
    if shared:
        raise InputError(
            f"{min(shared)} is in both lists ({len(shared)} such videos); take lists of one split"
        )
    places = _find_videos(arguments.videos or root)
    absent = [name for which in names.values() for name in which if name not in places]
    if absent:
        raise InputError(
            f"{len(absent)} listed videos are not under {arguments.videos or root}, such as "
            f"{', '.join(absent[:3])}; give their folder with --videos"
        )

    def read(name: str) -> LabelledFrames:
        path = root / "groundTruth" / f"{name}.txt"
        labels = _lines(path)
        unknown = set(labels) - set(classes)
        if unknown:
            raise InputError(f"label {min(unknown)!r} of {path} is not in {root / 'mapping.txt'}")
        return LabelledFrames(name, places[name], np.array([numbers[label] for label in labels]))

    train, test = ([read(name) for name in dict.fromkeys(names[which])] for which in ("train", "test"))
    return Dataset(classes, train, test)


def fit_to_frames(
    videos: Sequence[LabelledFrames], num_frames: Mapping[str, int]
) -> tuple[list[LabelledFrames], list[str]]:
    """The readable videos, labels cut to their frames, and those with another number of labels."""
    fitting, skipped = [], []
    for video in videos:
        if video.name not in num_frames:
            continue
        frames, labels = num_frames[video.name], len(video.labels_T)
        if abs(frames - labels) > _MOST_DIFFERENT * labels:
            skipped.append(f"{video.name}: {frames} frames, but {labels} labels; expected a label per frame")
        else:
            fitting.append(replace(video, labels_T=video.labels_T[:frames]))
    return fitting, skipped


def occurring(videos: Sequence[LabelledFrames]) -> set[int]:
    """The classes that some frame of the videos has."""
    return {int(label) for video in videos for label in np.unique(video.labels_T)}


def background_numbers(classes: Sequence[str], wanted: Sequence[str] | None) -> list[int]:
    """Numbers of the background labels; None means `background` where there is one."""
    names = [name for name in ("background",) if name in classes] if wanted is None else wanted
    for name in names:
        if name not in classes:
            raise InputError(f"--background {name}: not in mapping.txt, which has {', '.join(classes)}")
    return [classes.index(name) for name in names]


def _read_mapping(path: Path, lines: Sequence[str]) -> list[str]:
    try:
        by_number = {int(number): name for number, name in (line.split(maxsplit=1) for line in lines)}
    except ValueError as error:
        raise InputError(f"{path}: {error}; expected `NUMBER LABEL` per line") from error
    if sorted(by_number) != list(range(len(lines))):
        raise InputError(
            f"{path}: {len(lines)} lines, numbers {sorted(by_number)}; expected 0, 1, 2, ... once"
        )
    return [by_number[number] for number in range(len(lines))]


def _lines(path: Path) -> list[str]:
    lines = read_lines(path, "mapping.txt, groundTruth/ and splits/ in --root")
    if not lines:
        raise InputError(f"{path} is empty")
    return lines


def _find_videos(folder: Path) -> dict[str, Place]:
    """Videos and frame folders at any depth, by every name that the annotations may have for them."""
    if not folder.is_dir():
        raise InputError(f"--videos {folder} is not a folder; give the one that holds the videos")
    found: dict[str, Place]
    if is_packed(folder):
        index = PackedIndex(folder)
        found = {name: PackedVideo(index, video) for video, name in enumerate(index.names)}
    else:
        folders = find_source(folder, kind="folders").folders
        found = {name: path for name, (path, _) in folders.items()}
        found |= find_source(folder, kind="videos").videos
    places: dict[str, Place] = {}
    for relative, place in found.items():
        parts = list(Path(relative).parts)
        if Path(relative).suffix.lower() in VIDEO_SUFFIXES:
            parts[-1] = Path(parts[-1]).stem
        # Breakfast: P03/cam01/P03_tea.avi is P03_cam01_P03_tea, and P03/stereo/P03_tea_ch0.avi its stereo01.
        tail = parts[-3:]
        if len(tail) == 3 and tail[1] == "stereo":
            channel = re.search(r"_ch([01])$", tail[2])
            tail = [
                tail[0],
                f"stereo0{int(channel[1]) + 1 if channel else 1}",
                re.sub(r"_ch[01]$", "", tail[2]),
            ]
        for name in ("_".join(tail), parts[-1]):
            places.setdefault(name, place)
    return places
