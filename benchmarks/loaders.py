"""Frame-pair loaders on the same files: ours, plain PIL, the published implementation, torchcodec, decord.

    python -m benchmarks.loaders --source FRAME_FOLDERS   write results/loaders-{cpu,cuda}.json
    python -m benchmarks.loaders --short                  one round of fewer pairs
    python -m benchmarks.loaders --plot FILE.json         draw the plot

Every contender runs in a process of its own, all of them once a round, so that a busy machine is busy for
all. CPU seconds are those of the process and its workers; the first batches, in which workers start and
pipelines fill, do not count. Without --source, synthetic scenes are rendered. On a GPU, JPEG is also decoded
by the JPEG engine at several shares. What a training step loses to waiting for data is measured in step.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, functional

from benchmarks.measure import Results, cpu_seconds, parser, plot_bars, synchronize, with_changes
from fasttrain.data import FramePairs, PairLoader, open_source
from fasttrain.data.images import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.data.sampling import draw_crop
from fasttrain.distributed import World
from fasttrain.recipe import Recipe, recipe_from_dict
from fasttrain.tools.synthetic import render_scene

SIZE = 224
# The usual size of Kinetics-400 with a short side of 256.
WIDTH, HEIGHT = 340, 256
GAP, AREA, RATIO = 0.15, (0.5, 1.0), (3 / 4, 4 / 3)
# What every other loader is compared with.
BASELINE = "PIL, four frames (published)"
OURS, OUR_VIDEO = "ours, packed", "ours, video"
# Shares of the JPEG engine; its CUDA cores decode the rest.
ENGINE_LOADS = (0.65, 0.75, 0.85, 0.95, 1.0)
WARM_UP = 6
# Seconds after which a contender that has not answered hangs.
PATIENCE = 300.0


@dataclass(frozen=True)
class Setting:
    """What all contenders share: folders with the same frames as JPEG, packed and as H.264."""

    frames: str
    packed: str
    videos: str
    batch: int
    pairs: int
    threads: int
    device: str


def our_pairs(recipe: Recipe, source: str, world: World, batches: int) -> Generator[FramePairs, None, None]:
    """The recipe's batches from a small source, of which an epoch draws enough pairs for a batch."""
    recipe = with_changes(recipe, "data", source=source, kind="auto", pairs_per_video=recipe.train.batch_size)
    index = open_source(source)
    loader = PairLoader(index=index, recipe=recipe, world=world, first_step=0, num_steps=batches)
    try:
        yield from loader
    finally:
        loader.close()


class Pairs(Dataset[torch.Tensor]):
    """`length` pairs that `load` reads from the files or folders of a folder in turn."""

    def __init__(self, root: str, load: Callable[[str], torch.Tensor], length: int) -> None:
        self.paths, self.load, self.length = sorted(map(str, Path(root).iterdir())), load, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.load(self.paths[number % len(self.paths)])


def published_pair(folder: str) -> torch.Tensor:
    """Two frames of a folder through PIL, of the four that the published code decodes for them."""
    files = sorted(os.listdir(folder))
    squares = []
    # All four are resized twice, to the square and from the crop; the second and the fourth are used.
    for frame in [frame - back for frame in draw_pair(len(files)) for back in (1, 0)]:
        with Image.open(os.path.join(folder, files[frame])) as image:
            square = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            squares.append(functional.to_tensor(square))
    return augment(squares)[1::2]


def torchcodec_pair(path: str) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1)
    return augment(list(decoder.get_frames_at(draw_pair(len(decoder))).data))


def decord_pair(path: str) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    frames = torch.from_numpy(reader.get_batch(draw_pair(len(reader))).asnumpy())
    return augment(list(frames.permute(0, 3, 1, 2)))


def draw_pair(length: int) -> list[int]:
    gap = int(GAP * length)
    first = random.randrange(1, length - gap)
    return [first, first + gap]


def augment(images: list[torch.Tensor]) -> torch.Tensor:
    """One crop and one flip for all, resized and normalised by torchvision: (frames, 3, SIZE, SIZE)."""
    height, width = images[0].shape[1:]
    box = draw_crop(np.random.default_rng().random((1, 4)), area=AREA, ratio=RATIO)[0]
    top, left = round(box[0] * height), round(box[1] * width)
    extent = round((box[2] - box[0]) * height), round((box[3] - box[1]) * width)
    flip = random.random() < 0.5
    out = []
    for image in images:
        crop = functional.resized_crop(
            image, top, left, *extent, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True
        )
        crop = functional.hflip(crop) if flip else crop
        levels = functional.convert_image_dtype(crop, torch.float32)
        out.append(functional.normalize(levels, IMAGENET_MEAN, IMAGENET_STD))
    return torch.stack(out)


def workers(
    dataset: Dataset[torch.Tensor], batch_size: int, num_workers: int, device: torch.device
) -> Iterator[torch.Tensor]:
    # Spawned: a process that was forked beside DALI's threads may wait for a lock of theirs forever.
    loader = DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, multiprocessing_context="spawn"
    )
    for batch in loader:
        yield batch.to(device, non_blocking=True)


def contenders(setting: Setting, batches: int = 0) -> dict[str, Callable[[], Iterator[Any]]]:
    """All that can run here, by name; a call starts the loader."""
    device, length = torch.device(setting.device), batches * setting.batch
    precision = "bf16" if setting.device == "cuda" else "fp32"
    train = {"batch_size": setting.batch, "precision": precision}
    shared = {"image_size": SIZE, "gap": GAP, "crop_area": AREA, "crop_ratio": RATIO}

    def ours(source: str, **data: Any) -> Callable[[], Iterator[Any]]:
        tree = {"data": {**shared, "num_threads": setting.threads, **data}, "train": train}
        return lambda: our_pairs(recipe_from_dict(tree), source, World.single(device), batches)

    def theirs(source: str, load: Callable[[str], torch.Tensor]) -> Callable[[], Iterator[Any]]:
        return lambda: workers(Pairs(source, load, length), setting.batch, setting.threads, device)

    found = {OURS: ours(setting.packed), BASELINE: theirs(setting.frames, published_pair)}
    if setting.device == "cuda":
        for load in ENGINE_LOADS:
            name = f"{OURS}, JPEG engine {load:.0%}"
            found[name] = ours(setting.packed, decoder="mixed", jpeg_engine_load=load)
    for name, load_pair in (("torchcodec", torchcodec_pair), ("decord", decord_pair)):
        if importlib.util.find_spec(name):
            found[f"{name}, two frames"] = theirs(setting.videos, load_pair)
    return {**found, OUR_VIDEO: ours(setting.videos)}


def measure(name: str, setting: Setting) -> dict[str, float]:
    """Run one contender: pairs per second, and CPU seconds per pair with all its workers."""
    counted = max(1, setting.pairs // setting.batch)
    # The loader works ahead; what it does for batches beyond the last would count otherwise.
    batches = contenders(setting, WARM_UP + counted + 16)[name]()
    for _ in range(WARM_UP):
        next(batches)
    synchronize(torch.device(setting.device))
    cpu, start = cpu_seconds(), time.perf_counter()
    for _ in range(counted):
        next(batches)
    synchronize(torch.device(setting.device))
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    pairs = counted * setting.batch
    return {"pairs_per_second": pairs / seconds, "cpu_seconds_per_pair": cpu / pairs}


def measure_apart(name: str, setting: Setting, patience: float) -> dict[str, float]:
    """`measure` in a process of its own: no thread or cache of one contender is there for the next."""
    command = [sys.executable, "-m", "benchmarks.loaders", "--contender", name, json.dumps(asdict(setting))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    reading: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return reading


def medians(readings: list[dict[str, float]]) -> dict[str, Any]:
    found = {key: statistics.median(reading[key] for reading in readings) for key in readings[0]}
    per_cpu_second = 1 / max(found["cpu_seconds_per_pair"], 1e-9)
    return {**found, "pairs_per_cpu_second": per_cpu_second, "rounds": readings}


def goals(loaders: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the figures say of the goals, as far as they are there.

    Ratios of pairs per CPU second: packed over the published loader (goal 4.0), video over torchcodec (1.25).
    On a GPU the frames/s on the device (goal 9,000 with 16 cores) of the fastest way to decode.
    """
    ratios = {
        "packed_over_four_frames": (OURS, BASELINE),
        "video_over_torchcodec": (OUR_VIDEO, "torchcodec, two frames"),
    }
    found = {
        goal: loaders[name]["pairs_per_cpu_second"] / loaders[other]["pairs_per_cpu_second"]
        for goal, (name, other) in ratios.items()
        if name in loaders and other in loaders
    }
    packed = [row["pairs_per_second"] for name, row in loaders.items() if name.startswith(OURS)]
    return {**found, **({"packed_frames_per_second": 2 * max(packed)} if packed else {})}


def prepare(root: Path, source: Path | None, num_videos: int) -> dict[str, str]:
    """The same frames as JPEG folders, packed, and as H.264 files."""
    frames, videos, packed = root / "frames", root / "videos", root / "packed"
    videos.mkdir(parents=True)
    for name, clip in clips(source, num_videos):
        (frames / name).mkdir(parents=True)
        for number, frame in enumerate(clip):
            frame.save(frames / name / f"{number:05d}.jpg", quality=90)
        with av.open(str(videos / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "20"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for frame in clip:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode(None))
    command = [sys.executable, "-m", "fasttrain", "pack", "--kind", "folders", str(frames), str(packed)]
    subprocess.run(command, check=True, capture_output=True)
    return {"frames": str(frames), "videos": str(videos), "packed": str(packed)}


def clips(source: Path | None, num_videos: int) -> Iterator[tuple[str, list[Image.Image]]]:
    index = open_source(source) if source else None
    for number in range(len(index) if index else num_videos):
        frames: Iterable[Any]
        if index:
            frames = (index.read_frame(number, frame) for frame in range(int(index.num_frames[number])))
        else:
            frames = render_scene(number, height=HEIGHT, width=WIDTH).frames_THWC
        size = (WIDTH, HEIGHT)
        yield f"{number:04d}", [Image.fromarray(f).resize(size, Image.Resampling.BICUBIC) for f in frames]


def plot(path: Path) -> Path:
    content = json.loads(path.read_text(encoding="utf-8"))
    key = "pairs_per_second" if content["environment"]["device"] else "pairs_per_cpu_second"
    return plot_bars(path, f"{content['frame']} frames", {key.replace("_", " "): content["loaders"]}, key)


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--source", type=Path, help="frame folders or videos to take the frames from")
    options.add_argument("--pairs", type=int, help="pairs that are counted, per loader and round")
    options.add_argument("--batch", type=int, help="pairs in a batch (64; on a GPU 128)")
    options.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    if given.contender:
        print(json.dumps(measure(given.contender[0], Setting(**json.loads(given.contender[1])))))
        return
    if given.plot:
        print(plot(given.plot))
        return
    on_gpu = given.device == "cuda"
    sizes = {
        "batch": given.batch or (128 if on_gpu else 64),
        "pairs": given.pairs or (384 if given.short else 768) * (4 if on_gpu else 1),
        "threads": len(os.sched_getaffinity(0)),
    }
    source = "/".join(given.source.parts[-2:]) if given.source else "synthetic scenes"
    results = Results("loaders", given, frame=f"{WIDTH} x {HEIGHT} JPEG", source=source, setting=sizes)
    with tempfile.TemporaryDirectory() as folder:
        sources = prepare(Path(folder), given.source, 4 if given.short else 16)
        setting = Setting(**sources, **sizes, device=given.device)
        readings: dict[str, list[dict[str, float]]] = {}
        for _ in range(1 if given.short else 3):
            for name in contenders(setting):
                patience = min(PATIENCE, max(1.0, results.deadline - time.monotonic()))
                found = results.attempt(name, partial(measure_apart, name, setting, patience))
                if found is not None:
                    readings.setdefault(name, []).append(found)
                    print(name, {key: round(value, 5) for key, value in found.items()}, flush=True)
            results.write("loaders", {name: medians(rows) for name, rows in readings.items()})
            results.write("goals", goals(results.content["loaders"]))
    results.finish()


if __name__ == "__main__":
    main()
