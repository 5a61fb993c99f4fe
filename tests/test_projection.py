"""The projection: formulas and files, and the losses and gradients of the published implementation."""

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hub_server import Hub
from safetensors.torch import save_file
from synthetic import published_name, save_release
from torch import Tensor, nn

from fasttrain.backbones import load_backbone
from fasttrain.errors import InputError
from fasttrain.families import FAMILIES
from fasttrain.projection import COSETTLE, PROJECTION_FILE, PUBLISHED, Head, Init, Projection
from fasttrain_kernels import cosettle_loss

HEADS = get_args(Head)
MEAN_311 = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
STD_311 = torch.tensor((0.229, 0.224, 0.225))[:, None, None]


def relative_error(value: Tensor, expected: np.ndarray) -> float:
    return ((value - torch.from_numpy(expected)).norm() / np.linalg.norm(expected)).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_match_the_published_implementation(shared: Path, family: str) -> None:
    folder = shared / "golden" / "backbones"
    golden = np.load(folder / f"{family}.npz")
    encoder = load_backbone(
        family, weights=str(folder / f"{family}.pretrained.pth"), image_size=64, num_heads=2
    )
    projection = Projection.from_cosettle(folder / f"{family}.cosettle.pth")
    frames = [(torch.from_numpy(golden[name]) / 255 - MEAN_311) / STD_311 for name in ("frame1", "frame2")]
    row, column = (int(start) for start in golden["crop_offset"])
    positions = encoder.asymmetric_positions(ratio=float(golden["asym_ratio"]), offset=(row, column))
    frozen_B3ND = encoder.training_views(torch.stack(frames), positions)
    out = cosettle_loss(
        frozen_B3ND,
        projection(frozen_B3ND),
        grid=(4, 4),
        temperature=float(golden["temperature"]),
        window=2,
        lambda_reg=float(golden["lambda_reg"]),
        regularizer="kl",
        backend="eager",
    )
    losses = {"loss": out.loss, "cycle_loss": out.cycle, "separability_loss": out.separability}
    for name, value in losses.items():
        assert value.item() == pytest.approx(float(golden[name]), rel=1e-5)
    out.loss.backward()
    for name, parameter in projection.named_parameters():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, golden[f"grad.{published_name(name, 'linear')}"]) < 1e-4, name
        assert np.array_equal(parameter.detach(), golden[f"projection.{published_name(name, 'linear')}"])


@pytest.mark.parametrize(("case", "head"), [("linear_kl", "linear"), ("mlp2", "mlp2"), ("mlp3", "mlp3")])
def test_losses_of_all_published_heads(shared: Path, case: str, head: Head, tmp_path: Path) -> None:
    golden = np.load(shared / "golden" / "loss" / f"{case}.npz")
    prefix = "projection."
    parameters = {k.removeprefix(prefix): torch.from_numpy(golden[k]) for k in golden if k.startswith(prefix)}
    save_release(tmp_path / "ours.pth", parameters)
    projection = Projection.find(str(tmp_path / "ours.pth"))
    assert projection.head == head == str(golden["head"])
    frozen_B3ND = torch.from_numpy(golden["z"])
    side = int(frozen_B3ND.shape[2] ** 0.5)
    out = cosettle_loss(
        frozen_B3ND,
        projection(frozen_B3ND),
        grid=(side, side),
        temperature=float(golden["temperature"]),
        window=int(golden["window"]),
        lambda_reg=float(golden["lambda_reg"]),
        regularizer=str(golden["regularizer"]),
        backend="eager",
    )
    assert out.loss.item() == pytest.approx(float(golden["loss"]), rel=1e-5)


def layer_norm(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * norm.weight.detach().numpy() + norm.bias.detach().numpy()


@pytest.mark.parametrize("head", PUBLISHED)
def test_heads_match_their_formulas(head: Head) -> None:
    projection = Projection(6, head=head, seed=1).double()
    with torch.no_grad():
        projection.norm.weight.uniform_(0.5, 2)
        projection.norm.bias.uniform_(-1, 1)
    tokens = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    x = tokens.numpy()
    layers = list(projection.linears)
    for i, linear in enumerate(layers):
        assert isinstance(linear, nn.Linear)
        x = x @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        # The last linear layer of an MLP is not followed by tanh.
        if head == "linear" or i < len(layers) - 1:
            x = np.tanh(x)
    expected = layer_norm(x, projection.norm)
    np.testing.assert_allclose(projection(tokens).detach(), expected, rtol=1e-12, atol=1e-12)
    assert len(layers) == {"linear": 1, "mlp2": 2, "mlp3": 3}[head]


@pytest.mark.parametrize("head", ["lowrank", "residual"])
def test_heads_that_add_to_the_tokens_match_their_formulas(head: Head) -> None:
    projection = Projection(16, head=head).double()
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.uniform_(-1, 1)
    tokens, mean = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    projection.start_at_frozen_(mean, std=2.0)
    weights = {name: parameter.detach().numpy() for name, parameter in projection.named_parameters()}
    x = 0.25 * (tokens - mean).numpy()
    hidden, weight = x @ weights["linears.0.weight"].T, weights["linears.1.weight"].T
    if head == "lowrank":
        assert hidden.shape == (2, 5, 2)
        x = np.tanh(x + hidden @ weight + weights["linears.1.bias"])
    else:
        hidden = np.tanh(hidden + weights["linears.0.bias"])
        x = x + weights["gate"] * hidden @ weight + weights["linears.1.bias"]
    expected = layer_norm(x, projection.norm)
    np.testing.assert_allclose(projection(tokens).detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", get_args(Init))
def test_parameters_depend_on_the_seed_only(init: Init) -> None:
    state = torch.get_rng_state()
    first, again, other = (Projection(64, head="mlp3", init=init, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    for i in range(3):
        weight = first.get_parameter(f"linears.{i}.weight")
        assert not torch.equal(weight, other.get_parameter(f"linears.{i}.weight"))
        # The layers of a head differ from each other, too.
        assert not torch.equal(weight, first.get_parameter(f"linears.{(i + 1) % 3}.weight"))
        # Standard deviations: 0.02; sqrt(2 / (64 + 64)); that of a uniform distribution on +- 1 / sqrt(64).
        expected = {"trunc_normal": 0.02, "xavier_uniform": 0.125, "default": 0.125 / 3**0.5}[init]
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
        assert (first.get_parameter(f"linears.{i}.bias").abs().max() == 0) == (init != "default")


@pytest.mark.parametrize("init", ["trunc_normal", "default"])
@pytest.mark.parametrize("head", HEADS)
def test_start_at_the_frozen_features(head: Head, init: Init) -> None:
    """The output has the direction of the centred tokens, in which the layer norm removes the mean."""
    tokens = 3 * torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) + torch.arange(16.0)
    centred = tokens - tokens.mean(dim=0)
    projection = Projection(16, head=head, init=init)
    projection.start_at_frozen_(tokens.mean(dim=0), centred.std(correction=0).item())
    out = projection(tokens)
    similarity = torch.cosine_similarity(out, centred - centred.mean(dim=1, keepdim=True), dim=1)
    assert similarity.min() > 0.9
    assert similarity.mean() > 0.98


def test_a_projection_from_an_affine_map() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(500, 16, generator=generator, dtype=torch.float64) + 1
    weight = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    mapped = (tokens - 1) @ weight.T
    projection = Projection.from_affine(weight, -weight.sum(dim=1), mapped.std().item())
    assert (projection.head, projection.norm.weight.dtype) == ("linear", torch.float32)
    linear, rest = projection.split(tokens.float())
    inputs = linear + rest["bias"]
    assert inputs.std().item() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(inputs.double(), mapped * 0.5 / mapped.std(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_save_and_load(head: Head, tmp_path: Path) -> None:
    path = tmp_path / "run" / "projection.safetensors"
    projection = Projection(8, head=head, seed=3)
    projection.start_at_frozen_(torch.arange(8.0), 2.0)
    projection.save(path, {"backbone": "{}", "recipe": "ä"})
    loaded = Projection.find(str(path))
    assert (loaded.head, loaded.dim) == (head, 8)
    assert loaded.metadata == {"backbone": "{}", "recipe": "ä", "head": head}
    for name, tensor in projection.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_projections_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    projection = Projection(8, seed=3)
    projection.save(tmp_path / PROJECTION_FILE)
    save_release(
        tmp_path / "ours.pth", {published_name(k, "linear"): t for k, t in projection.state_dict().items()}
    )
    run, checkpoint = (tmp_path / PROJECTION_FILE).read_bytes(), (tmp_path / "ours.pth").read_bytes()
    hub.repos["me/run"] = {PROJECTION_FILE: run, "runs/mae/projection.safetensors": run, "model.bin": b""}
    assert set(COSETTLE) == set(FAMILIES)
    hub.repos["yafeng19/Co-Settle"] = {
        f"ckpts/ours/{name}+ours/checkpoint.pth": checkpoint for name in COSETTLE
    }
    found = [
        Projection.find("hf://me/run"),
        Projection.find("hf://me/run@main/runs/mae"),
        Projection.find("hf://me/run/runs/mae/projection.safetensors"),
        Projection.find("hf://yafeng19/Co-Settle/ckpts/ours/mae+ours"),
        *map(Projection.from_cosettle, COSETTLE),
        *(Projection.find(f"cosettle://{name}") for name in COSETTLE),
    ]
    for each in found:
        assert torch.equal(each.norm.weight, projection.norm.weight)
        assert torch.equal(
            each.get_parameter("linears.0.weight"), projection.get_parameter("linears.0.weight")
        )


def test_messages_about_projections_that_are_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.repos["me/run"] = {"README.md": b""}
    for location, message in [
        ("nowhere", "'nowhere': no projection.safetensors there. Pass the output folder"),
        (str(tmp_path), f"'{tmp_path}': no projection.safetensors there"),
        ("hf://me/run", "the folder has no weights"),
        ("hf://me/run/projection.safetensors", "me/run/resolve/main/projection.safetensors does not exist"),
        ("hf://me/other", "no such repository, or it is private"),
        ("cosettle://foo", f"published: {', '.join(COSETTLE)}"),
        ("cosettle://", f"published: {', '.join(COSETTLE)}"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            Projection.find(location)
    hub.private.add("me/run")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN")
        with pytest.raises(InputError, match="log in with `hf auth login`"):
            Projection.find("hf://me/run")


def test_messages_about_files_without_a_projection(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    projection = Projection(8)
    projection.save(whole)
    state = projection.state_dict()
    (tmp_path / "truncated").write_bytes(whole.read_bytes()[:200])
    save_file(state, tmp_path / "no_metadata")
    save_file({"norm.weight": state["norm.weight"]}, tmp_path / "no_linear", {"head": "linear"})
    save_file(state, tmp_path / "other_head", {"head": "mlp2"})
    save_file({"x": torch.zeros(1)}, tmp_path / "other_model", {"head": "linear"})
    messages = {
        "truncated": "cannot be read",
        "no_metadata": "is not from fasttrain",
        "other_model": "is not from fasttrain",
        "no_linear": "does not fit the head 'linear': .*linears.0.weight",
        "other_head": "does not fit the head 'mlp2': .*linears.1.weight",
        "missing": "cannot be read .*No such file",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=f"{tmp_path / name}.*{message}") as caught:
            Projection.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_messages_about_checkpoints_without_a_projection(tmp_path: Path) -> None:
    path = tmp_path / "ours.pth"
    complete = {published_name(k, "mlp2"): t for k, t in Projection(8, head="mlp2").state_dict().items()}
    for omitted, message in [
        ("adapter_", "contains no Co-Settle projection"),
        ("adapter_layer_norm1", "contains no Co-Settle projection"),
        ("adapter_linear1", "does not fit the head 'linear'"),
        ("adapter_linear2.bias", "does not fit the head 'mlp2': .*linears.1.bias"),
    ]:
        save_release(path, {k: t for k, t in complete.items() if not k.startswith(omitted)})
        with pytest.raises(InputError, match=message):
            Projection.from_cosettle(path)
    with pytest.raises(InputError, match="no such file"):
        Projection.from_cosettle(tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match="head 'mlp4' is not one of: linear, mlp2, mlp3, lowrank, residual"):
        Projection(8, head="mlp4")
