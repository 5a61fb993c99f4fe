"""The frozen image encoders: eight published families of ViTs, and any plain timm ViT by name.

`load_backbone` builds a ViT of timm and loads its weights. Training encodes T + 1 views of T frames
(`Backbone.training_views`); evaluation and inference need plain tokens (`Backbone.tokens`).

Shape suffixes: B images, T frames, V = T + 1 views, H and W pixels, N patch tokens on an h x w grid, P class
and register tokens, L all tokens, S cells per side of a square grid, D channels, C channels of the
positions (see `positions`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from fasttrain.configuration import (
    ACTIVATIONS,
    Config,
    activation_of,
    colours,
    layer_norm_eps,
    num_heads,
    timm_config,
)
from fasttrain.errors import InputError
from fasttrain.families import (
    FAMILIES,
    TIMM,
    Family,
    build_family,
    build_timm,
    check_config,
    check_timm,
    load_state,
)
from fasttrain.layouts import StateDict
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD, Triple
from fasttrain.positions import PositionEncoding
from fasttrain.projection import Init
from fasttrain.weights import hash_state_dict, load_encoder_weights, seeded


def load_backbone(
    name: str,
    *,
    weights: str = "random",
    image_size: int = 224,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    activation: str | None = None,
    layer_norm_eps: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> "Backbone":
    """Load a frozen encoder.

    Args:
        name: `mae`, `ijepa`, `clip`, `blip`, `mocov3`, `ibot`, `dino`, `dinov2`, or the name of a timm ViT
            with absolute or rotary positions, such as `vit_base_patch16_dinov3`.
        weights: A local file or folder, `hf://owner/repo` with an optional path, `timm://name`, or `random`.
            `#entry` at the end chooses one of several encoders in a checkpoint.
        image_size: Side of the square training images in pixels. Positions are resized from the
            checkpoint's own grid.
        patch_size: Patch size in pixels. None: that of the timm model if `name` is one, else of the
            checkpoint or, for random weights, of ViT-B/16.
        embed_dim: Embedding dimension D. None: as for `patch_size`.
        depth: Number of transformer blocks. None: as for `patch_size`.
        num_heads: Number of attention heads, which checkpoints do not store. None: from the configuration of
            the weights or the timm model, else the published number for this family and embedding dimension.
        activation: Activation function of the MLPs, `gelu`, `gelu_tanh`, `quick_gelu` or `silu`. None: as for
            `num_heads`.
        layer_norm_eps: Epsilon of the LayerNorms. None: from the configuration of the weights or the timm
            model, else that of the family.
        mean: Mean of the RGB values (0 to 1) by which images are normalised. None: from the configuration
            of the weights or the timm model, else that of ImageNet, which the paper uses for its families.
        std: Standard deviation of the RGB values. None: as for `mean`.
        seed: Seed of random weights.

    Returns:
        The encoder in float32 on the CPU, in evaluation mode and without gradients.

    Raises:
        InputError: The name is unknown, the weights cannot be loaded, or they do not fit the sizes.
    """
    family = FAMILIES.get(name, TIMM)
    if name not in FAMILIES and not timm.is_model(name):
        raise InputError(
            f"backbone {name!r} is neither one of {', '.join(FAMILIES)} nor a timm ViT{_similar(name)}"
        )
    if name not in FAMILIES:
        # Before the weights are downloaded.
        check_timm(name)
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    given = {size: value for size, value in sizes.items() if value is not None}
    for size, value in given.items():
        if value < 1:
            raise InputError(f"{size} is {value}; expected a positive integer")
    if activation not in (None, *ACTIVATIONS):
        raise InputError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if layer_norm_eps is not None and not 0 < layer_norm_eps < math.inf:
        raise InputError(f"layer_norm_eps is {layer_norm_eps}; expected a positive number, such as 1e-6")
    chosen = {
        "num_heads": given.pop("num_heads", None),
        "activation": activation,
        "layer_norm_eps": layer_norm_eps,
        "mean": mean,
        "std": std,
    }
    known: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
    state: StateDict = {}
    config, found = Config(), ""
    with seeded(seed):
        if weights != "random":
            state, config, found = load_encoder_weights(weights, family.prefer)
        config = replace(config, **known)
        if state:
            check_config(config, state, weights)
        if name in FAMILIES:
            vit = build_family(name, state, config, given, image_size)
        else:
            vit = build_timm(name, config, given, image_size)
    if state:
        load_state(vit, state, config, name=name, weights=weights, found=found)
    vit.attn_pool = None
    if activation not in (None, activation_of(vit)):
        raise InputError(
            f"activation is {activation!r}, but {name} has a fixed one, {activation_of(vit)}; do not set it"
        )
    if layer_norm_eps is not None and not any(isinstance(part, nn.LayerNorm) for part in vit.modules()):
        raise InputError(f"layer_norm_eps is {layer_norm_eps}, but {name} has no LayerNorm; do not set it")
    defaults = Config() if name in FAMILIES else timm_config(vit)
    how = family.resize
    if isinstance(vit, NaFlexVit) and vit.embeds.pos_embed_interp_mode == "bilinear":
        how = "bilinear"
    elif vit.reg_token is None and family.resize_without_registers:
        how = family.resize_without_registers
    return Backbone(
        vit,
        replace(family, resize=how),
        name=name,
        weights=weights,
        found=found,
        image_size=image_size,
        mean=colours("mean", config.mean or defaults.mean or IMAGENET_MEAN),
        std=colours("std", config.std or defaults.std or IMAGENET_STD),
    )


def _similar(name: str) -> str:
    modules = ("vision_transformer", "eva")
    similar = [model for module in modules for model in timm.list_models(f"*{name}*", module=module)]
    return f"; did you mean {' or '.join(similar[:6])}?" if similar else ""


# --- positions -----------------------------------------------------------------------------------------


def _split_positions(vit: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return class and register tokens with their positions added (P, D), and patch positions (S, S, D)."""
    names = ("cls_token", "dist_token", "reg_token")
    parts = [token.detach()[0] for token in (getattr(vit, n, None) for n in names) if token is not None]
    prefix_PD = torch.cat(parts) if parts else torch.zeros(0, vit.embed_dim)
    if vit.pos_embed is None:
        return prefix_PD, None
    positions_LD = vit.pos_embed.detach()[0]
    # Published checkpoints may have a position for the class token; timm models have one for all or none of
    # the class and register tokens.
    for count in (0, 1) if vit.no_embed_class else (len(prefix_PD),):
        side = math.isqrt(max(len(positions_LD) - count, 0))
        if count <= len(prefix_PD) and side and side * side == len(positions_LD) - count:
            prefix_PD = torch.cat((prefix_PD[:count] + positions_LD[:count], prefix_PD[count:]))
            return prefix_PD, positions_LD[count:].unflatten(0, (side, side)).clone()
    raise InputError(
        f"backbone {name!r}: the {len(positions_LD)} positions do not form a square grid of patches"
    )


# --- the encoder ---------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """A frozen ViT that maps images to their patch tokens after the final norm.

    Class and register tokens are not returned. Use `load_backbone` to create a backbone. Move and cast it as
    a whole (`.to(device, dtype)`). Positions are resized in float32 on the CPU and then cast, so that they
    are the same on every device.

    Attributes:
        name (str): The name that was passed to `load_backbone`.
        weights (str): The weights that were passed to `load_backbone`.
        weights_hash (str): SHA-256 of the parameters in float32, which does not depend on the file format.
        embed_dim: Embedding dimension D.
        patch_size: Patch size in pixels.
        num_heads (int): Number of attention heads.
        activation (str | None): Activation function of the MLPs, as for `load_backbone`.
        layer_norm_eps (float | None): Epsilon of the LayerNorms; None for a ViT without any.
        image_size: Side of the square training images in pixels.
        mean (tuple[float, float, float]): Mean of the RGB values (0 to 1) by which images are normalised.
        std (tuple[float, float, float]): Standard deviation of the RGB values.
        projection_init: Initialisation of a projection for this backbone (`init` of `Projection`).
    """

    positions_NC: Tensor
    prefix_PD: Tensor

    def __init__(
        self,
        vit: Any,
        family: Family,
        *,
        name: str,
        weights: str,
        found: str,
        image_size: int,
        mean: Triple,
        std: Triple,
    ) -> None:
        super().__init__()
        self.name, self.weights, self.image_size = name, weights, image_size
        self._found = found
        self.mean, self.std = mean, std
        self.weights_hash = hash_state_dict(vit.state_dict())
        self.embed_dim: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.feat_ratio()
        self.num_heads = num_heads(vit)
        self.activation = activation_of(vit)
        self.layer_norm_eps = layer_norm_eps(vit)
        self.projection_init: Init = family.projection_init
        self._norm_plain = family.norm_plain

        self.patch_embed, self.norm_pre, self.blocks = vit.patch_embed, vit.norm_pre, vit.blocks
        # timm models that pool before the final norm (*_gap) store it as fc_norm.
        self.norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm

        prefix_PD, positions_SSD = _split_positions(vit, name)
        # Not a module, so that `.to` does not cast the float32 values from which positions are computed.
        self._encoding = PositionEncoding(
            positions_SSD,
            getattr(vit, "rope", None),
            side=self.grid(image_size, image_size)[0],
            resize=family.resize,
            resize_once=family.resize_once,
        )
        self._cached: dict[Any, Tensor] = {}
        self.register_buffer("prefix_PD", prefix_PD, persistent=False)
        training_grid = (self._encoding.side, self._encoding.side)
        self.register_buffer("positions_NC", self._encoding.on_grid(training_grid), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def summary(self) -> str:
        """A sentence on the architecture, where the weights were found, and the normalisation of frames."""
        found = f" ({self._found})" if self._found else ""
        prefix = len(self.prefix_PD)
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{self.name}: width {self.embed_dim}, depth {len(self.blocks)}, {self.num_heads} heads, patch "
            f"size {self.patch_size}, {prefix} prefix token{'s' * (prefix != 1)}, {self.activation}; "
            f"weights {self.weights!r}{found}; frames normalised with mean ({mean}) and std ({std})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoder, in which images must be passed."""
        return self.positions_NC.dtype

    @property
    def device(self) -> torch.device:
        """The device of the encoder, on which images must be passed."""
        return self.positions_NC.device

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode, because the encoder is frozen."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        # Called by `.to`: discard the cached positions of the previous device and dtype.
        self._cached.clear()
        return super()._apply(fn, recurse)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the token grid (h, w) of an image.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.

        Raises:
            InputError: The size is not a multiple of the patch size. Tokens would then cover only
                part of the image, and label maps would be misaligned with them.
        """
        patch = self.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            nearest = " x ".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
            raise InputError(
                f"image size {height} x {width}: {self.name} needs multiples of {patch}, such as {nearest}"
            )
        return height // patch, width // patch

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the usual positions on a token grid, as the authors of the encoder compute them.

        Args:
            grid: The token grid (h, w).

        Returns:
            Positions (N, C) with N = h * w: position embeddings (N, D), rotary positions, or both.
        """
        if grid == (self._encoding.side, self._encoding.side):
            return self.positions_NC
        return self._cast(grid, partial(self._encoding.on_grid, grid))

    def _cast(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return computed positions on the device and in the dtype of the encoder; cache them by `key`."""
        if key not in self._cached:
            self._cached[key] = compute().to(self.positions_NC)
        return self._cached[key]

    def asymmetric_range(self, ratio: float = 10.0) -> int:
        """Return the number of valid offsets of `asymmetric_positions` along each axis.

        Args:
            ratio: Enlargement of the map, as for `asymmetric_positions`.
        """
        side = self._encoding.side
        return int((1 + ratio) * side) - side + 1

    def asymmetric_positions(self, ratio: float = 10.0, *, offset: tuple[int, int]) -> Tensor:
        """Crop the positions of the training grid from an enlarged position map.

        The S x S positions are enlarged to int((1 + ratio) S) squared and cropped back to S x S. Position
        embeddings are resized by bicubic interpolation without antialiasing, as in
        `interpolate_and_crop_pos_embed` of the published implementation. Rotary positions are those
        of a grid of as many cells over the same extent.

        Args:
            ratio: Enlargement of the map, whose side is int((1 + ratio) S).
            offset: Row and column of the crop, each in [0, asymmetric_range(ratio)).

        Returns:
            Positions (N, C) with N = S * S.

        Raises:
            InputError: The offset is out of range.
        """
        count = self.asymmetric_range(ratio)
        if not all(0 <= start < count for start in offset):
            raise InputError(f"offset {offset}: expected two integers in [0, {count})")
        side = self._encoding.side
        large = side + count - 1
        enlarged_LLC = self._cast(large, partial(self._encoding.enlarged, large))
        row, column = offset
        return enlarged_LLC[row : row + side, column : column + side].reshape(side * side, -1)

    def tokens(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """Encode images.

        Args:
            images: Images (B, 3, H, W), normalised with `mean` and `std`, in the dtype and on the device of
                the encoder. H and W must be multiples of the patch size.
            positions: Positions (N, C) to use for the patches instead of the usual ones, such as those of
                `asymmetric_positions`.

        Returns:
            Patch tokens (B, N, D) in row-major order of the grid.

        Raises:
            InputError: The image size is not a multiple of the patch size.
        """
        grid = self.grid(images.shape[-2], images.shape[-1])
        added_ND, rotary_NR = self._split(self.positions(grid) if positions is None else positions)
        tokens_BND = self._blocks(self._patches(images) + added_ND, rotary_NR)
        return tokens_BND if positions is None and not self._norm_plain else self.norm(tokens_BND)

    forward = tokens

    def training_views(self, frames: Tensor, positions: Tensor) -> Tensor:
        """Encode the views of a batch for training without waiting for the device.

        The blocks process one batch of (T + 1) B images, and the patches of frame 1 are embedded once.

        Args:
            frames: T frames of each of B samples, (T, B, 3, H, W), of the training image size and normalised
                with `mean` and `std`.
            positions: Asymmetric positions (N, C).

        Returns:
            Contiguous tokens (B, T + 1, N, D) of the frames, and of frame 1 with asymmetric positions.
        """
        own_NC = self.positions(self.grid(frames.shape[-2], frames.shape[-1]))
        patches_TBND = self._patches(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        patches_BVND = torch.stack((*patches_TBND, patches_TBND[0]), 1)
        added_VND, rotary_VNR = self._split(torch.stack((*[own_NC] * len(frames), positions)))
        inputs_BVND = patches_BVND + added_VND
        rotary = None
        if rotary_VNR is not None:
            rotary = rotary_VNR.expand(len(inputs_BVND), -1, -1, -1).flatten(0, 1)
        views_BVND = self._blocks(inputs_BVND.flatten(0, 1), rotary).unflatten(0, inputs_BVND.shape[:2])
        if self._norm_plain:
            return self.norm(views_BVND).contiguous()
        return torch.cat((views_BVND[:, :-1], self.norm(views_BVND[:, -1:])), 1)

    def _patches(self, images_BCHW: Tensor) -> Tensor:
        return self.patch_embed(images_BCHW).flatten(1, 2)

    def _split(self, positions: Tensor) -> tuple[Tensor | float, Tensor | None]:
        """Split positions (..., N, C) into embeddings to add (..., N, D) and a rotary table (..., N, R)."""
        added, rotary = positions.split(self._encoding.channels, dim=-1)
        return added if added.shape[-1] else 0.0, rotary if rotary.shape[-1] else None

    def _blocks(self, patches_BND: Tensor, rotary: Tensor | None) -> Tensor:
        prefix_BPD = self.prefix_PD.to(patches_BND.dtype).expand(patches_BND.shape[0], -1, -1)
        sequence = self.norm_pre(torch.cat((prefix_BPD, patches_BND), 1))
        if rotary is None:
            for block in self.blocks:
                sequence = block(sequence)
        else:
            # A table per image needs a dimension for the heads.
            rope = rotary if rotary.ndim == 2 else rotary[:, None]
            for block in self.blocks:
                sequence = block(sequence, rope=rope)
        return sequence[:, len(self.prefix_PD) :]
