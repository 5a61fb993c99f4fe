"""Validation during training, without labels: which projection to keep, and whether any is worth keeping.

Three encoders are measured on the same frames: the frozen one (`before`), the frozen one with the mean of its
tokens removed and, if that is better, partly whitened (`centred`), which costs no training, and that of the
current projection (`after`). `score` decides which is better.
"""

# Shape suffixes: T frames, H W pixels, N tokens, D channels.

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasttrain.backbones import Backbone
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FrameIndex
from fasttrain.data.preprocessing import centre_crop, stream_frames
from fasttrain.data.sampling import evenly_spaced
from fasttrain.errors import InputError
from fasttrain.evaluation.trade_off import (
    MIN_FRAMES,
    VideoMeasures,
    measure_video,
    nearest_accuracy,
    summarise,
)
from fasttrain.loggers import count
from fasttrain.projection import Projection
from fasttrain.recipe import Recipe

# The metrics of `trade_off` that are recorded. The plot of the trade-off shows the two normalised distances.
RECORDED = ("cycle_accuracy", "effective_rank", "intra_normalized_95", "inter_normalized_95")


def score(tokens_TND: Tensor) -> float:
    """Return the number by which projections are compared, for the tokens of a video; higher is better.

    Of several measures without labels, this one agreed best with label propagation (docs/benchmarks.md).

    Returns:
        The share of windows that are the nearest neighbour of their nearest neighbour, from 0 to 1; NaN if a
            feature is not finite.
    """
    return nearest_accuracy(tokens_TND).item()


def hold_out(index: FrameIndex, number: int) -> tuple[FrameIndex, FrameIndex]:
    """Return the videos to train on, and `number` evenly spaced ones to validate. 0: all videos, for both.

    Raises InputError if too few videos are long enough.
    """
    if not number:
        return index, index
    long_enough = np.flatnonzero(index.num_frames >= MIN_FRAMES)
    if number > len(long_enough) or number == len(index):
        raise InputError(
            f"eval.held_out: {number} is too many for {count(len(index), 'video')}, of which "
            f"{len(long_enough)} have at least {MIN_FRAMES} frames; lower it, or pass more videos"
        )
    chosen = long_enough[evenly_spaced(len(long_enough), number)]
    others = np.setdiff1d(np.arange(len(index)), chosen)
    return index.select(others.tolist()), index.select(chosen.tolist())


def read_frames(index: FrameIndex, video: int, num_frames: int, image_size: int, encoder: Backbone) -> Tensor:
    """Read evenly spaced crops (T, 3, H, W) of a video, normalised for the encoder.

    Raises UnreadableFrameError if the video is too short or a frame is unreadable.
    """
    length = int(index.num_frames[video])
    if length < MIN_FRAMES:
        raise UnreadableFrameError(f"fewer than {MIN_FRAMES} frames")
    frames = stream_frames(index, video, evenly_spaced(length, num_frames))
    return torch.stack([centre_crop(frame, image_size, encoder.mean, encoder.std) for frame in frames])


class Validation:
    """Measures the projections of one backbone during training, and keeps the best one.

    The frozen tokens of the videos are computed once and kept in host memory, in the encoder's dtype.

    Args:
        encoder: The frozen backbone, which the trainer may have cast to a lower precision.
        untrained: Projections that need no training, by the power to which they whiten the frozen tokens: 0
            removes only their mean.
        index: The videos to choose from. Those with fewer than 8 frames or unreadable ones are skipped.
        recipe: The recipe, whose section `eval` says how many to measure.

    Attributes:
        centred: The best of the untrained projections.
        whitening: The power to which it whitens.
        frozen: The metrics and scores of the frozen features, `before` and `centred`; empty if no video can
            be measured.
        best: The best projection so far, as a copy on the CPU; None before the first.
        best_step: The number of completed steps after which it was measured.
        best_score: Its score.
    """

    def __init__(
        self, encoder: Backbone, untrained: Mapping[float, Projection], index: FrameIndex, recipe: Recipe
    ) -> None:
        self.best: Projection | None = None
        self.best_step, self.best_score = 0, -math.inf
        # Scores on other videos or frames cannot be compared.
        self.settings = [recipe.eval.held_out, recipe.eval.num_videos, recipe.eval.num_frames]
        side = recipe.data.image_size
        self._device = encoder.device
        self._videos_TND: list[Tensor] = []
        long_enough = np.flatnonzero(index.num_frames >= MIN_FRAMES)
        for chosen in evenly_spaced(len(long_enough), recipe.eval.held_out or recipe.eval.num_videos):
            try:
                frames_T3HW = read_frames(
                    index, int(long_enough[chosen]), recipe.eval.num_frames, side, encoder
                )
            except UnreadableFrameError:
                continue
            with torch.no_grad():
                self._videos_TND.append(encoder.tokens(frames_T3HW.to(encoder.device, encoder.dtype)).cpu())
        self.frozen: dict[str, dict[str, float]] = {}
        measured = {}
        for power, projection in untrained.items() if self._videos_TND else ():
            metrics = self._measure(projection.to(encoder.device))
            # Not finite if features are not.
            if math.isfinite(metrics["score"]):
                measured[power] = metrics
        if measured:
            self.whitening = max(measured, key=lambda power: measured[power]["score"])
            self.centred = untrained[self.whitening]
            self.frozen = {"before": self._measure(nn.Identity()), "centred": measured[self.whitening]}

    @property
    def beats_frozen(self) -> bool:
        """Whether a projection was better than `centred`."""
        return self.best_score > self.frozen["centred"]["score"]

    def keeps(self, completed_steps: int) -> bool:
        """Whether the projection after `completed_steps` steps is the one to keep."""
        return self.beats_frozen and self.best_step == completed_steps

    @property
    def kept(self) -> Projection:
        """The best projection so far, or `centred` if none was better."""
        return self.best if self.best is not None and self.beats_frozen else self.centred

    def update(self, projection: Projection, completed_steps: int) -> dict[str, float | int | None]:
        """Measure a projection, and keep a copy of it if it is the best.

        Returns:
            The metrics `before/...`, `centred/...` and `after/...`, without undefined ones such as the
                inter-video distance of a single video; `best_step`, which is None if no projection was better
                than `centred`; `best_score`; and the `whitening` of `centred`.
        """
        measured = self.frozen | {"after": self._measure(projection)}
        if measured["after"]["score"] > self.best_score:
            self.best, self.best_step = copy.deepcopy(projection).cpu(), completed_steps
            self.best_score = measured["after"]["score"]
        numbers = {
            f"{variant}/{key}": value
            for variant, metrics in measured.items()
            for key, value in metrics.items()
            if math.isfinite(value)
        }
        best_step = self.best_step if self.beats_frozen else None
        kept = {"best_step": best_step, "best_score": self.best_score, "whitening": self.whitening}
        return numbers | kept

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue exactly."""
        best = None if self.best is None else self.best.state_dict()
        return {
            "settings": self.settings,
            "step": self.best_step,
            "score": self.best_score,
            "projection": best,
        }

    def resume(self, state: Mapping[str, Any], projection: Projection) -> bool:
        """Continue with what `state` has returned; `projection` is one of the same architecture.

        Returns False, without a change, if that was measured on other videos or frames.
        """
        if state["settings"] != self.settings:
            return False
        if state["projection"] is not None:
            self.best = copy.deepcopy(projection).cpu()
            self.best.load_state_dict(state["projection"])
        self.best_step, self.best_score = state["step"], state["score"]
        return True

    @torch.no_grad()
    def _measure(self, projection: nn.Module) -> dict[str, float]:
        """Return the recorded metrics and the score of a projection of the frozen tokens."""
        measured: list[VideoMeasures] = []
        scores = []
        for frozen_TND in self._videos_TND:
            tokens_TND = projection(frozen_TND.to(self._device).float()).float()
            measured.append(measure_video(tokens_TND))
            scores.append(score(tokens_TND))
        summary = summarise(measured)
        return {key: summary[key] for key in RECORDED} | {"score": fmean(scores)}


def describe_kept(record: Mapping[str, Any]) -> str:
    """Say which projection a run keeps, given its last record; an empty text if it was not validated."""
    if "best_step" not in record:
        return ""
    step, best = record["best_step"], record["best_score"]
    frozen = f"frozen {record['before/score']:.3f}, without its mean {record['centred/score']:.3f}"
    if step is None:
        whitened = " and partly whitened" if record["whitening"] else ""
        return (
            f"the frozen features with their mean removed{whitened}, because no projection was better on the "
            f"validation videos (best score {best:.3f}; {frozen})"
        )
    return f"the projection after step {step} (score {best:.3f}; {frozen})"


def has_improved(record: Mapping[str, Any]) -> bool:
    """Return whether a trained projection is better than the frozen features, with and without their mean."""
    return bool(record["best_step"]) and record["best_score"] > record["before/score"]
