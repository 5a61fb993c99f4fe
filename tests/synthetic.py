"""Deterministic test data: images, videos, frame folders, tiny datasets, run folders and loaders.

The datasets have the layouts of the published ones.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from fasttrain.backbones import load_backbone
from fasttrain.data.index import FrameIndex
from fasttrain.data.loader import PairLoader
from fasttrain.data.sampling import PairSampling
from fasttrain.distributed import World
from fasttrain.evaluation.frames import write_label_map
from fasttrain.projection import PROJECTION_FILE, Head, Projection
from fasttrain.recipe import DataRecipe, ObjectiveRecipe, Recipe, TrainRecipe, recipe_from_dict
from fasttrain.tools.synthetic import Scene, render_scene, write_scene
from fasttrain.video_encoder import projection_metadata

# --- images, frame folders and videos for training ---


def picture(video: int, frame: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return a smooth image (height, width, 3) in uint8 that is unique to (video, frame)."""
    y, x = np.mgrid[0:height, 0:width]
    phase = 0.7 * video + 0.31 * frame
    waves = [np.sin(x / 9 + phase), np.cos(y / 7 - phase), np.sin((x + y) / 11 + 2 * phase)]
    return np.stack([np.uint8(127.5 + 120 * wave) for wave in waves], axis=-1)


def write_folders(root: Path, lengths: list[int], suffix: str = ".jpg") -> Path:
    """Write one frame folder class_K/video_N per length."""
    for video, length in enumerate(lengths):
        folder = root / f"class_{video % 2}" / f"video_{video}"
        folder.mkdir(parents=True)
        for frame in range(length):
            Image.fromarray(picture(video, frame)).save(folder / f"{frame:05d}{suffix}", quality=95)
    return root


def encode_video(path: Path, frames: list[np.ndarray], codec: str = "libx264", **options: Any) -> Path:
    """Write RGB frames to a video file.

    `options` may contain `pix_fmt`, `time_base`, `times` (the time stamps of the frames), and encoder
    options.
    """
    av = pytest.importorskip("av")
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
    """Copy the packets of a video to another file, delayed by `shift` milliseconds.

    The content of each packet is replaced with `change(number, content)`; if that is None, the packet is
    omitted.
    """
    av = pytest.importorskip("av")
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


# --- damaged and unusual frames ---


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def with_thumbnail(jpeg: bytes) -> bytes:
    """Embed a thumbnail in the header of a JPEG file, as cameras do."""
    small = encoded(Image.fromarray(picture(3, 0)).resize((16, 12)))
    segment = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small
    return jpeg[:2] + segment + jpeg[2:]


JPEG = encoded(Image.fromarray(picture(3, 0)), quality=95)
PNG = encoded(Image.fromarray(picture(3, 0)), "PNG")
# For each case: the content of the file, its suffix, and a part of the expected reason.
BROKEN_FRAMES: dict[str, tuple[bytes, str, str]] = {
    "truncated jpeg": (JPEG[:-200], ".jpg", "truncated JPEG"),
    "jpeg cut in its header": (JPEG[:30], ".jpg", "truncated JPEG"),
    "truncated jpeg with a thumbnail": (with_thumbnail(JPEG)[:-200], ".jpg", "truncated JPEG"),
    "empty file": (b"", ".jpg", "empty"),
    "no image at all": (b"<html>404 not found</html>", ".jpg", "cannot be decoded"),
    "jpeg with a broken header": (JPEG[:4] + b"\0" * 300 + JPEG[304:], ".jpg", "cannot be decoded"),
    "truncated png": (PNG[:-200], ".png", "truncated PNG"),
    "png with a broken chunk": (PNG[:60] + b"\0" * 40 + PNG[100:], ".png", "cannot be decoded"),
}


def odd_frames() -> dict[str, list[bytes]]:
    """Return the frames of videos with unusual but valid images."""
    frames = [Image.fromarray(picture(5, t)) for t in range(8)]
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = [np.asarray(frame.convert("L")).astype(np.uint16) * 257 for frame in frames]
    modes = [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG")]
    return {
        **{
            f"{mode} {form}": [encoded(frame.convert(mode), form) for frame in frames] for mode, form in modes
        },
        "turned": [encoded(frame, exif=turned) for frame in frames],
        "thumbnail and a tail": [with_thumbnail(encoded(frame)) + bytes(999) for frame in frames],
        "progressive": [encoded(frame, progressive=True) for frame in frames],
        "mixed_sizes": [encoded(frame.resize((40 + 9 * t, 70 - 5 * t))) for t, frame in enumerate(frames)],
        "tiny": [encoded(frame.resize((3, 2))) for frame in frames],
        "png16": [encoded(Image.fromarray(grey), "PNG") for grey in grey16],
        "one_frame": [encoded(frames[0])],
    }


# --- recipes, loaders and processes ---


class OneOfTwo(World):
    """Rank 0 of two simulated ranks. Rank 1 has `other` instead of values of the type `instead_of`."""

    def __init__(self, other: Any, instead_of: type = object) -> None:
        super().__init__(**vars(World.single()))
        vars(self).update(other=other, instead_of=instead_of)

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other if isinstance(value, self.instead_of) else value]


def make_recipe(seed: int = 0, **changes: Any) -> Recipe:
    """Return a small recipe; `changes` are keys of its sections `data`, `train` and `objective`."""
    data: dict[str, Any] = {"image_size": 32, "num_threads": 2, "max_bad_fraction": 0.5}
    train: dict[str, Any] = {"batch_size": 2, "precision": "fp32"}
    objective: dict[str, Any] = {}
    sections = {TrainRecipe: train, ObjectiveRecipe: objective, DataRecipe: data}
    for key, value in changes.items():
        next(values for kind, values in sections.items() if key in kind.__dataclass_fields__)[key] = value
    return recipe_from_dict({"seed": seed, "data": data, "train": train, "objective": objective})


def make_sampling(**changes: Any) -> PairSampling:
    return PairSampling(make_recipe(**changes))


def make_loader(
    index: FrameIndex,
    *,
    first_step_index: int = 0,
    num_steps: int = 2,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    **changes: Any,
) -> PairLoader:
    world = World(rank=rank, size=world_size, cores=1, device=torch.device(device))
    recipe = make_recipe(**changes)
    return PairLoader(
        index=index, recipe=recipe, world=world, first_step_index=first_step_index, num_steps=num_steps
    )


# --- sequences: DAVIS, VIP, JHMDB ---

NAMES = ("alpha", "beta", "gamma")
FRAMES = 5
# The smallest ViT of timm, and its embedding dimension.
MODEL = ("--backbone", "test_vit", "--device", "cpu")
WIDTH = 64
# Options that make each evaluation fast.
SMALL = {
    "davis": ("--height", "64", "--width", "96", "--pictures", "1"),
    "vip": ("--long-side", "96", "--pictures", "1"),
    "jhmdb": ("--size", "96", "--pictures", "1"),
}


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_scene(seed: int, frames: int = FRAMES) -> Scene:
    return render_scene(seed, num_frames=frames, height=64, width=96)


def write_frames(scene: Scene, folder: Path, name: str = "{:05d}.jpg", first: int = 0) -> None:
    """Write the frames of a scene as images. `name` is a format string; frames are numbered from `first`."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(scene.frames_THWC, start=first):
        Image.fromarray(frame).save(folder / name.format(number), quality=95)


def write_davis(root: Path, year: str = "2017") -> Path:
    for seed, name in enumerate(NAMES):
        scene = make_scene(seed)
        write_frames(scene, root / "JPEGImages/480p" / name)
        for number, labels in enumerate(scene.labels_THW):
            write_label_map(labels, root / "Annotations/480p" / name / f"{number:05d}.png")
    write_lines(root / "ImageSets" / year / "val.txt", NAMES)
    return root


def write_vip(root: Path) -> Path:
    base = root / "VIP_Fine"
    for seed, name in enumerate(NAMES):
        scene = make_scene(seed)
        write_frames(scene, base / "Images" / name, "{:012d}.jpg")
        for number, labels in enumerate(scene.labels_THW):
            # Label the two objects as hair and pants.
            parts = np.array([0, 2, 8], dtype=np.uint8)[labels]
            write_label_map(parts, base / "Annotations/Category_ids" / name / f"{number:012d}.png")
    write_lines(base / "lists/val_videos.txt", NAMES)
    return root


def pose(labels_THW: np.ndarray) -> np.ndarray:
    """Return joint positions (2, 15, T) in one-based pixels: points around the centre of the first object."""
    angle = np.linspace(0, 2 * np.pi, 15, endpoint=False)
    offsets = np.linspace(4, 14, 15) * np.stack([np.cos(angle), np.sin(angle)])
    centres = [np.argwhere(labels == 1).mean(0)[::-1] for labels in labels_THW]
    return np.stack([centre[:, None] + offsets + 1 for centre in centres], axis=-1)


def write_jhmdb(root: Path) -> Path:
    for seed, name in enumerate(NAMES):
        scene = make_scene(seed)
        write_frames(scene, root / "Rename_Images/wave" / name, "{:05d}.png", first=1)
        folder = root / "joint_positions/wave" / name
        folder.mkdir(parents=True)
        savemat(folder / "joint_positions.mat", {"pos_img": pose(scene.labels_THW)})
    write_lines(root / "splits/wave_test_split1.txt", [*(f"{name}.avi 2" for name in NAMES), "other.avi 1"])
    return root


def write_videos(root: Path, frames: int = 9) -> Path:
    """Write frame folders for training."""
    for seed, name in enumerate(NAMES):
        write_frames(make_scene(seed, frames), root / name)
    return root


def result_of(folder: Path, task: str) -> Path:
    """Return the only result of a task in a folder."""
    (path,) = folder.glob(f"{task}-*.json")
    return path


def write_projection(path: Path) -> Path:
    torch.manual_seed(0)
    Projection(WIDTH).save(path)
    return path


# --- run folders, labelled videos and action segmentation ---

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
    """Write a run folder with a tiny random encoder and projection; `changes` override `SETTINGS`."""
    settings = {**SETTINGS, **changes}
    encoder = load_backbone(**settings)
    projection = Projection(encoder.embed_dim, init="xavier_uniform", seed=seed)
    projection.save(folder / PROJECTION_FILE, projection_metadata(settings, encoder, projection, {}))
    return folder


def write_weights(path: Path, shift: float = 0.0, container: str | None = None) -> str:
    """Write a checkpoint of the test encoder; `shift` changes the weights. `container` is a key around it."""
    encoder = load_backbone(**SETTINGS)
    prefix_1D, positions_ND = encoder.get_buffer("prefix_PD"), encoder.get_buffer("positions_NC")
    state: dict[str, Tensor] = {
        **encoder.state_dict(),
        "cls_token": prefix_1D[None],
        "pos_embed": positions_ND[None],
    }
    state |= {"norm.bias": state["norm.bias"] + shift}
    torch.save({container: state} if container else state, path)
    return str(path)


def published_name(name: str, head: Head) -> str:
    """Translate a parameter name (`linears.I.*` or `norm.*`) to that in published checkpoints."""
    layer, parameter = name.rsplit(".", 1)
    if layer == "norm":
        return f"adapter_layer_norm1.{parameter}"
    number = "" if head == "linear" else str(int(layer.removeprefix("linears.")) + 1)
    return f"adapter_linear{number}.{parameter}"


def save_release(path: Path, parameters: dict[str, Tensor]) -> None:
    """Write a checkpoint in the layout of the paper's release."""
    model = {f"adapter.adapter.{name}": tensor for name, tensor in parameters.items()}
    encoder = {"cls_token": torch.zeros(1, 1, 4)}
    torch.save({"model": encoder | model, "args": argparse.Namespace(lr=1e-4), "epoch": 4}, path)


@lru_cache
def clips(label: int) -> list[Scene]:
    """Return the clips of a class. Cut from one scene, they can be classified by a random encoder."""
    count = TRAIN + TEST
    scene = render_scene(20 + label, num_frames=CLIP_FRAMES * count, height=64, width=80, num_objects=1)
    parts = [slice(i * CLIP_FRAMES, (i + 1) * CLIP_FRAMES) for i in range(count)]
    return [Scene(frames_THWC=scene.frames_THWC[part], labels_THW=scene.labels_THW[part]) for part in parts]


def labelled_clips() -> Iterator[tuple[int, str, int, str, Scene]]:
    """Yield label, class name, number within the class, split (`train` or `test`), and scene of each clip."""
    for label, name in enumerate(CLASSES):
        for number, scene in enumerate(clips(label)):
            yield label, name, number, "train" if number < TRAIN else "test", scene


def ucf101(root: Path) -> Path:
    """Write video files, with lists in ucfTrainTestlist."""
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for label, name, number, half, scene in labelled_clips():
        video = f"{name}/v_{name}_g{number:02d}_c01.avi"
        write_scene(scene, root / "UCF-101" / video)
        lists[half].append(f"{video} {label + 1}" if half == "train" else video)
    folder = root / "ucfTrainTestlist"
    write_lines(folder / "classInd.txt", [f"{label + 1} {name}" for label, name in enumerate(CLASSES)])
    write_lines(folder / "trainlist01.txt", lists["train"])
    write_lines(folder / "testlist01.txt", lists["test"])
    return root


def hmdb51(root: Path) -> Path:
    """Write frame folders instead of video files. The lists also name unused videos that do not exist."""
    lists = {name: ["unused_0.avi 0 "] for name in CLASSES}
    for _, name, number, half, scene in labelled_clips():
        video = f"#{number} {name.lower()}_np1_{number}"
        write_frames(scene, root / "hmdb51_org" / name / video)
        lists[name].append(f"{video}.avi {1 if half == 'train' else 2} ")
    for name, lines in lists.items():
        write_lines(root / "testTrainMulti_7030_splits" / f"{name}_test_split1.txt", lines)
    return root


def kinetics(root: Path) -> Path:
    """Write CSV lists, and videos in class folders whose names contain spaces."""
    header = "label,youtube_id,time_start,time_end,split"
    lists = {"train": [header], "val": [header]}
    for label, name, number, half, scene in labelled_clips():
        half = "train" if half == "train" else "val"
        video, start, end = f"id_-{label}{number}", 7 * number, 7 * number + 10
        lists[half].append(f"doing {name},{video},{start},{end},{half}")
        write_scene(scene, root / half / f"doing {name}" / f"{video}_{start:06d}_{end:06d}.mp4")
    for half, lines in lists.items():
        write_lines(root / "annotations" / f"{half}.csv", lines)
    return root


def ssv2(root: Path) -> Path:
    """Write JSON lists with templates, and frame folders named by number."""
    lists: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for label, name, number, half, scene in labelled_clips():
        video = f"{label}0{number}"
        row = {"id": video, "label": f"{name} a ball", "template": f"{name} [something]"}
        lists["train" if half == "train" else "validation"].append(row)
        write_frames(scene, root / "20bn-something-something-v2" / video)
    labels = {f"{name} something": str(label) for label, name in enumerate(CLASSES)}
    for name, content in {"labels": labels, **lists}.items():
        write_lines(root / "labels" / f"{name}.json", [json.dumps(content)])
    return root


def plain(root: Path) -> Path:
    """Write lists with one `path label` per line. The paths contain spaces."""
    lists: dict[str, list[str]] = {"train": ["# a comment"], "test": []}
    for label, _, number, half, scene in labelled_clips():
        video = f"some videos/{label} {number}.mp4"
        write_scene(scene, root / video)
        lists[half].append(f"{video} {label}")
    for half, lines in lists.items():
        write_lines(root / f"{half}.txt", lines)
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "kinetics": kinetics,
    "ssv2": ssv2,
    "list": plain,
}


def segmentation(root: Path, *, as_breakfast: bool = False) -> Path:
    """Write videos that consist of actions (one scene each) and background, in the layout of MS-TCN."""
    names = ["background", "cut", "stir", "pour"]
    write_lines(root / "mapping.txt", [f"{label} {name}" for label, name in enumerate(names)])
    scenes = [
        render_scene(40 + i, num_frames=40, height=64, width=64, num_objects=1) for i in range(len(names))
    ]
    orders = [(0, 1, 2, 0), (2, 0, 3, 1), (0, 3, 1, 2), (1, 0, 2, 3), (3, 2, 0, 1)]
    listed = []
    for number, order in enumerate(orders):
        name = f"P0{number}_cam01_P0{number}_tea" if as_breakfast else f"S{number}_Tea_C1"
        labels = [label for label in order for _ in range(5 + number)]
        frames = [scenes[label].frames_THWC[(7 * number + t) % 40] for t, label in enumerate(labels)]
        # The last annotation lacks a frame, as some published ones do.
        written = labels[: len(labels) - (number == 4)]
        write_lines(root / "groundTruth" / f"{name}.txt", [names[label] for label in written])
        parts = name.split("_", 2) if as_breakfast else ["videos", name]
        scene = Scene(frames_THWC=np.stack(frames), labels_THW=np.zeros((len(frames), 64, 64), np.uint8))
        write_scene(scene, root.joinpath(*parts).with_suffix(".avi"))
        listed.append(f"{name}.txt")
    write_lines(root / "splits" / "train.split1.bundle", listed[:3])
    write_lines(root / "splits" / "test.split1.bundle", listed[3:])
    return root
