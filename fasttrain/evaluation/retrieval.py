"""Retrieve the nearest training videos of each test video and measure recall at 1, 5 and 10.

Supported datasets are UCF101, HMDB51, Kinetics, Something-Something V2 and plain lists.
"""

# Shape suffixes: Q queries, G gallery videos, D channels, K neighbours.

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from fasttrain.data.sampling import evenly_spaced
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.evaluation import plots
from fasttrain.evaluation.datasets import VideoSplit
from fasttrain.evaluation.features import class_numbers, extract_split, middle_frame
from fasttrain.evaluation.metrics import RANKS, nearest, recall_at

SHOWN_QUERIES = 4
SHOWN_NEIGHBOURS = 5


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Evaluate all test videos. Returns the results on the main process and None on the others."""
    extraction = extract_split(arguments, model, output, world)
    if extraction is None:
        return None
    split, extracted, data = extraction
    labels_G, labels_Q = class_numbers(split.train), class_numbers(split.test)
    results, per_class, neighbours = {}, {}, {}
    for variant in model.variants:
        queries_QD, gallery_GD = (extracted.stack(videos, variant) for videos in (split.test, split.train))
        _, neighbours[variant] = nearest(queries_QD, gallery_GD, max(RANKS))
        labels_QK = labels_G[neighbours[variant]]
        results[variant] = {f"R@{k}": value for k, value in recall_at(labels_QK, labels_Q).items()}
        per_class[variant] = {
            split.classes[label]: recall_at(labels_QK[labels_Q == label], labels_Q[labels_Q == label], [1])[1]
            for label in labels_Q.unique().tolist()
        }
    _draw(split, neighbours, arguments.num_frames, output, model.title)
    return {"data": data, "results": results, "recall_at_1_per_class": per_class}


def _draw(
    split: VideoSplit, neighbours: dict[str, Tensor], num_frames: int, output: Path, model: str
) -> None:
    """Draw evenly spaced queries, each with its nearest videos by variant."""
    sheet = []
    for number in evenly_spaced(len(split.test), SHOWN_QUERIES):
        query = split.test[number]
        for variant, neighbours_QK in neighbours.items():
            nearest_videos = [split.train[i] for i in neighbours_QK[number, :SHOWN_NEIGHBOURS].tolist()]
            pictures = [plots.framed(middle_frame(query.path, num_frames))]
            pictures += [
                plots.framed(middle_frame(video.path, num_frames), video.label == query.label)
                for video in nearest_videos
            ]
            marks = ["✓" if video.label == query.label else "✗" for video in nearest_videos]
            names = [plots.shorten(split.classes[video.label], 18) for video in (query, *nearest_videos)]
            captions = [f"{mark} {name}".strip() for mark, name in zip(["", *marks], names, strict=True)]
            sheet.append(plots.Row(variant, pictures, captions=captions))
    columns = ["query", *(f"rank {rank}" for rank in range(1, SHOWN_NEIGHBOURS + 1))]
    path, title = output / "figures" / "retrieval.png", f"{model}: the most similar training videos"
    plots.contact_sheet(sheet, path, columns, title=title, page=True)
