"""All synthetic data of the tests: pictures, videos, frame folders, loaders, tiny data sets and run folders.

The data sets have the layouts of the published ones. Everything is a function of its arguments.
"""

import csv
import json
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from fasttrain.backbones import load_backbone
from fasttrain.data import FrameIndex, PairLoader, PairSampling
from fasttrain.evaluation.plots import write_label_map
from fasttrain.projection import Projection
from fasttrain.tools.synthetic import Scene, render_scene, write_scene
from fasttrain.video_encoder import PROJECTION_FILE, projection_metadata

# --- pictures, frame folders and videos for training ---


def picture(video: int, frame: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture that no other (video, frame) has: (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    phase = 0.7 * video + 0.31 * frame
    waves = [np.sin(x / 9 + phase), np.cos(y / 7 - phase), np.sin((x + y) / 11 + 2 * phase)]
    return np.stack([np.uint8(127.5 + 120 * wave) for wave in waves], axis=-1)


def write_folders(root: Path, lengths: list[int], suffix: str = ".jpg") -> Path:
    """Frame folders class_K/video_K under a root, one per length."""
    for video, length in enumerate(lengths):
        folder = root / f"class_{video % 2}" / f"video_{video}"
        folder.mkdir(parents=True)
        for frame in range(length):
            Image.fromarray(picture(video, frame)).save(folder / f"{frame:05d}{suffix}", quality=95)
    return root


def encode_video(path: Path, frames: list[np.ndarray], codec: str = "libx264", **options: Any) -> Path:
    """Write RGB frames to a video file. options: pix_fmt, times (in 1/1000 s), and the encoder's own."""
    pix_fmt, times = options.pop("pix_fmt", "yuv420p"), options.pop("times", None)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            image.pts = times[number] if times else 40 * number
            image.time_base = Fraction(1, 1000)
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    return path


def make_sampling(**changes: Any) -> PairSampling:
    paper = {
        "seed": 0,
        "gap": 0.15,
        "crop_area": (0.5, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "flip": 0.5,
        "pairs_per_video": 1,
    }
    return PairSampling(**{**paper, **changes})


def make_loader(index: FrameIndex, sampling: PairSampling | None = None, **changes: Any) -> PairLoader:
    small = {
        "image_size": 32,
        "batch_size": 2,
        "accumulate": 1,
        "first_step": 0,
        "num_steps": 2,
        "rank": 0,
        "world_size": 1,
        "device": torch.device("cpu"),
        "num_threads": 2,
        "prefetch": 2,
        "decoder": "auto",
        "jpeg_engine_load": 0.65,
        "dtype": torch.float32,
        "max_bad_fraction": 0.5,
    }
    return PairLoader(index=index, sampling=sampling or make_sampling(), **{**small, **changes})


# --- sequences: DAVIS, VIP, JHMDB ---

NAMES = ("alpha", "beta", "gamma")
FRAMES = 5
# timm's smallest ViT, whose random weights are a function of the seed, and the width of its tokens.
MODEL = ("--backbone", "test_vit", "--device", "cpu")
WIDTH = 64
# Options that keep each task small.
SMALL = {
    "davis": ("--height", "64", "--width", "96"),
    "vip": ("--long-side", "96"),
    "jhmdb": ("--size", "96"),
}


def make_scene(seed: int, frames: int = FRAMES) -> Scene:
    return render_scene(seed, num_frames=frames, height=64, width=96)


def write_frames(scene: Scene, folder: Path, name: str = "{:05d}.jpg", first: int = 0) -> None:
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


# --- labelled videos, action segmentation, and a run folder ---

CLASSES = ("Archery", "Bowling", "Surfing")
TRAIN, TEST = 3, 2
CLIP_FRAMES = 6
SETTINGS: dict[str, Any] = {
    "name": "dino",
    "weights": "random",
    "image_size": 64,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
}


def write_run(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A run folder with a tiny random encoder and a random projection. changes: of its SETTINGS."""
    settings = {**SETTINGS, **changes}
    encoder = load_backbone(**settings)
    projection = Projection(encoder.embed_dim, init="xavier_uniform", seed=seed)
    projection.save(folder / PROJECTION_FILE, projection_metadata(settings, encoder, projection, {}))
    return folder


@lru_cache
def clips(label: int) -> list[Scene]:
    """Clips of one class: parts of one scene, so that even a random encoder tells the classes apart."""
    count = TRAIN + TEST
    scene = render_scene(20 + label, num_frames=CLIP_FRAMES * count, height=64, width=80, num_objects=1)
    parts = [slice(i * CLIP_FRAMES, (i + 1) * CLIP_FRAMES) for i in range(count)]
    return [Scene(frames_THWC=scene.frames_THWC[part], labels_THW=scene.labels_THW[part]) for part in parts]


def ucf101(root: Path) -> Path:
    """Video files; lists in ucfTrainTestlist."""
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    train, test = [], []
    for label, name in enumerate(CLASSES):
        for i, scene in enumerate(clips(label)):
            video = f"{name}/v_{name}_g{i:02d}_c01.avi"
            write_scene(scene, root / "UCF-101" / video)
            (train if i < TRAIN else test).append(video + (f" {label + 1}" if i < TRAIN else ""))
    (lists / "classInd.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(CLASSES)))
    (lists / "trainlist01.txt").write_text("\n".join(train) + "\n")
    (lists / "testlist01.txt").write_text("\n".join(test) + "\n")
    return root


def hmdb51(root: Path) -> Path:
    """Frame folders that stand in for video files; a video of mark 0 that does not exist."""
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    for label, name in enumerate(CLASSES):
        lines = ["unused_0.avi 0 "]
        for i, scene in enumerate(clips(label)):
            write_frames(scene, root / "hmdb51_org" / name / f"#{i} {name.lower()}_np1_{i}")
            lines.append(f"#{i} {name.lower()}_np1_{i}.avi {1 if i < TRAIN else 2} ")
        (lists / f"{name}_test_split1.txt").write_text("\n".join(lines) + "\n")
    return root


def kinetics(root: Path) -> Path:
    """CSV lists, class folders named after labels with spaces."""
    (root / "annotations").mkdir(parents=True)
    rows: dict[str, list[dict[str, object]]] = {"train": [], "val": []}
    for label, name in enumerate(CLASSES):
        for i, scene in enumerate(clips(label)):
            which = "train" if i < TRAIN else "val"
            row = {
                "youtube_id": f"id_-{label}{i}",
                "time_start": 7 * i,
                "time_end": 7 * i + 10,
                "split": which,
            }
            rows[which].append({"label": f"doing {name}", **row})
            path = root / which / f"doing {name}" / f"id_-{label}{i}_{7 * i:06d}_{7 * i + 10:06d}.mp4"
            write_scene(scene, path)
    for which, listed in rows.items():
        with (root / "annotations" / f"{which}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "youtube_id", "time_start", "time_end", "split"])
            writer.writeheader()
            writer.writerows(listed)
    return root


def ssv2(root: Path) -> Path:
    """JSON lists with templates; videos by number."""
    (root / "labels").mkdir(parents=True)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for label, name in enumerate(CLASSES):
        for i, scene in enumerate(clips(label)):
            number = f"{label}0{i}"
            row = {"id": number, "label": f"{name} a ball", "template": f"{name} [something]"}
            rows["train" if i < TRAIN else "validation"].append(row)
            write_frames(scene, root / "20bn-something-something-v2" / number)
    labels = {f"{name} something": str(number) for number, name in enumerate(CLASSES)}
    (root / "labels" / "labels.json").write_text(json.dumps(labels))
    for which, listed in rows.items():
        (root / "labels" / f"{which}.json").write_text(json.dumps(listed))
    return root


def plain(root: Path) -> Path:
    """`path label` per line, paths with spaces."""
    root.mkdir(parents=True)
    lines: dict[str, list[str]] = {"train": ["# a comment"], "test": []}
    for label in range(len(CLASSES)):
        for i, scene in enumerate(clips(label)):
            write_scene(scene, root / "some videos" / f"{label} {i}.mp4")
            lines["train" if i < TRAIN else "test"].append(f"some videos/{label} {i}.mp4 {label}")
    for which, listed in lines.items():
        (root / f"{which}.txt").write_text("\n".join(listed) + "\n")
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "kinetics": kinetics,
    "ssv2": ssv2,
    "list": plain,
}


def segmentation(root: Path, *, as_breakfast: bool = False) -> Path:
    """Videos made of actions (one scene each) and background, in the layout of MS-TCN."""
    names = ["background", "cut", "stir", "pour"]
    for folder in ("groundTruth", "splits"):
        (root / folder).mkdir(parents=True)
    (root / "mapping.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names)))
    scenes = [
        render_scene(40 + i, num_frames=40, height=64, width=64, num_objects=1) for i in range(len(names))
    ]
    orders = [(0, 1, 2, 0), (2, 0, 3, 1), (0, 3, 1, 2), (1, 0, 2, 3), (3, 2, 0, 1)]
    listed = []
    for number, order in enumerate(orders):
        name = f"P0{number}_cam01_P0{number}_tea" if as_breakfast else f"S{number}_Tea_C1"
        labels = [label for label in order for _ in range(5 + number)]
        frames = [scenes[label].frames_THWC[(7 * number + t) % 40] for t, label in enumerate(labels)]
        # The last annotation is one frame short, as published ones are.
        written = labels[: len(labels) - (number == 4)]
        (root / "groundTruth" / f"{name}.txt").write_text("".join(f"{names[label]}\n" for label in written))
        parts = name.split("_", 2) if as_breakfast else ["videos", name]
        scene = Scene(frames_THWC=np.stack(frames), labels_THW=np.zeros((len(frames), 64, 64), np.uint8))
        write_scene(scene, root.joinpath(*parts).with_suffix(".avi"))
        listed.append(f"{name}.txt\n")
    (root / "splits" / "train.split1.bundle").write_text("".join(listed[:3]))
    (root / "splits" / "test.split1.bundle").write_text("".join(listed[3:]))
    return root
