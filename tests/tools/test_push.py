"""Publishing a run on the Hub, on a stand-in for it, and loading it from there."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from hub_server import Hub
from synthetic import result_of, write_videos, write_weights
from torch import Tensor

from fasttrain.__main__ import main
from fasttrain.errors import InputError
from fasttrain.projection import PROJECTION_FILE, Projection
from fasttrain.tools.push import published, push, write_repository
from fasttrain.video_encoder import VideoEncoder, load_video_encoder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained and evaluated run, its videos and the weights of its backbone."""
    work = tmp_path_factory.mktemp("private")
    videos = write_videos(work / "my videos")
    keys = {
        "backbone.name": "dino",
        "backbone.num_heads": 2,
        "backbone.weights": write_weights(work / "dino.pth"),
        "data.source": videos,
        "data.image_size": 64,
        "data.pairs_per_video": 4,
        "train.batch_size": 2,
        "train.steps": 2,
        "train.precision": "fp32",
        "train.tensorboard": False,
        "device": "cpu",
        "output": work / "run",
    }
    assert main(["recipes/base.yaml", *(f"{key}={value}" for key, value in keys.items())]) == 0
    # The results say why it is skipped, which may include its path.
    (videos / "damaged").mkdir()
    for number in range(9):
        (videos / "damaged" / f"{number:05d}.jpg").touch()
    words = ["--image-size", "64", "--num-frames", "9", "--device", "cpu"]
    assert main(["eval", "consistency", "--run", str(work / "run"), "--root", str(videos), *words]) == 0
    return work


@pytest.fixture
def run(work: Path) -> Path:
    return work / "run"


def tokens(encoder: VideoEncoder) -> Tensor:
    return encoder(torch.randn(1, 2, 3, 64, 96, generator=torch.Generator().manual_seed(0)))


def metadata_of(card: bytes) -> dict[str, Any]:
    metadata: dict[str, Any] = yaml.safe_load(card.decode().split("---\n")[1])
    return metadata


def test_a_published_run_gives_the_same_tokens(
    work: Path, run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "me/tiny", "--private"]) == 0
    output = capsys.readouterr().out
    result = result_of(run / "eval", "consistency")
    assert sorted(hub.repos["me/tiny"]) == [
        "README.md",
        f"eval/{result.name}",
        f"figures/{result.stem}-trade_off.png",
        "figures/learning.png",
        "projection.safetensors",
        "recipe.yaml",
    ]
    assert all(name in output for name in hub.repos["me/tiny"])
    assert f"{hub.url}/me/tiny" in output
    assert 'load_video_encoder("hf://me/tiny", weights="PATH")' in output
    assert (len(hub.commits), hub.private) == (1, {"me/tiny"})
    weights = str(work / "dino.pth")
    loaded = load_video_encoder("hf://me/tiny@main", weights=weights)
    assert torch.equal(tokens(loaded), tokens(load_video_encoder(run)))
    with pytest.raises(InputError, match=r"the weights 'dino\.pth' of its backbone are not there. Pass"):
        load_video_encoder("hf://me/tiny")
    # The model that was evaluated can be found by its hashes.
    published = json.loads(hub.repos["me/tiny"][f"eval/{result.name}"])
    assert published["results"] == json.loads(result.read_text())["results"]
    assert published["settings"]["root"] == "my videos"
    recipe = yaml.safe_load(hub.repos["me/tiny"]["recipe.yaml"])
    places = (recipe["data"]["source"], recipe["output"], recipe["backbone"]["weights"])
    assert places == ("my videos", "run", "dino.pth")


def test_no_path_of_the_machine_ispublished(work: Path, run: Path, tmp_path: Path) -> None:
    write_repository(run, tmp_path, "me/tiny")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        assert str(work.parent).encode() not in file.read_bytes(), file
        assert b"damaged" not in file.read_bytes(), file
    # A folder with these files is a run, too.
    loaded = load_video_encoder(tmp_path, weights=str(work / "dino.pth"))
    assert torch.equal(tokens(loaded), tokens(load_video_encoder(run)))


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("s3://bucket/videos/packed/", "packed"),
        ("https://me:password@host/packed", "packed"),
        ("http://host:80", "http"),
        ("hf://datasets/me/packed", "hf://datasets/me/packed"),
    ],
)
def test_of_urls_only_what_is_public_ispublished(source: str, shown: str) -> None:
    assert published({"data": {"source": source}}) == {"data": {"source": shown}}


def test_the_card_says_what_it_is_and_how_good(work: Path, run: Path, tmp_path: Path) -> None:
    write_repository(run, tmp_path, "me/tiny")
    card = (tmp_path / "README.md").read_text()
    metadata = metadata_of(card.encode())
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("fasttrain", "image-feature-extraction")
    assert "base_model" not in metadata
    values = json.loads(result_of(run / "eval", "consistency").read_text())["results"]
    before, after = (values[variant]["intra_normalized_95"] for variant in ("before", "after"))
    row = f"| consistency | my videos | intra_normalized_95 | {before:.4f} | {after:.4f} | lower | distance "
    assert row in card
    for part in (
        'load_video_encoder("hf://me/tiny", weights="PATH")',
        load_video_encoder(run).encoder.weights_hash,
        "| `data.source` | `my videos` |",
        "| `train.steps` | `2` |",
        "(figures/learning.png)",
        "@InProceedings{Liu_2026_CVPR",
    ):
        assert part in card
    assert "train.epochs" not in card
    assert "$" not in card


def test_results_of_another_projection_and_of_an_earlier_upload_are_left_out(
    work: Path, run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = run / "eval" / "consistency-stale.json"
    content = json.loads(result_of(run / "eval", "consistency").read_text())
    content["model"]["projection_hash"] = "other"
    stale.write_text(json.dumps(content))
    hub.repos["me/tiny"] = {"eval/old.json": b"", "figures/old.png": b"", "LICENSE": b"mine"}
    try:
        push(run, "me/tiny")
    finally:
        stale.unlink()
    assert "not uploaded: " in capsys.readouterr().out
    assert not {"eval/old.json", "figures/old.png", "eval/consistency-stale.json"} & set(hub.repos["me/tiny"])
    assert {"LICENSE", "README.md"} <= set(hub.repos["me/tiny"])
    assert len(hub.commits) == 1


def test_the_public_location_of_the_weights_ispublished(work: Path, run: Path, hub: Hub) -> None:
    write_weights(work / "other.pth", shift=1.0)
    hub.repos["you/vit"] = {"a/dino.pth": (work / "dino.pth").read_bytes()}
    hub.repos["you/other"] = {"dino.pth": (work / "other.pth").read_bytes()}
    push(run, "me/tiny", weights="hf://you/vit@main/a/dino.pth")
    assert metadata_of(hub.repos["me/tiny"]["README.md"])["base_model"] == "you/vit"
    assert torch.equal(tokens(load_video_encoder("hf://me/tiny")), tokens(load_video_encoder(run)))
    for weights, message in [
        ("hf://you/other", "are not those used in training"),
        (str(work / "dino.pth"), "expected a public location"),
    ]:
        with pytest.raises(InputError, match=message):
            push(run, "me/tiny", weights=weights)


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("me/tiny", "", "not logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN"),
        ("me/tiny", "wrong", "'me/tiny': the Hub does not accept the token"),
        ("you/tiny", None, "'you/tiny': the token may not write there"),
        ("tiny", None, "'tiny': expected USER/NAME"),
        ("hf://me/tiny", None, "'hf://me/tiny': expected USER/NAME, such as me/tiny"),
        ("me/a b", None, "repository 'me/a b': "),
    ],
)
def test_refusals_are_one_line(
    repository: str,
    token: str | None,
    message: str,
    run: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    assert main(["push", str(run), repository]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fasttrain: ")
    assert message in error
    assert not hub.commits


def test_without_a_network(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(run), "me/tiny"]) == 2
    assert "the upload failed (ConnectError" in capsys.readouterr().err


def test_the_password_of_a_mirror_is_not_printed(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = f"{hub.url.replace('://', '://me:secret@')}/nowhere"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", mirror)
    assert main(["push", str(run), "me/tiny"]) == 2
    error = capsys.readouterr().err
    assert f"{hub.url}/nowhere" in error
    assert "secret" not in error


def test_folders_without_a_run_are_refused(run: Path, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no projection\.safetensors there"):
        push(tmp_path, "me/tiny")
    assert not hub.repos


@pytest.mark.parametrize(
    ("weights", "base_model", "part"),
    [
        ("random", None, "The encoder has random weights."),
        (
            "timm://vit_small_patch14_dinov2",
            "timm/vit_small_patch14_dinov2.lvd142m",
            "downloaded from `timm://vit",
        ),
        ("hf://you/vit@v1/a/b.pth#teacher", "you/vit", "downloaded from `hf://you/vit@v1/a/b.pth#teacher`"),
    ],
)
def test_the_base_model(weights: str, base_model: str | None, part: str, tmp_path: Path) -> None:
    backbone = json.dumps({"name": "dino", "weights": weights})
    metadata = {"backbone": backbone, "weights": weights, "weights_hash": "0", "recipe": "{}"}
    Projection(8).save(tmp_path / "run" / PROJECTION_FILE, metadata)
    (tmp_path / "new").mkdir()
    write_repository(tmp_path / "run", tmp_path / "new", "me/tiny")
    card = (tmp_path / "new" / "README.md").read_bytes()
    assert metadata_of(card).get("base_model") == base_model
    assert part in card.decode()
    assert 'load_video_encoder("hf://me/tiny")' in card.decode()
    assert "Not evaluated." in card.decode()
