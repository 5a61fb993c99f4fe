"""Action localisation: a linear classifier on single frames of video, judged by frames and by segments.

Reads the layout in which MS-TCN's authors published Breakfast, GTEA and 50Salads:

    mapping.txt                        NUMBER LABEL per line
    groundTruth/NAME.txt               a label per frame of the video
    splits/train.split1.bundle         NAME.txt per line; test.split1.bundle likewise
    videos/NAME.mp4                    or .avi, or a folder of frames; also Breakfast's P03/cam01/P03_tea.avi

or, with --videos, a packed set of them that has all frames.

The classifier sees one frame at a time, so that what is measured is the features. Measures and their sources
are in `localization.py`, the classifier in `linear.py`. Shape suffixes: T frames, S sampled frames, D
channels, C classes.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fasttrain.data.packed import PackedIndex, is_packed
from fasttrain.data.sources import find_source
from fasttrain.data.videos import VIDEO_SUFFIXES
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import charts, features
from fasttrain.evaluation.features import Extracted, PackedVideo, Place, Sampling, extract
from fasttrain.evaluation.frames import spread
from fasttrain.evaluation.harness import Subject
from fasttrain.evaluation.linear import MAX_ITERATIONS, LinearClassifier, fit_linear
from fasttrain.evaluation.localization import (
    OVERLAPS,
    TEMPORAL_IOU,
    detection_map,
    edit_score,
    frame_accuracy,
    scored_segments,
    segmental_f1,
    segments,
)

Labels = npt.NDArray[np.int64]

SHOWN_VIDEOS = 4
HELD_OUT = 0.2
# Labels and frames of one video: the published annotations differ by a few frames, not by a frame rate.
MOST_DIFFERENT = 0.1


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
    features.add_arguments(parser)
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
    parser.add_argument(
        "--stride", type=int, default=1,
        help="encode every N-th frame; its prediction stands for the frames up to the next (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--smooth", type=int, default=1,
        help="predict each frame from the mean probability of so many encoded frames about it (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--max-train-frames", type=int, default=200_000,
        help="frames that the classifier is fitted to, evenly chosen (default: 200000)",
    )  # fmt: skip
    parser.add_argument(
        "--tiou", choices=tuple(TEMPORAL_IOU), default="thumos",
        help="temporal IoU of the mAP: thumos 0.1:0.7, activitynet 0.5:0.95 (default: thumos)",
    )  # fmt: skip
    parser.add_argument(
        "--max-iterations", type=int, default=MAX_ITERATIONS,
        help=f"of L-BFGS (default: {MAX_ITERATIONS})",
    )  # fmt: skip


def run(arguments: argparse.Namespace, subject: Subject, output: Path, world: World) -> dict[str, Any] | None:
    """Figures of all test videos, on the main process."""
    for name in ("smooth", "max_train_frames"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected at least 1")
    data = read_dataset(arguments)
    background = background_numbers(data.classes, arguments.background)
    sampling = Sampling(
        pool="frame",
        num_frames=None,
        stride=arguments.stride,
        image_size=arguments.image_size,
        precision=arguments.precision,
    )
    places = {video.name: video.place for video in (*data.train, *data.test)}
    extracted = extract(places, sampling, subject, arguments, output, world)
    if extracted is None:
        return None
    train, train_skipped = _fitting(data.train, extracted.num_frames)
    test, test_skipped = _fitting(data.test, extracted.num_frames)
    skipped = extracted.skipped + train_skipped + test_skipped
    for videos, which in ((train, "training"), (test, "test")):
        if not videos:
            raise InputError(f"no video of the {which} list can be used; {'; '.join(skipped[:3])}")
    truth = {video.name: video.labels_T for video in test}
    trained = sorted({int(label) for video in train for label in np.unique(video.labels_T)})
    predicted: dict[str, dict[str, Labels]] = {}
    results: dict[str, dict[str, float]] = {}
    classifiers: dict[str, LinearClassifier] = {}
    for moment in subject.moments:
        classifiers[moment] = _fit(train, extracted, moment, trained, arguments, world.device)
        detections, predicted[moment] = {}, {}
        for video in test:
            features_SD = extracted.load(video.name, moment).features_TD.to(world.device)
            labels_T, probabilities_TC = _predict(
                classifiers[moment], features_SD, len(video.labels_T), arguments
            )
            # Numbers of the trained classes -> numbers of mapping.txt.
            predicted[moment][video.name] = np.array(trained)[labels_T]
            own_background = [place for place, label in enumerate(trained) if label in background]
            detections[video.name] = [
                segment.relabelled(trained[segment.label])
                for segment in scored_segments(labels_T, probabilities_TC, own_background)
            ]
        results[moment] = _measure(predicted[moment], detections, truth, background, arguments.tiou)
    _draw(test, predicted, data.classes, background, output)
    untrained = {int(label) for labels_T in truth.values() for label in np.unique(labels_T)} - set(trained)
    return {
        "data": {
            "classes": len(data.classes),
            "background": [data.classes[number] for number in background],
            "train_videos": len(train),
            "train_frames": sum(len(video.labels_T) for video in train),
            "test_videos": len(test),
            "test_frames": sum(map(len, truth.values())),
            "classes_without_training": [data.classes[number] for number in sorted(untrained)],
            "skipped": skipped,
        },
        "results": results,
        "classifier": {
            moment: {"l2": one.l2, "held_out_accuracy": one.held_out_accuracy, "converged": one.converged}
            for moment, one in classifiers.items()
        },
        "per_video": {
            name: {
                moment: {
                    "accuracy": frame_accuracy([labels[name]], [truth[name]]),
                    "edit": edit_score([labels[name]], [truth[name]], background),
                }
                for moment, labels in predicted.items()
            }
            for name in truth
        },
    }


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
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); --root must hold mapping.txt, groundTruth/ and splits/"
        ) from error
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


def _fitting(
    videos: Sequence[LabelledFrames], num_frames: Mapping[str, int]
) -> tuple[list[LabelledFrames], list[str]]:
    """The readable videos, labels cut to their frames, and those with another number of labels."""
    fitting, skipped = [], []
    for video in videos:
        if video.name not in num_frames:
            continue
        frames, labels = num_frames[video.name], len(video.labels_T)
        if abs(frames - labels) > MOST_DIFFERENT * labels:
            skipped.append(f"{video.name}: {frames} frames, but {labels} labels; expected a label per frame")
        else:
            fitting.append(LabelledFrames(video.name, video.place, video.labels_T[:frames]))
    return fitting, skipped


def _fit(
    train: Sequence[LabelledFrames],
    extracted: Extracted,
    moment: str,
    trained: Sequence[int],
    arguments: argparse.Namespace,
    device: torch.device,
) -> LinearClassifier:
    """A classifier of single frames; its L2 is chosen on the last fifth of the training videos."""
    total = sum(len(_sampled(video.labels_T, arguments.stride)) for video in train)
    chosen = np.zeros(total, dtype=bool)
    chosen[spread(total, arguments.max_train_frames)] = True
    # Of two videos one is held out; of one, none.
    held_out_from = len(train) - max(int(len(train) * HELD_OUT), int(len(train) > 1))
    parts, labels, held_out = [], [], []
    start = 0
    for number, video in enumerate(train):
        sampled_S = _sampled(video.labels_T, arguments.stride)
        own_S = chosen[start : start + len(sampled_S)]
        start += len(sampled_S)
        features_SD = extracted.load(video.name, moment).features_TD
        parts.append(features_SD[: len(sampled_S)][torch.from_numpy(own_S)])
        labels.append(np.searchsorted(trained, sampled_S[own_S]))
        held_out.append(np.full(int(own_S.sum()), number >= held_out_from))
    return fit_linear(
        torch.cat(parts).to(device),
        torch.from_numpy(np.concatenate(labels)).to(device),
        num_classes=len(trained),
        held_out_S=torch.from_numpy(np.concatenate(held_out)).to(device),
        max_iterations=arguments.max_iterations,
    )


def _sampled(labels_T: Labels, stride: int) -> Labels:
    return labels_T[::stride]


def _predict(
    classifier: LinearClassifier, features_SD: Tensor, length: int, arguments: argparse.Namespace
) -> tuple[Labels, npt.NDArray[np.float64]]:
    """Labels (T,) and probabilities (T, C) of every frame, from those of the encoded ones."""
    probabilities_SC = classifier.probabilities(features_SD).cpu().numpy()
    probabilities_SC = smoothed(probabilities_SC, arguments.smooth)
    probabilities_TC = probabilities_SC.repeat(arguments.stride, axis=0)[:length]
    return probabilities_TC.argmax(axis=1), probabilities_TC


def smoothed(probabilities_SC: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Running mean over `window` frames about each, fewer at the ends."""
    if window == 1:
        return probabilities_SC
    total_SC = np.concatenate([np.zeros_like(probabilities_SC[:1]), np.cumsum(probabilities_SC, axis=0)])
    places = np.arange(len(probabilities_SC))
    start = np.maximum(places - (window - 1) // 2, 0)
    end = np.minimum(places + window // 2 + 1, len(probabilities_SC))
    return (total_SC[end] - total_SC[start]) / (end - start)[:, None]


def _measure(
    predicted: dict[str, Labels],
    detections: dict[str, Any],
    truth: dict[str, Labels],
    background: Sequence[int],
    tiou: str,
) -> dict[str, float]:
    guesses, actual = [predicted[name] for name in truth], list(truth.values())
    precision = detection_map(
        detections,
        {name: segments(labels_T, background) for name, labels_T in truth.items()},
        TEMPORAL_IOU[tiou],
    )
    return {
        "frame accuracy": frame_accuracy(guesses, actual),
        "edit": edit_score(guesses, actual, background),
        **{
            f"F1@{round(100 * overlap)}": segmental_f1(guesses, actual, overlap, background)
            for overlap in OVERLAPS
        },
        **{f"mAP@{threshold:g}": value for threshold, value in precision.items()},
        "mAP mean": float(np.mean(list(precision.values()))),
    }


def _draw(
    test: Sequence[LabelledFrames],
    predicted: dict[str, dict[str, Labels]],
    classes: Sequence[str],
    background: Sequence[int],
    output: Path,
) -> None:
    shown = [test[place] for place in spread(len(test), SHOWN_VIDEOS)]
    rows = [
        (
            video.name,
            {"truth": video.labels_T, **{moment: labels[video.name] for moment, labels in predicted.items()}},
        )
        for video in shown
    ]
    charts.segment_bars(rows, classes, output / "figures" / "segments.png", background)
