"""The frozen encoders compared with golden vectors of the published implementation, timm and formulas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.errors import InputError
from fasttrain.families import FAMILIES
from fasttrain.positions import resize_positions
from fasttrain.weights import seeded

TINY: dict[str, Any] = {"image_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
MEAN_311 = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
STD_311 = torch.tensor((0.229, 0.224, 0.225))[:, None, None]


def normalised(frames: np.ndarray) -> Tensor:
    return (torch.from_numpy(frames) / 255 - MEAN_311) / STD_311


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def published(shared: Path, family: str, kind: str = "pretrained", image_size: int = 64) -> Backbone:
    path = shared / "golden" / "backbones" / f"{family}.{kind}.pth"
    return load_backbone(family, weights=str(path), image_size=image_size, num_heads=2)


@pytest.mark.parametrize("kind", ["pretrained", "cosettle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_match_the_published_implementation(shared: Path, family: str, kind: str) -> None:
    golden = np.load(shared / "golden" / "backbones" / f"{family}.npz")
    encoder = published(shared, family, kind)
    row, column = (int(start) for start in golden["crop_offset"])
    positions = encoder.asymmetric_positions(ratio=float(golden["asym_ratio"]), offset=(row, column))
    frames = torch.stack([normalised(golden["frame1"]), normalised(golden["frame2"])])
    tokens = {
        "tokens1": encoder.tokens(frames[0]),
        "tokens2": encoder.tokens(frames[1]),
        "tokens1_asym": encoder.tokens(frames[0], positions=positions),
    }
    # The published MAE code supports a single image size.
    if "other_tokens" in golden:
        tokens["other_tokens"] = encoder.tokens(normalised(golden["other_frame"]))
    for name, value in tokens.items():
        assert relative_error(value, torch.from_numpy(golden[name])) < 1e-5, name
    views_B3ND = encoder.training_views(frames, positions)
    expected = [torch.from_numpy(golden[name]) for name in ("tokens1", "tokens2", "tokens1_asym")]
    assert relative_error(views_B3ND, torch.stack(expected, 1)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_training_views_equal_separate_passes(family: str) -> None:
    encoder = load_backbone(family, **TINY)
    frames = random_images(3, 3, 3, 64, 64)
    positions = encoder.asymmetric_positions(offset=(3, 29))
    embedded, encoded = [], []
    encoder.patch_embed.register_forward_hook(lambda module, args, out: embedded.append(len(out)))
    encoder.blocks[0].register_forward_hook(lambda module, args, out: encoded.append(len(out)))
    views_B4ND = encoder.training_views(frames, positions)
    # One batch each: the patches of three frames are embedded, and the blocks process four views.
    assert (embedded, encoded) == ([9], [12])
    assert views_B4ND.shape == (3, 4, 16, 32)
    assert views_B4ND.is_contiguous()
    separate = [*map(encoder.tokens, frames), encoder.tokens(frames[0], positions)]
    torch.testing.assert_close(views_B4ND, torch.stack(separate, 1), rtol=1e-5, atol=1e-6)
    assert (views_B4ND[:, 3] - views_B4ND[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "dtype"), [("ijepa", torch.bfloat16), ("dinov2", torch.float16)])
def test_training_views_in_half_precision(family: str, dtype: torch.dtype) -> None:
    frames = random_images(2, 2, 3, 64, 64)
    exact = load_backbone(family, **TINY).double()
    expected = exact.training_views(frames.double(), exact.asymmetric_positions(offset=(3, 29)))
    encoder = load_backbone(family, **TINY).to(dtype)
    positions = encoder.asymmetric_positions(offset=(3, 29))
    views_B3ND = encoder.training_views(frames.to(dtype), positions)
    assert views_B3ND.dtype == positions.dtype == dtype
    assert views_B3ND.is_contiguous()
    frames = frames.to(dtype)
    separate = [encoder.tokens(frames[0]), encoder.tokens(frames[1]), encoder.tokens(frames[0], positions)]
    # One batch of three views must not be less accurate than three passes.
    error_of_separate = relative_error(torch.stack(separate, 1).double(), expected)
    assert relative_error(views_B3ND.double(), expected) < 1.1 * error_of_separate


@pytest.mark.parametrize("first_use_before_cast", [True, False])
def test_positions_are_resized_in_float32_before_casting(first_use_before_cast: bool) -> None:
    exact = load_backbone("dino", **TINY)
    encoder = load_backbone("dino", **TINY)
    if first_use_before_cast:
        encoder.positions((3, 5))
        encoder.asymmetric_positions(offset=(7, 2))
    encoder.to(torch.bfloat16)
    for cast, full in [
        (encoder.positions((4, 4)), exact.positions((4, 4))),
        (encoder.positions((3, 5)), exact.positions((3, 5))),
        (encoder.asymmetric_positions(offset=(7, 2)), exact.asymmetric_positions(offset=(7, 2))),
    ]:
        assert torch.equal(cast, full.to(torch.bfloat16))


@pytest.mark.parametrize("family", ["ijepa", "clip", "dinov2"])
def test_training_views_compile_without_graph_breaks(family: str) -> None:
    encoder = load_backbone(family, **(TINY | {"depth": 1}))
    frames, positions = random_images(2, 1, 3, 64, 64), encoder.asymmetric_positions(offset=(0, 1))
    compiled = torch.compile(encoder.training_views, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(frames, positions), encoder.training_views(frames, positions))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), ratio=st.sampled_from([0.0, 0.1, 0.5, 3.0, 10.0]))
def test_asymmetric_positions_are_a_crop_of_the_enlarged_map(data: st.DataObject, ratio: float) -> None:
    encoder = load_backbone("mae", **(TINY | {"depth": 1}))
    count = encoder.asymmetric_range(ratio)
    row, column = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    side = int((1 + ratio) * 4)
    assert count == side - 4 + 1
    own_1D44 = encoder.positions((4, 4)).T.reshape(1, 32, 4, 4)
    large_1DSS = F.interpolate(own_1D44, (side, side), mode="bicubic", align_corners=False)
    expected_ND = large_1DSS[0, :, row : row + 4, column : column + 4].reshape(32, 16).T
    assert torch.equal(encoder.asymmetric_positions(ratio, offset=(row, column)), expected_ND)


def test_asymmetric_positions_with_the_papers_sizes() -> None:
    encoder = load_backbone("dino", embed_dim=32, num_heads=2, depth=1)
    # A map of 154 x 154 positions has 141 x 141 crops of 14 x 14.
    assert encoder.asymmetric_range() == 141
    assert encoder.asymmetric_positions(offset=(140, 140)).shape == (196, 32)
    for offset in [(141, 0), (0, 141), (-1, 0)]:
        with pytest.raises(InputError, match=r"offset .* \[0, 141\)"):
            encoder.asymmetric_positions(offset=offset)


@pytest.mark.parametrize("family", ["mae", "ijepa", "mocov3"])
def test_sine_cosine_positions_match_the_published_implementation(shared: Path, family: str) -> None:
    expected_ND = published(shared, family).positions((4, 4))
    torch.testing.assert_close(
        load_backbone(family, **TINY).positions((4, 4)), expected_ND, rtol=0, atol=1e-6
    )


def test_random_weights_depend_on_the_seed_only() -> None:
    state = torch.get_rng_state()
    hashes = [load_backbone("dinov2", seed=seed, **TINY).weights_hash for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_sizes_are_those_of_vit_b_16() -> None:
    encoder = load_backbone("dinov2", depth=1)
    assert (encoder.embed_dim, encoder.patch_size, encoder.image_size) == (768, 16, 224)
    assert encoder.blocks[0].attn.num_heads == 12
    assert encoder.blocks[0].mlp.fc1.out_features == 4 * 768
    # The class token and four register tokens.
    assert encoder.prefix_PD.shape == (5, 768)
    assert encoder.grid(224, 448) == (14, 28)
    assert (encoder.name, encoder.weights) == ("dinov2", "random")


def test_sizes_are_read_from_the_checkpoint(shared: Path) -> None:
    encoder = load_backbone("mae", weights=str(shared / "weights" / "mae_vit_tiny_patch16.pth"))
    assert (encoder.embed_dim, encoder.patch_size, len(encoder.blocks)) == (192, 16, 12)
    assert encoder.blocks[0].attn.num_heads == 3
    assert next(encoder.parameters()).dtype == torch.float32
    assert encoder.tokens(random_images(1, 3, 224, 224)).shape == (1, 196, 192)
    assert published(shared, "dinov2").prefix_PD.shape == (5, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_a_checkpoint_are_resized_to_the_image_size(shared: Path, family: str) -> None:
    own_441D = published(shared, family).positions((4, 4)).view(4, 4, 32)
    encoder = published(shared, family, image_size=96)
    # The published BLIP code resizes positions without antialiasing when it loads a checkpoint.
    how = "plain" if family == "blip" else FAMILIES[family].resize
    assert torch.equal(encoder.positions((6, 6)), resize_positions(own_441D, (6, 6), how).flatten(0, 1))
    assert encoder.asymmetric_positions(offset=(60, 60)).shape == (36, 32)
    assert encoder.weights_hash == published(shared, family).weights_hash


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
        ("vit_medium_patch16_gap_240", {}),
        ("vit_base_patch16_clip_quickgelu_224", {"embed_dim": 64, "num_heads": 2}),
        ("vit_base_patch16_siglip_224", {"embed_dim": 64, "num_heads": 2}),
        ("vit_small_plus_patch16_dinov3_qkvb", {}),
        ("eva02_tiny_patch14_224", {"patch_size": 16}),
        ("vit_pe_core_small_patch16_384", {}),
        ("vit_pe_spatial_tiny_patch16_512", {}),
        ("vit_small_patch16_rope_ape_224", {}),
        ("vit_base_patch16_rope_reg1_gap_256", {"embed_dim": 64, "num_heads": 2}),
        ("vit_base_patch16_xp_224", {"embed_dim": 64, "num_heads": 2}),
    ],
)
def test_a_timm_vit_returns_the_tokens_of_timm(name: str, sizes: dict[str, int]) -> None:
    encoder = load_backbone(name, image_size=64, depth=2, seed=3, **sizes)
    with seeded(3):
        reference = timm.create_model(
            name, num_classes=0, img_size=64, depth=2, dynamic_img_size=True, **sizes
        )
    reference.eval()
    images = random_images(2, 3, 64, 96)
    with torch.no_grad():
        expected = reference.fc_norm(reference.forward_features(images)[:, reference.num_prefix_tokens :])
    torch.testing.assert_close(encoder.tokens(images), expected, rtol=1e-4, atol=1e-5)
    assert encoder.grid(64, 96) == (4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "dinov3"},
            "'dinov3' is neither one of mae, .* nor a timm ViT; did you mean .*vit_base_patch16_dinov3 or",
        ),
        (
            {"name": "convnext_tiny", "weights": "nowhere"},
            "'convnext_tiny' is a model of timm's convnext; fasttrain needs a ViT, .* such as vit_base_",
        ),
        ({"name": "beit_base_patch16_224"}, "timm's beit, whose positions are biases of the attention"),
        (
            {"name": "samvit_base_patch16"},
            "timm's vision_transformer_sam, whose attention is limited to windows",
        ),
        (
            {"name": "vit_small_r26_s32_224"},
            "timm's vision_transformer_hybrid, which has a convolutional stem",
        ),
        ({"name": "vit_small_patch16_rope_mixed_224"}, "mixed RoPE"),
        ({"name": "naflexvit_base_patch16_par_gap"}, "positions that .* depend on the aspect ratio"),
        ({"name": "mae", "std": (0.5, 0, 0.5)}, r"std is .*expected three positive numbers up to 1"),
        ({"name": "vit_tiny_patch16_224.mine"}, "Invalid pretrained tag"),
        ({"name": "vit_tiny_patch16_224", "embed_dim": 100}, "'vit_tiny_patch16_224' .* num_heads"),
        ({"name": "mae", "mean": (123, 116, 103)}, r"mean is .*expected three numbers from 0 to 1"),
        ({"name": "mae", "activation": "relu"}, "activation is 'relu'; expected one of gelu, "),
        ({"name": "mae", "layer_norm_eps": 0.0}, "layer_norm_eps is 0.0; expected a positive number"),
        (
            {"name": "aimv2_large_patch14_224", "depth": 1, "layer_norm_eps": 1e-6},
            "layer_norm_eps is 1e-06, but aimv2_large_patch14_224 has no LayerNorm; do not set it",
        ),
        ({"name": "mae", "num_heads": 0}, "num_heads is 0; expected a positive integer"),
        ({"name": "vit_small_plus_patch16_dinov3", "activation": "gelu"}, "has a fixed one, silu"),
        ({"name": "mae", "image_size": 100}, "100 x 100: mae needs multiples of 16, such as 96 x 96"),
        ({"name": "mae", "embed_dim": 32}, "published for the width 32; set backbone.num_heads"),
        (
            {"name": "mae", "embed_dim": 32, "num_heads": 3},
            "the width 32 is not a multiple of the number of heads, 3",
        ),
    ],
)
def test_invalid_backbones_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_backbone(**arguments)


def test_invalid_image_sizes_are_refused() -> None:
    encoder = load_backbone("dino", **TINY)
    with pytest.raises(InputError, match="50 x 64: dino needs multiples of 16, such as 48 x 64"):
        encoder.tokens(random_images(1, 3, 50, 64))


def test_the_encoder_is_frozen() -> None:
    encoder = load_backbone("mocov3", **TINY).train()
    assert not encoder.training
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.tokens(random_images(1, 3, 64, 64)).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_on_a_gpu_match_those_on_the_cpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # By default, PyTorch uses TensorFloat-32 for the convolution of the patch embedding.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    encoder = load_backbone(family, **TINY)
    frames = random_images(2, 2, 3, 64, 64)
    expected = encoder.training_views(frames, encoder.asymmetric_positions(offset=(5, 7)))
    encoder.cuda()
    actual = encoder.training_views(frames.cuda(), encoder.asymmetric_positions(offset=(5, 7)))
    assert relative_error(actual.cpu(), expected) < 1e-4
