"""Loading weights from all sources and in all published layouts, and messages about invalid ones."""

import argparse
import os
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from hub_server import Hub
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.errors import InputError
from fasttrain.families import FAMILIES
from fasttrain.weights import hash_state_dict, read_checkpoint, seeded, short_name, timm_config

WIDTH = 32


def timm_state(**options: Any) -> dict[str, Tensor]:
    """Return the state dict of a random timm ViT with image size 64, patch size 16, width 32 and depth 2."""
    with seeded(7):
        vit = VisionTransformer(
            img_size=64, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=0, global_pool="", **options
        )
    return vit.state_dict()


def load(path: Path, family: str = "dino") -> Backbone:
    return load_backbone(family, weights=str(path), image_size=64, num_heads=2)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return timm_state()


class Node(nn.Module):
    """A module with the parameters of a state dict, nested by their dotted names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name in {key.split(".")[0] for key in tensors}:
            if name in tensors:
                self.register_parameter(name, nn.Parameter(tensors[name], requires_grad=False))
            else:
                prefix = f"{name}."
                inner = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
                self.add_module(name, Node(inner))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_all_file_formats_give_the_same_encoder(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "release.pth")
    torch.save({"teacher": {f"backbone.{k}": t for k, t in state.items()}}, tmp_path / "teacher.pth")
    torch.save({f"module.{k}": t for k, t in state.items()}, tmp_path / "parallel.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "plain.safetensors")
    encoders = [load(path) for path in sorted(tmp_path.iterdir())]
    assert len(encoders) == 6
    assert {encoder.weights_hash for encoder in encoders} == {hash_state_dict(state)}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_torchscript_archive_of_clip_in_half_precision(shared: Path, tmp_path: Path) -> None:
    published = read_checkpoint(shared / "golden" / "backbones" / "clip.pretrained.pth")
    archive = {key: tensor.half() for key, tensor in published.items()}
    torch.save(archive, tmp_path / "clip.pth")
    torch.jit.trace(Node(archive), torch.zeros(1)).save(str(tmp_path / "clip.pt"))
    scripted, plain = load(tmp_path / "clip.pt", "clip"), load(tmp_path / "clip.pth", "clip")
    assert scripted.weights_hash == plain.weights_hash
    assert next(scripted.parameters()).dtype == torch.float32


class Writing(nn.Module):
    """A module whose TorchScript archive writes a file when torch.jit.load reads it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str, bool]:
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.weight, self.path, self.training = state
        torch.save(self.weight, self.path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_the_code_of_a_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    written = tmp_path / "written"
    torch.jit.script(Writing(str(written))).save(str(tmp_path / "model.pt"))
    with pytest.raises(InputError, match="is damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "model.pt")
    assert not written.exists()
    torch.jit.load(str(tmp_path / "model.pt"))
    assert written.exists()


def in_block_chunks(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"teacher": {f"backbone.{re.sub('^blocks.', 'blocks.0.', k)}": t for k, t in state.items()}}


def with_a_student(state: dict[str, Tensor]) -> dict[str, Any]:
    student = {f"module.backbone.{k}": t + 1 for k, t in state.items()}
    return {"student": student, "teacher": {f"backbone.{k}": t for k, t in state.items()}}


def with_a_base_encoder(state: dict[str, Tensor]) -> dict[str, Any]:
    momentum = {f"module.momentum_encoder.{k}": t for k, t in state.items()}
    return {"state_dict": momentum | {f"module.base_encoder.{k}": t + 1 for k, t in state.items()}}


def with_other_parts(state: dict[str, Tensor]) -> dict[str, Any]:
    parts = ("mask_token", "decoder_blocks.0.norm1.weight", "decoder_pos_embed", "head.weight", "head.0.bias",
             "adapter.adapter.adapter_linear.weight")  # fmt: skip
    return {"model": state | dict.fromkeys(parts, torch.zeros(3)), "epoch": 4}


@pytest.mark.parametrize(
    ("family", "options", "layout"),
    [
        ("dinov2", {"init_values": 1.0}, in_block_chunks),
        ("mocov3", {}, with_a_base_encoder),
        ("ibot", {}, with_a_student),
        ("mae", {}, with_other_parts),
    ],
)
def test_the_encoder_is_found_in_published_layouts(
    family: str, options: dict[str, Any], layout: Callable[..., Any], tmp_path: Path
) -> None:
    state = timm_state(**options)
    torch.save(layout(state), tmp_path / "published.pth")
    assert load(tmp_path / "published.pth", family).weights_hash == hash_state_dict(state)


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_needs_layer_scale_and_supports_any_number_of_registers(
    registers: int, tmp_path: Path
) -> None:
    state = timm_state(init_values=1.0) | ({"register_tokens": torch.ones(1, 2, WIDTH)} if registers else {})
    torch.save(state, tmp_path / "dinov2.pth")
    assert len(load(tmp_path / "dinov2.pth", "dinov2").prefix_PD) == 1 + registers
    torch.save(timm_state(), tmp_path / "dino.pth")
    with pytest.raises(InputError, match=r"missing blocks\.0\.ls1\.gamma and 3 more"):
        load(tmp_path / "dino.pth", "dinov2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"blocks.1.attn.qkv.bias": None},
            r"missing blocks\.1\.attn\.qkv\.bias\. Check the name",
        ),
        ({"pos_embed": None}, r"missing pos_embed\. Check the name"),
        ({"patch_embed.proj.weight": None}, "contain no ViT .*: their keys are cls_token, pos_embed, "),
        ({"blocks.0.attn.gate": torch.zeros(3)}, r"unexpected blocks\.0\.attn\.gate\. Check the name"),
        ({"norm.weight": torch.zeros(7)}, r"norm\.weight has the shape \[7\], expected \[32\]"),
        ({"blocks.2.norm1.weight": torch.zeros(32)}, r"missing blocks\.2\.attn\.proj\.bias and 10 more"),
        ({"pos_embed": torch.zeros(1, 19, 32)}, "19 positions do not form a square grid"),
        ({"pos_embed": torch.zeros(1, 17, 8)}, r"pos_embed has the shape \[1, 17, 8\]"),
    ],
)
def test_the_message_about_a_mismatched_checkpoint_names_the_keys(
    state: dict[str, Tensor], changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    changed = {key: tensor for key, tensor in (state | changes).items() if tensor is not None}
    torch.save(changed, tmp_path / "dino.pth")
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "dino.pth")
    assert "\n" not in str(caught.value)


def test_sizes_that_contradict_the_checkpoint_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "dino.pth")
    arguments = {"weights": str(tmp_path / "dino.pth"), "image_size": 64, "num_heads": 2}
    with pytest.raises(InputError, match=r"unexpected blocks\.1\."):
        load_backbone("dino", depth=1, **arguments)
    with pytest.raises(InputError, match=r"patch_embed.*\[32, 3, 16, 16\], expected \[32, 3, 8, 8\]"):
        load_backbone("dino", patch_size=8, **arguments)


class Harmful:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_cannot_run_code(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": state, "extra": Harmful(tmp_path / "created")}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"bad\.pth'.* contains \w+\.mkdir, which is not safe to load"):
        load(tmp_path / "bad.pth")
    assert not (tmp_path / "created").exists()


def test_objects_of_published_checkpoints_are_loaded(tmp_path: Path) -> None:
    objects = {
        "args": argparse.Namespace(lr=1e-4, output_dir=Path("runs")),
        "epoch": np.int64(4),
        "loss": np.float64(0.5),
        "accuracy": np.float32(0.25),
    }
    torch.save(objects, tmp_path / "objects.pth")
    assert read_checkpoint(tmp_path / "objects.pth") == objects


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("text.pth", b"<html>404</html>"),
        ("pickle.pth", pickle.dumps([1, 2])),
        ("list.pth", [1, 2]),
        ("no_tensors.pth", {"model": {"epoch": 4}}),
        ("truncated.pth", None),
        ("truncated.safetensors", None),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_messages_about_damaged_and_other_files(
    state: dict[str, Tensor], name: str, content: object, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    else:
        (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=name) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["nowhere.pth", "rnadom", ""])
def test_the_message_about_a_missing_file_lists_the_sources(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (weights, f"{tmp_path}/x/{weights}"):
        with pytest.raises(InputError, match="no such file; expected a local file or folder, hf://"):
            load_backbone("mae", weights=path)


def test_hub_files_are_found_by_path_and_by_folder(
    state: dict[str, Tensor], hub: Hub, tmp_path: Path
) -> None:
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    content = (tmp_path / "checkpoint.pth").read_bytes()
    files = ["README.md", "ckpts/base/MAE/checkpoint.pth", "two/a.pth", "two/b.pth"]
    hub.repos["owner/repo"] = dict.fromkeys(files, content)
    for weights in ("hf://owner/repo@main/two/b.pth", "hf://owner/repo/ckpts/base/MAE"):
        encoder = load_backbone("mae", weights=weights, image_size=64, num_heads=2)
        assert encoder.weights_hash == hash_state_dict(state)
        assert encoder.weights == weights
    assert [request for request in hub.log if request.startswith("HEAD")] == [
        "HEAD /owner/repo/resolve/main/two/b.pth",
        "HEAD /owner/repo/resolve/main/ckpts/base/MAE/checkpoint.pth",
    ]
    for path, message in [
        ("/two/c.pth", r"/resolve/main/two/c\.pth does not exist; correct the path or the revision"),
        ("/two", r"/two': the folder has several files of weights \(a\.pth, b\.pth\)"),
        ("/other", "/other': the folder has no weights"),
        ("", r"repo': the folder has several files of weights \(ckpts/base/MAE/checkpoint\.pth, two"),
        ("@", "expected hf://owner/repo"),
    ]:
        with pytest.raises(InputError, match=message):
            load_backbone("mae", weights=f"hf://owner/repo{path}")


def test_downloaded_files_need_no_network(
    state: dict[str, Tensor], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state, tmp_path / "x.pth")
    hub.repos["owner/repo"] = {"a/x.pth": (tmp_path / "x.pth").read_bytes()}
    weights = [f"hf://owner/repo{path}" for path in ("", "/a", "/a/x.pth")]
    for each in weights:
        load_backbone("mae", weights=each, image_size=64, num_heads=2)
    # Nothing listens at this port.
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    for each in weights:
        load_backbone("mae", weights=each, image_size=64, num_heads=2)
    with pytest.raises(InputError, match="cannot be downloaded"):
        load_backbone("mae", weights="hf://owner/other")
    # huggingface_hub waits 23 seconds if it repeats requests.
    assert time.monotonic() - start < 10


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("weights", "file"),
    [
        ("hf://owner/repo/a/b.pth", r"https://huggingface\.co/owner/repo/resolve/main/a/b\.pth"),
        ("hf://owner/repo/a/b", r"https://huggingface\.co/owner/repo/tree/main/a/b"),
        ("timm://vit_tiny_patch16_224.augreg_in21k", r"https://huggingface\.co/timm/vit_tiny_patch16_224"),
    ],
)
def test_the_message_of_a_failed_download_names_the_file(weights: str, file: str) -> None:
    with pytest.raises(
        InputError, match=rf"{weights}' cannot be downloaded .* download .*{file}.* local path"
    ):
        load_backbone("mae", weights=weights)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.nonsense", "nonsense"])
def test_the_message_about_timm_names_without_pretrained_weights(name: str) -> None:
    with pytest.raises(InputError, match=f"timm://{name}': timm has no pretrained model of this name"):
        load_backbone("mae", weights=f"timm://{name}")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mae", "vit_base_patch16_224.mae"),
        ("dino", "vit_small_patch16_224.dino"),
        ("dinov2", "vit_small_patch14_reg4_dinov2.lvd142m"),
        ("clip", "vit_base_patch16_clip_quickgelu_224.openai"),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"),
        ("vit_base_patch16_siglip_224", "vit_base_patch16_siglip_224.webli"),
        ("deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224.fb_in1k"),
        ("vit_medium_patch16_gap_240", "vit_medium_patch16_gap_240.sw_in12k"),
        ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3.lvd1689m"),
        ("eva02_tiny_patch14_224", "eva02_tiny_patch14_224.mim_in22k"),
        ("vit_pe_core_tiny_patch16_384", "vit_pe_core_tiny_patch16_384.fb"),
    ],
)
def test_timm_weights_give_the_tokens_of_timm(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def small(model: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
        """Create a shallow timm model; pretrained weights are random and not downloaded."""
        with seeded(11 if pretrained else 0):
            return create(model, **(options | {"depth": 1}))

    monkeypatch.setattr(timm, "create_model", small)
    reference = small(name, pretrained=True, num_classes=0, dynamic_img_size=True).eval()
    patch = reference.patch_embed.patch_size[0]
    image_size = reference.patch_embed.img_size[0]
    sizes = {} if family in FAMILIES else {"depth": 1}
    encoder = load_backbone(family, weights=f"timm://{name}", image_size=image_size, **sizes)
    assert encoder.patch_size == patch
    images = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.fc_norm(reference.forward_features(images)[:, reference.num_prefix_tokens :])
    torch.testing.assert_close(encoder.tokens(images), expected, rtol=1e-4, atol=1e-5)


def test_naflex_weights_give_the_tokens_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaFlex embeds patches with a linear layer, and interpolates positions bilinearly."""
    name = "naflexvit_base_patch16_siglip"
    with seeded(11):
        reference = timm.create_model(name, num_classes=0, depth=1).eval()
    loaded = reference.state_dict(), timm_config(reference)
    monkeypatch.setattr("fasttrain.weights._load_timm", lambda _: loaded)
    encoder = load_backbone(name, weights=f"timm://{name}.v2_webli", depth=1)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.forward_features(images)
    torch.testing.assert_close(encoder.tokens(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("random", "random weights"),
        ("data/demo/vit_tiny_patch14.safetensors", "vit_tiny_patch14"),
        ("runs/mine/model.safetensors", "mine"),
        ("vit-b-300ep.pth.tar#teacher", "vit-b-300ep"),
        ("timm://vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"),
        ("hf://facebook/dinov2-small", "dinov2-small"),
        ("hf://facebook/dinov2-small@main/pytorch_model.bin", "dinov2-small"),
        ("hf://yafeng19/Co-Settle/ckpts/base/DINO_vitb16", "DINO_vitb16"),
    ],
)
def test_short_names(weights: str, name: str) -> None:
    assert short_name(weights) == name


def test_the_hash_depends_on_names_shapes_dtypes_and_values() -> None:
    state = {"b": torch.arange(6.0), "a": torch.ones(())}
    variants = [
        state,
        {"c": state["b"], "a": state["a"]},
        state | {"b": torch.arange(6.0).view(2, 3)},
        state | {"b": torch.arange(6.0) + 1e-6},
        state | {"b": torch.arange(6.0).half()},
    ]
    assert len({hash_state_dict(variant) for variant in variants}) == len(variants)
    assert hash_state_dict({"a": state["a"], "b": state["b"]}) == hash_state_dict(state)
