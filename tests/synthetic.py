"""All synthetic data of the tests: pictures, videos, frame folders, loaders, tiny data sets and run folders.

The data sets have the layouts of the published ones. Everything is a function of its arguments.
"""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import fields
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
from fasttrain.data import FrameIndex, PairLoader
from fasttrain.data.sampling import PairSampling
from fasttrain.distributed import World
from fasttrain.evaluation.frames import write_label_map
from fasttrain.projection import Projection
from fasttrain.recipe import Recipe, TrainRecipe, recipe_from_dict
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
    """Write RGB frames to a video file. options: pix_fmt, time_base, times (in it), and the encoder's own."""
    options = {"pix_fmt": "yuv420p", "time_base": Fraction(1, 1000), "times": None} | options
    pix_fmt, time_base, times = (options.pop(key) for key in ("pix_fmt", "time_base", "times"))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        for number, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            image.pts = times[number] if times else 40 * number
            image.time_base = time_base
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    return path


def remux(
    source: Path,
    target: Path,
    change: Callable[[int, bytes], bytes | None],
    *,
    shift: int = 0,
    **options: str,
) -> Path:
    """Copy a file's packets, each as change(number, bytes) makes it (None: left out), `shift` ms later."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        later = round(shift / 1000 / old.streams.video[0].time_base)
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            content = change(number, bytes(packet))
            if content is None:
                continue
            copy = av.Packet(content)
            copy.pts, copy.dts = packet.pts + later, packet.dts + later
            copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
            new.mux(copy)
    return target


# --- frames that are damaged, or unusual ---


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def whole_jpeg() -> bytes:
    return encoded(Image.fromarray(picture(3, 0)), quality=95)


def whole_png() -> bytes:
    return encoded(Image.fromarray(picture(3, 0)), "PNG")


def with_thumbnail(jpeg: bytes) -> bytes:
    """With a small whole JPEG in its header, as cameras write it."""
    small = encoded(Image.fromarray(picture(3, 0)).resize((16, 12)))
    segment = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small
    return jpeg[:2] + segment + jpeg[2:]


BROKEN_FRAMES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "truncated jpeg": (lambda: whole_jpeg()[:-200], ".jpg", "truncated JPEG"),
    "jpeg cut in its header": (lambda: whole_jpeg()[:30], ".jpg", "truncated JPEG"),
    "truncated jpeg with a thumbnail": (
        lambda: with_thumbnail(whole_jpeg())[:-200],
        ".jpg",
        "truncated JPEG",
    ),
    "empty file": (lambda: b"", ".jpg", "empty"),
    "no image at all": (lambda: b"<html>404 not found</html>", ".jpg", "cannot be decoded"),
    "jpeg with a broken header": (
        lambda: whole_jpeg()[:4] + b"\0" * 300 + whole_jpeg()[304:],
        ".jpg",
        "cannot be decoded",
    ),
    "truncated png": (lambda: whole_png()[:-200], ".png", "truncated PNG"),
    "png with a broken chunk": (
        lambda: whole_png()[:60] + b"\0" * 40 + whole_png()[100:],
        ".png",
        "cannot be decoded",
    ),
}


def deep_png(frame: np.ndarray) -> bytes:
    """16 bits in each colour, which Pillow cannot write."""
    height, width = frame.shape[:2]
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "rgb48be"
    encoder.time_base = Fraction(1, 25)
    image = av.VideoFrame(width, height, "rgb48be")
    rows = np.zeros((height, image.planes[0].line_size), dtype=np.uint8)
    rows[:, : 6 * width] = (frame.astype(">u2") * 257).astype(">u2").view(np.uint8).reshape(height, -1)
    image.planes[0].update(rows.tobytes())
    return b"".join(bytes(packet) for packet in [*encoder.encode(image), *encoder.encode(None)])


def odd_frames() -> dict[str, list[bytes]]:
    """Videos of unusual frames, all of which must work."""
    frames = [Image.fromarray(picture(5, t)) for t in range(8)]
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = [np.asarray(frame.convert("L")).astype(np.uint16) * 257 for frame in frames]
    return {
        "grey": [encoded(frame.convert("L")) for frame in frames],
        "cmyk": [encoded(frame.convert("CMYK")) for frame in frames],
        "turned": [encoded(frame, exif=turned) for frame in frames],
        "thumbnail and a tail": [with_thumbnail(encoded(frame)) + bytes(999) for frame in frames],
        "progressive": [encoded(frame, progressive=True) for frame in frames],
        "mixed_sizes": [encoded(frame.resize((40 + 9 * t, 70 - 5 * t))) for t, frame in enumerate(frames)],
        "tiny": [encoded(frame.resize((3, 2))) for frame in frames],
        "png16": [encoded(Image.fromarray(grey), "PNG") for grey in grey16],
        "png48": [deep_png(np.asarray(frame)) for frame in frames],
        "palette": [encoded(frame.convert("P"), "PNG") for frame in frames],
        "alpha": [encoded(frame.convert("RGBA"), "PNG") for frame in frames],
        "grey_alpha": [encoded(frame.convert("LA"), "PNG") for frame in frames],
        "one_bit": [encoded(frame.convert("1"), "PNG") for frame in frames],
        "one_frame": [encoded(frames[0])],
    }


# --- recipes and loaders ---


def make_recipe(seed: int = 0, **changes: Any) -> Recipe:
    """A small recipe on the CPU; `changes` are keys of its sections `data` and `train`."""
    small = {
        "image_size": 32,
        "num_threads": 2,
        "max_bad_fraction": 0.5,
        "batch_size": 2,
        "precision": "fp32",
    }
    sections: dict[str, dict[str, Any]] = {"data": {}, "train": {}}
    train_keys = {key.name for key in fields(TrainRecipe)}
    for key, value in (small | changes).items():
        sections["train" if key in train_keys else "data"][key] = value
    return recipe_from_dict({"seed": seed, **sections})


def make_sampling(**changes: Any) -> PairSampling:
    recipe = make_recipe(**changes)
    return PairSampling(recipe.data, recipe.seed)


def make_loader(
    index: FrameIndex,
    *,
    first_step: int = 0,
    num_steps: int = 2,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    **changes: Any,
) -> PairLoader:
    world = World(rank=rank, size=world_size, local_size=1, device=torch.device(device))
    recipe = make_recipe(**changes)
    return PairLoader(index=index, recipe=recipe, world=world, first_step=first_step, num_steps=num_steps)


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
