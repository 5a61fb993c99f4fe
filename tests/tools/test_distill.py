"""Distillation of the demo's encoder: the start from the teacher's weights, and a few steps."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from synthetic import write_folders
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from fasttrain.backbones import Backbone, load_backbone
from fasttrain.tools import distill


def make_teacher(path: Path) -> Backbone:
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=192, depth=3, num_heads=3, num_classes=0, init_values=1.0
    )
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    save_file(vit.state_dict(), path)
    return load_backbone("dinov2", weights=str(path), image_size=28)


@torch.no_grad()
def test_a_student_as_wide_as_the_teacher_starts_with_its_tokens(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher.safetensors").double()
    images_BCHW = torch.rand(2, 3, 28, 28, dtype=torch.float64)
    teacher.norm = torch.nn.Identity()
    tokens_BNC = teacher.tokens(images_BCHW)
    basis_CD = distill.find_basis([distill.Views(images_BCHW, torch.rand(2, 3, 80, 192))], 192).double()
    student = distill.shrink(teacher, basis_CD, 3).double()
    normalised_BNC = functional.layer_norm(tokens_BNC, (192,)) @ basis_CD
    torch.testing.assert_close(
        student.forward_features(images_BCHW)[:, 1:], normalised_BNC, rtol=1e-4, atol=1e-4
    )


def test_the_student_learns_and_is_a_checkpoint_of_dinov2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_teacher(tmp_path / "teacher.safetensors")
    videos = write_folders(tmp_path / "videos", [4])
    paths = [tmp_path / "teacher.safetensors", tmp_path / "student.safetensors"]
    words = ["distill", *paths, "--sources", videos, "--held-out", videos]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    for name, value in {"WIDTH": 64, "DEPTH": 2, "IMAGE_SIZE": 28, "WHOLE_GRID": (2, 3), "STEPS": 30}.items():
        monkeypatch.setattr(distill, name, value)
    for name, value in {"BATCH_SIZE": 2, "LOG_EVERY": 5, "LEARNING_RATE": 1e-3, "WARMUP_STEPS": 1}.items():
        monkeypatch.setattr(distill, name, value)
    distill.main()
    lines = re.findall(r"unexplained variance (.*?)  left", capsys.readouterr().out)
    first, *_, last = (float(line.split()[-1]) for line in lines)
    assert last < first
    student = load_backbone("dinov2", weights=str(paths[1]), image_size=28, num_heads=1)
    assert student.tokens(torch.rand(1, 3, 28, 42)).shape == (1, 6, 64)
