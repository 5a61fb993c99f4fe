"""`fasttrain fit`: the projection in closed form, from the command line and from Python."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import write_folders, write_weights
from torch import Tensor

import fasttrain
from fasttrain.__main__ import main
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.fitter import STRENGTHS, WHITENINGS, gather_moments
from fasttrain.projection import PROJECTION_FILE, Projection
from fasttrain.recipe import load_recipe, to_dict
from fasttrain.tools.push import write_repository
from fasttrain.trainer import Trainer

TINY: dict[str, Any] = {
    "device": "cpu",
    "data": {"image_size": 32, "num_threads": 1, "pairs_per_video": 2},
    "train": {"steps": 1, "batch_size": 2, "accumulate": 1, "precision": "fp32", "tensorboard": False},
    "backbone": {"weights": "random", "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "eval": {"num_frames": 8},
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("frames"), [8] * 6)


def negative_rank(tokens_TND: Tensor) -> float:
    values = torch.linalg.svdvals(tokens_TND.flatten(0, 1).double())
    share = values / values.sum()
    return torch.xlogy(share, share).sum().item()


def fit(
    frames: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    score: Callable[[Tensor], float] = negative_rank,
    **keys: Any,
) -> Any:
    """Fit with another criterion."""
    monkeypatch.setattr("fasttrain.evaluation.validation.score", score)
    return fasttrain.fit("dino", source=frames, output=output, **{**TINY, **keys})


def test_other_commands_accept_the_run_folder(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The strongest filter leaves the lowest effective rank, so it is chosen by this criterion."""
    folder = tmp_path / "fit"
    fitted = fit(frames, folder, monkeypatch)
    content = json.loads((folder / "fit.json").read_text())
    assert fitted.results == {"dino": content}
    assert (content["strength"], content["whitening"]) == (min(STRENGTHS), 0)
    assert len(content["scores"]) == len(STRENGTHS) * len(WHITENINGS)
    best = max(content["scores"], key=lambda each: each["score"])
    assert (best["strength"], best["whitening"]) == (min(STRENGTHS), 0)
    # Of six videos, one is held out. An epoch has two pairs of each of the others, with 2 x 4 tokens.
    assert (content["pairs"], content["tokens"], content["validated_videos"]) == (10, 80, 1)
    printed = capsys.readouterr().out
    assert "warning: the weights of dino are random" in printed
    assert "an epoch has 10 of the 2,048 pairs to encode; raise data.pairs_per_video to 410" in printed
    assert "strength 0.03, whitening 0; score " in printed
    assert torch.isfinite(fitted.encoder(torch.zeros(1, 2, 3, 32, 32))).all()
    evaluated = ["--device", "cpu", "--image-size", "32", "--num-frames", "8"]
    assert main(["eval", "consistency", "--run", str(folder), "--root", str(frames), *evaluated]) == 0
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    assert "a projection in closed form" in (tmp_path / "report.html").read_text()
    write_repository(folder, tmp_path / "repository", "me/fitted")
    card = (tmp_path / "repository" / "README.md").read_text()
    assert "strength 0.03, whitening 0" in card
    assert "optimizer.lr" not in card
    # The first step moves the weights by the learning rate.
    keys = {**TINY, "projection.weights": str(folder), "optimizer.lr": 1e-9}
    trained = fasttrain.train("dino", source=frames, output=tmp_path / "run", **keys)
    start, end = Projection.find(str(folder)), Projection.find(str(trained.folders["dino"]))
    torch.testing.assert_close(dict(end.state_dict()), dict(start.state_dict()), rtol=0, atol=1e-6)


def test_the_frozen_features_are_kept_if_no_map_is_better(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbones = [{"name": "dino", **TINY["backbone"]}]
    monkeypatch.delitem(TINY, "backbone")
    fitted = fit(frames, tmp_path, monkeypatch, lambda _: 0.0, backbones=backbones)
    printed = capsys.readouterr().out
    assert "pass pretrained ones as weights in the entries of backbones" in printed
    assert (fitted.results["dino"]["strength"], fitted.results["dino"]["whitening"]) == (None, 0)
    assert "none is better than the frozen features with their mean" in printed
    weight_DD = Projection.find(str(tmp_path / "dino")).linears[0].weight
    assert torch.equal(weight_DD, weight_DD[0, 0] * torch.eye(32))


def test_pairs_are_divided_among_processes(frames: Path, tmp_path: Path) -> None:
    """Seven pairs in batches of two: the last process gets one pair less. Longer walks are of no matter."""
    keys = {**TINY, "data.source": str(frames), "output": str(tmp_path), "objective.frames": 3}
    recipe = load_recipe("dino", keys)
    single, *ranks = (
        gather_moments(trainer, trainer.index, 7)[0]
        for trainer in (
            Trainer(recipe, dataclasses.replace(World.single("cpu"), rank=rank, size=size))
            for rank, size in ((0, 1), (0, 2), (1, 2))
        )
    )
    assert [rank.num_samples for rank in ranks] == [4, 3]
    ranks[0].merge(ranks[1])
    assert (ranks[0].num_tokens, ranks[0].num_matches) == (single.num_tokens, single.num_matches)
    for name in ("mean_D", "total_DD", "noise_DD", "frame_DD"):
        torch.testing.assert_close(getattr(ranks[0], name), getattr(single, name), rtol=1e-5, atol=1e-6)


def test_a_folder_is_used_for_one_projection(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same fit may be repeated."""
    fitted, trained = tmp_path / "fit", tmp_path / "run"
    first = fit(frames, fitted, monkeypatch)
    assert fit(frames, fitted, monkeypatch) == first
    with pytest.raises(InputError, match=r"holds a run of another recipe \(seed: 0 -> 1\)"):
        fit(frames, fitted, monkeypatch, seed=1)
    other = write_weights(tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"holds a projection for other weights than .*other\.pth"):
        fit(frames, fitted, monkeypatch, backbone=TINY["backbone"] | {"weights": other})
    assert Projection.load(fitted / PROJECTION_FILE).metadata["weights"] == "random"
    with pytest.raises(
        InputError, match=r"projection of `fasttrain fit`\. To start from it, pass projection"
    ):
        fasttrain.train("dino", source=frames, output=fitted, **TINY)
    trained.mkdir()
    (trained / "recipe.yaml").write_text(json.dumps(to_dict(load_recipe("dino", TINY))))
    with pytest.raises(InputError, match="holds a training run; use another output=DIR"):
        fit(frames, trained, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "0"], "--pairs: 0 is less than 1; pass the number of frame pairs"),
        (
            ["projection.head=mlp2"],
            "projection.head: 'mlp2' cannot be fitted, because the closed form is a linear",
        ),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "dino", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"fasttrain: {message}")


def test_videos_that_cannot_be_validated_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="none of 2 videos can be validated; pass videos of at least 8"):
        fit(write_folders(tmp_path / "short", [4] * 2), tmp_path / "fit", monkeypatch, lambda _: 0.0)
    assert not (tmp_path / "fit" / "recipe.yaml").exists()
