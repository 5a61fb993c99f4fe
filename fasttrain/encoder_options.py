"""The encoder that the options of a command select, before and after its projection.

Shape suffixes: B frames, H W pixels, N tokens, D channels.
"""

import argparse
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.errors import InputError
from fasttrain.loggers import say
from fasttrain.projection import Projection
from fasttrain.video_encoder import UNSTORED, check_backbone, load_video_encoder, trained_backbone
from fasttrain.weights import hash_state_dict, short_name


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """An encoder, its projection and the variants to measure."""

    encoder: Backbone
    projection: Projection | None
    variants: tuple[str, ...]
    """`before` (the frozen backbone alone), `after` (with the projection) or both."""

    @property
    def title(self) -> str:
        """The backbone and its weights in titles, because a family says little about the weights."""
        name, weights = self.encoder.name, short_name(self.encoder.weights)
        return weights if weights.startswith(name) else f"{name} ({weights})"

    @torch.inference_mode()
    def tokens(self, frames_B3HW: Tensor) -> dict[str, Tensor]:
        """Encode frames (B, 3, H, W) on the encoder's device. Returns float32 tokens (B, N, D) by variant."""
        frozen_BND = self.encoder.tokens(frames_B3HW).float()
        tokens_BND = {"before": frozen_BND}
        if self.projection is not None:
            tokens_BND["after"] = self.projection(frozen_BND).float()
        return {variant: tokens_BND[variant] for variant in self.variants}


def describe_model(encoder: Backbone, projection: Projection | None) -> dict[str, Any]:
    """Return what identifies an encoder with its projection in the files of results."""
    return {
        "backbone": encoder.name,
        "weights": encoder.weights,
        "weights_hash": encoder.weights_hash,
        **{name: getattr(encoder, name) for name in UNSTORED},
        "head": projection.head if projection else None,
        "projection_hash": hash_state_dict(projection.state_dict()) if projection else None,
    }


def load_model(arguments: argparse.Namespace, device: torch.device) -> EvaluatedModel:
    """Load the encoder and projection that the options select. Raises InputError if they do not match."""
    encoder: Backbone
    projection: Projection | None = None
    options = {name: value for name in UNSTORED if (value := getattr(arguments, name)) is not None}
    if arguments.run is not None:
        if options:
            raise InputError(
                "--num-heads, --activation, --layer-norm-eps, --mean and --std cannot be combined with "
                "--run, which stores these values. Pass --backbone instead of --run."
            )
        if arguments.projection is not None:
            raise InputError(
                f"--projection: '{arguments.projection}' cannot be combined with --run, which has its own "
                "projection. Pass --backbone instead of --run."
            )
        loaded = load_video_encoder(arguments.run, weights=arguments.weights)
        encoder, projection = loaded.encoder, loaded.projection
    else:
        if arguments.weights in (None, "random") and os.environ.get("RANK", "0") == "0":
            say("warning: the encoder has random weights, so its features are meaningless; pass --weights")
        settings: dict[str, Any] = {}
        if arguments.projection is not None:
            projection = Projection.find(arguments.projection)
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
