"""Action localisation: a linear classifier on single frames of video, judged by frames and by segments.

Reads Breakfast, GTEA, 50Salads and what is laid out like them (`datasets.py`). The classifier sees one frame
at a time, so that what is measured is the features. `metrics.py` holds the measures and names their sources.
Shape suffixes: T frames, S sampled frames, D channels, C classes.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import uniform_filter1d

from fasttrain.data.sampling import evenly_spaced
from fasttrain.distributed import World
from fasttrain.errors import check_options
from fasttrain.evaluation import datasets, features, linear_probe, metrics, plots
from fasttrain.evaluation.datasets import LabelledVideo, Labels
from fasttrain.evaluation.features import Extracted
from fasttrain.evaluation.linear_probe import LinearClassifier, fit_linear
from fasttrain.evaluation.model import EvaluatedModel

SHOWN_VIDEOS = 4
HELD_OUT = 0.2
# The published annotations differ from their videos by a few frames, not by a frame rate.
MAX_DIFFERENCE = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    features.add_arguments(parser)
    datasets.add_frame_arguments(parser)
    parser.add_argument("--stride", type=int, default=1, help="encode one of so many frames (default: 1)")
    parser.add_argument("--smooth", type=int, default=1, help="encoded frames to average (default: 1)")
    parser.add_argument(
        "--max-train-frames", type=int, default=200_000, help="to fit, evenly chosen (default: %(default)s)"
    )
    parser.add_argument(
        "--tiou", choices=tuple(metrics.TEMPORAL_IOU), default="thumos",
        help="temporal IoU of the mAP: thumos 0.1:0.7, activitynet 0.5:0.95 (default: thumos)",
    )  # fmt: skip
    linear_probe.add_arguments(parser)


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Figures of all test videos, on the main process."""
    check_options(arguments, smooth=1, max_train_frames=1, max_iterations=1)
    split = datasets.read_split(arguments)
    classes, background = split.classes, datasets.background_numbers(split.classes, arguments.background)
    paths = {video.name: video.path for video in (*split.train, *split.test)}
    extracted = features.extract(paths, arguments, model, output, world)
    if extracted is None:
        return None
    unlike: list[str] = []
    train, test = (_fit_to_frames(videos, extracted, unlike) for videos in (split.train, split.test))
    if unlike:
        print(f"videos that do not fit their labels: {len(unlike)} are skipped, such as {unlike[0]}")
    trained, tested = (
        sorted({label for video in videos for label in np.unique(video.labels_T).tolist()})
        for videos in (train, test)
    )
    truth = {video.name: video.labels_T for video in test}
    results, classifiers = {}, {}
    predicted: dict[str, dict[str, Labels]] = {variant: {} for variant in model.variants}
    for variant, found in predicted.items():
        classifier = _fit(train, extracted, variant, trained, arguments, world.device)
        classifiers[variant] = classifier.describe()
        detections = {}
        for name, labels_T in truth.items():
            logits_SC = classifier.scores(extracted.load(name, variant).to(world.device))
            # A class without training has no probability.
            probabilities_SC = np.zeros((len(logits_SC), len(classes)))
            probabilities_SC[:, trained] = logits_SC.softmax(dim=-1).cpu().numpy()
            probabilities_SC = smoothed(probabilities_SC, arguments.smooth)
            probabilities_TC = probabilities_SC.repeat(arguments.stride, axis=0)[: len(labels_T)]
            found[name] = probabilities_TC.argmax(axis=1)
            detections[name] = metrics.scored_segments(found[name], probabilities_TC, background)
        results[variant] = _figures(
            found, detections, truth, background, metrics.TEMPORAL_IOU[arguments.tiou]
        )
    shown = [test[index].name for index in evenly_spaced(len(test), SHOWN_VIDEOS)]
    rows = {"truth": truth, **predicted}
    bars = [(name, {row: labels[name] for row, labels in rows.items()}) for name in shown]
    plots.segment_bars(bars, classes, output / "figures" / "segments.png", background)
    return {
        "data": {
            "classes": len(classes),
            "background": [classes[number] for number in background],
            "train_videos": len(train),
            "train_frames": sum(len(video.labels_T) for video in train),
            "test_videos": len(test),
            "test_frames": sum(len(video.labels_T) for video in test),
            "classes_without_training": [classes[number] for number in tested if number not in trained],
            "skipped": extracted.skipped + unlike,
        },
        "results": results,
        "classifier": classifiers,
        "per_video": {
            name: {
                variant: {
                    "accuracy": metrics.frame_accuracy([found[name]], [labels_T]),
                    "edit": metrics.edit_score([found[name]], [labels_T], background),
                }
                for variant, found in predicted.items()
            }
            for name, labels_T in truth.items()
        },
    }


def _fit_to_frames(
    listed: Sequence[LabelledVideo], extracted: Extracted, unlike: list[str]
) -> list[LabelledVideo]:
    """The videos with their labels cut to their frames; `unlike` gets those with too few or many labels."""
    fitting = []
    for video in extracted.readable(listed):
        frames, labels = extracted.num_frames[video.name], len(video.labels_T)
        if abs(frames - labels) > MAX_DIFFERENCE * labels:
            unlike.append(f"{video.name}: {frames} frames, but {labels} labels; expected a label per frame")
        else:
            fitting.append(replace(video, labels_T=video.labels_T[:frames]))
    return fitting


def _figures(
    predicted: Mapping[str, Labels],
    detections: Mapping[str, Sequence[metrics.Segment]],
    truth: Mapping[str, Labels],
    background: Sequence[int],
    thresholds: Sequence[float],
) -> dict[str, float]:
    """Of all test videos together, in percent."""
    found, true = list(predicted.values()), list(truth.values())
    true_segments = {name: metrics.segments(labels_T, background) for name, labels_T in truth.items()}
    precision = metrics.detection_map(detections, true_segments, thresholds)
    return {
        "frame accuracy": metrics.frame_accuracy(found, true),
        "edit": metrics.edit_score(found, true, background),
        **{
            f"F1@{100 * share:.0f}": metrics.segmental_f1(found, true, share, background)
            for share in metrics.OVERLAPS
        },
        **{f"mAP@{threshold:g}": value for threshold, value in precision.items()},
        "mAP mean": float(np.mean(list(precision.values()))),
    }


def _fit(
    train: Sequence[LabelledVideo],
    extracted: Extracted,
    variant: str,
    trained: Sequence[int],
    arguments: argparse.Namespace,
    device: torch.device,
) -> LinearClassifier:
    """A classifier of single frames; its L2 is chosen on the last fifth of the training videos."""
    sampled = [torch.from_numpy(video.labels_T[:: arguments.stride]) for video in train]
    lengths = [len(labels_S) for labels_S in sampled]
    chosen_S = torch.zeros(sum(lengths), dtype=torch.bool)
    chosen_S[evenly_spaced(len(chosen_S), arguments.max_train_frames)] = True
    # By video: the features of all frames need not fit in memory.
    features_SD = torch.cat(
        [
            extracted.load(video.name, variant)[: len(own_S)][own_S]
            for video, own_S in zip(train, chosen_S.split(lengths), strict=True)
        ]
    )
    labels_S = torch.searchsorted(torch.tensor(trained), torch.cat(sampled)[chosen_S])
    # Of two videos one is held out; of one, none.
    held_out_from = len(train) - max(int(len(train) * HELD_OUT), int(len(train) > 1))
    is_held_out = torch.arange(len(train)) >= held_out_from
    return fit_linear(
        features_SD.to(device),
        labels_S.to(device),
        num_classes=len(trained),
        held_out_S=is_held_out.repeat_interleave(torch.tensor(lengths))[chosen_S].to(device),
        max_iterations=arguments.max_iterations,
    )


def smoothed(probabilities_SC: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Running mean over `window` frames about each, fewer at the ends."""
    # Of an even number one more comes after the frame than before it.
    total_SC, count_S1 = (
        uniform_filter1d(array, window, axis=0, mode="constant", origin=window % 2 - 1)
        for array in (probabilities_SC, np.ones((len(probabilities_SC), 1)))
    )
    return total_SC / count_S1
