"""The encoder under evaluation, before and after its projection, and the options that name it.

Shape suffixes: T frames, H W pixels, N tokens, D channels.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def to(self, device: torch.device) -> "EvaluatedModel":
        self.encoder.to(device).eval()
        if self.projection is not None:
            self.projection.to(device).eval()
        return self

    def tokens(self, frames: Iterable[Tensor], device: torch.device) -> dict[str, Tensor]:
        """Tokens (T, N, D) float32 of frames (3, H, W) by variant; frames are encoded one at a time."""
        encoded = list(self.stream(frames, device))
        return {variant: torch.stack([tokens[variant] for tokens in encoded]) for variant in self.variants}

    @torch.inference_mode()
    def stream(self, frames: Iterable[Tensor], device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Tokens (N, D) float32 by variant of one frame (3, H, W) after another."""
        for frame_3HW in frames:
            tokens_ND = self.encoder.tokens(frame_3HW[None].to(device))[0].float()
            found = {"before": tokens_ND} if "before" in self.variants else {}
            if self.projection is not None and "after" in self.variants:
                found["after"] = self.projection(tokens_ND).float()
            yield found

    def describe(self) -> dict[str, Any]:
        """What the results say of it."""
        return {
            "backbone": self.encoder.name,
            "weights": self.encoder.weights,
            "weights_hash": self.encoder.weights_hash,
            "head": self.projection.head if self.projection else None,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, help="output folder of a training run")
    parser.add_argument(
        "--backbone", help="evaluate this backbone without a run: mae, dino, ... or a timm ViT"
    )
    parser.add_argument("--weights", help="weights of --backbone (path, hf://, timm://, random)")
    parser.add_argument("--projection", type=Path, help="a projection.safetensors to go with --backbone")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--baseline-only", action="store_true", help="the frozen backbone alone")
    only.add_argument("--projection-only", action="store_true", help="with the projection alone")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")


def load_model(arguments: argparse.Namespace) -> EvaluatedModel:
    """The model that the command line names. Raises InputError where it names none, or two."""
    if (arguments.run is None) == (arguments.backbone is None):
        raise InputError("give either --run FOLDER or --backbone NAME: which encoder is to be evaluated")
    if arguments.run is not None and arguments.projection is not None:
        raise InputError(f"--projection {arguments.projection} goes with --backbone; --run has its own")
    projection: Projection | None
    if arguments.run is not None:
        loaded = load_video_encoder(arguments.run, weights=arguments.weights)
        encoder, projection = loaded.encoder, loaded.projection
    else:
        encoder = load_backbone(arguments.backbone, weights=arguments.weights or "random")
        projection = Projection.load(arguments.projection) if arguments.projection else None
    if projection is not None and projection.dim != encoder.embed_dim:
        raise InputError(f"projection of width {projection.dim} for an encoder of width {encoder.embed_dim}")
    if arguments.projection_only and projection is None:
        raise InputError("--projection-only, but there is no projection; give --run or --projection")
    variants = ("before",) if projection is None or arguments.baseline_only else ("before", "after")
    if arguments.projection_only:
        variants = ("after",)
    return EvaluatedModel(encoder=encoder, projection=projection, variants=variants)
