"""Classification of videos by frozen features: weighted k-NN and a linear probe, top-1 and top-5.

Reads UCF101, HMDB51, Kinetics, Something-Something V2 and plain lists (`datasets.py`); what is measured, and
after whom, stands in `metrics.py` and `linear_probe.py`. Shape suffixes: S test videos, N training videos, D
channels, C classes.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fasttrain.distributed import World
from fasttrain.errors import check_options
from fasttrain.evaluation import plots
from fasttrain.evaluation.features import add_split_arguments, extract_split
from fasttrain.evaluation.linear_probe import MAX_ITERATIONS, fit_linear
from fasttrain.evaluation.metrics import (
    MIN_TEMPERATURE,
    NEIGHBOURS,
    TEMPERATURE,
    confusion,
    hold_out,
    knn_classify,
    top_accuracy,
)
from fasttrain.evaluation.model import EvaluatedModel

TOP = (1, 5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_split_arguments(parser)
    parser.add_argument(
        "--neighbours", type=int, nargs="+", default=list(NEIGHBOURS), metavar="K",
        help=f"of the k-NN; those above the number of training videos are left out (default: {NEIGHBOURS})",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=TEMPERATURE, help=f"of its votes (default: {TEMPERATURE})"
    )
    parser.add_argument(
        "--max-iterations", type=int, default=MAX_ITERATIONS,
        help=f"of L-BFGS for each linear probe (default: {MAX_ITERATIONS})",
    )  # fmt: skip


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Accuracy on all test videos, on the main process."""
    check_options(arguments, neighbours=1, max_iterations=1, temperature=MIN_TEMPERATURE)
    found = extract_split(arguments, model, output, world)
    if found is None:
        return None
    split, extracted, data = found
    labels_N = torch.tensor([video.label for video in split.train])
    labels_S = torch.tensor([video.label for video in split.test])
    held_out_N = hold_out(labels_N)
    results: dict[str, dict[str, float]] = {}
    probes: dict[str, dict[str, Any]] = {}
    confusions: dict[str, npt.NDArray[np.int64]] = {}
    for variant in model.variants:
        train_ND, test_SD = (
            extracted.stack(videos, variant).to(world.device) for videos in (split.train, split.test)
        )
        scores = {
            f"{k}-NN": votes_SC.cpu()
            for k, votes_SC in knn_classify(
                test_SD,
                train_ND,
                labels_N.to(world.device),
                num_classes=len(split.classes),
                neighbours=tuple(arguments.neighbours),
                temperature=arguments.temperature,
            ).items()
        }
        probe = fit_linear(
            train_ND,
            labels_N.to(world.device),
            num_classes=len(split.classes),
            held_out_S=held_out_N.to(world.device),
            max_iterations=arguments.max_iterations,
        )
        scores["linear"] = probe.scores(test_SD).cpu()
        results[variant] = {
            f"{name} top-{k}": top_accuracy(scores_SC, labels_S, k)
            for name, scores_SC in scores.items()
            for k in TOP
        }
        probes[variant] = probe.describe()
        confusions[variant] = confusion(scores["linear"].argmax(dim=1), labels_S, len(split.classes))
    plots.confusion_maps(confusions, split.classes, output / "figures" / "confusion.png")
    return {
        "data": {**data, "held_out_videos": int(held_out_N.sum())},
        "results": results,
        "linear_probe": probes,
        "linear_top_1_per_class": {
            variant: {
                split.classes[label]: 100 * int(counts_CC[label, label]) / int(counts_CC[label].sum())
                for label in labels_S.unique().tolist()
            }
            for variant, counts_CC in confusions.items()
        },
    }
