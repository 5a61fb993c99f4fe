"""Classify videos by their features, with a weighted k-NN and a linear probe: top-1 and top-5 accuracy.

Supported datasets are UCF101, HMDB51, Kinetics, Something-Something V2 and plain lists.
"""

# Shape suffixes: S test videos, N training videos, D channels, C classes.

import argparse
from pathlib import Path
from typing import Any

from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import check_options
from fasttrain.evaluation import metrics, plots
from fasttrain.evaluation.features import class_numbers, extract_split
from fasttrain.evaluation.linear_probe import fit_linear

TOP = (1, 5)


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Evaluate all test videos. Returns the results on the main process and None on the others."""
    check_options(arguments, neighbours=1, max_iterations=1, temperature=metrics.MIN_TEMPERATURE)
    extraction = extract_split(arguments, model, output, world)
    if extraction is None:
        return None
    split, extracted, data = extraction
    classes = split.classes
    labels_N, labels_S = class_numbers(split.train), class_numbers(split.test)
    held_out_N = metrics.hold_out(labels_N)
    results, probes, confusions, per_class = {}, {}, {}, {}
    for variant in model.variants:
        train_ND, test_SD = (
            extracted.stack(videos, variant).to(world.device) for videos in (split.train, split.test)
        )
        votes = metrics.knn_classify(
            test_SD,
            train_ND,
            labels_N.to(world.device),
            num_classes=len(classes),
            neighbours=arguments.neighbours,
            temperature=arguments.temperature,
        )
        probe = fit_linear(
            train_ND,
            labels_N.to(world.device),
            num_classes=len(classes),
            held_out_S=held_out_N.to(world.device),
            max_iterations=arguments.max_iterations,
        )
        logits_SC = probe.scores(test_SD).cpu()
        scores = {f"{k}-NN": votes_SC.cpu() for k, votes_SC in votes.items()} | {"linear": logits_SC}
        results[variant] = {
            f"{name} top-{k}": metrics.top_accuracy(scores_SC, labels_S, k)
            for name, scores_SC in scores.items()
            for k in TOP
        }
        probes[variant] = probe.describe()
        counts_CC = confusions[variant] = metrics.confusion(logits_SC.argmax(dim=1), labels_S, len(classes))
        per_class[variant] = {
            classes[label]: 100 * counts_CC[label, label] / counts_CC[label].sum()
            for label in labels_S.unique().tolist()
        }
    plots.confusion_maps(confusions, classes, output / "figures" / "confusion.png")
    return {
        "data": {**data, "held_out_videos": int(held_out_N.sum())},
        "results": results,
        "linear_probe": probes,
        "linear_top_1_per_class": per_class,
    }
