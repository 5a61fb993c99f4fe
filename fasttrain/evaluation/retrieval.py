"""Video retrieval: for every test video the nearest training videos, and recall at 1, 5 and 10.

Reads UCF101, HMDB51 and the other layouts of `splits.py`; the measure and its protocol are in `retrieval.py`.
Shape suffixes: Q queries, G gallery videos, D channels, K neighbours.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.sampling import evenly_spaced
from fasttrain.distributed import World
from fasttrain.evaluation import charts, video_features
from fasttrain.evaluation.features import Extracted
from fasttrain.evaluation.metrics import RANKS, nearest, recall_at
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.splits import LabelledVideo
from fasttrain.evaluation.video_features import extract_split, stack

SHOWN_QUERIES = 4
SHOWN_NEIGHBOURS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    video_features.add_arguments(parser)


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Recall of all test videos, on the main process."""
    found = extract_split(arguments, model, output, world)
    if found is None:
        return None
    split, extracted, data = found
    labels_G = torch.tensor([video.label for video in split.train])
    labels_Q = torch.tensor([video.label for video in split.test])
    results: dict[str, dict[str, float]] = {}
    per_class: dict[str, dict[str, float]] = {}
    neighbours: dict[str, Tensor] = {}
    for variant in model.variants:
        queries_QD, gallery_GD = (stack(videos, extracted, variant) for videos in (split.test, split.train))
        _, neighbours[variant] = nearest(queries_QD, gallery_GD, max(RANKS))
        labels_QK = labels_G[neighbours[variant]]
        results[variant] = {f"R@{k}": value for k, value in recall_at(labels_QK, labels_Q).items()}
        per_class[variant] = {
            split.classes[label]: recall_at(labels_QK[labels_Q == label], labels_Q[labels_Q == label], [1])[1]
            for label in labels_Q.unique().tolist()
        }
    _draw(split.train, split.test, split.classes, neighbours, extracted, output)
    return {"data": data, "results": results, "recall_at_1_per_class": per_class}


def _draw(
    train: list[LabelledVideo],
    test: list[LabelledVideo],
    classes: list[str],
    neighbours: dict[str, Tensor],
    extracted: Extracted,
    output: Path,
) -> None:
    """A few queries, evenly chosen, with what lies nearest at each variant."""
    rows = []
    for query in evenly_spaced(len(test), SHOWN_QUERIES):
        for variant, neighbours_QK in neighbours.items():
            nearest_K = [train[place] for place in neighbours_QK[query, :SHOWN_NEIGHBOURS].tolist()]
            pictures = [extracted.load(video.name, variant).picture() for video in (test[query], *nearest_K)]
            names = ", ".join(classes[video.label] for video in nearest_K)
            rows.append(
                charts.RetrievalRow(
                    caption=f"{variant}: {classes[test[query].label]} finds {names}",
                    query=pictures[0],
                    neighbours=pictures[1:],
                    right=[video.label == test[query].label for video in nearest_K],
                )
            )
    charts.retrieval_sheet(rows, output / "figures" / "retrieval.png")
