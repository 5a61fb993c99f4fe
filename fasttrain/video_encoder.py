"""The video encoder: a frozen backbone with its trained projection.

Training stores `projection_metadata` in projection.safetensors, from which `load_video_encoder` rebuilds the
encoder.

Shape suffixes: B videos, T frames, H and W pixels, N patch tokens, D channels.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.data.preprocessing import channels_last, normalise, read_resized, resize_all
from fasttrain.errors import InputError
from fasttrain.families import FAMILIES
from fasttrain.files import parse_json
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD, Triple
from fasttrain.options import SHORT_SIDE
from fasttrain.projection import Projection
from fasttrain.recipe import recipe_from_dict
from fasttrain.weights import absolute, is_missing

# Arguments of `load_backbone` that the weights alone do not determine.
UNSTORED = ("num_heads", "activation", "layer_norm_eps", "mean", "std")


class VideoEncoder(nn.Module):
    """A frozen backbone and its projection, which map the frames of videos to patch tokens.

    The module has no trainable parameters and is in evaluation mode. Move it with `.to(device)`.

    Args:
        encoder: The frozen backbone.
        projection: The projection that was trained for it.
    """

    def __init__(self, encoder: Backbone, projection: Projection) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.requires_grad_(False).eval()

    @property
    def mean(self) -> Triple:
        """Mean of the RGB values (0 to 1) by which frames must be normalised."""
        return self.encoder.mean

    @property
    def std(self) -> Triple:
        """Standard deviation of the RGB values (0 to 1) by which frames must be normalised."""
        return self.encoder.std

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the token grid (h, w) of a frame, with h * w = N.

        Args:
            height: Height of the frame in pixels.
            width: Width of the frame in pixels.

        Raises:
            InputError: The size is not a multiple of the patch size.
        """
        return self.encoder.grid(height, width)

    def preprocess(
        self,
        video: str | Path | npt.NDArray[np.uint8] | Tensor,
        *,
        size: int | tuple[int, int] = SHORT_SIDE,
        frames: slice = slice(None),
    ) -> Tensor:
        """Prepare a video for the encoder: read, resize and normalise its frames.

        The frames are resized on the CPU by antialiased bilinear interpolation, without a crop, as label
        propagation and `fasttrain embed` do.

        Args:
            video: The path of a video file or frame folder, or uint8 RGB frames: (T, H, W, 3), (T, 3, H, W),
                or either with a batch dimension B before T.
            size: Short side of the resized frames in pixels, which keeps the aspect ratio, or height and
                width. Both sides are rounded to the nearest multiple of the patch size.
            frames: The frames to take, such as `slice(0, 64, 2)` for every second one of the first 64. The
                default is all.

        Returns:
            Frames (B, T, 3, H, W), where B is 1 for a path or frames without a batch dimension, on the
            encoder's device and in its dtype, to be passed to the encoder.

        Raises:
            InputError: The video cannot be read, the path contains several videos, no frame is selected, or
                the frames have another dtype or shape.
        """
        patch = self.encoder.patch_size
        if isinstance(video, str | Path):
            resized_BT3HW = read_resized(video, frames, size, patch)[None]
        else:
            array = channels_last(video)
            chosen_BTHW3 = (array if array.ndim == 5 else array[None])[:, frames]
            resized_BT3HW = resize_all(iter(chosen_BTHW3.reshape(-1, *array.shape[-3:])), size, patch)
            resized_BT3HW = resized_BT3HW.unflatten(0, chosen_BTHW3.shape[:2])
        return normalise(resized_BT3HW.to(self.encoder.device), self.mean, self.std).to(self.encoder.dtype)

    def frozen(self, frames: Tensor) -> Tensor:
        """Encode frames without the projection.

        Args:
            frames: As for `forward`.

        Returns:
            Tokens (B, T, N, D) of the frozen backbone.

        Raises:
            InputError: As for `forward`.
        """
        if not (isinstance(frames, Tensor) and frames.is_floating_point()):
            raise InputError(
                f"frames are {type(frames).__name__} of dtype {getattr(frames, 'dtype', None)}; expected a "
                "floating-point tensor that is normalised with the encoder's mean and std. Pass "
                "encoder.preprocess(frames)"
            )
        if frames.ndim != 5 or frames.shape[2] != 3:
            raise InputError(f"frames have shape {tuple(frames.shape)}, expected (B, T, 3, H, W)")
        return self.encoder.tokens(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def forward(self, frames: Tensor, *, normalize: bool = False) -> Tensor:
        """Encode frames.

        Args:
            frames: RGB frames (B, T, 3, H, W) with values from 0 to 1, normalised with `mean` and `std`, on
                the encoder's device and in its dtype. H and W must be multiples of the patch size.
                `preprocess` makes them from a file or from uint8 frames.
            normalize: Whether to divide every token by its L2 norm, as the losses and label propagation do.

        Returns:
            Projected tokens (B, T, N, D) in row-major order of the grid.

        Raises:
            InputError: The frames have another shape or are not floating-point numbers, or their size is not
                a multiple of the patch size.
        """
        tokens_BTND = self.projection(self.frozen(frames))
        return F.normalize(tokens_BTND, dim=-1) if normalize else tokens_BTND


def projection_metadata(
    backbone_settings: dict[str, Any], encoder: Backbone, projection: Projection, recipe: dict[str, Any]
) -> dict[str, str]:
    """Return the metadata of a projection file, which describe its backbone and training.

    Args:
        backbone_settings: The arguments of `load_backbone`.
        encoder: The backbone that it returned.
        projection: The trained projection.
        recipe: The resolved recipe (`recipe.to_dict`).
    """
    # Weights that have been moved may lack the configuration from which these values were taken.
    resolved = {name: getattr(encoder, name) for name in UNSTORED}
    # Absolute, because the run may be loaded from another folder.
    weights = absolute(encoder.weights)
    return {
        "backbone": json.dumps(backbone_settings | resolved | {"weights": weights}),
        "weights": weights,
        "weights_hash": encoder.weights_hash,
        "head": projection.head,
        "recipe": json.dumps(recipe),
    }


def trained_backbone(projection: Projection) -> dict[str, Any]:
    """Return the arguments of `load_backbone` from the metadata of a projection.

    Raises InputError if the metadata are damaged.
    """
    try:
        settings = parse_json(projection.metadata["backbone"])
        # A recipe has the same keys.
        tree: dict[str, Any] = {"backbone": dict(settings)}
        if "image_size" in settings:
            tree["data"] = {"image_size": tree["backbone"].pop("image_size")}
        if "seed" in settings:
            tree["seed"] = tree["backbone"].pop("seed")
        recipe_from_dict(tree)
        if "name" not in settings:
            raise ValueError("it has no name")
    # `dict` raises TypeError for values that are not mappings.
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the projection's description of its backbone is damaged ({error}); copy the file again"
        ) from error
    earlier = earlier_settings(settings["name"], settings.get("num_heads"), projection.dim)
    return settings | {name: value for name, value in earlier.items() if settings.get(name) is None}


def earlier_settings(name: str, num_heads: int | None, embed_dim: int) -> dict[str, Any]:
    """Return the values of `UNSTORED` that earlier versions used without storing them."""
    settings: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if name == "clip":
        settings["activation"] = "quick_gelu"
    if name in FAMILIES:
        settings["layer_norm_eps"] = FAMILIES[name].layer_norm_eps
        if num_heads is None:
            settings["num_heads"] = embed_dim // 64
    return settings


def check_backbone(projection: Projection, encoder: Backbone, what: str) -> None:
    """Raise InputError if a projection was trained on other weights than those of the encoder."""
    if encoder.weights_hash != projection.metadata.get("weights_hash"):
        raise InputError(
            f"{what}: the weights {encoder.weights!r} of {encoder.name} are not those used in training "
            f"(their hash differs). Pass the original weights; for random weights, use the versions of torch "
            f"and timm, the seed and the image size of the training"
        )


def load_video_encoder(
    run: str | Path, device: str | torch.device | None = None, *, weights: str | None = None
) -> VideoEncoder:
    """Load the video encoder that a training run has produced.

    Args:
        run: The run folder (`output` of the recipe; with several backbones, `output/NAME`), or a repository
            on the Hugging Face Hub that `fasttrain push` has written: `hf://owner/repo[@revision][/path]`.
        device: The device to load it on. None: the CPU.
        weights: The new location of the backbone's weights, if they have been moved since training. Their
            hash must be the same as in training.

    Returns:
        The encoder in float32.

    Raises:
        InputError: The run has no projection, or the weights of the backbone are missing or have changed.
    """
    projection = Projection.find(str(run))
    if "backbone" not in projection.metadata:
        raise InputError(
            f"projection '{run}' does not name its backbone; pass the output folder of a training run"
        )
    settings = trained_backbone(projection)
    if weights:
        settings["weights"] = weights
    elif is_missing(stored := settings.get("weights", "random")):
        raise InputError(
            f"run '{run}': the weights {stored!r} of its backbone are not there. Pass their location as "
            f"weights=PATH (`--weights PATH`)"
        )
    encoder = load_backbone(**settings)
    check_backbone(projection, encoder, f"run '{run}'")
    return VideoEncoder(encoder, projection).to(device)
