"""Checkpoints in other layouts, compared with transformers, and messages about other models."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from hub_server import Hub
from safetensors.torch import load_file, save_file
from synthetic import write_run
from torch import Tensor, nn

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.errors import InputError
from fasttrain.families import FAMILIES
from fasttrain.layouts import flatten, select_encoder
from fasttrain.video_encoder import load_video_encoder
from fasttrain.weights import hash_state_dict, seeded

# Heads of 16 channels, so that a number of heads inferred from the width would be wrong.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 64,
    "patch_size": 16,
}
TIMM_SIZES = {"embed_dim": 64, "depth": 2}
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)), "dinov2"),
    "dinov2 swiglu": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
        "dinov2",
    ),
    "dinov2 registers": (
        lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SIZES)),
        "dinov2",
    ),
    "dinov3": (
        lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, num_register_tokens=4)),
        "vit_small_patch16_dinov3",
    ),
    "dinov3 gated": (
        lambda: transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(
                **SIZES, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"
            )
        ),
        "vit_small_plus_patch16_dinov3",
    ),
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES)), "dino"),
    "vit classifier": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)),
        "vit_tiny_patch16_224",
    ),
    "mae": (
        lambda: transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**(SIZES | {"intermediate_size": 160}), mask_ratio=0.0)
        ),
        "mae",
    ),
    "clip": (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)), "clip"),
    "clip gelu": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, hidden_act="gelu")),
        "clip",
    ),
    "siglip": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES)),
        "vit_base_patch16_siglip_224",
    ),
    "ijepa": (lambda: transformers.IJepaModel(transformers.IJepaConfig(**SIZES)), "ijepa"),
}


def random_model(kind: str) -> Any:
    """Build a model of transformers with weights large enough for mistakes to show."""
    with seeded(5):
        model = MODELS[kind][0]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def load(kind: str, path: Path, **options: Any) -> Backbone:
    name = MODELS[kind][1]
    sizes = {} if name in FAMILIES else TIMM_SIZES
    return load_backbone(name, weights=str(path), image_size=64, **sizes, **options)


def tokens_of(model: Any, images: Tensor) -> Tensor:
    """Return the patch tokens of a model of transformers after its final norm."""
    base = getattr(model, "vit", model)
    options = {"noise": torch.arange(16.0).expand(len(images), -1)} if "MAE" in type(base).__name__ else {}
    with torch.no_grad():
        hidden = base(pixel_values=images, **options).last_hidden_state
        if isinstance(base, transformers.CLIPVisionModel):
            hidden = base.post_layernorm(hidden)
    return hidden[:, -(images.shape[-2] // 16) * (images.shape[-1] // 16) :]


def random_images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_match_transformers(kind: str, tmp_path: Path) -> None:
    model = random_model(kind)
    model.save_pretrained(tmp_path)
    encoder = load(kind, tmp_path)
    assert encoder.num_heads == 4
    images = random_images(2, 3, 64, 64)
    tokens = encoder.tokens(images)
    if kind == "ijepa":
        # The paper's code omits the final norm.
        tokens = encoder.norm(tokens)
    assert relative_error(tokens, tokens_of(model, images)) < 1e-5
    # The parameters of a model in memory have other names than its files.
    torch.save(model.state_dict(), tmp_path / "in_memory.pth")
    named = load(kind, tmp_path / "in_memory.pth", num_heads=4, activation=encoder.activation)
    assert named.weights_hash == encoder.weights_hash
    torch.testing.assert_close(named.tokens(images), encoder.tokens(images))


@pytest.mark.parametrize("kind", MODELS)
def test_the_epsilon_of_the_layer_norms_comes_from_the_configuration(kind: str, tmp_path: Path) -> None:
    """An epsilon of the order of the tokens' variance, so that another one would show."""
    usual = random_model(kind)
    usual.save_pretrained(tmp_path)
    model = type(usual).from_pretrained(tmp_path, layer_norm_eps=0.3).eval()
    model.save_pretrained(tmp_path)
    encoder, images = load(kind, tmp_path), random_images(2, 3, 64, 64)
    tokens = encoder.norm(encoder.tokens(images)) if kind == "ijepa" else encoder.tokens(images)
    expected = tokens_of(model, images)
    assert relative_error(tokens_of(usual, images), expected) > 0.01
    assert relative_error(tokens, expected) < 1e-5


@pytest.mark.parametrize("kind", ["dinov2 registers", "dinov3", "dinov3 gated"])
def test_tokens_of_other_image_sizes_match_transformers(kind: str, tmp_path: Path) -> None:
    model = random_model(kind)
    model.save_pretrained(tmp_path)
    images = random_images(1, 3, 48, 112)
    assert relative_error(load(kind, tmp_path).tokens(images), tokens_of(model, images)) < 1e-5


def test_numbers_of_heads_come_from_the_published_models() -> None:
    """MoCo v3's ViT-S has 12 heads, and the larger MAE and I-JEPA have 16, of more than 64 channels."""
    for family, width, heads in [
        ("mocov3", 384, 12), ("dino", 384, 6), ("mae", 1280, 16), ("ijepa", 1408, 16), ("dinov2", 1536, 24),
    ]:  # fmt: skip
        encoder = load_backbone(family, embed_dim=width, depth=1, image_size=32)
        assert encoder.num_heads == heads


def test_a_width_without_a_published_number_of_heads_is_refused(tmp_path: Path) -> None:
    state = load_backbone("dino", embed_dim=320, num_heads=10, depth=1, image_size=32).state_dict()
    names = {
        key: tensor for key, tensor in state.items() if key.startswith(("patch_embed", "blocks", "norm"))
    }
    torch.save(
        names | {"cls_token": torch.zeros(1, 1, 320), "pos_embed": torch.zeros(1, 5, 320)}, tmp_path / "w"
    )
    with pytest.raises(InputError, match=r"width 320; set backbone\.num_heads"):
        load_backbone("dino", weights=str(tmp_path / "w"))
    assert load_backbone("dino", weights=str(tmp_path / "w"), num_heads=5, image_size=32).num_heads == 5


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_resizes_positions_as_its_authors_do(registers: int, tmp_path: Path) -> None:
    kind = "dinov2 registers" if registers else "dinov2"
    model = random_model(kind)
    model.save_pretrained(tmp_path)
    encoder = load(kind, tmp_path)
    own_1DSS = model.embeddings.position_embeddings[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    for grid in [(6, 5), (3, 4)]:
        size: dict[str, Any] = (
            {"size": grid} if registers else {"scale_factor": ((grid[0] + 0.1) / 4, (grid[1] + 0.1) / 4)}
        )
        expected = nn.functional.interpolate(own_1DSS, mode="bicubic", antialias=registers > 0, **size)
        torch.testing.assert_close(encoder.positions(grid), expected[0].flatten(1).T)


# --- wrappers and containers ---------------------------------------------------------------------------


def small_state() -> dict[str, Tensor]:
    """Return an encoder with the names of timm: two parameters suffice to find it."""
    return {"patch_embed.proj.weight": torch.ones(8, 3, 2, 2), "blocks.0.attn.qkv.weight": torch.ones(24, 8)}


def behind(prefix: str, value: float = 0.0) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor + value for key, tensor in small_state().items()}


@pytest.mark.parametrize(
    "checkpoint",
    [
        behind("_orig_mod."),
        behind("module._orig_mod."),
        {"state_dict": behind("model."), "optimizer_states": [{"state": {}}], "epoch": 3},
        {"state_dict": behind("model._orig_mod.backbone.")},
        {"teacher": behind("backbone.")},
        {"net": behind("")},
        {"ema": behind("module.")},
        {"model": behind("", 1.0), "model_ema": behind("")},
        {"state_dict": behind("", 1.0), "state_dict_ema": behind(""), "arch": "vit_tiny_patch16_224"},
        {"app": {"model": behind("encoder.vision."), "step": torch.ones(())}},
        {key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t for key, t in small_state().items()},
        behind("visual.trunk.") | {"visual.head.proj.weight": torch.ones(3), "logit_scale": torch.ones(())},
    ],
)
def test_an_encoder_is_found_in_any_wrapper(checkpoint: dict[str, Any]) -> None:
    state, _ = select_encoder(flatten(checkpoint), "weights")
    assert hash_state_dict(state) == hash_state_dict(small_state())


STUDENT_AND_TEACHER = {"student": behind("backbone.", 1.0), "teacher": behind("backbone.")}


@pytest.mark.parametrize(
    "choice", [{"prefer": ("teacher",)}, {"entry": "teacher"}, {"entry": "teacher.backbone"}]
)
def test_one_of_several_encoders_is_chosen(choice: dict[str, Any]) -> None:
    state, found = select_encoder(flatten(STUDENT_AND_TEACHER), "weights", **choice)
    assert hash_state_dict(state) == hash_state_dict(small_state())
    assert found == "entry 'teacher.backbone', parameters named as in timm"


@pytest.mark.parametrize(
    ("entry", "message"),
    [(None, "contain several encoders:"), ("", "have no encoder '':"), ("teach", "no encoder 'teach':")],
)
def test_several_encoders_need_a_choice(entry: str | None, message: str) -> None:
    with pytest.raises(
        InputError, match=rf"{message} 'student\.backbone', 'teacher\.backbone'\. Append .*#teacher"
    ):
        select_encoder(flatten(STUDENT_AND_TEACHER), "weights", entry=entry)


def test_an_entry_is_chosen_in_the_location_of_the_weights(tmp_path: Path) -> None:
    name, sizes = "vit_small_patch16_224", {"embed_dim": 64, "depth": 1, "num_heads": 1}
    states = {}
    for seed, entry in enumerate(("student", "teacher")):
        with seeded(seed):
            states[entry] = timm.create_model(name, num_classes=0, img_size=32, **sizes).state_dict()
    torch.save(states, tmp_path / "both.pth")
    for entry, state in states.items():
        encoder = load_backbone(name, weights=f"{tmp_path}/both.pth#{entry}", image_size=32, **sizes)
        assert encoder.weights_hash == hash_state_dict(state)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("model.embed_tokens.weight", (9, 4), "they look like a language model"),
        ("decoder_blocks.0.norm1.weight", (4,), "the decoder of a masked autoencoder"),
        ("decoder.up_blocks.0.resnets.0.norm1.weight", (4,), "the autoencoder or U-Net of a diffusion model"),
        ("layer1.0.conv1.weight", (4, 4, 1, 1), "a ResNet"),
        ("stages.0.0.gamma", (4,), "a convolutional network"),
        ("patch_embed.proj.0.weight", (4, 3, 3, 3), "a ViT with a convolutional stem"),
        ("patch_embed.proj.weight", (4, 3, 2, 16, 16), "their patches span several frames"),
        ("blocks.0.attn.relative_position_bias_table", (9, 2), "their positions are relative"),
        ("anything.else", (4,), r"their keys are anything\.else"),
    ],
)
def test_the_message_says_what_other_checkpoints_contain(
    key: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=f"weights 'x' contain no ViT .*: .*{message}"):
        select_encoder({key: torch.zeros(shape)}, "x")


def test_other_parts_of_a_checkpoint_do_not_matter() -> None:
    """An encoder may stand next to a model that is not supported, or above another encoder."""
    segmenter = {
        "sam.patch_embed.proj.weight": torch.ones(4, 3, 2, 2),
        "sam.blocks.0.attn.rel_pos_h": torch.ones(3, 4),
    }
    for checkpoint, entry in [
        (behind("vision_tower.") | segmenter, "vision_tower"),
        (behind("") | behind("student.", 1.0), ""),
    ]:
        state, _ = select_encoder(flatten(checkpoint), "weights", entry=entry)
        assert hash_state_dict(state) == hash_state_dict(small_state())


def test_the_message_names_the_family_of_other_weights(tmp_path: Path) -> None:
    model = random_model("dinov2")
    model.save_pretrained(tmp_path)
    # A bare file has no configuration, but LayerScale.
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    for path in (tmp_path, tmp_path / "bare.pth"):
        with pytest.raises(
            InputError, match=r"Check the name of the backbone; these look like weights of dinov2$"
        ):
            load_backbone("mae", weights=str(path), image_size=64, num_heads=4)


@pytest.mark.parametrize(
    "missing",
    ["encoder.layer.0.attention.attention.key.weight", "encoder.layer.1.attention.attention.query.bias"],
)
def test_a_missing_part_of_attention_is_not_filled_in(missing: str, tmp_path: Path) -> None:
    random_model("dinov2").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[missing]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"missing blocks\.{missing.split('.')[2]}\.attn\.qkv"):
        load("dinov2", tmp_path)


def test_the_periods_of_dinov3_are_checked(tmp_path: Path) -> None:
    name, sizes = "vit_small_patch16_dinov3", {"embed_dim": 64, "num_heads": 4, "depth": 1}
    state = timm.create_model(name, num_classes=0, **sizes).state_dict()
    for periods, message in [
        (torch.ones(8), r"rope\.periods has the shape \[8\], expected \[4\]"),
        (torch.full((4,), torch.nan), r"rope\.periods has values that are not finite"),
    ]:
        torch.save(state | {"rope_embed.periods": periods}, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=message):
            load_backbone(name, weights=str(tmp_path / "weights.pth"), **sizes)


@pytest.mark.parametrize(
    ("name", "other"), [("clip", "vit_pe_core_base_patch16_224"), ("vit_pe_core_base_patch16_224", "clip")]
)
def test_clip_and_the_perception_encoder_are_told_apart(name: str, other: str, tmp_path: Path) -> None:
    """Their parameters have the same names and shapes, except for attention pooling."""
    sizes = {"embed_dim": 64, "num_heads": 1, "depth": 1}
    if name == "clip":
        model = timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=0, **sizes)
    else:
        model = timm.create_model(name, num_classes=0, **sizes)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    load_backbone(name, weights=str(tmp_path / "weights.pth"), **sizes)
    with pytest.raises(InputError, match=r"(missing|unexpected) attn_pool\."):
        load_backbone(other, weights=str(tmp_path / "weights.pth"), **sizes)


@pytest.mark.filterwarnings("ignore:.*(prototype|[sS]parse|deprecated)")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to_sparse(), "'norm.weight' is a sparse tensor"),
        (lambda t: t[None].to_sparse_csr(), "'norm.weight' is a sparse tensor"),
        (lambda t: t.to("meta"), "'norm.weight' is a meta tensor"),
        (lambda t: torch.nested.nested_tensor([t, t[:3]]), "'norm.weight' is a nested tensor"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "'norm.weight' is a quantised tensor"),
    ],
)
def test_tensors_without_plain_values_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).state_dict()
    torch.save(state | {"norm.weight": change(state["norm.weight"])}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=message):
        load_backbone("dino", weights=str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("blocks.0.mlp.fc1.weight", torch.tensor(1.0), "blocks.0.mlp.fc1.weight has the shape"),
        ("blocks.0.mlp.fc2.weight", torch.zeros(32), "blocks.0.mlp.fc2.weight has the shape"),
        ("patch_embed.proj.weight", torch.zeros(0, 3, 16, 16), "the patch embedding is empty"),
        ("cls_token", torch.tensor(1.0), "cls_token has the unsupported shape"),
        ("norm.weight", torch.tensor(1.0), "norm.weight has the shape"),
    ],
)
def test_parameters_of_impossible_shapes_are_refused(
    key: str, tensor: Tensor, message: str, tmp_path: Path
) -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).state_dict()
    torch.save(state | {key: tensor}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=message):
        load_backbone("dino", weights=str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.int8, r"blocks\.0\.attn\.proj\.weight has the dtype torch\.int8; .*not quantised"),
        (torch.nan, r"blocks\.0\.attn\.proj\.weight has values that are not finite"),
    ],
)
def test_quantised_and_broken_weights_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).state_dict()
    name = "blocks.0.attn.proj.weight"
    state[name] = state[name].to(change) if isinstance(change, torch.dtype) else state[name] * change
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=message):
        load_backbone("dino", weights=str(tmp_path / "weights.pth"))


# --- configurations ------------------------------------------------------------------------------------


def test_normalisation_and_heads_come_from_the_configuration(tmp_path: Path) -> None:
    random_model("siglip").save_pretrained(tmp_path)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = load("siglip", tmp_path)
    assert (encoder.mean, encoder.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    # An explicit value takes precedence, and the file itself stands for its folder.
    encoder = load("siglip", tmp_path / "model.safetensors", mean=(0, 0, 0))
    assert (encoder.mean, encoder.std, encoder.num_heads) == ((0, 0, 0), (0.2, 0.25, 0.3), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, "the configuration says width 128, but the tensors have width 64"),
        ({"num_hidden_layers": 12}, "depth 12, but the tensors have depth 2"),
        ({"patch_size": 14}, "patch size 14, but the tensors have patch size 16"),
        ({"num_attention_heads": 7}, "the number of heads, 7, does not divide the width 64"),
        ({"num_attention_heads": "4"}, "num_heads '4'; expected a positive integer"),
        ({"hidden_act": "relu6"}, "the activation 'relu6'; set backbone.activation to one of gelu"),
        ("[]", "expected a JSON object, got a list"),
        ("{", "is not valid JSON"),
    ],
)
def test_configurations_that_contradict_the_tensors(change: Any, message: str, tmp_path: Path) -> None:
    random_model("dinov2").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(
        change if isinstance(change, str) else json.dumps(json.loads(config.read_text()) | change)
    )
    with pytest.raises(InputError, match=message) as caught:
        load("dinov2", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_projection_remembers_what_the_configuration_says(tmp_path: Path) -> None:
    """The file of weights alone, moved away from its configuration, gives the same features."""
    model = random_model("clip gelu")
    model.config.layer_norm_eps = 1e-3
    model.save_pretrained(tmp_path / "clip")
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(processor))
    run = write_run(
        tmp_path / "run", name="clip", weights=str(tmp_path / "clip"),
        embed_dim=None, depth=None, num_heads=None, patch_size=None,
    )  # fmt: skip
    trained = load_video_encoder(run)
    (tmp_path / "clip" / "model.safetensors").rename(tmp_path / "moved.safetensors")
    moved = load_video_encoder(run, weights=str(tmp_path / "moved.safetensors"))
    frames = random_images(1, 1, 3, 64, 64)
    assert torch.equal(moved(frames), trained(frames))
    assert (moved.encoder.activation, moved.encoder.layer_norm_eps) == ("gelu", 1e-3)
    assert moved.mean == (0.5, 0.4, 0.3)


# --- folders and repositories --------------------------------------------------------------------------


def test_a_repository_is_loaded_by_its_name(tmp_path: Path, hub: Hub) -> None:
    random_model("dinov2").save_pretrained(tmp_path)
    hub.repos["owner/repo"] = {path.name: path.read_bytes() for path in tmp_path.iterdir()} | {
        "other.bin": b""
    }
    encoder = load_backbone("dinov2", weights="hf://owner/repo", image_size=64)
    assert encoder.num_heads == 4
    downloaded = {request.rpartition("/")[2] for request in hub.log if "/resolve/" in request}
    assert downloaded == {"config.json", "model.safetensors"}
    assert encoder.weights_hash == load("dinov2", tmp_path).weights_hash


def test_loading_weights_leaves_the_random_state_unchanged(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    save_file(timm.create_model(name, num_classes=0, depth=1).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    state = torch.get_rng_state()
    load_backbone(name, weights=str(tmp_path), depth=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_shards_are_joined(tmp_path: Path) -> None:
    model = random_model("dinov2")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shards = sorted((tmp_path / "shards").glob("model-*"))
    assert len(shards) > 1
    encoder = load("dinov2", tmp_path / "shards")
    assert encoder.weights_hash == load("dinov2", tmp_path / "whole").weights_hash
    with pytest.raises(InputError, match="one of several shards; pass the folder"):
        load("dinov2", shards[0])
    shards[0].unlink()
    with pytest.raises(InputError, match=f"'{re.escape(shards[0].name)}' is missing from the folder"):
        load("dinov2", tmp_path / "shards")


def test_folders_without_weights_and_pointers_of_git_lfs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="the folder has no weights"):
        load_backbone("mae", weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match="a pointer of Git LFS"):
        load_backbone("mae", weights=str(tmp_path))
    save_file({"embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="a language model"):
        load_backbone("mae", weights=str(tmp_path))
