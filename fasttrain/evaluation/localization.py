"""Localise actions in time with a linear classifier of single frames: accuracy, F1, edit score and mAP.

Supported datasets are Breakfast, GTEA, 50Salads and others in their layout. The classifier uses one frame at
a time, so the results reflect the features and not a temporal model.
"""

# Shape suffixes: T frames, S sampled frames, D channels, C classes.

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
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError, check_options
from fasttrain.evaluation import datasets, features, metrics, plots
from fasttrain.evaluation.datasets import LabelledVideo, Labels
from fasttrain.evaluation.features import Extracted
from fasttrain.evaluation.linear_probe import LinearClassifier, fit_linear
from fasttrain.loggers import say

SHOWN_VIDEOS = 4
HELD_OUT = 0.2
# Skip a video if the number of its labels differs from that of its frames by more than this share. Published
# annotations are a few frames off; a larger difference means another frame rate.
MAX_DIFFERENCE = 0.1


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Evaluate all test videos. Returns the results on the main process and None on the others."""
    check_options(arguments, smooth=1, max_train_frames=1, max_iterations=1)
    split = datasets.read_split(arguments)
    classes, background = split.classes, datasets.background_numbers(split.classes, arguments.background)
    paths = {video.name: video.path for video in (*split.train, *split.test)}
    extracted = features.extract(paths, arguments, model, output, world)
    if extracted is None:
        return None
    mismatched: list[str] = []
    train, test = (_trim_labels(videos, extracted, mismatched) for videos in (split.train, split.test))
    if mismatched:
        say(
            f"skipped videos with too few or too many labels: {len(mismatched)} (for example {mismatched[0]})"
        )
    train_classes, test_classes = (
        sorted({label for video in videos for label in np.unique(video.labels_T).tolist()})
        for videos in (train, test)
    )
    truth = {video.name: video.labels_T for video in test}
    results, classifiers = {}, {}
    predicted: dict[str, dict[str, Labels]] = {variant: {} for variant in model.variants}
    for variant, labels_by_video in predicted.items():
        classifier = _fit(train, extracted, variant, train_classes, arguments, world.device)
        classifiers[variant] = classifier.describe()
        detections = {}
        for name, labels_T in truth.items():
            logits_SC = classifier.scores(extracted.load(name, variant).to(world.device))
            # Classes without training videos keep the probability 0.
            probabilities_SC = np.zeros((len(logits_SC), len(classes)))
            probabilities_SC[:, train_classes] = logits_SC.softmax(dim=-1).cpu().numpy()
            probabilities_SC = smoothed(probabilities_SC, arguments.smooth)
            probabilities_TC = probabilities_SC.repeat(arguments.stride, axis=0)[: len(labels_T)]
            predicted_T = labels_by_video[name] = probabilities_TC.argmax(axis=1)
            detections[name] = metrics.scored_segments(predicted_T, probabilities_TC, background)
        results[variant] = _measure(
            labels_by_video, detections, truth, background, metrics.TEMPORAL_IOU[arguments.tiou]
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
            "classes_without_training": [classes[i] for i in test_classes if i not in train_classes],
            "skipped": extracted.skipped + mismatched,
        },
        "results": results,
        "classifier": classifiers,
        "per_video": {
            name: {
                variant: {
                    "accuracy": metrics.frame_accuracy([by_video[name]], [labels_T]),
                    "edit": metrics.edit_score([by_video[name]], [labels_T], background),
                }
                for variant, by_video in predicted.items()
            }
            for name, labels_T in truth.items()
        },
    }


def _trim_labels(
    listed: Sequence[LabelledVideo], extracted: Extracted, mismatched: list[str]
) -> list[LabelledVideo]:
    """Trim the labels of each video to its number of frames.

    Videos with far too few or too many labels are left out and described in `mismatched`. Raises
    InputError if no video remains.
    """
    trimmed = []
    for video in extracted.readable(listed):
        frames, labels = extracted.num_frames[video.name], len(video.labels_T)
        if abs(frames - labels) > MAX_DIFFERENCE * labels:
            mismatched.append(f"{video.name}: {frames} frames, but {labels} labels; expected one per frame")
        else:
            trimmed.append(replace(video, labels_T=video.labels_T[:frames]))
    if not trimmed:
        raise InputError(
            f"all videos in a list have too few or too many labels (for example {mismatched[-1]}). Pass "
            "videos at the frame rate of the labels."
        )
    return trimmed


def _measure(
    predicted: Mapping[str, Labels],
    detections: Mapping[str, Sequence[metrics.Segment]],
    truth: Mapping[str, Labels],
    background: Sequence[int],
    thresholds: Sequence[float],
) -> dict[str, float]:
    """Return the metrics over all test videos, in percent."""
    labels, true_labels = list(predicted.values()), list(truth.values())
    true_segments = {name: metrics.segments(labels_T, background) for name, labels_T in truth.items()}
    precision = metrics.detection_map(detections, true_segments, thresholds)
    return {
        "frame accuracy": metrics.frame_accuracy(labels, true_labels),
        "edit": metrics.edit_score(labels, true_labels, background),
        **{
            f"F1@{100 * overlap:.0f}": metrics.segmental_f1(labels, true_labels, overlap, background)
            for overlap in metrics.OVERLAPS
        },
        **{f"mAP@{threshold:g}": value for threshold, value in precision.items()},
        "mAP mean": float(np.mean(list(precision.values()))),
    }


def _fit(
    train: Sequence[LabelledVideo],
    extracted: Extracted,
    variant: str,
    train_classes: Sequence[int],
    arguments: argparse.Namespace,
    device: torch.device,
) -> LinearClassifier:
    """Fit a classifier of single frames, with its L2 chosen on the last fifth of the training videos."""
    sampled = [torch.from_numpy(video.labels_T[:: arguments.stride]) for video in train]
    lengths = [len(labels_S) for labels_S in sampled]
    chosen_S = torch.zeros(sum(lengths), dtype=torch.bool)
    chosen_S[evenly_spaced(len(chosen_S), arguments.max_train_frames)] = True
    # Load one video at a time, because the features of all frames may not fit in memory.
    features_SD = torch.cat(
        [
            extracted.load(video.name, variant)[: len(own_S)][own_S]
            for video, own_S in zip(train, chosen_S.split(lengths), strict=True)
        ]
    )
    labels_S = torch.searchsorted(torch.tensor(train_classes), torch.cat(sampled)[chosen_S])
    # Hold out at least one video, unless there is only one.
    held_out_from = len(train) - max(int(len(train) * HELD_OUT), int(len(train) > 1))
    is_held_out = torch.arange(len(train)) >= held_out_from
    return fit_linear(
        features_SD.to(device),
        labels_S.to(device),
        num_classes=len(train_classes),
        held_out_S=is_held_out.repeat_interleave(torch.tensor(lengths))[chosen_S].to(device),
        max_iterations=arguments.max_iterations,
    )


def smoothed(probabilities_SC: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Return the running mean over `window` frames centred on each frame, over fewer at the ends."""
    # An even window has one more frame after its centre than before it.
    total_SC, count_S1 = (
        uniform_filter1d(array, window, axis=0, mode="constant", origin=window % 2 - 1)
        for array in (probabilities_SC, np.ones((len(probabilities_SC), 1)))
    )
    return total_SC / count_S1
