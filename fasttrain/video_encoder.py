"""The frozen backbone and its trained projection as one video encoder.

Training writes `projection_metadata` into `projection.safetensors`, and `load_video_encoder` reads it from
the run folder. Shape suffixes: B videos, T frames, H and W pixels, N patch tokens, D channels.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.errors import InputError
from fasttrain.projection import Projection

PROJECTION_FILE = "projection.safetensors"


class VideoEncoder(nn.Module):
    """Frames to projected patch tokens. Frozen and in evaluation mode; move it with `.to(device)`."""

    def __init__(self, encoder: Backbone, projection: Projection) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.requires_grad_(False).eval()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (h, w) of a frame of height x width pixels; N = h w."""
        return self.encoder.grid(height, width)

    def frozen(self, frames: Tensor) -> Tensor:
        """The backbone's own tokens (B, T, N, D), before the projection."""
        if frames.ndim != 5 or frames.shape[2] != 3:
            raise InputError(f"frames of shape {tuple(frames.shape)}: expected (B, T, 3, H, W)")
        return self.encoder.tokens(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def forward(self, frames: Tensor, *, normalize: bool = False) -> Tensor:
        """Projected tokens (B, T, N, D) of ImageNet-normalised frames (B, T, 3, H, W), row by row.

        normalize: divide every token by its L2 norm, as the losses and the label propagation do.
        """
        tokens_BTND = self.projection(self.frozen(frames))
        return F.normalize(tokens_BTND, dim=-1) if normalize else tokens_BTND


def projection_metadata(
    backbone_settings: dict[str, Any], encoder: Backbone, projection: Projection, recipe: dict[str, Any]
) -> dict[str, str]:
    """Metadata of a projection file: which encoder it was trained on, and how.

    backbone_settings: the arguments that `load_backbone` got; recipe: the resolved recipe as plain data.
    """
    return {
        "backbone": json.dumps(backbone_settings),
        "weights": encoder.weights,
        "weights_hash": encoder.weights_hash,
        "head": projection.head,
        "recipe": json.dumps(recipe),
    }


def load_video_encoder(
    run: str | Path, device: str | torch.device | None = None, *, weights: str | None = None
) -> VideoEncoder:
    """The video encoder that training left in the folder `run`, in float32 on `device` (default: the CPU).

    weights: where the backbone's weights are now, if they moved; their hash must be that of the training.
    Raises InputError where the folder holds no projection, or the weights cannot be read or differ.
    """
    path = Path(run) / PROJECTION_FILE
    if not path.is_file():
        raise InputError(
            f"run {run}: no {PROJECTION_FILE} there; give the output folder of a training run (with several "
            "backbones, output/NAME)"
        )
    projection = Projection.load(path)
    if "backbone" not in projection.metadata:
        raise InputError(f"projection {path}: its metadata names no backbone as training writes it")
    settings: dict[str, Any] = json.loads(projection.metadata["backbone"])
    encoder = load_backbone(**settings | ({"weights": weights} if weights else {}))
    if encoder.weights_hash != projection.metadata.get("weights_hash"):
        raise InputError(
            f"run {run}: weights {encoder.weights} of {encoder.name} are not those it was trained on (their "
            f"hash differs); give the same file, or for random weights the same version of torch and timm"
        )
    return VideoEncoder(encoder, projection).to(device)
