"""The layouts of published checkpoints: where the encoder is in a file, and what its parameters are called.

`select_encoder` finds the encoder among all tensors of a checkpoint by its patch embedding, whatever
wrappers and containers surround it, and renames its parameters to those of timm. `fit_names` then adapts
the few names that differ between timm's classes.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from fasttrain.errors import InputError

StateDict = dict[str, Tensor]

# Names that wrappers insert anywhere in a key: DistributedDataParallel, torch.compile, FSDP, checkpointing.
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# The weight of the patch embedding, by which an encoder is recognised, and the layout that has this name.
_TRANSFORMERS = "Hugging Face transformers"
_PATCH_EMBEDDINGS = {
    "patch_embed.proj.weight": "timm",
    "conv1.weight": "CLIP",
    "embeds.proj.weight": "timm's NaFlexVit",
    "embeddings.patch_embeddings.projection.weight": _TRANSFORMERS,
    "embeddings.patch_embeddings.weight": _TRANSFORMERS,
    "embeddings.patch_embedding.weight": _TRANSFORMERS,
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A moving average of the weights, which some training scripts store next to them. timm prefers it as well.
_AVERAGES = ("state_dict_ema", "model_ema", "ema")

# Parts of an encoder that do not affect the patch tokens, after `_TIMM_NAMES`: MAE's decoder, mask tokens,
# heads, constants of rotary embeddings, and the projection in the checkpoints of the Co-Settle release.
_NOT_ENCODER = re.compile(
    r"(adapter|decoder\w*|head|head_dist|fc|classifier|pooler|proj|projectors|mask_token|masked_embed"
    r"|lm_head|local_cls_norm|rope_embeddings|embeddings\.position_ids)(\.|$)|(.*\.)?(rope\.freqs_\w+|bias_mask)$"
)

# Translates the keys of other layouts to those of timm's VisionTransformer. In order, they are those of
# OpenAI's CLIP and Meta's Perception Encoder, Meta's DINOv2 and DINOv3, BAAI's EVA, timm's NaFlexVit, and
# transformers.
_TIMM_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in [
        (r"^class_embedding$", "cls_token"),
        (r"^positional_embedding$", "pos_embed"),
        (r"^conv1\.", "patch_embed.proj."),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_post\.", "norm."),
        (r"^transformer\.resblocks\.", "blocks."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.ls_([12])\.", r".ls\1."),
        (r"\.attn\.in_proj_", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        (r"^(register_tokens|storage_tokens)$", "reg_token"),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
        (r"^rope_embed\.periods$", "rope.periods"),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        (r"\.attn\.([qkv])_bias$", r".attn.\1_proj.bias"),
        (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
        (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
        (r"^embeds\.proj\.", "patch_embed.proj."),
        (r"^embeds\.(cls_token|reg_token|pos_embed)$", r"\1"),
        (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
        (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.mask_token$", "mask_token"),
        (r"^embeddings\.(patch_embeddings\.projection|patch_embeddings?)\.", "patch_embed.proj."),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(layernorm|post_layernorm)\.", "norm."),
        (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
        (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
        (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
        (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1_proj."),
        (r"\.(attention|self_attn)\.(q|k|v)_proj\.", r".attn.\2_proj."),
        (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
        (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
        (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
        (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    ]
]

# Names of relative positions, which fasttrain does not support.
_RELATIVE = re.compile(r"relative_position_bias_table$|\.rel_pos(_|\.|$)")
# What a checkpoint without a ViT is likely to contain, by a pattern of its keys.
_OTHER_MODELS = [
    (r"(^|\.)(decoder_embed|decoder_blocks\.0)\.", "the decoder of a masked autoencoder"),
    (r"(embed_tokens|wte|word_embeddings|token_embedding)\.weight$", "a language model or text encoder"),
    (r"(^|\.)(up_blocks|down_blocks|quant_conv)\.", "the autoencoder or U-Net of a diffusion model"),
    (r"(^|\.)patch_embed(dings)?\.(proj\.\d|projection\.\d|stem|conv)", "a ViT with a convolutional stem"),
    (r"(^|\.)(downsample_layers|stages\.\d)\.", "a convolutional network such as ConvNeXt"),
    (r"(^|\.)layer1\.0\.conv1\.", "a ResNet"),
    (r"(^|\.)encoder_layer_0\.", "torchvision's ViT; use weights of timm or another library"),
    (r"(^|\.)_?flat_param", "a shard of a model that was trained with FSDP; export the whole state dict"),
]  # fmt: skip


def flatten(checkpoint: Any) -> StateDict:
    """Return all tensors of nested mappings, by their dotted keys without the names of wrappers.

    Raises InputError if two keys differ only in the wrappers, or if a tensor has no plain array of values.
    """
    tensors: StateDict = {}
    for key, tensor in _tensors(checkpoint, ""):
        kinds = {
            "sparse": tensor.layout not in (torch.strided, torch.jagged),
            "nested": tensor.is_nested,
            "meta": tensor.is_meta,
            "quantised": tensor.is_quantized,
        }
        if kind := next((kind for kind, is_kind in kinds.items() if is_kind), None):
            raise InputError(f"parameter {key!r} is a {kind} tensor; expected the values of a dense one")
        name = _WRAPPERS.sub("", key)
        if name in tensors:
            raise InputError(f"parameter {key!r} occurs twice, under different wrappers; save a single model")
        tensors[name] = tensor
    return tensors


def _tensors(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if torch.is_tensor(value):
        yield prefix.removesuffix("."), value.detach()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{prefix}{key}.")


def select_encoder(
    tensors: StateDict, weights: str, *, prefer: tuple[str, ...] = (), entry: str | None = None
) -> tuple[StateDict, str]:
    """Find the encoder in a checkpoint and rename its parameters to those of timm.

    Args:
        tensors: All tensors of the checkpoint (`flatten`).
        weights: The location of the weights, for messages.
        prefer: Names in the path of an encoder that decide between several encoders, such as `teacher`.
        entry: The path of the encoder, if the user chose one; empty: the top level.

    Returns:
        The tensors of the encoder in float32, and a description of where they were found.

    Raises:
        InputError: The checkpoint contains no encoder, or several of which neither `prefer` nor `entry`
            selects one.
    """
    found = {root: layout for key in tensors for root, layout in _encoder_of(key, tensors)}
    if not found:
        raise InputError(f"weights {weights!r} contain no ViT that fasttrain can read: {describe(tensors)}")
    root = _choose(list(found), weights, prefer, entry)
    # Another encoder may be nested below the top level.
    others = tuple(other for other in found if other != root and other.startswith(root))
    inner = {
        key.removeprefix(root): tensor
        for key, tensor in tensors.items()
        if key.startswith(root) and not key.startswith(others)
    }
    if any(map(_RELATIVE.search, inner)):
        raise InputError(f"weights {weights!r} contain no ViT that fasttrain can read: {describe(inner)}")
    state = {_timm_name(key): tensor for key, tensor in inner.items()}
    place = f"entry {root.removesuffix('.')!r}, " if root else ""
    return _unify(state, weights), f"{place}parameters named as in {found[root]}"


def _choose(roots: list[str], weights: str, prefer: tuple[str, ...], entry: str | None) -> str:
    """Return the prefix of one of several encoders."""
    chosen = roots
    if entry is not None:
        chosen = [root for root in roots if (f".{root}".startswith(f".{entry}.") if entry else not root)]
    for name in (*prefer, *_AVERAGES):
        chosen = [root for root in chosen if name in root.split(".")] or chosen
    if len(chosen) != 1:
        choices = [root.removesuffix(".") for root in roots]
        problem = "contain several encoders:" if entry is None or chosen else f"have no encoder {entry!r}:"
        location = weights if entry is None else weights.removesuffix(f"#{entry}")
        raise InputError(
            f"weights {weights!r} {problem} {', '.join(map(repr, choices))}. Append one of them after #, as "
            f"in {location}#{choices[-1]}"
        )
    return chosen[0]


def _unify(state: StateDict, weights: str) -> StateDict:
    """Return the parameters that matter for patch tokens in float32, with the shapes of timm."""
    for mask in [key for key in state if key.endswith("qkv.bias_mask")]:
        # DINOv3 has no bias of the keys; the mask is one for queries and values.
        bias = mask.removesuffix("_mask")
        if bias in state:
            state[bias] = torch.where(state[mask] == 1, state[bias], 0)
    state = {key: tensor for key, tensor in state.items() if not _NOT_ENCODER.match(key)}
    if not any(".mlp.fc1_g." in key for key in state):
        # DINOv3 in transformers names the first layer of an MLP without a gate `up_proj`.
        state = {key.replace(".mlp.fc1_x.", ".mlp.fc1."): tensor for key, tensor in state.items()}
    quantised = next((key for key, tensor in state.items() if tensor.dtype not in _FLOATS), None)
    if quantised is not None:
        raise InputError(
            f"weights {weights!r}: {quantised} has the dtype {state[quantised].dtype}; expected "
            f"floating-point weights, not quantised ones"
        )
    state = {key: tensor.float() for key, tensor in state.items()}
    state["patch_embed.proj.weight"] = as_convolution(state["patch_embed.proj.weight"])
    if not state["patch_embed.proj.weight"].numel():
        raise InputError(f"weights {weights!r}: the patch embedding is empty; download them again")
    for name in {"cls_token", "reg_token", "pos_embed"} & state.keys():
        # CLIP stores them without a batch dimension, and NaFlex stores positions as a square map.
        shape = state[name].shape
        if not shape or (len(shape) == 4 and shape[1] != shape[2]):
            raise InputError(f"weights {weights!r}: {name} has the unsupported shape {list(shape)}")
        state[name] = state[name].reshape(1, -1, shape[-1])
    return state


def as_convolution(weight: Tensor) -> Tensor:
    """Reshape the weight of a linear layer on patches (rows, columns, colours) for a convolution."""
    if weight.ndim == 4:
        return weight
    side = math.isqrt(weight.shape[1] // 3)
    if weight.shape[1] != 3 * side * side:
        raise InputError(
            f"the patch embedding has {weight.shape[1]} columns; expected 3 colours of a square patch"
        )
    return weight.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()


def _encoder_of(key: str, tensors: StateDict) -> Iterator[tuple[str, str]]:
    for name, layout in _PATCH_EMBEDDINGS.items():
        if f".{key}".endswith(f".{name}") and tensors[key].ndim in (2, 4):
            root = key.removesuffix(name)
            # A ResNet has a `conv1` as well.
            if layout != "CLIP" or f"{root}transformer.resblocks.0.ln_1.weight" in tensors:
                yield root, layout


def _timm_name(key: str) -> str:
    for pattern, name in _TIMM_NAMES:
        key = pattern.sub(name, key)
    return key


def describe(tensors: Mapping[str, Tensor]) -> str:
    """Say in a few words what a checkpoint seems to contain."""
    if any(re.search(r"patch_embed.*weight$", key) and t.ndim == 5 for key, t in tensors.items()):
        return "their patches span several frames, as in a video model"
    if any(_RELATIVE.search(key) for key in tensors):
        return "their positions are relative, as in BEiT, Swin or SAM; expected embedded or rotary positions"
    for pattern, model in _OTHER_MODELS:
        if any(re.search(pattern, key) for key in tensors):
            return f"they look like {model}"
    shown = ", ".join(list(tensors)[:4])
    return (
        f"their keys are {shown}{', ...' if len(tensors) > 4 else ''}" if tensors else "they have no tensors"
    )


def fit_names(state: StateDict, vit: Any) -> StateDict:
    """Adapt an encoder's tensors to the names of a model's class.

    Queries, keys and values, and the two halves of a gated MLP, are stored apart in some layouts and together
    in others. The final norm and LayerScale have two names in timm.
    """
    state = dict(state)
    has_bias = any(key.endswith(("q_proj.bias", "qkv.bias")) for key in state)
    for index, block in enumerate(vit.blocks):
        attn, mlp = f"blocks.{index}.attn.", f"blocks.{index}.mlp."
        if getattr(getattr(block, "attn", None), "qkv", None) is not None:
            if f"{attn}q_proj.bias" in state:
                # DINOv3 and EVA have no bias of the keys.
                state.setdefault(f"{attn}k_proj.bias", torch.zeros_like(state[f"{attn}q_proj.bias"]))
            for kind in ("weight", "bias"):
                _join(state, f"{attn}qkv.{kind}", [f"{attn}{name}_proj.{kind}" for name in "qkv"])
            if isinstance(vit, Eva) and not has_bias:
                # DINOv3 was released with biases of zero, and timm has models with and without them.
                state[f"{attn}qkv.bias"] = torch.zeros(block.attn.qkv.out_features)
        if hasattr(getattr(block, "mlp", None), "fc1"):
            for kind in ("weight", "bias"):
                _join(state, f"{mlp}fc1.{kind}", [f"{mlp}fc1_{half}.{kind}" for half in "gx"])
    if isinstance(vit, Eva):
        state = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key): tensor for key, tensor in state.items()}
    if isinstance(vit.norm, nn.Identity):
        state = {re.sub(r"^norm\.", "fc_norm.", key): tensor for key, tensor in state.items()}
    return state


def _join(state: StateDict, joined: str, parts: list[str]) -> None:
    """Concatenate the parts of a parameter if all of them are stored."""
    if all(part in state for part in parts):
        state[joined] = torch.cat([state.pop(part) for part in parts])
