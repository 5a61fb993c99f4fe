"""The encoder under evaluation, before and after its projection, and the options that name it.

Shape suffixes: B frames, H W pixels, N tokens, D channels.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.errors import InputError
from fasttrain.projection import Projection
from fasttrain.video_encoder import load_video_encoder


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """An encoder and which variants of it to measure."""

    encoder: Backbone
    projection: Projection | None
    variants: tuple[str, ...]
    """Of `before` (frozen backbone alone) and `after` (with the projection)."""

    @torch.inference_mode()
    def tokens(self, frames_B3HW: Tensor) -> dict[str, Tensor]:
        """Tokens (B, N, D) float32 by variant of frames (B, 3, H, W) on the encoder's device."""
        frozen_BND = self.encoder.tokens(frames_B3HW).float()
        tokens_BND = {"before": frozen_BND}
        if self.projection is not None:
            tokens_BND["after"] = self.projection(frozen_BND).float()
        return {variant: tokens_BND[variant] for variant in self.variants}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument("--run", type=Path, help="output folder of a training run")
    encoder.add_argument("--backbone", help="a backbone without a run: mae, dino, ... or a timm ViT")
    parser.add_argument("--weights", help="weights of --backbone (path, hf://, timm://, random)")
    parser.add_argument("--projection", type=Path, help="a projection.safetensors to go with --backbone")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--baseline-only", action="store_true", help="the frozen backbone alone")
    only.add_argument("--projection-only", action="store_true", help="with the projection alone")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")


def load_model(arguments: argparse.Namespace, device: torch.device) -> EvaluatedModel:
    """The model that the command line names. Raises InputError where its parts do not go together."""
    encoder: Backbone
    projection: Projection | None = None
    if arguments.run is not None:
        if arguments.projection is not None:
            raise InputError(f"--projection {arguments.projection} goes with --backbone; --run has its own")
        loaded = load_video_encoder(arguments.run, weights=arguments.weights)
        encoder, projection = loaded.encoder, loaded.projection
    else:
        encoder = load_backbone(arguments.backbone, weights=arguments.weights or "random")
        if arguments.projection is not None:
            projection = Projection.load(arguments.projection)
    variants: tuple[str, ...] = ("before",)
    if projection is not None:
        if projection.dim != encoder.embed_dim:
            raise InputError(
                f"projection of width {projection.dim} for an encoder of width {encoder.embed_dim}"
            )
        projection.to(device)
        if not arguments.baseline_only:
            variants = ("after",) if arguments.projection_only else ("before", "after")
    elif arguments.projection_only:
        raise InputError("--projection-only needs a projection; give --run or --projection")
    return EvaluatedModel(encoder=encoder.to(device), projection=projection, variants=variants)
