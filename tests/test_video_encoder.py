"""A run folder read back as one video encoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.backbones import load_backbone
from fasttrain.errors import InputError
from fasttrain.projection import Projection
from fasttrain.video_encoder import PROJECTION_FILE, load_video_encoder, projection_metadata

SETTINGS: dict[str, Any] = {
    "name": "dino",
    "weights": "random",
    "image_size": 64,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "seed": 5,
}


def write_run(folder: Path, settings: dict[str, Any] = SETTINGS) -> Projection:
    encoder = load_backbone(**settings)
    projection = Projection(encoder.embed_dim, head="mlp2", seed=9)
    metadata = projection_metadata(settings, encoder, projection, {"seed": 5, "backbone": settings})
    projection.save(folder / PROJECTION_FILE, metadata)
    return projection


def frames(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_frames_to_projected_tokens(tmp_path: Path) -> None:
    projection = write_run(tmp_path)
    encoder = load_video_encoder(tmp_path)
    video_BTCHW = frames(2, 3, 3, 64, 96)
    tokens_BTND = encoder(video_BTCHW)
    assert tokens_BTND.shape == (2, 3, 24, 32)
    assert encoder.grid(64, 96) == (4, 6)
    backbone = load_backbone(**SETTINGS)
    for video in range(2):
        for t in range(3):
            frozen_1ND = backbone.tokens(video_BTCHW[video, t : t + 1])
            torch.testing.assert_close(encoder.frozen(video_BTCHW)[video, t], frozen_1ND[0])
            torch.testing.assert_close(tokens_BTND[video, t], projection(frozen_1ND)[0].detach())
    normalised = encoder(video_BTCHW, normalize=True)
    torch.testing.assert_close(normalised, F.normalize(tokens_BTND, dim=-1))
    assert not tokens_BTND.requires_grad
    with pytest.raises(InputError, match=r"\(3, 3, 64, 96\): expected \(B, T, 3, H, W\)"):
        encoder(video_BTCHW[0])


def test_settings_that_were_left_out_are_read_again(tmp_path: Path) -> None:
    encoder = load_backbone(**SETTINGS)
    torch.save(timm_layout(encoder), tmp_path / "dino.pth")
    settings = SETTINGS | {"weights": str(tmp_path / "dino.pth"), "embed_dim": None, "depth": None}
    write_run(tmp_path / "run", settings)
    assert load_video_encoder(str(tmp_path / "run"), "cpu").encoder.embed_dim == 32


def timm_layout(encoder: torch.nn.Module) -> dict[str, Tensor]:
    """A checkpoint of the encoder: its own parameters, the class token and the positions."""
    prefix_1D, positions_ND = encoder.get_buffer("prefix_PD"), encoder.get_buffer("positions_ND")
    return {**encoder.state_dict(), "cls_token": prefix_1D[None], "pos_embed": positions_ND[None]}


def test_weights_may_have_moved_but_not_changed(tmp_path: Path) -> None:
    encoder = load_backbone(**SETTINGS)
    state = timm_layout(encoder)
    torch.save(state, tmp_path / "dino.pth")
    write_run(tmp_path / "run", SETTINGS | {"weights": str(tmp_path / "dino.pth")})
    (tmp_path / "dino.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(InputError, match=r"dino\.pth: no such file"):
        load_video_encoder(tmp_path / "run")
    moved = load_video_encoder(tmp_path / "run", weights=str(tmp_path / "moved.pth"))
    assert moved.encoder.weights == str(tmp_path / "moved.pth")
    torch.save(state | {"norm.bias": state["norm.bias"] + 1}, tmp_path / "moved.pth")
    with pytest.raises(InputError, match=r"moved\.pth of dino are not those it was trained on"):
        load_video_encoder(tmp_path / "run", weights=str(tmp_path / "moved.pth"))


def test_another_seed_of_random_weights_is_another_encoder(tmp_path: Path) -> None:
    metadata = projection_metadata(SETTINGS | {"seed": 6}, load_backbone(**SETTINGS), Projection(32), {})
    Projection(32).save(tmp_path / PROJECTION_FILE, metadata)
    with pytest.raises(InputError, match="random of dino are not those"):
        load_video_encoder(tmp_path)


def test_a_projection_of_another_width(tmp_path: Path) -> None:
    metadata = projection_metadata(SETTINGS, load_backbone(**SETTINGS), Projection(16), {})
    Projection(16).save(tmp_path / PROJECTION_FILE, metadata)
    with pytest.raises(InputError, match="projection of width 16, encoder of 32"):
        load_video_encoder(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"backbone": "dino"},
        {"backbone": "[]"},
        {"backbone": '{"weights": "random"}'},
        {"backbone": '{"nam": "dino"}'},
    ],
)
def test_projections_without_a_backbone(metadata: dict[str, str], tmp_path: Path) -> None:
    Projection(32).save(tmp_path / PROJECTION_FILE, metadata)
    with pytest.raises(InputError, match=r"projection\.safetensors: its metadata names no backbone"):
        load_video_encoder(tmp_path)


def test_folders_without_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"run {folder}: no projection.safetensors"):
            load_video_encoder(folder)
