"""Consistency and separability before and after the projection, measured while it trains.

The trainer calls `validate` every `eval.every` steps; the figures go to metrics.jsonl and TensorBoard. Shape
suffixes: T frames, H W pixels, N tokens, D channels.
"""

import math

import torch
from torch import Tensor, nn

from fasttrain.backbones import Backbone
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FrameIndex
from fasttrain.data.sampling import evenly_spaced
from fasttrain.evaluation.frames import centre_crop, read_clip
from fasttrain.evaluation.trade_off import FEWEST_FRAMES, measure_videos

# What is followed over training; the distances over the 95 % diameter are those of the trade-off plot.
FOLLOWED = ("cycle_accuracy", "effective_rank", "intra_normalized_95", "inter_normalized_95")


@torch.no_grad()
def validate(
    encoder: Backbone,
    projection: nn.Module,
    index: FrameIndex,
    device: torch.device,
    *,
    num_videos: int,
    num_frames: int,
    image_size: int,
) -> dict[str, float]:
    """Keys `before/...` and `after/...` for metrics.jsonl, from evenly chosen videos of `index`.

    Videos of fewer than 8 frames and videos that cannot be read are passed over. What cannot be said is
    absent: everything without a video left, the inter-video distance of one video.
    """
    before: list[Tensor] = []
    after: list[Tensor] = []
    was_training = projection.training
    projection.eval()
    long_enough = [video for video in range(len(index)) if index.num_frames[video] >= FEWEST_FRAMES]
    for place in evenly_spaced(len(long_enough), num_videos):
        video = long_enough[place]
        try:
            clip = read_clip(index, video, evenly_spaced(int(index.num_frames[video]), num_frames))
        except UnreadableFrameError:
            continue
        frames_T3HW = torch.stack([centre_crop(frame, image_size) for frame in clip])
        # The encoder that trains may have been cast.
        tokens_TND = encoder.tokens(frames_T3HW.to(device, encoder.positions_ND.dtype)).float()
        before.append(tokens_TND)
        after.append(projection(tokens_TND).float())
    projection.train(was_training)
    if not before:
        return {}
    figures = {"before": measure_videos(before), "after": measure_videos(after)}
    return {
        f"{variant}/{key}": measured[key]
        for variant, measured in figures.items()
        for key in FOLLOWED
        if math.isfinite(measured[key])
    }
