"""The trade-off on a list of videos: the paper's analysis (`consistency.py`) before and after the projection.

Reads any source that training reads: frame folders, a list, video files, a packed set.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FrameIndex
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError, LocalInputError
from fasttrain.evaluation import plots
from fasttrain.evaluation.frames import centre_crop, read_clip
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.trade_off import FEWEST_FRAMES, Analysis


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-frames", type=int, default=40, help="evenly spread over each video (default: 40)"
    )
    parser.add_argument("--num-videos", type=int, default=1000, help="at most, evenly chosen (default: 1000)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the middle crop (default: 224)")


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Figures of all videos together, on the main process."""
    for name, least in (("num_frames", FEWEST_FRAMES), ("num_videos", 1), ("image_size", 1)):
        if getattr(arguments, name) < least:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} {getattr(arguments, name)}: expected at least {least}")
    index = open_source(arguments.root)
    chosen = evenly_spaced(len(index), arguments.num_videos)
    analyses, skipped = measure_share(index, world.shard(chosen), arguments, model, world.device)
    if not merge(analyses, skipped, output, world):
        return None
    told = [f"{name}: {reason}" for name, reason in index.skipped]
    told += [skipped[video] for video in sorted(skipped)]
    counted = len(chosen) - len(skipped)
    if not counted:
        raise InputError(f"no video of {arguments.root} can be measured; {'; '.join(told[:3])}")
    if told:
        print(f"videos passed over: {len(told)}, such as {told[0]}")
    results = {variant: analysis.result() for variant, analysis in analyses.items()}
    if set(results) == {"before", "after"} and counted > 1:
        point = (model.encoder.name, results["before"], results["after"])
        plots.trade_off([point], output / "figures" / "trade_off.png")
    return {"data": {"videos": counted, "skipped": told}, "results": results}


def measure_share(
    index: FrameIndex,
    videos: list[int],
    arguments: argparse.Namespace,
    model: EvaluatedModel,
    device: torch.device,
) -> tuple[dict[str, Analysis], dict[int, str]]:
    """The analysis of these videos per variant, and which of them were passed over, and why."""
    analyses = {variant: Analysis() for variant in model.variants}
    skipped = {}
    for video in videos:
        length = int(index.num_frames[video])
        if length < FEWEST_FRAMES:
            skipped[video] = f"{index.names[video]}: fewer than {FEWEST_FRAMES} frames"
            continue
        try:
            clip = read_clip(index, video, evenly_spaced(length, arguments.num_frames))
        except UnreadableFrameError as error:
            skipped[video] = f"{index.names[video]}: {error}"
            continue
        frames = (centre_crop(frame, arguments.image_size) for frame in clip)
        for variant, tokens_TND in model.tokens(frames, device).items():
            if not tokens_TND.isfinite().all():
                raise LocalInputError(
                    f"features of {index.names[video]} {variant} the projection are not all finite; look at "
                    "the frames and at the weights"
                )
            analyses[variant].add(video, tokens_TND)
    return analyses, skipped


def merge(analyses: dict[str, Analysis], skipped: dict[int, str], output: Path, world: World) -> bool:
    """Bring what all processes measured into the main one's `analyses` and `skipped`; whether this is it.

    Goes through files in `output`, which all processes must see.
    """
    parts = [output / f".part{rank}.pt" for rank in range(world.size)]
    if not world.is_main:
        output.mkdir(parents=True, exist_ok=True)
        measured = {variant: (one.within, one.middles) for variant, one in analyses.items()}
        torch.save({"measured": measured, "skipped": skipped}, parts[world.rank])
    world.barrier()
    if not world.is_main:
        return False
    for path in parts[1:]:
        part = torch.load(path, weights_only=True)
        for variant, (within, middles) in part["measured"].items():
            analyses[variant].within |= within
            analyses[variant].middles |= middles
        skipped |= part["skipped"]
        path.unlink()
    return True
