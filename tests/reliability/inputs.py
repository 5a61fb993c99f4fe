"""The kinds of files that fasttrain reads: intact examples, how they are damaged, and how they are read.

Each kind has a folder of surrounding files. An input replaces one of them; fasttrain then reads the folder
through its public functions, as its commands do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import torch
from PIL import Image
from safetensors.torch import save as save_safetensors
from scipy.io import savemat
from timm.models.vision_transformer import VisionTransformer

from fasttrain.__main__ import ADVICE
from fasttrain.backbones import Backbone, load_backbone
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FrameIndex
from fasttrain.data.pack import PackOptions, check, pack
from fasttrain.data.sources import open_source
from fasttrain.data.video_cache import cache_path
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError
from fasttrain.evaluation import davis, jhmdb, vip
from fasttrain.evaluation.datasets import read_split
from fasttrain.evaluation.sequences import evaluate_all
from fasttrain.options import TASKS
from fasttrain.projection import PROJECTION_FILE, Projection
from fasttrain.recipe import load_recipe, recipe_from_dict, recipe_hash, to_yaml
from fasttrain.run_folder import check_run_folder
from fasttrain.trainer import Trainer
from fasttrain.video_encoder import load_video_encoder
from reliability import mutations

Seeds = dict[str, bytes]
# Settings of the tiny encoder that all kinds share.
ENCODER = {k: v for k, v in synthetic.SETTINGS.items() if k != "image_size"}
# Recipe keys for a training run of a second.
SMALL = (
    *(
        "device=cpu",
        "data.image_size=64",
        "data.num_threads=1",
        "data.max_bad_fraction=1",
        "train.warmup_epochs=0",
    ),
    *(
        "train.batch_size=2",
        "train.precision=fp32",
        "train.steps=1",
        "train.tensorboard=false",
        "train.accumulate=1",
        "data.pairs_per_video=4",
    ),
    *("encoder.compile=none", *(f"backbone.{key}={value}" for key, value in ENCODER.items())),
)


class Outcome:
    """What became of an input: `read`, or `skipped` with its name, or `refused` with one line.

    Use it as a context manager around each way of reading. Other exceptions than those that fasttrain reports
    leave the context.
    """

    def __init__(self) -> None:
        self.name = "read"

    def __enter__(self) -> Outcome:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if isinstance(error, InputError):
            assert "\n" not in str(error), f"the message has several lines: {error}"
        elif not (isinstance(error, OSError) and error.errno in ADVICE):
            return False
        self.name = "refused"
        return True

    def skipped(self) -> None:
        if self.name == "read":
            self.name = "skipped"


@dataclass(frozen=True)
class Kind:
    """A kind of input."""

    count: int
    """The number of inputs among 10,000."""
    prepare: Callable[[Path], Seeds]
    """Writes the surrounding files to a folder; returns the intact inputs by their path relative to it."""
    read: Callable[[Path, str, Outcome], None]
    """Reads the folder, given the path of the input relative to it."""
    mutate: Callable[[random.Random, bytes, str], bytes] | None
    """Changes an input without breaking the syntax of its format; the last argument is the marker."""
    command: Callable[[Path, str], list[str]]
    """The command that reads the folder."""
    structural: float = 0.4
    """The share of inputs that `mutate` changes; bytes of the others are damaged."""

    def damage(self, seeds: Seeds, rng: random.Random, marker: str) -> tuple[str, bytes]:
        """Choose an intact input and return its path and its damaged content."""
        name = rng.choice(sorted(seeds))
        others = [data for path, data in seeds.items() if Path(path).suffix == Path(name).suffix]
        if self.mutate is not None and rng.random() < self.structural:
            data = self.mutate(rng, seeds[name], marker)
            return name, mutations.damage(rng, data) if rng.random() < 0.05 else data
        return name, mutations.damage(rng, seeds[name], rng.choice(others))


def contents(folder: Path, *patterns: str) -> Seeds:
    paths = [path for pattern in patterns for path in sorted(folder.rglob(pattern)) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# --- frames, videos and packed sets ---


def train_on(index: FrameIndex, outcome: Outcome) -> None:
    """Load one batch of all videos, and check that a sample which was replaced is named."""
    loader = synthetic.make_loader(index, num_steps=1, batch_size=len(index), num_threads=1, prefetch=1)
    try:
        for pairs in loader:
            assert pairs.frames.isfinite().all()
            for line in pairs.bad_samples:
                assert any(name in line for name in index.names), line
                outcome.skipped()
    finally:
        loader.close()


def read_source(folder: Path, outcome: Outcome, source: str = "videos") -> None:
    """Train on a source, read each of its frames, and pack it."""
    shutil.rmtree(cache_path(folder / source).parent, ignore_errors=True)
    with outcome:
        index = open_source(folder / source)
        if index.skipped:
            outcome.skipped()
        with outcome:
            train_on(index, outcome)
        for video, length in enumerate(index.num_frames.tolist()):
            for frame in {0, length - 1, length // 2, length // 3}:
                try:
                    image = index.read_frame(video, frame)
                except UnreadableFrameError:
                    outcome.skipped()
                else:
                    assert image.ndim == 3
                    assert image.shape[2] == 3
    packed = folder / "packed again"
    shutil.rmtree(packed, ignore_errors=True)
    with outcome:
        pack(folder / source, packed, PackOptions(short_side=32))
        if json.loads((packed / "pack-1of1.json").read_text())["skipped"]:
            outcome.skipped()
        check(packed)


def source_command(folder: Path, name: str, source: str = "videos") -> list[str]:
    """Pack or train, depending on the size of the input."""
    if (folder / name).stat().st_size % 2:
        return ["pack", str(folder / source), str(folder / "packed again"), "--workers", "1"]
    return [*train_command(folder), f"data.source={folder / source}"]


def train_command(folder: Path) -> list[str]:
    return ["recipes/base.yaml", f"output={folder / 'run'}", *SMALL]


def jpeg_frames(folder: Path) -> Seeds:
    synthetic.write_folders(folder / "videos", [3])
    picture = Image.fromarray(synthetic.picture(1, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    variants = {
        "plain": synthetic.encoded(picture),
        "exif": synthetic.encoded(picture, exif=exif, dpi=(72, 72), comment=b"x"),
        "progressive": synthetic.encoded(picture, progressive=True, quality=60),
        "optimised": synthetic.encoded(picture, optimize=True, subsampling=0),
        "grey": synthetic.encoded(picture.convert("L")),
        "cmyk": synthetic.encoded(picture.convert("CMYK")),
        "restarts": synthetic.encoded(picture, restart_marker_blocks=2),
        "thumbnail": synthetic.with_thumbnail(synthetic.encoded(picture)),
        "odd": synthetic.encoded(picture.resize((33, 17))),
    }
    return {f"videos/damaged_{name}/0.jpg": data for name, data in variants.items()}


def png_frames(folder: Path) -> Seeds:
    synthetic.write_folders(folder / "videos", [3], ".png")
    picture = Image.fromarray(synthetic.picture(1, 2, 24, 32))
    grey16 = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    modes = {
        mode: synthetic.encoded(picture.convert(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1")
    }
    modes["I16"] = synthetic.encoded(Image.fromarray(grey16), "PNG")
    transparent = picture.convert("P")
    modes["transparency"] = synthetic.encoded(transparent, "PNG", transparency=3)
    return {f"videos/damaged_{mode}/0.png": data for mode, data in modes.items()}


def videos(folder: Path, suffix: str) -> Seeds:
    frames = [synthetic.picture(2, t, 48, 64) for t in range(10)]
    (folder / "videos").mkdir()
    synthetic.encode_video(folder / "videos" / "intact.mp4", frames, g=4)
    codecs: dict[str, dict[str, Any]] = {
        "libx264": {"g": 4},
        "mpeg4": {},
        **(
            {"libx265": {"x265-params": "log-level=none"}, "mpeg2video": {"strict": "-2"}}
            if suffix == ".ts"
            else {}
        ),
        **({"libvpx-vp9": {}, "mjpeg": {"pix_fmt": "yuvj420p"}, "ffv1": {}} if suffix == ".mkv" else {}),
        **({"mjpeg": {"pix_fmt": "yuvj420p"}, "rawvideo": {}} if suffix == ".avi" else {}),
        **(
            {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"svtav1-params": "lp=1"}}
            if suffix == ".mp4"
            else {}
        ),
    }
    seeds = {}
    for codec, options in codecs.items():
        path = synthetic.encode_video(folder / f"{codec}{suffix}", frames, codec, **options)
        seeds[f"videos/damaged_{codec}{suffix}"] = path.read_bytes()
        path.unlink()
    return seeds


def packed_set(folder: Path) -> None:
    synthetic.write_folders(folder / "source", [3, 2, 4])
    pack(folder / "source", folder / "videos", PackOptions(short_side=32, shard_bytes=4_000))


def packed_files(folder: Path, pattern: str) -> Seeds:
    packed_set(folder)
    return contents(folder, f"videos/{pattern}")


def read_packed(folder: Path, name: str, outcome: Outcome) -> None:
    """Read a packed set, verify it, and continue to pack into it."""
    read_source_of_packed = folder / "videos"
    with outcome:
        index = open_source(read_source_of_packed)
        with outcome:
            train_on(index, outcome)
        for video, length in enumerate(index.num_frames.tolist()):
            for frame in range(length):
                try:
                    index.read_frame(video, frame)
                except UnreadableFrameError:
                    outcome.skipped()
    with outcome:
        check(read_source_of_packed)
    again = folder / "packed again"
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(read_source_of_packed, again)
    with outcome:
        pack(folder / "source", again, PackOptions(short_side=32, shard_bytes=4_000))


def packed_command(folder: Path, name: str) -> list[str]:
    if (folder / name).stat().st_size % 2:
        return ["pack", "--check", str(folder / "videos"), "--workers", "1"]
    return [*train_command(folder), f"data.source={folder / 'videos'}"]


# --- recipes ---


def recipes(folder: Path) -> Seeds:
    full = recipe_from_dict(
        {"output": "runs/x", "backbones": [{"name": "mae"}, {"name": "dino", "depth": 2}]}
    )
    short = "base: whole.yaml\nseed: 3  # a comment\ndata:\n  source: videos\n  crop_area: [0.5, 1.0]\n"
    short += "train: {epochs: 2}\n"
    seeds = {"whole.yaml": to_yaml(full), "short.yaml": short, "run/recipe.yaml": to_yaml(full)}
    for name, text in seeds.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return {name: text.encode() for name, text in seeds.items()}


def read_recipe(folder: Path, name: str, outcome: Outcome) -> None:
    with outcome:
        recipe = load_recipe(folder / name)
        recipe_hash(recipe)
        again = folder / "again.yaml"
        again.write_text(to_yaml(recipe))
        assert load_recipe(again) == recipe
    with outcome if name == "whole.yaml" else Outcome():
        load_recipe(folder / "short.yaml")
    if name == "run/recipe.yaml":
        with outcome:
            check_run_folder(recipe_from_dict({"output": str(folder / "run")}))
    # Lines of the recipe, as assignments on the command line.
    for line in (folder / name).read_text(errors="surrogateescape").split("\n")[:20]:
        key, _, value = line.strip().partition(":")
        # Most are refused, because the keys of a section need its name.
        with Outcome():
            load_recipe("recipes/base.yaml", [f"{key}={value.strip()}"])


def recipe_command(folder: Path, name: str) -> list[str]:
    return [str(folder / name), f"output={folder / 'new run'}", f"data.source={folder}", *SMALL]


# --- checkpoints, projections and weights ---


def checkpoints(folder: Path) -> Seeds:
    synthetic.write_folders(folder / "videos", [4, 5, 6])
    Trainer(checkpoint_recipe(folder, 2), World.single()).train()
    return contents(folder, "*.pt")


def checkpoint_recipe(folder: Path, steps: int) -> Any:
    overrides = [
        f"data.source={folder / 'videos'}",
        f"output={folder / 'run'}",
        *SMALL,
        "train.save_every=100",
    ]
    # The schedule always spans all steps, so the number of steps may not change; fewer are completed.
    return load_recipe("recipes/base.yaml", [*overrides, f"train.steps={steps}"])


def read_checkpoint(folder: Path, name: str, outcome: Outcome) -> None:
    with outcome:
        Trainer(checkpoint_recipe(folder, 2), World.single())


def projections(folder: Path) -> Seeds:
    synthetic.write_run(folder / "run")
    synthetic.write_davis(folder / "davis")
    return contents(folder, PROJECTION_FILE)


def read_projection(folder: Path, name: str, outcome: Outcome) -> None:
    frames = torch.zeros(1, 2, 3, 64, 64)
    with outcome:
        Projection.load(folder / name)(torch.zeros(1, synthetic.SETTINGS["embed_dim"]))
    with outcome:
        load_video_encoder(folder / "run")(frames)


def projection_command(folder: Path, name: str) -> list[str]:
    return [
        *("eval", "davis", "--root", str(folder / "davis"), "--run", str(folder / "run"), "--device", "cpu"),
        *synthetic.SMALL["davis"],
    ]


def encoder_state() -> dict[str, torch.Tensor]:
    vit = VisionTransformer(
        img_size=64, embed_dim=32, depth=1, num_heads=2, num_classes=0, global_pool="", no_embed_class=True
    )
    return vit.state_dict()


def safetensors_weights(folder: Path) -> Seeds:
    config = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 16,
        "hidden_act": "gelu",
    }
    preprocessor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2], "do_normalize": True}
    (folder / "weights").mkdir()
    (folder / "weights" / "model.safetensors").write_bytes(save_safetensors(encoder_state()))
    (folder / "weights" / "config.json").write_text(json.dumps(config))
    (folder / "weights" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return contents(folder, "weights/*")


def pickled_weights(folder: Path) -> Seeds:
    state = encoder_state()
    released = {"teacher": {f"module.backbone.{k}": t for k, t in state.items()}, "epoch": 3, "lr": 1e-4}
    adapter = {f"adapter.adapter.adapter_{k}": t for k, t in Projection(32).state_dict().items()}
    adapter = {
        key.replace("linears.0", "linear").replace("_norm.", "_layer_norm1."): t for key, t in adapter.items()
    }
    legacy = io.BytesIO()
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    (folder / "weights").mkdir()
    (folder / "weights" / "legacy.pth").write_bytes(legacy.getvalue())
    torch.save(state, folder / "weights" / "plain.pth")
    torch.save(released, folder / "weights" / "released.pth")
    torch.save({"model": state | adapter}, folder / "weights" / "adapter.pth")
    with warnings.catch_warnings():
        # torch.jit is deprecated.
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)).save(str(folder / "weights" / "scripted.pt"))
    return contents(folder, "weights/*")


def read_weights(folder: Path, name: str, outcome: Outcome) -> None:
    path = folder / name
    # A configuration belongs to the weights in its folder.
    weights = path.parent if path.suffix == ".json" else path
    with outcome:
        encoder = load_backbone("dino", weights=str(weights), image_size=64, num_heads=2)
        encoder.tokens(torch.zeros(1, 3, *[4 * encoder.patch_size] * 2))
    if path.suffix in (".pth", ".pt"):
        with outcome:
            Projection.from_cosettle(path)(torch.zeros(32))


def damage_weights(rng: random.Random, data: bytes, marker: str) -> bytes:
    if data[:1] == b"{":
        return mutations.damage_json(rng, data)
    return mutations.damage_safetensors(rng, data)


def damage_pickle(rng: random.Random, data: bytes, marker: str) -> bytes:
    if b"constants.pkl" in data:
        return mutations.damage_member(rng, data)
    return mutations.damage_checkpoint(rng, data, marker)


def weights_command(folder: Path, name: str) -> list[str]:
    synthetic_videos = folder / "videos"
    if not synthetic_videos.exists():
        synthetic.write_folders(synthetic_videos, [4, 5])
    sizes = [word for word in train_command(folder) if not word.startswith("backbone.")]
    weights = ["backbone.name=dino", "backbone.num_heads=2", f"backbone.weights={folder / name}"]
    return [*sizes, f"data.source={synthetic_videos}", *weights]


# --- lists, labels and annotations ---


def lists(folder: Path) -> Seeds:
    synthetic.write_folders(folder / "frames", [3, 2, 4])
    frames = [synthetic.picture(2, t) for t in range(4)]
    for number in range(3):
        synthetic.encode_video(folder / f"video {number}.mp4", frames)
    synthetic.write_lines(folder / "folders.txt", [f"frames/class_{n % 2}/video_{n} 2" for n in range(3)])
    synthetic.write_lines(folder / "videos.txt", ["# videos", *(f"video {n}.mp4 {n}" for n in range(3))])
    return contents(folder, "*.txt")


def read_list(folder: Path, name: str, outcome: Outcome) -> None:
    read_source(folder, outcome, name)


def splits(folder: Path) -> Seeds:
    for layout, write in synthetic.LAYOUTS.items():
        write(folder / layout)
    synthetic.segmentation(folder / "frames")
    # The names of the videos matter, not their contents.
    for path in [*folder.rglob("*.avi"), *folder.rglob("*.mp4"), *folder.rglob("*.jpg")]:
        path.write_bytes(b"")
    synthetic.write_davis(folder / "davis")
    synthetic.write_vip(folder / "vip")
    synthetic.write_jhmdb(folder / "jhmdb")
    clips = [f"/x/joint_positions/wave/{name}/joint_positions.mat /y" for name in synthetic.NAMES]
    synthetic.write_lines(folder / "jhmdb" / "clips.txt", clips)
    return contents(folder, "*.txt", "*.csv", "*.json", "*.bundle")


def parsed(task: str, words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path)
    TASKS[task].add_options(parser)
    return parser.parse_args(words)


def read_split_file(folder: Path, name: str, outcome: Outcome) -> None:
    layout = name.split("/")[0]
    root = folder / layout
    with outcome:
        if layout == "davis":
            davis.find_sequences(root, "2017", "val")
        elif layout == "vip":
            vip.find_sequences(root, "val", None)
        elif layout == "jhmdb":
            jhmdb.find_sequences(root, 1, root / "clips.txt" if name.endswith("clips.txt") else None)
        elif layout == "frames":
            read_split(parsed("localization", ["--root", str(root)]))
        else:
            words = ["--root", str(root)]
            if layout == "list":
                words += ["--train-list", str(root / "train.txt"), "--test-list", str(root / "test.txt")]
            read_split(parsed("retrieval", words))
            split = read_split(parsed("retrieval", [*words, "--allow-missing"]))
            if split.missing:
                outcome.skipped()


def split_command(folder: Path, name: str) -> list[str]:
    layout = name.split("/")[0]
    root = ["--root", str(folder / layout), "--output", str(folder / "results")]
    if layout in ("davis", "vip", "jhmdb"):
        return ["eval", layout, *root, *synthetic.MODEL, *synthetic.SMALL[layout]]
    task = ["localization"] if layout == "frames" else ["retrieval", "--allow-missing"]
    words = ["eval", *task, *root, *synthetic.MODEL, "--image-size", "64"]
    if layout == "list":
        words += [f"--{half}-list={folder / layout / half}.txt" for half in ("train", "test")]
    return words


def damage_split(rng: random.Random, data: bytes, marker: str) -> bytes:
    is_json = data[:1] in (b"[", b"{")
    return mutations.damage_json(rng, data) if is_json else mutations.damage_lines(rng, data)


def masks(folder: Path) -> Seeds:
    synthetic.write_davis(folder / "davis")
    synthetic.write_vip(folder / "vip")
    return contents(folder, "*/Annotations/*/alpha/*.png", "*/VIP_Fine/Annotations/*/alpha/*.png")


def poses(folder: Path) -> Seeds:
    synthetic.write_jhmdb(folder / "jhmdb")
    path = folder / "jhmdb" / "joint_positions" / "wave" / "beta" / "joint_positions.mat"
    pose = synthetic.pose(synthetic.make_scene(1).labels_THW)
    # The published files have more variables, and some tools write compressed ones.
    savemat(path, {"pos_img": pose, "pos_world": pose / 100, "scale": np.ones((1, 5)), "viewpoint": "front"})
    name = "jhmdb/joint_positions/wave/alpha/joint_positions.mat"
    compressed = folder / "jhmdb" / "joint_positions" / "wave" / "gamma" / "joint_positions.mat"
    savemat(compressed, {"pos_img": pose}, do_compression=True)
    return {name: contents(folder, name)[name], **contents(folder, "*/beta/*.mat", "*/gamma/*.mat")}


_ENCODERS: list[Backbone] = []


def read_annotations(folder: Path, name: str, outcome: Outcome) -> None:
    """Evaluate the damaged sequence with a tiny encoder."""
    task = name.split("/")[0]
    if not _ENCODERS:
        _ENCODERS.append(load_backbone(**synthetic.SETTINGS))
    model = EvaluatedModel(encoder=_ENCODERS[0], projection=None, variants=("before",))
    module: Any = {"davis": davis, "vip": vip, "jhmdb": jhmdb}[task]
    options = ["--root", str(folder / task), *synthetic.SMALL[task], "--pictures", "0"]
    arguments = parsed(task, options)
    with outcome:
        if task == "davis":
            listed = davis.find_sequences(arguments.root, "2017", "val")
        elif task == "vip":
            listed = vip.find_sequences(arguments.root, "val", None)
        else:
            listed = jhmdb.find_sequences(arguments.root, 1, None)
        damaged = [sequence for sequence in listed if sequence.name in Path(name).parts]
        evaluate_all(damaged, module.evaluate_sequence, arguments, model, folder / "results", World.single())


def annotation_command(folder: Path, name: str) -> list[str]:
    task = name.split("/")[0]
    root = ["--root", str(folder / task), "--output", str(folder / "results")]
    return ["eval", task, *root, *synthetic.MODEL, *synthetic.SMALL[task]]


def without_marker(
    mutate: Callable[[random.Random, bytes], bytes],
) -> Callable[[random.Random, bytes, str], bytes]:
    return lambda rng, data, marker: mutate(rng, data)


def _read_videos(folder: Path, name: str, outcome: Outcome) -> None:
    read_source(folder, outcome)


def _checkpoint_command(folder: Path, name: str) -> list[str]:
    return [
        *train_command(folder),
        f"data.source={folder / 'videos'}",
        "train.steps=2",
        "train.save_every=100",
    ]


def _video(count: int, suffix: str) -> Kind:
    return Kind(count, partial(videos, suffix=suffix), _read_videos, None, source_command)


def _packed(count: int, pattern: str, mutate: Any) -> Kind:
    return Kind(count, partial(packed_files, pattern=pattern), read_packed, mutate, packed_command, 0.7)


KINDS: dict[str, Kind] = {
    "jpeg": Kind(1200, jpeg_frames, _read_videos, without_marker(mutations.damage_jpeg), source_command),
    "png": Kind(600, png_frames, _read_videos, without_marker(mutations.damage_png), source_command, 0.7),
    "mp4": _video(800, ".mp4"),
    "mkv": _video(600, ".mkv"),
    "ts": _video(500, ".ts"),
    "avi": _video(500, ".avi"),
    "shard": _packed(300, "*.tar", None),
    "index": _packed(500, "*.npz", mutations.damage_npz),
    "manifest": _packed(400, "*.json", without_marker(mutations.damage_json)),
    "recipe": Kind(1000, recipes, read_recipe, mutations.damage_yaml, recipe_command, 0.8),
    "checkpoint": Kind(
        500, checkpoints, read_checkpoint, mutations.damage_checkpoint, _checkpoint_command, 0.8
    ),
    "projection": Kind(
        500,
        projections,
        read_projection,
        without_marker(mutations.damage_safetensors),
        projection_command,
        0.7,
    ),
    "safetensors": Kind(300, safetensors_weights, read_weights, damage_weights, weights_command, 0.7),
    "pickle": Kind(600, pickled_weights, read_weights, damage_pickle, weights_command, 0.8),
    "list": Kind(400, lists, read_list, without_marker(mutations.damage_lines), source_command, 0.7),
    "split": Kind(600, splits, read_split_file, damage_split, split_command, 0.7),
    "mask": Kind(400, masks, read_annotations, without_marker(mutations.damage_png), annotation_command, 0.6),
    "mat": Kind(300, poses, read_annotations, without_marker(mutations.damage_mat), annotation_command, 0.5),
}


@contextlib.contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    """Write a file, and restore what was there before when the context ends."""
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        yield
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)
