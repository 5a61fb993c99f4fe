"""The configuration of weights: what transformers, timm and OpenCLIP write, and what it means."""

from typing import Any

import pytest

from fasttrain.backbones import load_backbone
from fasttrain.configuration import read_config
from fasttrain.errors import InputError


@pytest.mark.parametrize(
    ("name", "mean"),
    [("dino", 0.485), ("clip", 0.485), ("vit_tiny_patch16_224", 0.5), ("vit_small_patch16_dinov3", 0.485)],
)
def test_the_normalisation_without_a_configuration(name: str, mean: float) -> None:
    """The paper uses ImageNet's for its families, and timm's models have their own."""
    assert load_backbone(name, depth=1, image_size=32).mean[0] == mean


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "siglip", "vision_config": {}}, (12, "gelu_tanh", 1e-6)),
        ({"model_type": "clip", "vision_config": {"num_attention_heads": 16}}, (16, "quick_gelu", 1e-5)),
        ({"model_type": "dinov2", "num_attention_heads": 6, "hidden_act": "silu"}, (6, "silu", 1e-6)),
        ({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}, (3, "gelu", 1e-6)),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, (12, "quick_gelu", 1e-5)),
        # timm stores OpenAI's weights under a model with GELU.
        (
            {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"tag": "openai"}},
            (12, "quick_gelu", 1e-5),
        ),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 6}}, (6, "gelu", 1e-6)),
        ({"encoder": "vits", "features": 64}, (None, None, None)),
        ({"model_type": "depth_anything", "backbone_config": {"num_attention_heads": 6}}, (6, None, None)),
        ({"model_type": "chinese_clip", "vision_config": {}}, (None, None, None)),
        ({"model_type": "vit_mae"}, (12, "gelu", 1e-12)),
        ({"model_type": "vit", "layer_norm_eps": 1e-6}, (12, "gelu", 1e-6)),
        ({}, (None, None, None)),
    ],
)
def test_values_that_transformers_omits_are_its_defaults(
    config: dict[str, Any], expected: tuple[Any, Any, Any]
) -> None:
    read = read_config({"config.json": config}, "weights")
    assert (read.num_heads, read.activation, read.layer_norm_eps) == expected


def test_the_configuration_of_open_clip() -> None:
    vision = {"width": 1280, "layers": 32, "head_width": 80, "patch_size": 14, "norm_kwargs": {"eps": 1e-6}}
    config = {
        "model_cfg": {"embed_dim": 1024, "vision_cfg": vision},
        "preprocess_cfg": {"mean": [0.48, 0.45, 0.4], "std": [0.26, 0.26, 0.27]},
    }
    read = read_config({"open_clip_config.json": config}, "weights")
    assert (read.embed_dim, read.depth, read.patch_size, read.num_heads) == (1280, 32, 14, 16)
    assert (read.activation, read.layer_norm_eps, read.mean) == ("gelu", 1e-6, (0.48, 0.45, 0.4))


@pytest.mark.parametrize(
    ("files", "mean", "std"),
    [
        ({"preprocessor_config.json": {"do_normalize": False, "image_mean": [0.5] * 3}}, 0.0, 1.0),
        (
            {"processor_config.json": {"image_processor": {"image_mean": [0.4] * 3, "image_std": [0.2] * 3}}},
            0.4,
            0.2,
        ),
        (
            {
                "preprocessor_config.json": {
                    "image_mean": [1.0] * 3,
                    "image_std": [0.5] * 3,
                    "rescale_factor": 1 / 127.5,
                }
            },
            0.5,
            0.25,
        ),
        (
            {
                "preprocessor_config.json": {
                    "image_mean": [127.5] * 3,
                    "image_std": [51] * 3,
                    "do_rescale": False,
                }
            },
            0.5,
            0.2,
        ),
        ({"config.json": {"pretrained_cfg": {"mean": [0.3] * 3, "std": [0.1] * 3}}}, 0.3, 0.1),
    ],
)
def test_the_normalisation_is_that_of_values_from_0_to_1(
    files: dict[str, Any], mean: float, std: float
) -> None:
    config = read_config(files, "weights")
    assert config.mean == pytest.approx([mean] * 3)
    assert config.std == pytest.approx([std] * 3)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": {"model_type": 5}},
        {
            "config.json": {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": []},
            "preprocessor_config.json": [],
        },
        {"open_clip_config.json": {"model_cfg": None}},
        {"open_clip_config.json": {"model_cfg": {"vision_cfg": {"width": 64, "head_width": 0}}}},
    ],
)
def test_malformed_configurations_are_refused(files: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="weights 'w': their configuration cannot be read"):
        read_config(files, "w")


@pytest.mark.parametrize("eps", [0, -1e-6, "small", True])
def test_an_epsilon_that_is_not_positive_is_refused(eps: Any) -> None:
    with pytest.raises(InputError, match=r"weights 'w': .* layer_norm_eps .*; expected a positive number"):
        read_config({"config.json": {"model_type": "vit", "layer_norm_eps": eps}}, "w")
