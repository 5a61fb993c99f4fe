"""Small made-up data sets in the layouts of the published ones, and a run folder to evaluate on them."""

import csv
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from fasttrain.backbones import load_backbone
from fasttrain.projection import Projection
from fasttrain.tools.synthetic import Scene, render_scene, write_scene
from fasttrain.video_encoder import PROJECTION_FILE, projection_metadata

CLASSES = ("Archery", "Bowling", "Surfing")
TRAIN, TEST = 3, 2
FRAMES = 6
SETTINGS = {
    "name": "dino",
    "weights": "random",
    "image_size": 64,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
}


def write_run(folder: Path, seed: int = 0) -> Path:
    """A run folder with a tiny random encoder and a random projection."""
    encoder = load_backbone(**SETTINGS)
    projection = Projection(encoder.embed_dim, init="xavier_uniform", seed=seed)
    projection.save(folder / PROJECTION_FILE, projection_metadata(SETTINGS, encoder, projection, {}))
    return folder


@lru_cache
def clips(label: int) -> list[Scene]:
    """Clips of one class: parts of one scene, so that even a random encoder tells the classes apart."""
    count = TRAIN + TEST
    scene = render_scene(20 + label, num_frames=FRAMES * count, height=64, width=80, num_objects=1)
    parts = [slice(i * FRAMES, (i + 1) * FRAMES) for i in range(count)]
    return [Scene(frames_THWC=scene.frames_THWC[part], labels_THW=scene.labels_THW[part]) for part in parts]


def write_frames(scene: Scene, folder: Path) -> None:
    folder.mkdir(parents=True)
    for t, image in enumerate(scene.frames_THWC):
        Image.fromarray(image).save(folder / f"{t:05d}.jpg")


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
