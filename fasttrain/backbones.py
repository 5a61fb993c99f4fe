"""The frozen image encoders: eight published families of ViTs, and any timm ViT by name.

`load_backbone` builds a timm VisionTransformer and loads its weights. Training encodes three views of each
frame pair (`Backbone.three_views`); evaluation and inference need plain tokens (`Backbone.tokens`).

Shape suffixes: B images, C colours, H and W pixels, N patch tokens on an h x w grid, P class and register
tokens, L tokens in total, S cells per side of the square grid of the training images, D channels.
"""

import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fasttrain.errors import InputError
from fasttrain.projection import Init
from fasttrain.weights import StateDict, hash_state_dict, load_encoder_weights, seeded

Axis = Literal["row", "column"]
Resize = Literal["plain", "offset", "antialias"]


@dataclass(frozen=True)
class Family:
    """The properties of a family of backbones, as published in github.com/yafeng19/Co-Settle.

    Attributes:
        containers: Entries of published checkpoints that may hold the state dict.
        prefix: Prefix of the encoder's keys in the state dict.
        vit: Arguments of timm's VisionTransformer other than the sizes.
        layer_norm_eps: Epsilon of every LayerNorm.
        sincos: If set, position embeddings are initialised with fixed sines and cosines, and the first half
            of the channels encodes this axis.
        norm_plain: Whether the final norm is applied to tokens with the usual positions. The published I-JEPA
            code applies it to the asymmetric view only, both in training and in evaluation.
        resize: How positions are resized to other image sizes (see `resize_positions`).
        resize_once: How the positions of a checkpoint are resized to the training image size when it is
            loaded (None: as `resize`).
        projection_init: How the weights of the projection are initialised.
    """

    containers: tuple[str, ...]
    prefix: str = ""
    vit: dict[str, Any] = field(default_factory=dict)
    layer_norm_eps: float = 1e-6
    sincos: Axis | None = None
    norm_plain: bool = True
    resize: Resize = "offset"
    resize_once: Resize | None = None
    projection_init: Init = "trunc_normal"


FAMILIES: dict[str, Family] = {
    "mae": Family(("model",), sincos="column", projection_init="xavier_uniform"),
    "ijepa": Family(("encoder",), vit={"class_token": False}, sincos="column", norm_plain=False),
    "clip": Family(
        ("state_dict",),
        "visual.",
        vit={"pre_norm": True, "act_layer": QuickGELU},
        layer_norm_eps=1e-5,
        resize="antialias",
        projection_init="default",
    ),
    "blip": Family(("model",), "visual_encoder.", resize="antialias", resize_once="plain"),
    "mocov3": Family(("state_dict",), "momentum_encoder.", sincos="row", projection_init="xavier_uniform"),
    "ibot": Family(("state_dict", "teacher"), "backbone."),
    "dino": Family(("teacher",), "backbone."),
    "dinov2": Family(
        ("teacher",), "backbone.", vit={"reg_tokens": 4, "init_values": 1.0}, resize="antialias"
    ),
}

# All timm ViTs. Their positions are resized as in timm.
_TIMM = Family(("state_dict",), resize="antialias")


def load_backbone(
    name: str,
    *,
    weights: str = "random",
    image_size: int = 224,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    seed: int = 0,
) -> "Backbone":
    """Load a frozen encoder.

    Args:
        name: `mae`, `ijepa`, `clip`, `blip`, `mocov3`, `ibot`, `dino`, `dinov2`, or the name of a timm ViT
            with absolute position embeddings, such as `vit_tiny_patch16_224`.
        weights: A local path, `hf://owner/repo/path`, `timm://name`, or `random`.
        image_size: Side of the square training images in pixels. The positions of a checkpoint for another
            size are resized when it is loaded.
        patch_size: Patch size in pixels. None: that of the timm model if `name` is one, else of the
            checkpoint or, for random weights, of ViT-B/16.
        embed_dim: Embedding dimension D. None: as for `patch_size`.
        depth: Number of transformer blocks. None: as for `patch_size`.
        num_heads: Number of attention heads, which checkpoints do not store. None: embed_dim / 64, or that of
            the timm model.
        seed: Seed of random weights.

    Returns:
        The encoder in float32 on the CPU, in evaluation mode and without gradients.

    Raises:
        InputError: The name is unknown, the weights cannot be loaded, or they do not fit the sizes.
    """
    family = FAMILIES.get(name, _TIMM)
    if name not in FAMILIES and not timm.is_model(name):
        raise InputError(f"backbone {name!r} is neither one of {', '.join(FAMILIES)} nor a timm ViT")
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    given = {size: value for size, value in sizes.items() if value is not None}
    build = partial(_build_family, family) if name in FAMILIES else partial(_build_timm, name)
    with seeded(seed):
        if weights == "random":
            vit = build(img_size=image_size, **given)
        else:
            state = load_encoder_weights(weights, family.containers, family.prefix)
            vit = build(**((_sizes(state) if name in FAMILIES else {}) | given))
            _fill(vit, state, f"weights {weights!r} do not fit {name}")
    return Backbone(vit, family, name=name, weights=weights, image_size=image_size)


# --- building an encoder with random weights -----------------------------------------------------------


def _build_family(family: Family, *, embed_dim: int = 768, num_heads: int | None = None, **sizes: Any) -> Any:
    if embed_dim % (num_heads or 64):
        divisor = f"num_heads={num_heads}" if num_heads else "64, the default width of a head; set num_heads"
        raise InputError(f"embed_dim {embed_dim} is not a multiple of {divisor}")
    vit: Any = VisionTransformer(
        embed_dim=embed_dim,
        num_heads=num_heads or embed_dim // 64,
        norm_layer=partial(nn.LayerNorm, eps=family.layer_norm_eps),
        no_embed_class=True,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
        **(family.vit | sizes),
    )
    if family.sincos:
        vit.pos_embed.data.copy_(sincos_positions(vit.patch_embed.grid_size, embed_dim, family.sincos))
    return vit


def _build_timm(name: str, **sizes: Any) -> Any:
    try:
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **sizes)
    # Raised for architectures that do not accept these arguments, for invalid sizes, and for unknown tags.
    except (TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"backbone {name!r} is not a plain timm ViT of these sizes ({error})") from error
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise InputError(
            f"backbone {name!r} is a timm {type(vit).__name__}; expected a ViT with absolute positions"
        )
    # SigLIP's attention pooling does not affect the patch tokens, and its weights are not loaded.
    del vit.attn_pool
    return vit


# --- loading the weights of a checkpoint ---------------------------------------------------------------


def _sizes(state: StateDict) -> dict[str, Any]:
    """Infer the sizes of a ViT from its state dict; `_fill` reports missing keys."""
    sizes: dict[str, Any] = {"reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0}
    blocks = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    if blocks:
        sizes["depth"] = max(blocks) + 1
    if "patch_embed.proj.weight" in state:
        sizes["embed_dim"], *_, sizes["patch_size"] = state["patch_embed.proj.weight"].shape
        if "blocks.0.mlp.fc1.weight" in state:
            # May be fractional (48 / 11 in I-JEPA's ViT-g). timm truncates the product with the embedding
            # dimension; adding a half protects it from rounding errors.
            sizes["mlp_ratio"] = (len(state["blocks.0.mlp.fc1.weight"]) + 0.5) / sizes["embed_dim"]
    return sizes


def _fill(vit: Any, state: StateDict, problem: str) -> None:
    """Load a state dict strictly, for any number of positions; raise InputError if it does not fit."""
    if "pos_embed" in state:
        vit.pos_embed = nn.Parameter(torch.empty(1, state["pos_embed"].shape[1], vit.embed_dim))
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        reasons = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise InputError(f"{problem} (width {vit.embed_dim}, depth {len(vit.blocks)}): {reasons}") from error


# --- positions -----------------------------------------------------------------------------------------


def sincos_positions(grid: tuple[int, int], dim: int, first: Axis) -> Tensor:
    """Compute the fixed position embeddings (N, D) of MAE, I-JEPA and MoCo v3.

    The channels are sin(x f), cos(x f), sin(y f), cos(y f), a quarter each, with D / 4 frequencies
    f = 10000^(-4 i / D). x is the index of a cell along the axis `first`, y along the other axis.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    cells_N2 = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid))
    x, y = (cells_N2[:, axis, None] * frequencies for axis in ((0, 1) if first == "row" else (1, 0)))
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), 1).float()


def resize_positions(positions_SSD: Tensor, grid: tuple[int, int], how: Resize) -> Tensor:
    """Resize positions on an S x S grid to (h, w, D) by bicubic interpolation.

    `how` selects one of three published variants: `plain`, to the given size; `offset`, by the scale factors
    (cells + 0.1) / S, which shifts the sampling points slightly (DINO and code derived from it); `antialias`,
    to the given size with antialiasing.
    """
    side = positions_SSD.shape[0]
    if grid == (side, side):
        return positions_SSD
    size: dict[str, Any] = {"size": grid}
    if how == "offset":
        size = {"scale_factor": tuple((cells + 0.1) / side for cells in grid)}
    positions_1DSS = positions_SSD.permute(2, 0, 1)[None]
    resized_1Dhw = F.interpolate(
        positions_1DSS, **size, mode="bicubic", align_corners=False, antialias=how == "antialias"
    )
    return resized_1Dhw[0].permute(1, 2, 0).contiguous()


def _split_positions(vit: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return class and register tokens with their positions added (P, D), and patch positions (S, S, D)."""
    names = ("cls_token", "dist_token", "reg_token")
    parts = [token.detach()[0] for token in (getattr(vit, n, None) for n in names) if token is not None]
    positions_LD = vit.pos_embed.detach()[0]
    prefix_PD = torch.cat(parts) if parts else positions_LD[:0]
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
        image_size: Side of the square training images in pixels.
        projection_init: Initialisation of a projection for this backbone (`init` of `Projection`).
    """

    positions_ND: Tensor
    prefix_PD: Tensor

    def __init__(self, vit: Any, family: Family, *, name: str, weights: str, image_size: int) -> None:
        super().__init__()
        self.name, self.weights, self.image_size = name, weights, image_size
        self.weights_hash = hash_state_dict(vit.state_dict())
        self.embed_dim: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.feat_ratio()
        self.projection_init: Init = family.projection_init
        self._resize: Resize = family.resize
        self._norm_plain = family.norm_plain

        self.patch_embed, self.norm_pre, self.blocks = vit.patch_embed, vit.norm_pre, vit.blocks
        # timm models that pool before the final norm (*_gap) store it as fc_norm.
        self.norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm

        side = self.grid(image_size, image_size)[0]
        prefix_PD, checkpoint_SSD = _split_positions(vit, name)
        # Not a buffer, so that `.to` does not cast these float32 values, from which positions are resized.
        self._positions_SSD = resize_positions(
            checkpoint_SSD, (side, side), family.resize_once or family.resize
        )
        self._resized: dict[tuple[tuple[int, int], Resize], Tensor] = {}
        self.register_buffer("prefix_PD", prefix_PD, persistent=False)
        self.register_buffer("positions_ND", self._positions_SSD.flatten(0, 1), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoder, in which images must be passed."""
        return self.positions_ND.dtype

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode, because the encoder is frozen."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        # Called by `.to`: discard the cached positions of the previous device and dtype.
        self._resized.clear()
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
        """Resize the position embeddings to a token grid, as the published implementation does.

        Args:
            grid: The token grid (h, w).

        Returns:
            Position embeddings (N, D) with N = h * w.
        """
        if grid == self._positions_SSD.shape[:2]:
            return self.positions_ND
        return self._resized_to(grid, self._resize).flatten(0, 1)

    def _resized_to(self, grid: tuple[int, int], how: Resize) -> Tensor:
        """Return the resized positions (h, w, D) of a grid, which are cached."""
        if (grid, how) not in self._resized:
            resized_hwD = resize_positions(self._positions_SSD, grid, how)
            self._resized[grid, how] = resized_hwD.to(self.positions_ND)
        return self._resized[grid, how]

    def asymmetric_range(self, ratio: float = 10.0) -> int:
        """Return the number of valid offsets of `asymmetric_positions` along each axis.

        Args:
            ratio: Enlargement of the map, as for `asymmetric_positions`.
        """
        side = self._positions_SSD.shape[0]
        return int((1 + ratio) * side) - side + 1

    def asymmetric_positions(self, ratio: float = 10.0, *, offset: tuple[int, int]) -> Tensor:
        """Crop the position embeddings of the training grid from an enlarged position map.

        The S x S positions are resized to int((1 + ratio) S) squared by bicubic interpolation without
        antialiasing and cropped back to S x S, as in `interpolate_and_crop_pos_embed` of the published
        implementation.

        Args:
            ratio: Enlargement of the map, whose side is int((1 + ratio) S).
            offset: Row and column of the crop, each in [0, asymmetric_range(ratio)).

        Returns:
            Position embeddings (N, D) with N = S * S.

        Raises:
            InputError: The offset is out of range.
        """
        count = self.asymmetric_range(ratio)
        if not all(0 <= start < count for start in offset):
            raise InputError(f"offset {offset}: expected two integers in [0, {count})")
        side = self._positions_SSD.shape[0]
        large_SSD = self._resized_to((side + count - 1, side + count - 1), "plain")
        row, column = offset
        return large_SSD[row : row + side, column : column + side].reshape(side * side, -1)

    def tokens(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """Encode images.

        Args:
            images: ImageNet-normalised images (B, 3, H, W), in the dtype and on the device of the encoder. H
                and W must be multiples of the patch size.
            positions: Position embeddings (N, D) to use for the patches instead of the usual ones, such as
                those of `asymmetric_positions`.

        Returns:
            Patch tokens (B, N, D) in row-major order of the grid.

        Raises:
            InputError: The image size is not a multiple of the patch size.
        """
        grid = self.grid(images.shape[-2], images.shape[-1])
        added_ND = self.positions(grid) if positions is None else positions
        tokens_BND = self._blocks(self._patches(images) + added_ND)
        return tokens_BND if positions is None and not self._norm_plain else self.norm(tokens_BND)

    forward = tokens

    def three_views(self, frames: Tensor, positions: Tensor) -> Tensor:
        """Encode the three views of a batch of frame pairs without waiting for the device.

        The blocks process one batch of 3 B images, and the patches of frame 1 are embedded once.

        Args:
            frames: ImageNet-normalised frames (2, B, 3, H, W) of the training image size.
            positions: Asymmetric position embeddings (N, D).

        Returns:
            Contiguous tokens (B, 3, N, D) of frame 1, frame 2, and frame 1 with asymmetric positions.
        """
        own_ND = self.positions(self.grid(frames.shape[-2], frames.shape[-1]))
        first_BND, second_BND = self._patches(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).unbind(0)
        patches_B3ND = torch.stack((first_BND, second_BND, first_BND), 1)
        inputs_B3ND = patches_B3ND + torch.stack((own_ND, own_ND, positions))
        views_B3ND = self._blocks(inputs_B3ND.flatten(0, 1)).unflatten(0, inputs_B3ND.shape[:2])
        if self._norm_plain:
            return self.norm(views_B3ND).contiguous()
        return torch.cat((views_B3ND[:, :2], self.norm(views_B3ND[:, 2:])), 1)

    def _patches(self, images_BCHW: Tensor) -> Tensor:
        return self.patch_embed(images_BCHW).flatten(1, 2)

    def _blocks(self, patches_BND: Tensor) -> Tensor:
        prefix_BPD = self.prefix_PD.to(patches_BND.dtype).expand(patches_BND.shape[0], -1, -1)
        sequence = self.norm_pre(torch.cat((prefix_BPD, patches_BND), 1))
        return self.blocks(sequence)[:, len(self.prefix_PD) :]
