"""The trade-off on a list of videos: the paper's analysis (`consistency.py`) before and after the projection.

Reads any source that training reads: frame folders, a list, video files, a packed set.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import figures
from fasttrain.evaluation.consistency import FEWEST_FRAMES, measure_videos
from fasttrain.evaluation.frames import centre_crop, read_clip, spread
from fasttrain.evaluation.harness import Subject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-frames", type=int, default=40, help="evenly spread over each video (default: 40)"
    )
    parser.add_argument("--num-videos", type=int, default=1000, help="at most, evenly chosen (default: 1000)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the middle crop (default: 224)")


def run(arguments: argparse.Namespace, subject: Subject, output: Path, world: World) -> dict[str, Any] | None:
    """Figures of all videos together. The main process does the work: inter-video distances need all."""
    if not world.is_main:
        return None
    index = open_source(arguments.root)
    skipped = [f"{name}: {reason}" for name, reason in index.skipped]
    tokens: dict[str, list[torch.Tensor]] = {moment: [] for moment in subject.moments}
    for video in spread(len(index), arguments.num_videos):
        if index.num_frames[video] < FEWEST_FRAMES:
            skipped.append(f"{index.names[video]}: fewer than {FEWEST_FRAMES} frames")
            continue
        try:
            clip = read_clip(index, video, spread(int(index.num_frames[video]), arguments.num_frames))
        except UnreadableFrameError as error:
            skipped.append(f"{index.names[video]}: {error}")
            continue
        frames = (centre_crop(frame, arguments.image_size) for frame in clip)
        for moment, tokens_TND in subject.tokens(frames, world.device).items():
            tokens[moment].append(tokens_TND.cpu())
    counted = len(tokens[subject.moments[0]])
    if not counted:
        raise InputError(f"no video of {arguments.root} can be measured; {'; '.join(skipped[:3])}")
    results = {moment: measure_videos(videos) for moment, videos in tokens.items()}
    if set(results) == {"before", "after"} and counted > 1:
        point = (subject.encoder.name, results["before"], results["after"])
        figures.trade_off([point], output / "figures" / "trade_off.png")
    return {"data": {"videos": counted, "skipped": skipped}, "results": results}
