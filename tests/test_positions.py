"""The positions of encoders with absolute and rotary position encodings, and their asymmetric variants."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.positions import PositionEncoding, resize_positions

# A model of timm for each kind of positions, with arguments that make it small.
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_small_plus_patch16_dinov3_qkvb": {"embed_dim": 64, "num_heads": 2},
    "eva02_tiny_patch14_224": {"patch_size": 16},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_small_patch16_rope_224": {"embed_dim": 64, "num_heads": 2},
    "vit_small_patch16_rope_ape_224": {"embed_dim": 64, "num_heads": 2},
}


def encoder_of(name: str, image_size: int = 64) -> Backbone:
    encoder = load_backbone(name, image_size=image_size, depth=2, seed=3, **TIMM[name])
    # The initial LayerScale of DINOv3 would hide what attention does.
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TIMM)
def test_an_enlargement_of_zero_gives_the_own_positions(name: str) -> None:
    encoder = encoder_of(name)
    positions = encoder.asymmetric_positions(ratio=0, offset=(0, 0))
    assert torch.equal(positions, encoder.positions((4, 4)))
    assert torch.equal(encoder.tokens(images(2), positions), encoder.tokens(images(2)))


@pytest.mark.parametrize("name", TIMM)
def test_asymmetric_positions_change_the_tokens(name: str) -> None:
    encoder = encoder_of(name)
    own = encoder.tokens(images(2))
    shifted = [encoder.tokens(images(2), encoder.asymmetric_positions(offset=(i, 8))) for i in (0, 30)]
    for first, second in [(own, shifted[0]), (own, shifted[1]), (shifted[0], shifted[1])]:
        assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["vit_small_plus_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"])
def test_rotary_positions_are_a_window_of_those_of_a_larger_image(name: str) -> None:
    """These models give the same extent of coordinates to images of all sizes."""
    encoder = encoder_of(name)
    rotary = encoder._encoding.channels[1]
    larger_LLR = encoder.positions((44, 44))[:, -rotary:].unflatten(0, (44, 44))
    positions_NR = encoder.asymmetric_positions(ratio=10, offset=(7, 31))[:, -rotary:]
    assert torch.equal(positions_NR, larger_LLR[7:11, 31:35].flatten(0, 1))


@pytest.mark.parametrize("name", ["vit_small_patch16_rope_224", "vit_pe_core_tiny_patch16_384"])
def test_rotary_positions_of_numbered_cells_are_compressed(name: str) -> None:
    """Cell i of an enlarged grid of L cells has the rotation of cell i S / L."""
    encoder = encoder_of(name)
    rotary = encoder._encoding.channels[1]
    # 44 cells in place of 4: every eleventh cell has the coordinates of a cell of the training grid.
    scaled_LLR = encoder._encoding.enlarged(44)[..., -rotary:]
    own_SSR = encoder.positions((4, 4))[:, -rotary:].unflatten(0, (4, 4))
    # The Perception Encoder counts from one, and shifts before it scales.
    start = 10 if "pe_core" in name else 0
    torch.testing.assert_close(scaled_LLR[start::11, start::11], own_SSR, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_views_equal_separate_passes(name: str, dtype: torch.dtype) -> None:
    encoder = encoder_of(name).to(dtype)
    frames = images(4).unflatten(0, (2, 2)).to(dtype)
    positions = encoder.asymmetric_positions(offset=(3, 29))
    views_B3ND = encoder.training_views(frames, positions)
    separate = [encoder.tokens(frames[0]), encoder.tokens(frames[1]), encoder.tokens(frames[0], positions)]
    expected_B3ND = torch.stack(separate, 1)
    assert views_B3ND.dtype == dtype
    assert (views_B3ND - expected_B3ND).norm() < (
        1e-5 if dtype == torch.float32 else 2e-2
    ) * expected_B3ND.norm()


def test_rotary_positions_that_are_random_in_training_are_fixed() -> None:
    """timm rescales the coordinates of Sapiens 2 at random in training mode."""
    tables = [load_backbone("vit_base_patch16_sapiens2", image_size=64).positions((3, 5)) for _ in range(2)]
    assert torch.equal(*tables)


def test_training_views_with_rotary_positions_compile_without_graph_breaks() -> None:
    encoder = encoder_of("eva02_tiny_patch14_224")
    frames, positions = images(2).unflatten(0, (2, 1)), encoder.asymmetric_positions(offset=(0, 1))
    compiled = torch.compile(encoder.training_views, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(frames, positions), encoder.training_views(frames, positions))


@pytest.mark.parametrize("how", ["plain", "offset", "antialias", "bilinear"])
def test_other_grids_are_interpolated_from_the_checkpoints_own_grid(how: Any) -> None:
    own_SSD = torch.randn(9, 9, 5, generator=torch.Generator().manual_seed(0))
    encoding = PositionEncoding(own_SSD, None, side=4, resize=how)
    for grid in [(4, 4), (9, 9), (3, 7)]:
        expected_ND = resize_positions(own_SSD, grid, how).flatten(0, 1)
        assert torch.equal(encoding.on_grid(grid), expected_ND)
    # The enlarged map continues the positions of the training grid.
    training_SSD = resize_positions(own_SSD, (4, 4), how)
    assert torch.equal(encoding.enlarged(8), resize_positions(training_SSD, (8, 8), "plain"))
