"""Action localisation: a linear classifier on single frames of video, judged by frames and by segments.

Reads Breakfast, GTEA, 50Salads and what is laid out like them (`segmentation.py`). The classifier sees one
frame at a time, so that what is measured is the features. Measures and their sources are in
`localization.py`, the classifier in `linear.py`. Shape suffixes: T frames, S sampled frames, D channels, C
classes.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fasttrain.data.sampling import evenly_spaced
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import charts, features, segmentation
from fasttrain.evaluation.features import Extracted, Sampling, extract
from fasttrain.evaluation.linear_probe import MAX_ITERATIONS, LinearClassifier, fit_linear
from fasttrain.evaluation.metrics import (
    OVERLAPS,
    TEMPORAL_IOU,
    Segment,
    detection_map,
    edit_score,
    frame_accuracy,
    scored_segments,
    segmental_f1,
    segments,
)
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.segmentation import Dataset, LabelledFrames, Labels

SHOWN_VIDEOS = 4
HELD_OUT = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    features.add_arguments(parser)
    segmentation.add_arguments(parser)
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


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Figures of all test videos, on the main process."""
    for name in ("smooth", "max_train_frames", "max_iterations"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected at least 1")
    data = segmentation.read_dataset(arguments)
    background = segmentation.background_numbers(data.classes, arguments.background)
    sampling = Sampling(
        pool="frame",
        num_frames=None,
        stride=arguments.stride,
        image_size=arguments.image_size,
        precision=arguments.precision,
    )
    places = {video.name: video.place for video in (*data.train, *data.test)}
    extracted = extract(places, sampling, model, arguments, output, world)
    if extracted is None:
        return None
    train, train_skipped = segmentation.fit_to_frames(data.train, extracted.num_frames)
    test, test_skipped = segmentation.fit_to_frames(data.test, extracted.num_frames)
    unlike = train_skipped + test_skipped
    if unlike:
        print(f"videos that do not fit their labels: {len(unlike)} are skipped, such as {unlike[0]}")
    skipped = extracted.skipped + unlike
    for videos, which in ((train, "training"), (test, "test")):
        if not videos:
            raise InputError(f"no video of the {which} list can be used; {'; '.join(skipped[:3])}")
    judged = {
        variant: _Judged(data, train, test, extracted, variant, background, arguments, world.device)
        for variant in model.variants
    }
    _draw(test, judged, data.classes, background, output)
    untrained = segmentation.occurring(test) - segmentation.occurring(train)
    return {
        "data": {
            "classes": len(data.classes),
            "background": [data.classes[number] for number in background],
            "train_videos": len(train),
            "train_frames": sum(len(video.labels_T) for video in train),
            "test_videos": len(test),
            "test_frames": sum(len(video.labels_T) for video in test),
            "classes_without_training": [data.classes[number] for number in sorted(untrained)],
            "skipped": skipped,
        },
        "results": {variant: one.figures() for variant, one in judged.items()},
        "classifier": {variant: one.classifier.describe() for variant, one in judged.items()},
        "per_video": {
            video.name: {variant: one.figures_of(video) for variant, one in judged.items()} for video in test
        },
    }


class _Judged:
    """A classifier trained on one variant's features, and what it says of the test videos."""

    def __init__(
        self,
        data: Dataset,
        train: Sequence[LabelledFrames],
        test: Sequence[LabelledFrames],
        extracted: Extracted,
        variant: str,
        background: Sequence[int],
        arguments: argparse.Namespace,
        device: torch.device,
    ) -> None:
        self.test, self.background = test, background
        self.thresholds = TEMPORAL_IOU[arguments.tiou]
        trained = sorted(segmentation.occurring(train))
        self.classifier = _fit(train, extracted, variant, trained, arguments, device)
        self.predicted: dict[str, Labels] = {}
        self.detections: dict[str, list[Segment]] = {}
        for video in test:
            features_SD = extracted.load(video.name, variant).features_TD.to(device)
            # A class without training has no probability.
            found_SC = np.zeros((len(features_SD), len(data.classes)))
            found_SC[:, trained] = self.classifier.probabilities(features_SD).cpu().numpy()
            probabilities_SC = smoothed(found_SC, arguments.smooth)
            probabilities_TC = probabilities_SC.repeat(arguments.stride, axis=0)[: len(video.labels_T)]
            labels_T = probabilities_TC.argmax(axis=1)
            self.predicted[video.name] = labels_T
            self.detections[video.name] = scored_segments(labels_T, probabilities_TC, background)

    def figures(self) -> dict[str, float]:
        """Of all test videos together, in percent."""
        predicted, truth = list(self.predicted.values()), [video.labels_T for video in self.test]
        true_segments = {video.name: segments(video.labels_T, self.background) for video in self.test}
        precision = detection_map(self.detections, true_segments, self.thresholds)
        return {
            "frame accuracy": frame_accuracy(predicted, truth),
            "edit": edit_score(predicted, truth, self.background),
            **{
                f"F1@{round(100 * overlap)}": segmental_f1(predicted, truth, overlap, self.background)
                for overlap in OVERLAPS
            },
            **{f"mAP@{threshold:g}": value for threshold, value in precision.items()},
            "mAP mean": float(np.mean(list(precision.values()))),
        }

    def figures_of(self, video: LabelledFrames) -> dict[str, float]:
        predicted, truth = [self.predicted[video.name]], [video.labels_T]
        return {
            "accuracy": frame_accuracy(predicted, truth),
            "edit": edit_score(predicted, truth, self.background),
        }


def _fit(
    train: Sequence[LabelledFrames],
    extracted: Extracted,
    variant: str,
    trained: Sequence[int],
    arguments: argparse.Namespace,
    device: torch.device,
) -> LinearClassifier:
    """A classifier of single frames; its L2 is chosen on the last fifth of the training videos."""
    total = sum(len(video.labels_T[:: arguments.stride]) for video in train)
    chosen = np.zeros(total, dtype=bool)
    chosen[evenly_spaced(total, arguments.max_train_frames)] = True
    # Of two videos one is held out; of one, none.
    held_out_from = len(train) - max(int(len(train) * HELD_OUT), int(len(train) > 1))
    parts, labels, held_out = [], [], []
    start = 0
    for number, video in enumerate(train):
        sampled_S = video.labels_T[:: arguments.stride]
        own_S = chosen[start : start + len(sampled_S)]
        start += len(sampled_S)
        features_SD = extracted.load(video.name, variant).features_TD
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


def smoothed(probabilities_SC: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Running mean over `window` frames about each, fewer at the ends."""
    if window == 1:
        return probabilities_SC
    total_SC = np.concatenate([np.zeros_like(probabilities_SC[:1]), np.cumsum(probabilities_SC, axis=0)])
    places = np.arange(len(probabilities_SC))
    start = np.maximum(places - (window - 1) // 2, 0)
    end = np.minimum(places + window // 2 + 1, len(probabilities_SC))
    return (total_SC[end] - total_SC[start]) / (end - start)[:, None]


def _draw(
    test: Sequence[LabelledFrames],
    judged: Mapping[str, _Judged],
    classes: Sequence[str],
    background: Sequence[int],
    output: Path,
) -> None:
    shown = [test[place] for place in evenly_spaced(len(test), SHOWN_VIDEOS)]
    rows = [
        (
            video.name,
            {
                "truth": video.labels_T,
                **{variant: one.predicted[video.name] for variant, one in judged.items()},
            },
        )
        for video in shown
    ]
    charts.segment_bars(rows, classes, output / "figures" / "segments.png", background)
