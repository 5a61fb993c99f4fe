"""Features of the training and test videos of a split: what retrieval and probe share.

Shape suffixes: V videos, D channels.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import features, splits
from fasttrain.evaluation.features import Extracted, Sampling, extract
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.splits import LabelledVideo, VideoSplit, describe_split, read_split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    splits.add_arguments(parser)
    features.add_arguments(parser)
    parser.add_argument(
        "--num-frames", type=int, default=16, help="evenly spread over each video (default: 16)"
    )


def extract_split(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> tuple[VideoSplit, Extracted, dict[str, Any]] | None:
    """The split without the videos that cannot be read, the features, and facts for the JSON.

    On the main process; None on the others. Raises InputError as `read_split` does, and where unreadable
    videos leave the training or test list empty, or a class without a training video.
    """
    split = read_split(arguments)
    sampling = Sampling(
        pool="video",
        num_frames=arguments.num_frames,
        stride=1,
        image_size=arguments.image_size,
        precision=arguments.precision,
    )
    places = {video.name: video.place for video in (*split.train, *split.test)}
    extracted = extract(places, sampling, model, arguments, output, world)
    if extracted is None:
        return None
    skipped, readable = extracted.skipped, extracted.num_frames
    train, test = ([one for one in videos if one.name in readable] for videos in (split.train, split.test))
    for videos, which in ((train, "training"), (test, "test")):
        if not videos:
            raise InputError(f"no video of the {which} list can be read; {'; '.join(skipped[:3])}")
    untrained = sorted({one.label for one in test} - {one.label for one in train})
    if untrained:
        raise InputError(
            f"no training video of class {split.classes[untrained[0]]!r} is there and can be read "
            f"({len(untrained)} such classes); {'; '.join(skipped[:3]) or 'some are missing'}"
        )
    split = replace(split, train=train, test=test)
    return split, extracted, {**describe_split(split), "skipped": skipped}


def stack(videos: Sequence[LabelledVideo], extracted: Extracted, variant: str) -> Tensor:
    """(V, D) float32 of the videos in their order."""
    return torch.cat([extracted.load(video.name, variant).features_TD for video in videos])
