"""Loading a video encoder from a run folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from synthetic import SETTINGS, picture, write_folders, write_run, write_weights

from fasttrain.backbones import load_backbone
from fasttrain.errors import InputError
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.projection import PROJECTION_FILE, Projection
from fasttrain.video_encoder import load_video_encoder, trained_backbone


def test_the_encoder_applies_backbone_and_projection_to_every_frame(tmp_path: Path) -> None:
    encoder = load_video_encoder(write_run(tmp_path))
    projection, backbone = Projection.load(tmp_path / PROJECTION_FILE), load_backbone(**SETTINGS)
    video_BTCHW = torch.randn(2, 3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    tokens_BTND = encoder(video_BTCHW)
    assert tokens_BTND.shape == (2, 3, 24, 32)
    assert encoder.grid(64, 96) == (4, 6)
    for video in range(2):
        for t in range(3):
            frozen_1ND = backbone.tokens(video_BTCHW[video, t : t + 1])
            torch.testing.assert_close(encoder.frozen(video_BTCHW)[video, t], frozen_1ND[0])
            torch.testing.assert_close(tokens_BTND[video, t], projection(frozen_1ND)[0].detach())
    torch.testing.assert_close(encoder(video_BTCHW, normalize=True), F.normalize(tokens_BTND, dim=-1))
    assert not tokens_BTND.requires_grad
    with pytest.raises(InputError, match=r"\(3, 3, 64, 96\), expected \(B, T, 3, H, W\)"):
        encoder(video_BTCHW[0])


def test_preprocess_takes_files_and_uint8_frames_of_every_layout(tmp_path: Path) -> None:
    mean, std = (0.5, 0.4, 0.6), (0.5, 0.25, 0.3)
    encoder = load_video_encoder(write_run(tmp_path / "run", mean=mean, std=std))
    root = write_folders(tmp_path / "videos", [5, 4], suffix=".png")
    video_THWC = np.stack([picture(0, t) for t in range(5)])  # 48 x 64
    expected = (torch.tensor(video_THWC / 255.0) - torch.tensor(mean)) / torch.tensor(std)
    expected_1T3HW = expected.permute(0, 3, 1, 2)[None].float()
    video_TCHW = torch.tensor(video_THWC).permute(0, 3, 1, 2)
    for video in (root / "class_0/video_0", str(root / "class_0"), video_THWC, video_TCHW, video_TCHW[None]):
        torch.testing.assert_close(encoder.preprocess(video, size=48), expected_1T3HW)
        some = encoder.preprocess(video, size=48, frames=slice(1, None, 2))
        torch.testing.assert_close(some, expected_1T3HW[:, 1::2])
    twice = encoder.preprocess(np.stack([video_THWC, video_THWC]), size=(48, 64))
    torch.testing.assert_close(twice, expected_1T3HW.expand(2, -1, -1, -1, -1))
    assert encoder.preprocess(video_THWC).shape == (1, 5, 3, 224, 304)
    assert encoder.half().preprocess(video_THWC, size=32).dtype == torch.float16
    for frames in (video_THWC / 255, video_THWC[..., :2], video_THWC[0], list(video_THWC[0]), None):
        with pytest.raises(
            InputError, match=r"dtype \w+ and shape \(.*\); expected uint8 RGB, \(T, H, W, 3\)"
        ):
            encoder.preprocess(frames)  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"contains 2 videos \(first: class_0/video_0\); pass the path of one"
    ):
        encoder.preprocess(root)
    with pytest.raises(InputError, match="no frame is selected"):
        encoder.preprocess(video_THWC, frames=slice(9, None))
    (root / "class_0/video_0/00003.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"class_0': frame 3 is unreadable \(cannot be decoded"):
        encoder.preprocess(root / "class_0")


def test_frames_that_are_not_normalised_are_refused(tmp_path: Path) -> None:
    encoder = load_video_encoder(write_run(tmp_path))
    for frames in (torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8), np.zeros((2, 64, 64, 3), np.uint8)):
        for encode in (encoder, encoder.frozen):
            with pytest.raises(InputError, match=r"of dtype \S*uint8; .* Pass encoder\.preprocess\(frames\)"):
                encode(frames)


def test_moved_weights_are_accepted_and_changed_ones_refused(tmp_path: Path) -> None:
    # Without sizes in the metadata, they are read from the weights.
    weights = write_weights(tmp_path / "dino.pth")
    run = write_run(tmp_path / "run", weights=weights, embed_dim=None, depth=None)
    assert load_video_encoder(str(run), "cpu").encoder.embed_dim == 32
    moved = tmp_path / "moved.pth"
    (tmp_path / "dino.pth").rename(moved)
    with pytest.raises(InputError, match=r"dino\.pth' of its backbone are not there. Pass .* weights=PATH"):
        load_video_encoder(run)
    assert load_video_encoder(run, weights=str(moved)).encoder.weights == str(moved)
    write_weights(moved, shift=1.0)
    with pytest.raises(InputError, match=r"moved\.pth' of dino are not those used in training"):
        load_video_encoder(run, weights=str(moved))


@pytest.mark.parametrize("weights", ["dino.pth", "./dino.pth#teacher"])
def test_a_run_loads_from_any_folder(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tmp_path / "dino.pth", container="teacher" if "#" in weights else None)
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", weights=weights)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_video_encoder("../run").encoder.weights == str(tmp_path / weights)
    # Earlier versions stored the location as the user wrote it.
    projection = Projection.load(run / PROJECTION_FILE)
    settings = json.loads(projection.metadata["backbone"]) | {"weights": weights}
    projection.save(run / PROJECTION_FILE, projection.metadata | {"backbone": json.dumps(settings)})
    with pytest.raises(InputError, match="not there"):
        load_video_encoder(run)
    monkeypatch.chdir(tmp_path)
    assert load_video_encoder(run).encoder.weights == weights


def test_mean_std_and_heads_are_stored_with_the_projection(tmp_path: Path) -> None:
    mean, std = (0.5, 0.4, 0.6), (0.5, 0.25, 0.3)
    run = write_run(tmp_path / "run", mean=mean, std=std)
    encoder = load_video_encoder(run)
    assert (encoder.mean, encoder.std) == (encoder.encoder.mean, encoder.encoder.std) == (mean, std)
    # The settings of the run do not name them.
    write_run(run, name="test_vit", embed_dim=None, depth=None, num_heads=None)
    stored = json.loads(Projection.load(run / PROJECTION_FILE).metadata["backbone"])
    backbone = load_backbone("test_vit", image_size=64)
    resolved = {"num_heads": backbone.num_heads, "mean": list(backbone.mean), "std": list(backbone.std)}
    assert {key: stored[key] for key in resolved} == resolved


def test_projections_of_version_0_1_0_were_trained_with_the_imagenet_mean_and_std(tmp_path: Path) -> None:
    write_run(tmp_path, name="test_vit", embed_dim=None, depth=None, num_heads=None)
    projection = Projection.load(tmp_path / PROJECTION_FILE)
    settings = json.loads(projection.metadata["backbone"])
    settings = {key: value for key, value in settings.items() if key not in ("mean", "std")}
    projection.save(tmp_path / PROJECTION_FILE, projection.metadata | {"backbone": json.dumps(settings)})
    encoder = load_video_encoder(tmp_path)
    assert (encoder.mean, encoder.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"projection '{folder}': no projection.safetensors"):
            load_video_encoder(folder)
    Projection(32).save(tmp_path / PROJECTION_FILE)
    with pytest.raises(InputError, match="does not name its backbone"):
        load_video_encoder(tmp_path)


@pytest.mark.parametrize(
    ("description", "part"),
    [
        ("{", "Expecting property name"),
        ("[" * 99_999, "nested too deeply"),
        ("3", "'int' object is not iterable"),
        ('{"name": 3}', "backbone.name: expected a valid string, got 3"),
        ('{"weights": "random"}', "it has no name"),
        ('{"name": "dino", "image_size": 64.5}', "data.image_size: expected a valid integer"),
        ('{"name": "dino", "embed_dim": "32"}', "backbone.embed_dim: expected a valid integer, got '32'"),
        ('{"name": "dino", "kmage_size": 64}', "unknown recipe key 'backbone.kmage_size'"),
    ],
)
def test_a_damaged_description_of_the_backbone_is_refused(
    description: str, part: str, tmp_path: Path
) -> None:
    Projection(32).save(tmp_path / PROJECTION_FILE, {"backbone": description})
    with pytest.raises(InputError, match=f"description of its backbone is damaged .*{part}"):
        load_video_encoder(tmp_path)


def test_a_projection_of_0_1_0_keeps_the_heads_and_colours_of_its_training(tmp_path: Path) -> None:
    """0.1.0 took the number of heads as width / 64, so that MoCo v3's ViT-S had 6 instead of 12."""
    sizes = {"embed_dim": 384, "num_heads": None}
    projection = Projection.load(write_run(tmp_path, name="mocov3", **sizes) / PROJECTION_FILE)
    stored = json.loads(projection.metadata["backbone"])
    assert stored["num_heads"] == 12
    # Versions between 0.1.0 and 0.2.0 stored all but the epsilon.
    recent = {key: value for key, value in stored.items() if key != "layer_norm_eps"}
    projection.metadata |= {"backbone": json.dumps(recent)}
    assert trained_backbone(projection) == stored
    earlier = {key: value for key, value in stored.items() if key not in ("mean", "std", "activation")}
    metadata = projection.metadata | {"backbone": json.dumps(earlier | {"num_heads": None})}
    projection.save(tmp_path / PROJECTION_FILE, metadata)
    encoder = load_video_encoder(tmp_path)
    assert (encoder.encoder.num_heads, encoder.mean, encoder.std) == (6, IMAGENET_MEAN, IMAGENET_STD)
