"""Measure how consistent features are within videos and how separable videos are (the paper's trade-off).

The dataset can be any source that training accepts: frame folders, a frame list, video files or a packed set.
`validation.py` measures the same during training.
"""

# The metrics themselves are in `trade_off.py`. Shape suffixes: T frames, H W pixels, N tokens, D channels.

import argparse
from pathlib import Path
from typing import Any

import torch

from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FrameIndex
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.sources import describe_left_out, open_source
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError, LocalInputError, check_options
from fasttrain.evaluation import plots
from fasttrain.evaluation.trade_off import MIN_FRAMES, VideoMeasures, measure_video, summarise
from fasttrain.evaluation.validation import read_frames
from fasttrain.loggers import Progress, say


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Evaluate evenly spaced videos. Returns the results on the main process and None on the others."""
    check_options(arguments, num_frames=MIN_FRAMES, num_videos=1, image_size=1)
    index = open_source(arguments.root)
    measured: dict[int, dict[str, VideoMeasures]] = {}
    skipped: dict[int, str] = {}
    videos = world.shard(evenly_spaced(len(index), arguments.num_videos))
    with Progress("videos", len(videos), enabled=world.is_main) as progress:
        for video in videos:
            progress.advance(0, index.names[video])
            try:
                measured[video] = _measure(index, video, arguments, model, world.device)
            except UnreadableFrameError as error:
                skipped[video] = f"{index.names[video]}: {error}"
            progress.advance()
    measured, skipped = world.merge(measured), world.merge(skipped)
    if not world.is_main:
        return None
    reasons = [*(f"{name}: {reason}" for name, reason in index.skipped), *skipped.values()]
    if not measured:
        raise InputError(
            f"--root: no video in '{arguments.root}' can be measured ({'; '.join(reasons[:3])}). Pass videos "
            f"with at least {MIN_FRAMES} frames."
        )
    if reasons:
        say(f"skipped videos: {len(reasons)} (for example {reasons[0]})")
    if index.left_out:
        say(describe_left_out(index.left_out))
    results = {
        variant: summarise([measures[variant] for measures in measured.values()])
        for variant in model.variants
    }
    if plots.has_trade_off(results):
        point = (model.title, results["before"], results["after"])
        plots.trade_off([point], output / "figures" / "trade_off.png")
    return {"data": {"videos": len(measured), "skipped": reasons}, "results": results}


def _measure(
    index: FrameIndex, video: int, arguments: argparse.Namespace, model: EvaluatedModel, device: torch.device
) -> dict[str, VideoMeasures]:
    """Measure one video with each variant. Raises UnreadableFrameError if it cannot be read."""
    frames_T3HW = read_frames(index, video, arguments.num_frames, arguments.image_size, model.encoder)
    # Encode one frame at a time to bound the memory.
    tokens = [model.tokens(frame_3HW[None].to(device)) for frame_3HW in frames_T3HW]
    measured = {}
    for variant in model.variants:
        tokens_TND = torch.cat([by_variant[variant] for by_variant in tokens])
        if not tokens_TND.isfinite().all():
            raise LocalInputError(
                f"video {index.names[video]!r}: its features {variant} the projection are not all "
                "finite. Check its frames and the weights."
            )
        measured[variant] = measure_video(tokens_TND)
    return measured
