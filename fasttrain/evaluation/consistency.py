"""The paper's trade-off on a list of videos: consistency and separability before and after the projection.

`eval consistency` reads any source that training reads: frame folders, a list, video files, a packed set. The
trainer calls `validate` every `eval.every` steps; its figures go to metrics.jsonl and TensorBoard. The
analysis itself is in `trade_off.py`. Shape suffixes: T frames, H W pixels, N tokens, D channels.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.backbones import Backbone
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FrameIndex
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError, LocalInputError, check_options
from fasttrain.evaluation import plots
from fasttrain.evaluation.frames import centre_crop, stream_frames
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.trade_off import MIN_FRAMES, VideoMeasures, measure_video, summarise
from fasttrain.recipe import Recipe

# What is followed over training; the distances over the 95 % diameter are those of the trade-off plot.
FOLLOWED = ("cycle_accuracy", "effective_rank", "intra_normalized_95", "inter_normalized_95")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-frames", type=int, default=40, help="evenly spaced, of a video (default: 40)")
    parser.add_argument("--num-videos", type=int, default=1000, help="at most, evenly chosen (default: 1000)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the middle crop (default: 224)")


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Figures of all videos together, on the main process."""
    check_options(arguments, num_frames=MIN_FRAMES, num_videos=1, image_size=1)
    index = open_source(arguments.root)
    measured: dict[int, dict[str, VideoMeasures]] = {}
    skipped: dict[int, str] = {}
    for video in world.shard(evenly_spaced(len(index), arguments.num_videos)):
        try:
            frames_T3HW = _read_frames(index, video, arguments.num_frames, arguments.image_size)
        except UnreadableFrameError as error:
            skipped[video] = f"{index.names[video]}: {error}"
            continue
        # One frame at a time, which bounds the memory.
        tokens = [model.tokens(frame_3HW[None].to(world.device)) for frame_3HW in frames_T3HW]
        measured[video] = {}
        for variant in model.variants:
            tokens_TND = torch.cat([found[variant] for found in tokens])
            if not tokens_TND.isfinite().all():
                raise LocalInputError(
                    f"features of {index.names[video]} {variant} the projection are not all finite; look at "
                    "the frames and at the weights"
                )
            measured[video][variant] = measure_video(tokens_TND)
    measured, skipped = world.merge(measured), world.merge(skipped)
    if not world.is_main:
        return None
    reasons = [*(f"{name}: {reason}" for name, reason in index.skipped), *skipped.values()]
    if not measured:
        raise InputError(f"no video of {arguments.root} can be measured; {'; '.join(reasons[:3])}")
    if reasons:
        print(f"videos passed over: {len(reasons)}, such as {reasons[0]}")
    results = {
        variant: summarise([found[variant] for found in measured.values()]) for variant in model.variants
    }
    if plots.has_trade_off(results):
        point = (model.encoder.name, results["before"], results["after"])
        plots.trade_off([point], output / "figures" / "trade_off.png")
    return {"data": {"videos": len(measured), "skipped": reasons}, "results": results}


def _read_frames(index: FrameIndex, video: int, num_frames: int, image_size: int) -> Tensor:
    """Evenly spaced crops (T, 3, H, W). Raises UnreadableFrameError, also for a video that is too short."""
    length = int(index.num_frames[video])
    if length < MIN_FRAMES:
        raise UnreadableFrameError(f"fewer than {MIN_FRAMES} frames")
    frames = stream_frames(index, video, evenly_spaced(length, num_frames))
    return torch.stack([centre_crop(frame, image_size) for frame in frames])


@torch.no_grad()
def validate(
    encoder: Backbone, projection: nn.Module, index: FrameIndex, device: torch.device, recipe: Recipe
) -> dict[str, float]:
    """Keys `before/...` and `after/...` for metrics.jsonl, from evenly chosen videos of `index`.

    Passes over videos of fewer than 8 frames and those that cannot be read. Leaves out what cannot be
    measured: everything where no video remains, the inter-video distance of one video.
    """
    measured: dict[str, list[VideoMeasures]] = {"before": [], "after": []}
    long_enough = [video for video in range(len(index)) if index.num_frames[video] >= MIN_FRAMES]
    for chosen in evenly_spaced(len(long_enough), recipe.eval.num_videos):
        try:
            frames_T3HW = _read_frames(
                index, long_enough[chosen], recipe.eval.num_frames, recipe.data.image_size
            )
        except UnreadableFrameError:
            continue
        # The encoder that trains may have been cast.
        tokens_TND = encoder.tokens(frames_T3HW.to(device, encoder.dtype)).float()
        measured["before"].append(measure_video(tokens_TND))
        measured["after"].append(measure_video(projection(tokens_TND).float()))
    figures = {variant: summarise(videos) for variant, videos in measured.items() if videos}
    return {
        f"{variant}/{key}": found[key]
        for variant, found in figures.items()
        for key in FOLLOWED
        if math.isfinite(found[key])
    }
