"""The families of ViTs: what distinguishes them, how timm builds them, and how their weights are loaded.

The paper has eight families; all other ViTs of timm form one more. `build_family` and `build_timm` make an
encoder with random weights, of the sizes of a checkpoint if there is one. `load_state` loads the checkpoint.
"""

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import Mlp, PatchEmbed, QuickGELU, SwiGLUPacked
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fasttrain.configuration import ACTIVATIONS, Config
from fasttrain.errors import InputError
from fasttrain.layouts import StateDict, as_convolution, fit_names
from fasttrain.positions import Axis, Resize, sincos_positions
from fasttrain.projection import Init


@dataclass(frozen=True)
class Family:
    """The properties of a family of backbones, as published in github.com/yafeng19/Co-Settle.

    Attributes:
        prefer: Names in a checkpoint that decide between several encoders, such as `teacher`.
        vit: Arguments of timm's VisionTransformer other than the sizes.
        layer_norm_eps: Epsilon of every LayerNorm, unless the configuration of the weights has another.
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
TIMM = Family(resize="antialias")


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


def build_family(name: str, state: StateDict, config: Config, given: dict[str, int], image_size: int) -> Any:
    family = FAMILIES[name]
    options: dict[str, Any] = family.vit | _sizes(state) | given
    width = options.setdefault("embed_dim", 768)
    heads = config.num_heads or (HEADS | family.heads).get(width)
    if heads is None and not state and width % 64 == 0:
        heads = width // 64  # Any number is right for random weights.
    if heads is None:
        raise InputError(
            f"backbone {name!r}: no number of heads is published for the width {width}; set "
            f"backbone.num_heads"
        )
    if width % heads:
        raise InputError(
            f"backbone {name!r}: the width {width} is not a multiple of the number of heads, {heads}; set "
            f"backbone.num_heads to a divisor of it"
        )
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
    _configure(vit, config)
    if family.sincos:
        vit.pos_embed.data.copy_(sincos_positions(vit.patch_embed.grid_size, width, family.sincos))
    return vit


def check_timm(name: str) -> None:
    """Raise InputError if a timm model is of another architecture than a ViT that fasttrain supports."""
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    if module not in TIMM_MODULES:
        reason = _REASONS.get(module, "")
        raise InputError(
            f"backbone {name!r} is a model of timm's {module}{reason}; fasttrain needs a ViT, all blocks of "
            f"which have the same grid of patches. Choose one of the families {', '.join(FAMILIES)}, or a "
            f"model of timm's {', '.join(TIMM_MODULES)}, such as vit_base_patch16_dinov3"
        )


def build_timm(name: str, config: Config, given: dict[str, int], image_size: int) -> Any:
    sizes: dict[str, Any] = dict(given)
    if config.num_heads:
        sizes["num_heads"] = config.num_heads
    # NaFlexVit accepts images of all sizes.
    if not name.startswith("naflexvit"):
        sizes |= {"img_size": image_size, "dynamic_img_size": True}
    try:
        # In training mode, some rotary positions are random.
        vit: Any = timm.create_model(name, num_classes=0, **sizes).eval()
    # Raised for architectures that do not accept these arguments, for invalid sizes, and for unknown tags.
    except (TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"backbone {name!r} cannot be built with these sizes ({error})") from error
    if isinstance(vit, NaFlexVit):
        _unify_embeddings_of_naflex(vit, name)
    rope = getattr(vit, "rope", None)
    if vit.pos_embed is None and rope is None:
        raise InputError(f"backbone {name!r} has neither position embeddings nor rotary positions")
    if isinstance(rope, RotaryEmbeddingMixed):
        raise InputError(
            f"backbone {name!r} has rotary positions with frequencies per block and head (mixed RoPE), which "
            f"are not supported; expected embedded or axial rotary positions"
        )
    _configure(vit, config)
    if isinstance(vit, Eva):
        _join_biases_of_eva(vit)
    return vit


def _unify_embeddings_of_naflex(vit: Any, name: str) -> None:
    """Replace the embeddings of a NaFlexVit by those of a VisionTransformer, which are equal for images."""
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
    # Of the module, only the mode in which it resizes positions is still needed.
    embeds.proj = embeds.pos_embed = embeds.cls_token = embeds.reg_token = None


def _configure(vit: Any, config: Config) -> None:
    """Set the epsilon of all LayerNorms, and the activation function of plain MLPs.

    Gated MLPs, and those of Eva, have a fixed activation function.
    """
    if config.layer_norm_eps is not None:
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps
    if config.activation is not None and not isinstance(vit, Eva):
        for block in vit.blocks:
            if isinstance(getattr(block, "mlp", None), Mlp):
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
    """Infer the sizes of a ViT from its state dict; `load_state` reports missing keys."""
    if not state:
        return {}
    sizes: dict[str, Any] = {"reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0}
    sizes["embed_dim"], *_, sizes["patch_size"] = state["patch_embed.proj.weight"].shape
    sizes["depth"] = _depth(state)
    hidden = state.get("blocks.0.mlp.fc1.weight")
    gate = state.get("blocks.0.mlp.fc1_g.weight")
    # `load_state` reports parameters of another shape.
    rows = 2 * gate.shape[0] if gate is not None and gate.ndim else 0
    if gate is None and hidden is not None and hidden.ndim:
        rows = hidden.shape[0]
    if rows:
        # May be fractional (48 / 11 in I-JEPA's ViT-g). timm truncates the product with the embedding
        # dimension; adding a half protects it from rounding errors.
        sizes["mlp_ratio"] = (rows + 0.5) / sizes["embed_dim"]
    output = state.get("blocks.0.mlp.fc2.weight")
    if output is not None and output.ndim == 2 and rows == 2 * output.shape[1]:
        sizes |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return sizes


def _depth(state: StateDict) -> int:
    """Return the number of blocks; `load_state` reports those beyond a missing one."""
    return len({match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))})


def check_config(config: Config, state: StateDict, weights: str) -> None:
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
    if config.activation not in (None, *ACTIVATIONS):
        raise InputError(
            f"weights {weights!r}: the configuration names the activation {config.activation!r}; set "
            f"backbone.activation to one of {', '.join(ACTIVATIONS)}"
        )
    if config.num_heads and width % config.num_heads:
        raise InputError(
            f"weights {weights!r}: the number of heads, {config.num_heads}, does not divide the width "
            f"{width} of the tensors; pass the right configuration, or set backbone.num_heads"
        )


# The family, or a part of the names in timm, for each `model_type` of transformers.
_FAMILY_OF = {
    "vit_mae": "mae",
    "dinov2_with_registers": "dinov2",
    "dinov3_vit": "dinov3",
    "siglip2": "siglip",
}
_FAMILY_OF |= {model: model for model in ("clip", "dinov2", "ijepa", "siglip")}
_POOLING = re.compile(r"attn_pool\.").match


def _likely_family(state: StateDict) -> str:
    if any(map(_POOLING, state)):
        return ""
    if "blocks.0.ls1.gamma" in state:
        return "dinov2" if "pos_embed" in state else "dinov3"
    return "clip" if "norm_pre.weight" in state else ""


def load_state(vit: Any, state: StateDict, config: Config, *, name: str, weights: str, found: str) -> None:
    """Load a state dict strictly, for any number of positions; raise InputError if it does not fit."""
    state = fit_names(state, vit)
    if "pos_embed" in state and vit.pos_embed is not None:
        vit.pos_embed = nn.Parameter(torch.empty(1, state["pos_embed"].shape[1], vit.embed_dim))
    expected = vit.state_dict()
    # Attention pooling does not affect patch tokens, so its weights may be missing. Those of Eva may not:
    # only by them does the Perception Encoder differ from CLIP, which has other positions and activations.
    pools = getattr(vit, "attn_pool", None) is not None
    if pools and (any(map(_POOLING, state)) or not isinstance(vit, Eva)):
        state, expected = (
            {key: tensor for key, tensor in tensors.items() if not _POOLING(key)}
            for tensors in (state, expected)
        )
    periods = getattr(getattr(vit, "rope", None), "periods", None)
    if periods is not None and "rope.periods" in state:
        # The published DINOv3 stores the periods of its rotary positions, rounded to bfloat16.
        expected["rope.periods"] = periods
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
        width, depth = state["patch_embed.proj.weight"].shape[0], _depth(state)
        if (width, depth) != (vit.embed_dim, len(vit.blocks)):
            reasons.insert(0, f"the checkpoint has width {width} and depth {depth}")
        family = _FAMILY_OF.get(config.model or "") or _likely_family(state)
        likely = "" if not family or family in name else f"; these look like weights of {family}"
        raise InputError(
            f"weights {weights!r} ({found}) do not fit {name} (width {vit.embed_dim}, depth "
            f"{len(vit.blocks)}): {'; '.join(reasons[:4])}. Check the name of the backbone{likely}"
        )
    broken = next((key for key, tensor in state.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise InputError(f"weights {weights!r}: {broken} has values that are not finite; download them again")
    if periods is not None and "rope.periods" in state:
        periods.copy_(state["rope.periods"])
    vit.load_state_dict(state, strict=False)
