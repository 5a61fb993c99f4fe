"""The frozen image encoders: eight published families of ViTs, and any plain timm ViT by name.

`load_backbone` builds a timm VisionTransformer or Eva and loads its weights. Training encodes three views of
each frame pair (`Backbone.three_views`); evaluation and inference need plain tokens (`Backbone.tokens`).

Shape suffixes: B images, H and W pixels, N patch tokens on an h x w grid, P class and register tokens, L all
tokens, S cells per side of a square grid, D channels, C channels of the positions (see `positions`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import GluMlp, PatchEmbed, QuickGELU, SwiGLUPacked
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fasttrain.errors import InputError
from fasttrain.layouts import ACTIVATIONS, Config, StateDict, as_convolution, fit_names, triple
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.positions import Axis, PositionEncoding, Resize, sincos_positions
from fasttrain.projection import Init
from fasttrain.weights import hash_state_dict, load_encoder_weights, seeded, timm_config


@dataclass(frozen=True)
class Family:
    """The properties of a family of backbones, as published in github.com/yafeng19/Co-Settle.

    Attributes:
        prefer: Names in a checkpoint that decide between several encoders, such as `teacher`.
        vit: Arguments of timm's VisionTransformer other than the sizes.
        layer_norm_eps: Epsilon of every LayerNorm.
        heads: Published numbers of attention heads by width, if they differ from `HEADS`.
        sincos: If set, position embeddings are initialised with fixed sines and cosines, and the first half
            of the channels encodes this axis.
        norm_plain: Whether the final norm is applied to tokens with the usual positions. The published I-JEPA
            code applies it to the asymmetric view only, both in training and in evaluation.
        resize: How positions are resized to other image sizes (see `resize_positions`).
        resize_once: How the positions of a checkpoint are resized to the training image size (None: as
            `resize`).
        resize_without_registers: How models without register tokens resize positions (None: as `resize`).
        projection_init: How the weights of the projection are initialised.
    """

    prefer: tuple[str, ...] = ()
    vit: dict[str, Any] = field(default_factory=dict)
    layer_norm_eps: float = 1e-6
    heads: dict[int, int] = field(default_factory=dict)
    sincos: Axis | None = None
    norm_plain: bool = True
    resize: Resize = "offset"
    resize_once: Resize | None = None
    resize_without_registers: Resize | None = None
    projection_init: Init = "trunc_normal"


# The numbers of heads of ViT-Ti, S, B and L by width, from github.com/google-research/vision_transformer and
# github.com/facebookresearch/deit.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}

FAMILIES: dict[str, Family] = {
    "mae": Family(
        heads={1280: 16},  # models_mae.py of github.com/facebookresearch/mae
        sincos="column",
        projection_init="xavier_uniform",
    ),
    "ijepa": Family(
        ("encoder",),
        vit={"class_token": False},
        # src/models/vision_transformer.py of github.com/facebookresearch/ijepa
        heads={1280: 16, 1408: 16, 1664: 16},
        sincos="column",
        norm_plain=False,
    ),
    "clip": Family(
        ("visual",),
        vit={"pre_norm": True, "act_layer": QuickGELU},
        layer_norm_eps=1e-5,
        # src/open_clip/model_configs of github.com/mlfoundations/open_clip: ViT-H, g and bigG
        heads={1280: 16, 1408: 16, 1664: 16},
        resize="antialias",
        projection_init="default",
    ),
    "blip": Family(("visual_encoder",), resize="antialias", resize_once="plain"),
    "mocov3": Family(
        ("momentum_encoder",),
        heads={384: 12},  # vits.py of github.com/facebookresearch/moco-v3
        sincos="row",
        projection_init="xavier_uniform",
    ),
    "ibot": Family(("teacher",)),
    "dino": Family(("teacher",)),
    "dinov2": Family(
        ("teacher",),
        vit={"reg_tokens": 4, "init_values": 1.0},
        heads={1536: 24},  # dinov2/models/vision_transformer.py of github.com/facebookresearch/dinov2
        resize="antialias",
        # dinov2/hub/backbones.py: an offset of 0.1 without registers, antialiasing with them.
        resize_without_registers="offset",
    ),
}

# All timm ViTs. Their positions are resized as in timm.
_TIMM = Family(resize="antialias")


# timm's modules of ViTs in which every block attends to all patches, and positions are embedded or rotary.
TIMM_MODULES = ("vision_transformer", "deit", "eva", "naflexvit")
_REASONS = {
    "beit": ", whose positions are biases of the attention",
    "vision_transformer_relpos": ", whose positions are biases of the attention",
    "vision_transformer_hybrid": ", which has a convolutional stem",
    "vision_transformer_sam": ", whose attention is limited to windows",
    "swin_transformer": ", whose attention is limited to windows",
    "swin_transformer_v2": ", whose attention is limited to windows",
    "hiera": ", whose attention is limited to windows",
}


def load_backbone(
    name: str,
    *,
    weights: str = "random",
    image_size: int = 224,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
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
        mean: Mean of the RGB values (0 to 1) by which images are normalised. None: from the configuration
            of the weights or the timm model, else that of ImageNet, which the paper uses for its families.
        std: Standard deviation of the RGB values. None: as for `mean`.
        seed: Seed of random weights.

    Returns:
        The encoder in float32 on the CPU, in evaluation mode and without gradients.

    Raises:
        InputError: The name is unknown, the weights cannot be loaded, or they do not fit the sizes.
    """
    family = FAMILIES.get(name, _TIMM)
    if name not in FAMILIES and not timm.is_model(name):
        raise InputError(
            f"backbone {name!r} is neither one of {', '.join(FAMILIES)} nor a timm ViT{_similar(name)}"
        )
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    given = {size: value for size, value in sizes.items() if value is not None}
    state: StateDict = {}
    config, found = Config(), ""
    if weights != "random":
        state, config, found = load_encoder_weights(weights, family.prefer)
        _check_config(config, state, weights)
    with seeded(seed):
        if name in FAMILIES:
            vit = _build_family(name, state, config, given, image_size)
        else:
            vit = _build_timm(name, state, config, given, image_size)
    if state:
        _load_state(vit, state, config, f"weights {weights!r} ({found}) do not fit {name}")
    defaults = timm_config(vit) if name not in FAMILIES else Config()
    if isinstance(vit, NaFlexVit) and vit.embeds.pos_embed_interp_mode == "bilinear":
        family = replace(family, resize="bilinear")
    return Backbone(
        vit,
        family,
        name=name,
        weights=weights,
        found=found,
        image_size=image_size,
        mean=mean or config.mean or defaults.mean or IMAGENET_MEAN,
        std=std or config.std or defaults.std or IMAGENET_STD,
    )


def _similar(name: str) -> str:
    modules = ("vision_transformer", "eva")
    similar = [model for module in modules for model in timm.list_models(f"*{name}*", module=module)]
    return f"; did you mean {' or '.join(similar[:6])}?" if similar else ""


# --- building an encoder with random weights -----------------------------------------------------------


def _build_family(name: str, state: StateDict, config: Config, given: dict[str, int], image_size: int) -> Any:
    family = FAMILIES[name]
    options: dict[str, Any] = family.vit | _sizes(state) | given
    width = options.setdefault("embed_dim", 768)
    heads = given.get("num_heads", config.num_heads) or (HEADS | family.heads).get(width)
    if heads is None and not state and width % 64 == 0:
        heads = width // 64  # Any number is right for random weights.
    if heads is None or width % heads:
        problem = "no published number of heads" if heads is None else f"no multiple of num_heads={heads}"
        raise InputError(f"backbone {name!r}: the width {width} has {problem}; set backbone.num_heads")
    options["num_heads"] = heads
    vit: Any = VisionTransformer(
        norm_layer=partial(nn.LayerNorm, eps=family.layer_norm_eps),
        no_embed_class=True,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
        img_size=image_size,
        **options,
    )
    _set_activation(vit, config)
    if family.sincos:
        vit.pos_embed.data.copy_(sincos_positions(vit.patch_embed.grid_size, width, family.sincos))
    return vit


def _build_timm(name: str, state: StateDict, config: Config, given: dict[str, int], image_size: int) -> Any:
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    if module not in TIMM_MODULES:
        reason = _REASONS.get(module, "")
        raise InputError(
            f"backbone {name!r} is a model of timm's {module}{reason}; expected a ViT of "
            f"{', '.join(TIMM_MODULES)}"
        )
    sizes: dict[str, Any] = ({"num_heads": config.num_heads} if config.num_heads else {}) | given
    # NaFlexVit accepts images of all sizes.
    if not name.startswith("naflexvit"):
        sizes |= {"img_size": image_size, "dynamic_img_size": True}
    try:
        vit: Any = timm.create_model(name, num_classes=0, **sizes)
    # Raised for architectures that do not accept these arguments, for invalid sizes, and for unknown tags.
    except (TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"backbone {name!r} is not a plain timm ViT of these sizes ({error})") from error
    # Attention pooling does not affect the patch tokens, and its weights are not loaded.
    vit.attn_pool = None
    if isinstance(vit, NaFlexVit):
        _unify_embeddings_of_naflex(vit, name)
    if vit.pos_embed is None and getattr(vit, "rope", None) is None:
        raise InputError(f"backbone {name!r} has neither position embeddings nor rotary positions")
    if isinstance(vit.rope if hasattr(vit, "rope") else None, RotaryEmbeddingMixed):
        raise InputError(
            f"backbone {name!r} has rotary positions with frequencies per block and head (mixed RoPE), which "
            f"are not supported; expected embedded or axial rotary positions"
        )
    _set_activation(vit, config)
    if isinstance(vit, Eva):
        _join_biases_of_eva(vit)
    return vit


def _unify_embeddings_of_naflex(vit: Any, name: str) -> None:
    """Give a NaFlexVit the embeddings of a VisionTransformer, which for images compute the same."""
    embeds = vit.embeds
    if embeds.pos_embed is None or embeds.pos_embed_ar_preserving:
        raise InputError(
            f"backbone {name!r} has positions that are factorised or depend on the aspect ratio; expected a "
            f"map of positions"
        )
    vit.patch_embed = PatchEmbed(
        img_size=None,
        patch_size=embeds.patch_size,
        embed_dim=vit.embed_dim,
        bias=embeds.proj.bias is not None,
        output_fmt="NHWC",
    )
    vit.patch_embed.proj.weight.data = as_convolution(embeds.proj.weight.detach())
    if embeds.proj.bias is not None:
        vit.patch_embed.proj.bias = embeds.proj.bias
    vit.cls_token, vit.reg_token, vit.no_embed_class = embeds.cls_token, embeds.reg_token, True
    vit.pos_embed = nn.Parameter(embeds.pos_embed.detach().flatten(1, 2))
    # The module keeps no parameters, but the mode by which it resizes positions.
    embeds.proj = embeds.pos_embed = embeds.cls_token = embeds.reg_token = None


def _set_activation(vit: Any, config: Config) -> None:
    if config.activation is not None and not isinstance(vit, Eva):
        block: Any
        for block in vit.blocks:
            if not isinstance(block.mlp, GluMlp):
                block.mlp.act = ACTIVATIONS[config.activation][0]()


def _join_biases_of_eva(vit: Eva) -> None:
    """Move the biases of queries and values, which timm concatenates at each call, to the linear layer."""
    attention: Any
    for attention in (block.attn for block in vit.blocks):
        if attention.qkv is not None and attention.qkv.bias is None:
            bias = torch.zeros(attention.qkv.out_features)
            if attention.q_bias is not None:
                bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias)).detach()
            attention.qkv.bias = nn.Parameter(bias)
            attention.q_bias = attention.k_bias = attention.v_bias = None


# --- loading the weights of a checkpoint ---------------------------------------------------------------


def _sizes(state: StateDict) -> dict[str, Any]:
    """Infer the sizes of a ViT from its state dict; `_load_state` reports missing keys."""
    if not state:
        return {}
    sizes: dict[str, Any] = {"reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0}
    sizes["embed_dim"], *_, sizes["patch_size"] = state["patch_embed.proj.weight"].shape
    depth = _depth(state)
    if depth:
        sizes["depth"] = depth
    hidden = state.get("blocks.0.mlp.fc1.weight")
    gate = state.get("blocks.0.mlp.fc1_g.weight")
    rows = 2 * len(gate) if gate is not None else len(hidden) if hidden is not None else 0
    if rows:
        # May be fractional (48 / 11 in I-JEPA's ViT-g). timm truncates the product with the embedding
        # dimension; adding a half protects it from rounding errors.
        sizes["mlp_ratio"] = (rows + 0.5) / sizes["embed_dim"]
    output = state.get("blocks.0.mlp.fc2.weight")
    if output is not None and rows == 2 * output.shape[1]:
        sizes |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return sizes


def _depth(state: StateDict) -> int:
    return 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)


def _check_config(config: Config, state: StateDict, weights: str) -> None:
    """Raise InputError if the configuration contradicts the tensors."""
    width, *_, patch = state["patch_embed.proj.weight"].shape
    for key, told, actual in (
        ("width", config.embed_dim, width),
        ("depth", config.depth, _depth(state)),
        ("patch size", config.patch_size, patch),
    ):
        if told not in (None, actual):
            raise InputError(
                f"weights {weights!r}: the configuration says {key} {told}, but the tensors have {key} "
                f"{actual}; pass the configuration that belongs to the weights"
            )
    if config.num_heads and width % config.num_heads:
        raise InputError(
            f"weights {weights!r}: the configuration says {config.num_heads} heads, which do not divide the "
            f"width {width} of the tensors; pass the configuration that belongs to the weights"
        )


# The families of weights by the model type in the configuration of transformers.
_FAMILY_OF = {
    "vit_mae": "mae",
    "ijepa": "ijepa",
    "clip": "clip",
    "clip_vision_model": "clip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "dinov3_vit": "vit_base_patch16_dinov3 or another of timm's dinov3",
    "siglip": "vit_base_patch16_siglip_224 or another of timm's siglip",
    "siglip_vision_model": "vit_base_patch16_siglip_224 or another of timm's siglip",
    "vit": "dino (if DINO trained it) or vit_base_patch16_224",
}


def _load_state(vit: Any, state: StateDict, config: Config, problem: str) -> None:
    """Load a state dict strictly, for any number of positions; raise InputError if it does not fit."""
    state = fit_names(state, vit)
    # The published DINOv3 stores the periods of its rotary positions, rounded to bfloat16.
    periods = state.pop("rope.periods", None)
    if periods is not None and hasattr(getattr(vit, "rope", None), "periods"):
        vit.rope.periods.copy_(periods)
    if "pos_embed" in state and vit.pos_embed is not None:
        vit.pos_embed = nn.Parameter(torch.empty(1, state["pos_embed"].shape[1], vit.embed_dim))
    expected = vit.state_dict()
    reasons = [
        f"{key} has the shape {list(state[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    for what, keys in (("missing", expected.keys() - state), ("unexpected", state.keys() - expected.keys())):
        if keys:
            first, *others = sorted(keys)
            reasons.append(f"{what} {first}" + (f" and {len(others)} more" if others else ""))
    if reasons:
        hint = _FAMILY_OF.get(config.model or "", "")
        hint = "" if problem.endswith(f" {hint}") else hint
        raise InputError(
            f"{problem} (width {vit.embed_dim}, depth {len(vit.blocks)}): {'; '.join(reasons[:4])}"
            + (f". They are weights of {config.model}: use backbone.name={hint}" if hint else "")
        )
    broken = next((key for key, tensor in state.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise InputError(f"{problem}: {broken} has values that are not finite; expected intact weights")
    vit.load_state_dict(state)


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
        num_heads: Number of attention heads.
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
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.name, self.weights, self.image_size = name, weights, image_size
        self._found = found
        self.mean = triple("backbone.mean", mean)
        self.std = triple("backbone.std", std, positive=True)
        self.weights_hash = hash_state_dict(vit.state_dict())
        self.embed_dim: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.feat_ratio()
        self.num_heads = _num_heads(vit)
        self.projection_init: Init = family.projection_init
        self._norm_plain = family.norm_plain

        self.patch_embed, self.norm_pre, self.blocks = vit.patch_embed, vit.norm_pre, vit.blocks
        # timm models that pool before the final norm (*_gap) store it as fc_norm.
        self.norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm

        prefix_PD, positions_SSD = _split_positions(vit, name)
        without_registers = family.resize_without_registers if vit.reg_token is None else None
        # Not a module, so that `.to` does not cast the float32 values from which positions are computed.
        self._encoding = PositionEncoding(
            positions_SSD,
            getattr(vit, "rope", None),
            side=self.grid(image_size, image_size)[0],
            resize=without_registers or family.resize,
            resize_once=family.resize_once,
        )
        self._cached: dict[Any, Tensor] = {}
        self.register_buffer("prefix_PD", prefix_PD, persistent=False)
        training_grid = (self._encoding.side, self._encoding.side)
        self.register_buffer("positions_NC", self._encoding.on_grid(training_grid), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def activation(self) -> str:
        """The class of the activation function in the blocks. Weights do not determine it."""
        kinds = (type(part).__name__ for part in self.blocks[0].modules() if "GELU" in type(part).__name__)
        return next(kinds, "SiLU")

    @property
    def summary(self) -> str:
        """A sentence on the architecture, where the weights were found, and the normalisation of frames."""
        found = f" ({self._found})" if self._found else ""
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{self.name}: width {self.embed_dim}, depth {len(self.blocks)}, {self.num_heads} heads, patch "
            f"size {self.patch_size}; weights {self.weights!r}{found}; frames normalised with mean ({mean}) "
            f"and std ({std})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoder, in which images must be passed."""
        return self.positions_NC.dtype

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

    def three_views(self, frames: Tensor, positions: Tensor) -> Tensor:
        """Encode the three views of a batch of frame pairs without waiting for the device.

        The blocks process one batch of 3 B images, and the patches of frame 1 are embedded once.

        Args:
            frames: Frames (2, B, 3, H, W) of the training image size, normalised with `mean` and `std`.
            positions: Asymmetric positions (N, C).

        Returns:
            Contiguous tokens (B, 3, N, D) of frame 1, frame 2, and frame 1 with asymmetric positions.
        """
        own_NC = self.positions(self.grid(frames.shape[-2], frames.shape[-1]))
        first_BND, second_BND = self._patches(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).unbind(0)
        patches_B3ND = torch.stack((first_BND, second_BND, first_BND), 1)
        added_3ND, rotary_3NR = self._split(torch.stack((own_NC, own_NC, positions)))
        inputs_B3ND = patches_B3ND + added_3ND
        rotary = None if rotary_3NR is None else rotary_3NR.expand(len(first_BND), -1, -1, -1).flatten(0, 1)
        views_B3ND = self._blocks(inputs_B3ND.flatten(0, 1), rotary).unflatten(0, inputs_B3ND.shape[:2])
        if self._norm_plain:
            return self.norm(views_B3ND).contiguous()
        return torch.cat((views_B3ND[:, :2], self.norm(views_B3ND[:, 2:])), 1)

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


def _num_heads(vit: Any) -> int:
    return next(part.num_heads for part in vit.blocks[0].modules() if hasattr(part, "num_heads"))
