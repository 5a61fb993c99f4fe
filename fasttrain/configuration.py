"""The configuration of weights: values that checkpoints do not store, from the files next to them or timm."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.layers import QuickGELU
from timm.layers.activations import GELU, GELUTanh
from torch import nn

from fasttrain.errors import InputError
from fasttrain.normalization import Triple

# The classes that implement each activation function of an MLP. New layers use the first one.
ACTIVATIONS: dict[str, tuple[type[nn.Module], ...]] = {
    "gelu": (nn.GELU, GELU),
    "gelu_tanh": (GELUTanh,),
    "quick_gelu": (QuickGELU,),
    "silu": (nn.SiLU,),
}
# Their other names in transformers.
_SYNONYMS = dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh")
_SYNONYMS |= {"gelu_python": "gelu", "swish": "silu"}

# config.json of transformers omits values that equal the defaults of the model's class. These are the
# defaults of the number of heads, the activation function and the epsilon of LayerNorm, by model type.
_DEFAULTS = {
    "clip": (12, "quick_gelu", 1e-5),
    "dinov3_vit": (6, "gelu", 1e-5),
    "siglip": (12, "gelu_tanh", 1e-6),
    "siglip2": (12, "gelu_tanh", 1e-6),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), (12, "gelu", 1e-6)),
    **dict.fromkeys(("deit", "ijepa", "vit", "vit_mae"), (12, "gelu", 1e-12)),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The values in the configuration of weights; None if it has none."""

    model: str | None = None
    """transformers' `model_type`, without `_vision_model`, or the name of a timm model."""
    embed_dim: int | None = None
    depth: int | None = None
    patch_size: int | None = None
    num_heads: int | None = None
    activation: str | None = None
    """The activation function of the MLPs, one of `ACTIVATIONS` if fasttrain supports it."""
    layer_norm_eps: float | None = None
    mean: Triple | None = None
    std: Triple | None = None


def read_config(files: Mapping[str, Any], weights: str) -> Config:
    """Read the configuration files of a repository.

    Args:
        files: Those that exist of `config.json` (of transformers or timm), `preprocessor_config.json`,
            `processor_config.json` (of transformers) and `open_clip_config.json`, parsed.
        weights: The location of the weights, for messages.

    Raises:
        InputError: A value is invalid.
    """
    config, open_clip = files.get("config.json", {}), files.get("open_clip_config.json", {})
    try:
        if isinstance(config.get("architecture"), str):
            known = _of_timm(config)
        elif open_clip and "model_type" not in config:
            known = _of_open_clip(open_clip)
        else:
            known = _of_transformers(config)
        known |= _normalisation(files)
    # A value has a type that these libraries never write.
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"weights {weights!r}: their configuration cannot be read ({error}). Download config.json and "
            f"preprocessor_config.json again"
        ) from error
    for name in ("embed_dim", "depth", "patch_size", "num_heads"):
        size = known.get(name)
        if size is not None and (type(size) is not int or size < 1):
            raise InputError(
                f"weights {weights!r}: the configuration says {name} {size!r}; expected a positive integer"
            )
    eps = known.get("layer_norm_eps")
    if eps is not None and not (type(eps) in (int, float) and 0 < eps < math.inf):
        raise InputError(
            f"weights {weights!r}: the configuration says layer_norm_eps {eps!r}; expected a positive number"
        )
    for name in ("mean", "std"):
        if known.get(name) is not None:
            known[name] = colours(f"weights {weights!r}: the configured {name}", known[name])
    return Config(**known)


def _of_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    # In the configuration of a larger model, the image encoder has its own section.
    sections = (config.get(name) for name in ("vision_config", "backbone_config", "encoder"))
    vision = next((section for section in sections if isinstance(section, Mapping)), config)
    model = vision.get("model_type", config.get("model_type", "")).removesuffix("_vision_model")
    heads, activation, eps = _DEFAULTS.get(model, (None, None, None))
    activation = vision.get("hidden_act", activation)
    return {
        "model": model or None,
        "embed_dim": vision.get("hidden_size"),
        "depth": vision.get("num_hidden_layers"),
        "patch_size": vision.get("patch_size"),
        "num_heads": vision.get("num_attention_heads", heads),
        "activation": _SYNONYMS.get(activation, activation),
        "layer_norm_eps": vision.get("layer_norm_eps", eps),
    }


def _of_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    model = config.get("model_cfg", {})
    vision = model.get("vision_cfg", {})
    if "width" not in vision:
        return {"model": vision.get("timm_model_name")}
    return {
        "embed_dim": vision["width"],
        "depth": vision.get("layers"),
        "patch_size": vision.get("patch_size"),
        "num_heads": vision["width"] // vision.get("head_width", 64),
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def _of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    name, pretrained = config["architecture"], config.get("pretrained_cfg") or {}
    # One block is enough to know the heads, the activation function and the epsilon.
    arguments = (config.get("model_args") or {}) | {"num_classes": 0, "depth": 1}
    try:
        vit = timm.create_model(name, **arguments)
    # Raised for unknown models, and for those that are not ViTs.
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return {"model": name}
    tag = pretrained.get("tag")
    native = native_activation(f"{name}.{tag}") if tag else None
    return {
        "model": name,
        "num_heads": num_heads(vit),
        "activation": native or activation_of(vit),
        "layer_norm_eps": layer_norm_eps(vit),
    }


def native_activation(name: str) -> str | None:
    """Return `quick_gelu` if weights of timm were trained with it, although their model has GELU."""
    try:
        pretrained = timm.models.get_pretrained_cfg(name)
    # Raised for unknown tags.
    except RuntimeError:
        return None
    notes = (pretrained.notes if pretrained else None) or ()
    return "quick_gelu" if any("QuickGELU" in note for note in notes) else None


def timm_config(model: Any) -> Config:
    """Return the configuration of a timm model."""
    pretrained = getattr(model, "pretrained_cfg", None) or {}
    return Config(
        model=pretrained.get("architecture"),
        num_heads=num_heads(model),
        activation=activation_of(model),
        layer_norm_eps=layer_norm_eps(model),
        mean=pretrained.get("mean"),
        std=pretrained.get("std"),
    )


def num_heads(vit: Any) -> int | None:
    """Return the number of attention heads of a ViT, or None for other models."""
    parts = (part for block in getattr(vit, "blocks", ()) for part in block.modules())
    return next((part.num_heads for part in parts if hasattr(part, "num_heads")), None)


def activation_of(vit: Any) -> str | None:
    """Return the activation function of a ViT's MLPs, one of `ACTIVATIONS`, or None for other models."""
    parts = (type(part) for block in getattr(vit, "blocks", ()) for part in block.modules())
    return next((name for part in parts for name, kinds in ACTIVATIONS.items() if part in kinds), None)


def layer_norm_eps(vit: Any) -> float | None:
    """Return the epsilon of a ViT's LayerNorms, which is the same in all of them, or None without any."""
    parts = (part for block in getattr(vit, "blocks", ()) for part in block.modules())
    return next((part.eps for part in parts if isinstance(part, nn.LayerNorm)), None)


def _normalisation(files: Mapping[str, Any]) -> dict[str, Any]:
    # Newer versions of transformers write, and prefer, processor_config.json.
    processor = files.get("processor_config.json", {}).get("image_processor")
    processor = processor or files.get("preprocessor_config.json", {})
    if processor.get("do_normalize") is False:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if processor.get("image_mean") is not None and processor.get("image_std") is not None:
        means, stds = processor["image_mean"], processor["image_std"]
        # They apply to rescaled pixels, and ours to values from 0 to 1.
        scale = 255 * (processor.get("rescale_factor") or 1 / 255)
        if processor.get("do_rescale") is False:
            scale = 255 if max(means) > 1 else 1
        if not math.isclose(scale, 1):
            means, stds = [value / scale for value in means], [value / scale for value in stds]
        return {"mean": means, "std": stds}
    pretrained = files.get("config.json", {}).get("pretrained_cfg") or {}
    pretrained = pretrained or files.get("open_clip_config.json", {}).get("preprocess_cfg") or {}
    return {name: pretrained.get(name) for name in ("mean", "std")}


def colours(what: str, values: Any) -> Triple:
    """Return three statistics of RGB values from 0 to 1. Raises InputError if `values` are not."""
    numbers = list(values) if isinstance(values, list | tuple) else []
    # A std of zero cannot be divided by.
    lowest = 0 if what.endswith("mean") else 1e-6
    valid = all(isinstance(number, int | float) and lowest <= number <= 1 for number in numbers)
    if len(numbers) != 3 or not valid:
        kind = "numbers from 0 to 1" if not lowest else "positive numbers up to 1"
        raise InputError(f"{what} is {values!r}; expected three {kind}, for RGB values from 0 to 1")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
