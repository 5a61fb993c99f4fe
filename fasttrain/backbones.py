"""The frozen image encoders: eight families as their authors publish them, and any timm ViT by its name.

`load_backbone` builds one on timm's VisionTransformer and fills it from `weights`. `trainer` takes three
views a step from it, `evaluation` and `video_encoder` take plain tokens.

Shape suffixes: B images, C colours, H and W pixels, N patch tokens on an h x w grid, P class and register
tokens, L tokens in all, S cells on a side of the encoder's own square grid, D channels.
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
    """What sets one family apart, after its authors' code (as republished in github.com/yafeng19/Co-Settle).

    containers, prefix: the entries of published checkpoints that may hold the state dict, and the
        prefix of the encoder's keys in it.
    vit: arguments to timm's VisionTransformer beyond the sizes.
    layer_norm_eps: of every LayerNorm.
    sincos: positions start as fixed sines and cosines, not as a draw; the axis that the first half of the
        channels encodes.
    norm_plain: whether tokens at the encoder's own positions pass the final norm. The published I-JEPA code
        leaves it out there, in training and in evaluation, and applies it to the asymmetric view alone.
    resize: how positions follow the image size (see `resize_positions`).
    resize_once: how a checkpoint of another image size is fitted to the encoder's own; None: as `resize`.
    projection_init: how the published code initialises the head for this family.
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

# A ViT named after a timm model: timm's own construction and its way of resizing positions.
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
    """A frozen encoder in float32 on the CPU, in evaluation mode.

    Args:
        name: mae | ijepa | clip | blip | mocov3 | ibot | dino | dinov2, or the name of a timm ViT with
            absolute positions, such as vit_tiny_patch16_224.
        weights: a local path, hf://owner/repo/path, timm://name, or random.
        image_size: side of the square training images in pixels. If the checkpoint was made for another, its
            positions are resized once.
        patch_size, embed_dim, depth, num_heads: read from the checkpoint where left out; with random weights
            ViT-B/16 (or the timm model's own). The number of heads is in no checkpoint: embed_dim / 64.
        seed: of the random weights, which are a function of it alone.

    Raises InputError for an unknown name, weights that cannot be had, and a checkpoint that does not fit.
    """
    family = FAMILIES.get(name, _TIMM)
    if name not in FAMILIES and not timm.is_model(name):
        raise InputError(
            f"backbone {name!r}: expected one of {', '.join(FAMILIES)}, or the name of a timm ViT"
        )
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    given = {size: value for size, value in sizes.items() if value is not None}
    build = partial(_build_family, family) if name in FAMILIES else partial(_build_timm, name)
    with seeded(seed):
        if weights == "random":
            vit = build(img_size=image_size, **given)
        else:
            state = load_encoder_weights(weights, family.containers, family.prefix)
            vit = build(**((_sizes(state) if name in FAMILIES else {}) | given))
            _fill(vit, state, f"weights {weights} do not fit {name}")
    return Backbone(vit, family, name=name, weights=weights, image_size=image_size)


# --- building: an encoder of random weights -------------------------------------------------------------


def _build_family(family: Family, *, embed_dim: int = 768, num_heads: int | None = None, **sizes: Any) -> Any:
    if embed_dim % (num_heads or 64):
        of = f"num_heads {num_heads}" if num_heads else "64, the default width of a head: give num_heads"
        raise InputError(f"embed_dim {embed_dim} is not a multiple of {of}")
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
    # Other networks take other arguments, contradictory sizes fail assertions, and a tag may be unknown.
    except (TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"backbone {name} is not a plain timm ViT of these sizes ({error})") from error
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise InputError(f"backbone {name} is a {type(vit).__name__}; expected a ViT with absolute positions")
    # SigLIP's pooling: tokens do not pass it, and checkpoints are read without it.
    del vit.attn_pool
    return vit


# --- filling: the weights of a checkpoint -----------------------------------------------------------------


def _sizes(state: StateDict) -> dict[str, Any]:
    """The sizes that a checkpoint shows; what it lacks is left to `_fill` to report."""
    sizes: dict[str, Any] = {"reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0}
    blocks = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    if blocks:
        sizes["depth"] = max(blocks) + 1
    if "patch_embed.proj.weight" in state:
        sizes["embed_dim"], *_, sizes["patch_size"] = state["patch_embed.proj.weight"].shape
        if "blocks.0.mlp.fc1.weight" in state:
            # 48 / 11 in I-JEPA's ViT-g. timm truncates the product; the half keeps rounding harmless.
            sizes["mlp_ratio"] = (len(state["blocks.0.mlp.fc1.weight"]) + 0.5) / sizes["embed_dim"]
    return sizes


def _fill(vit: Any, state: StateDict, problem: str) -> None:
    """Load strictly, with the checkpoint's own number of positions; InputError names what does not fit."""
    if "pos_embed" in state:
        vit.pos_embed = nn.Parameter(torch.empty(1, state["pos_embed"].shape[1], vit.embed_dim))
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        reasons = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise InputError(f"{problem} (width {vit.embed_dim}, depth {len(vit.blocks)}): {reasons}") from error


# --- positions --------------------------------------------------------------------------------------------


def sincos_positions(grid: tuple[int, int], dim: int, first: Axis) -> Tensor:
    """Fixed positions (N, D) of MAE, I-JEPA and MoCo v3, with D / 4 frequencies f = 10000^(-4 i / D).

    The channels are sin(x f), cos(x f), sin(y f), cos(y f), a quarter each, with x the axis `first` and y the
    other one, in cells.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    cells_N2 = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid))
    x, y = (cells_N2[:, axis, None] * frequencies for axis in ((0, 1) if first == "row" else (1, 0)))
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), 1).float()


def resize_positions(positions_SSD: Tensor, grid: tuple[int, int], how: Resize) -> Tensor:
    """Positions on an S x S grid, bicubically brought to (h, w, D).

    how: plain, to the wanted size; offset, by scale factors (cells + 0.1) / S, which moves the sampling
    points a little (DINO's code and those that took it over); antialias, as plain but antialiased.
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
    """Class and register tokens with their positions added (P, D), and the patches' positions (S, S, D)."""
    names = ("cls_token", "dist_token", "reg_token")
    parts = [token.detach()[0] for token in (getattr(vit, n, None) for n in names) if token is not None]
    positions_LD = vit.pos_embed.detach()[0]
    prefix_PD = torch.cat(parts) if parts else positions_LD[:0]
    # In a published checkpoint the class token may have a position; in timm's models all such tokens or none.
    for count in (0, 1) if vit.no_embed_class else (len(prefix_PD),):
        side = math.isqrt(max(len(positions_LD) - count, 0))
        if count <= len(prefix_PD) and side and side * side == len(positions_LD) - count:
            prefix_PD = torch.cat((prefix_PD[:count] + positions_LD[:count], prefix_PD[count:]))
            return prefix_PD, positions_LD[count:].unflatten(0, (side, side)).clone()
    raise InputError(f"backbone {name}: {len(positions_LD)} positions are not a square grid of patches")


# --- the encoder ------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """A frozen ViT that gives the patch tokens after its final norm, without class and register tokens.

    Cast and move it as a whole (`.to(device, dtype)`). Positions are resized in float32 on the CPU and then
    cast, so that every device sees the same ones.

    Attributes: name and weights (as asked for), weights_hash (SHA-256 of the parameters as loaded, in
    float32, whatever the file format), embed_dim, patch_size, image_size, projection_init.
    """

    positions_ND: Tensor
    prefix_PD: Tensor

    def __init__(self, vit: Any, family: Family, *, name: str, weights: str, image_size: int) -> None:
        """Take over the parts of a timm VisionTransformer; use `load_backbone`."""
        super().__init__()
        self.name, self.weights, self.image_size = name, weights, image_size
        self.weights_hash = hash_state_dict(vit.state_dict())
        self.embed_dim: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.feat_ratio()
        self.projection_init: Init = family.projection_init
        self._resize: Resize = family.resize
        self._norm_plain = family.norm_plain

        self.patch_embed, self.norm_pre, self.blocks = vit.patch_embed, vit.norm_pre, vit.blocks
        # Models that pool before their last norm (timm's *_gap) keep it in fc_norm.
        self.norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm

        side = self.grid(image_size, image_size)[0]
        prefix_PD, checkpoint_SSD = _split_positions(vit, name)
        # Not a buffer: positions are resized from these float32 values, whatever `.to` was called with.
        self._positions_SSD = resize_positions(
            checkpoint_SSD, (side, side), family.resize_once or family.resize
        )
        self._resized: dict[tuple[tuple[int, int], Resize], Tensor] = {}
        self.register_buffer("prefix_PD", prefix_PD, persistent=False)
        self.register_buffer("positions_ND", self._positions_SSD.flatten(0, 1), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        """What `.to` cast it to, and what its images must be."""
        return self.positions_ND.dtype

    def train(self, mode: bool = True) -> "Backbone":
        """Frozen: stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        # Moved or cast: resized positions follow at their next use.
        self._resized.clear()
        return super()._apply(fn, recurse)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (h, w) of an image of height x width pixels, which must be multiples of the patch size.

        Any other size is an InputError: tokens that cover only a part of the image would shift label maps.
        """
        patch = self.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            nearest = " x ".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
            raise InputError(
                f"image of {height} x {width}: {self.name} needs multiples of {patch}; resize it to {nearest}"
            )
        return height // patch, width // patch

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding of the patches of a grid (h, w), resized as the family's authors do: (N, D)."""
        if grid == self._positions_SSD.shape[:2]:
            return self.positions_ND
        return self._resized_to(grid, self._resize).flatten(0, 1)

    def _resized_to(self, grid: tuple[int, int], how: Resize) -> Tensor:
        """Positions (h, w, D) of a grid, kept for the next call."""
        if (grid, how) not in self._resized:
            resized_hwD = resize_positions(self._positions_SSD, grid, how)
            self._resized[grid, how] = resized_hwD.to(self.positions_ND)
        return self._resized[grid, how]

    def asymmetric_range(self, ratio: float = 10.0) -> int:
        """Number of offsets per axis that `asymmetric_positions` takes: 0 <= i < asymmetric_range(ratio)."""
        side = self._positions_SSD.shape[0]
        return int((1 + ratio) * side) - side + 1

    def asymmetric_positions(self, ratio: float = 10.0, *, offset: tuple[int, int]) -> Tensor:
        """Positions (N, D) of the training grid, cut at `offset` (row, column) from an enlarged map.

        As `interpolate_and_crop_pos_embed` of the published models: S x S positions are resized bicubically
        to int((1 + ratio) S) squared, in every family without antialiasing, and cropped back to S x S.
        """
        count = self.asymmetric_range(ratio)
        if not all(0 <= start < count for start in offset):
            raise InputError(
                f"offset {offset} of the asymmetric positions: expected two numbers in [0, {count})"
            )
        side = self._positions_SSD.shape[0]
        large_SSD = self._resized_to((side + count - 1, side + count - 1), "plain")
        row, column = offset
        return large_SSD[row : row + side, column : column + side].reshape(side * side, -1)

    def tokens(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """Patch tokens (B, N, D) of ImageNet-normalised images (B, 3, H, W), row by row.

        positions: (N, D), in place of the encoder's own; class and register tokens keep theirs.
        """
        grid = self.grid(images.shape[-2], images.shape[-1])
        added_ND = self.positions(grid) if positions is None else positions
        tokens_BND = self._blocks(self._patches(images) + added_ND)
        return tokens_BND if positions is None and not self._norm_plain else self.norm(tokens_BND)

    forward = tokens

    def three_views(self, frames: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, 3, N, D), contiguous, of frame 1, frame 2 and frame 1 at other positions.

        frames: (2, B, 3, H, W), ImageNet-normalised, of the training size; positions: (N, D), asymmetric.
        One batch of 3 B passes the blocks, frame 1 is cut into patches once; nothing waits for the device.
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
