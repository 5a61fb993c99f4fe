"""The encoder under evaluation, before and after its projection, and the options that select it.

Shape suffixes: B frames, H W pixels, N tokens, D channels.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.configuration import ACTIVATIONS
from fasttrain.errors import InputError
from fasttrain.projection import Projection
from fasttrain.video_encoder import UNSTORED, check_backbone, load_video_encoder, trained_backbone


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """An encoder, its projection and the variants to measure."""

    encoder: Backbone
    projection: Projection | None
    variants: tuple[str, ...]
    """`before` (the frozen backbone alone), `after` (with the projection) or both."""

    @torch.inference_mode()
    def tokens(self, frames_B3HW: Tensor) -> dict[str, Tensor]:
        """Encode frames (B, 3, H, W) on the encoder's device. Returns float32 tokens (B, N, D) by variant."""
        frozen_BND = self.encoder.tokens(frames_B3HW).float()
        tokens_BND = {"before": frozen_BND}
        if self.projection is not None:
            tokens_BND["after"] = self.projection(frozen_BND).float()
        return {variant: tokens_BND[variant] for variant in self.variants}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument("--run", type=Path, metavar="RUN", help="output folder of a training run")
    encoder.add_argument(
        "--backbone",
        metavar="NAME",
        help="backbone to evaluate without a run: mae, dino, ... or a timm ViT",
    )
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="weights of the backbone: a path, hf://..., timm://... or random (default: those of the run, or "
        "random for --backbone)",
    )
    parser.add_argument(
        "--projection",
        type=Path,
        metavar="FILE",
        help="projection to use with --backbone (a projection.safetensors)",
    )
    parser.add_argument(
        "--num-heads",
        type=int,
        metavar="N",
        help="number of attention heads, like backbone.num_heads in a recipe",
    )
    parser.add_argument(
        "--activation",
        choices=tuple(ACTIVATIONS),
        help="activation function of the MLPs, like backbone.activation",
    )
    for option in ("--mean", "--std"):
        parser.add_argument(
            option, type=float, nargs=3, metavar=("R", "G", "B"),
            help="statistic of RGB values from 0 to 1, like the key of this name in a recipe's backbone",
        )  # fmt: skip
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--baseline-only", action="store_true", help="evaluate only the frozen backbone")
    only.add_argument("--projection-only", action="store_true", help="evaluate only the projected features")
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="device; auto uses cuda if available (default: auto)",
    )


def load_model(arguments: argparse.Namespace, device: torch.device) -> EvaluatedModel:
    """Load the encoder and projection that the options select. Raises InputError if they do not match."""
    encoder: Backbone
    projection: Projection | None = None
    options = {name: value for name in UNSTORED if (value := getattr(arguments, name)) is not None}
    if arguments.run is not None:
        if options:
            raise InputError(
                "--num-heads, --activation, --mean and --std cannot be combined with --run, which "
                "stores these values. Pass --backbone instead of --run."
            )
        if arguments.projection is not None:
            raise InputError(
                f"--projection: '{arguments.projection}' cannot be combined with --run, which has its own "
                "projection. Pass --backbone instead of --run."
            )
        loaded = load_video_encoder(arguments.run, weights=arguments.weights)
        encoder, projection = loaded.encoder, loaded.projection
    else:
        settings: dict[str, Any] = {}
        if arguments.projection is not None:
            projection = Projection.load(arguments.projection)
            if "backbone" in projection.metadata:
                settings = trained_backbone(projection)
                options = {name: settings.get(name) for name in UNSTORED} | options
        try:
            encoder = load_backbone(arguments.backbone, weights=arguments.weights or "random", **options)
        except InputError as error:
            if not settings:
                raise
            raise InputError(
                f"--projection '{arguments.projection}' was trained on {settings['name']}, and --backbone "
                f"cannot be loaded with the same settings: {error}"
            ) from error
        if projection is not None and settings:
            check_backbone(projection, encoder, f"--projection '{arguments.projection}'")
    variants: tuple[str, ...] = ("before",)
    if projection is not None:
        if projection.dim != encoder.embed_dim:
            raise InputError(
                f"--projection: width {projection.dim} does not match the encoder's width "
                f"{encoder.embed_dim}. Pass a projection that was trained on this backbone."
            )
        projection.to(device)
        if not arguments.baseline_only:
            variants = ("after",) if arguments.projection_only else ("before", "after")
    elif arguments.projection_only:
        raise InputError("--projection-only requires a projection. Pass --run or --projection.")
    return EvaluatedModel(encoder=encoder.to(device), projection=projection, variants=variants)
