"""Tiny made-up DAVIS, VIP and JHMDB data sets in the data sets' own layouts, from scenes with known masks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from fasttrain.evaluation.plots import write_label_map
from fasttrain.projection import Projection
from fasttrain.tools.synthetic import Scene, render_scene

NAMES = ("alpha", "beta", "gamma")
FRAMES = 5
# timm's smallest ViT, whose random weights are a function of the seed, and the width of its tokens.
SUBJECT = ("--backbone", "test_vit", "--device", "cpu")
WIDTH = 64
# Options that keep each task small.
SMALL = {
    "davis": ("--height", "64", "--width", "96"),
    "vip": ("--long-side", "96"),
    "jhmdb": ("--size", "96"),
}


def make_scene(seed: int, frames: int = FRAMES) -> Scene:
    return render_scene(seed, num_frames=frames, height=64, width=96)


def write_frames(scene: Scene, folder: Path, name: str, first: int = 0) -> None:
    """`name` is a format of the frame's number, counted from `first`, and ends in the file type."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(scene.frames_THWC, start=first):
        Image.fromarray(frame).save(folder / name.format(number), quality=95)


def write_davis(root: Path, year: str = "2017") -> Path:
    for seed, name in enumerate(NAMES):
        scene = make_scene(seed)
        write_frames(scene, root / "JPEGImages/480p" / name, "{:05d}.jpg")
        for number, labels in enumerate(scene.labels_THW):
            write_label_map(labels, root / "Annotations/480p" / name / f"{number:05d}.png")
    (root / "ImageSets" / year).mkdir(parents=True)
    (root / "ImageSets" / year / "val.txt").write_text("\n".join(NAMES) + "\n")
    return root


def write_vip(root: Path) -> Path:
    base = root / "VIP_Fine"
    for seed, name in enumerate(NAMES):
        scene = make_scene(seed)
        write_frames(scene, base / "Images" / name, "{:012d}.jpg")
        for number, labels in enumerate(scene.labels_THW):
            # Any parts will do: the objects as hair and as pants.
            parts = np.array([0, 2, 8], dtype=np.uint8)[labels]
            write_label_map(parts, base / "Annotations/Category_ids" / name / f"{number:012d}.png")
    (base / "lists").mkdir()
    (base / "lists/val_videos.txt").write_text("\n".join(NAMES) + "\n")
    return root


def pose(labels_THW: np.ndarray) -> np.ndarray:
    """(2, 15, T) pixels counted from 1: a fan of points about the middle of each frame's first object."""
    angle = np.linspace(0, 2 * np.pi, 15, endpoint=False)
    fan = np.linspace(4, 14, 15) * np.stack([np.cos(angle), np.sin(angle)])
    middles = [np.argwhere(labels == 1).mean(0)[::-1] for labels in labels_THW]
    return np.stack([middle[:, None] + fan + 1 for middle in middles], axis=-1)


def write_jhmdb(root: Path) -> Path:
    (root / "splits").mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        scene = make_scene(seed)
        write_frames(scene, root / "Rename_Images/wave" / name, "{:05d}.png", first=1)
        folder = root / "joint_positions/wave" / name
        folder.mkdir(parents=True)
        savemat(folder / "joint_positions.mat", {"pos_img": pose(scene.labels_THW)})
    lines = [f"{name}.avi 2" for name in NAMES]
    (root / "splits/wave_test_split1.txt").write_text("\n".join([*lines, "other.avi 1"]) + "\n")
    return root


def write_videos(root: Path, frames: int = 9) -> Path:
    """Frame folders, as training reads them."""
    for seed, name in enumerate(NAMES):
        write_frames(make_scene(seed, frames), root / name, "{:05d}.jpg")
    return root


def write_projection(path: Path) -> Path:
    torch.manual_seed(0)
    Projection(WIDTH).save(path)
    return path
