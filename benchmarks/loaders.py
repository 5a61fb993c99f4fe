"""Frame-pair loaders on the same files: ours, PIL the obvious way, the published scheme, torchcodec, decord.

    python -m benchmarks.loaders --source FRAME_FOLDERS      measure, write results/loaders.json and its plot
    python -m benchmarks.loaders --plot                      draw the plot again from the JSON

Every contender runs in a process of its own, all of them once a round, so that a busy machine is busy for
all. CPU seconds are those of the process and its workers, from the kernel's books; the first batches, in
which workers start and pipelines fill, do not count. Without --source, made-up scenes are rendered.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, functional

from benchmarks.record import RESULTS, environment, write_results
from fasttrain.data import FramePairs, PairLoader, PairSampling, open_source
from fasttrain.data.images import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.data.pack import PackOptions, pack
from fasttrain.data.packed import Part
from fasttrain.data.pipeline import Decoder, HostDecoder
from fasttrain.data.sampling import draw_crop
from fasttrain.scenes import render_scene

SIZE = 224
# The usual size of Kinetics-400 with a short side of 256.
WIDTH, HEIGHT = 340, 256
GAP, AREA, RATIO = 0.15, (0.5, 1.0), (3 / 4, 4 / 3)
# The published scheme: what every other loader is compared with.
BASELINE = "PIL, four frames (published)"


# Given the number of batches, starts a loader.
Contender = Callable[[int], Iterator[Any]]


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


def our_pairs(setting: Setting, source: str, decoder: Decoder, batches: int) -> Iterator[FramePairs]:
    index = open_source(source)
    needed = -(-setting.batch // len(index))
    loader = PairLoader(
        index=index,
        sampling=PairSampling(
            seed=0, gap=GAP, crop_area=AREA, crop_ratio=RATIO, flip=0.5, pairs_per_video=max(needed, 16)
        ),
        image_size=SIZE,
        batch_size=setting.batch,
        accumulate=1,
        first_step=0,
        num_steps=batches,
        rank=0,
        world_size=1,
        device=torch.device(setting.device),
        num_threads=setting.threads,
        prefetch=2,
        decoder=decoder,
        dtype=torch.bfloat16 if setting.device == "cuda" else torch.float32,
        max_bad_fraction=0.0,
    )
    try:
        yield from loader
    finally:
        loader.close()


def decode_only(setting: Setting) -> Iterator[Any]:
    """Our packed reading and JPEG decoding, without crop, resize and normalisation."""
    index = open_source(setting.packed)
    decoder = HostDecoder(2 * setting.batch, setting.threads, prefetch=2)
    rng = np.random.default_rng(0)

    def submit() -> None:
        videos = rng.integers(len(index), size=setting.batch)
        pairs = [index.read(int(v), rng.integers(index.num_frames[v], size=2).tolist()) for v in videos]
        decoder.submit([frame for pair in pairs for frame in pair])

    submit()
    while True:
        submit()
        yield decoder.collect()


class FolderPairs(Dataset[torch.Tensor]):
    """Frame folders through PIL. Of four frames, the published scheme keeps two."""

    def __init__(self, root: str, length: int, num_frames: int) -> None:
        self.folders = sorted({str(path.parent) for path in Path(root).rglob("*.jpg")})
        self.length, self.num_frames = length, num_frames

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> torch.Tensor:
        folder = self.folders[number % len(self.folders)]
        files = sorted(os.listdir(folder))
        gap = int(GAP * len(files))
        first = random.randrange(1, len(files) - gap)
        wanted = [first, first + gap]
        if self.num_frames == 4:
            wanted = [first - 1, first, first + gap - 1, first + gap]
        images = []
        for frame in wanted:
            with Image.open(os.path.join(folder, files[frame])) as image:
                images.append(image.convert("RGB"))
        if self.num_frames == 2:
            return augment(images)
        # All four are resized twice, to the square and from the crop; the second and the fourth are used.
        squares = [image.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images]
        return augment([functional.to_tensor(square) for square in squares])[1::2]


class VideoPairs(Dataset[torch.Tensor]):
    """Video files through torchcodec or decord, two frames by number."""

    def __init__(self, root: str, length: int, library: str) -> None:
        self.files = sorted(str(path) for path in Path(root).iterdir())
        self.length, self.library = length, library

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> torch.Tensor:
        path = self.files[number % len(self.files)]
        if self.library == "torchcodec":
            from torchcodec.decoders import VideoDecoder

            decoder = VideoDecoder(path, num_ffmpeg_threads=1)
            pair = draw_numbers(len(decoder))
            frames = decoder.get_frames_at(pair).data
        else:
            import decord

            reader = decord.VideoReader(path, num_threads=1)
            pair = draw_numbers(len(reader))
            frames = torch.from_numpy(reader.get_batch(pair).asnumpy()).permute(0, 3, 1, 2)
        return augment(list(frames))


def draw_numbers(length: int) -> list[int]:
    gap = int(GAP * length)
    first = random.randrange(1, length - gap)
    return [first, first + gap]


def augment(images: list[Any]) -> torch.Tensor:
    """One crop and one flip for all, resized and normalised by torchvision: (frames, 3, SIZE, SIZE)."""
    width, height = functional.get_image_size(images[0])
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
        levels = functional.to_tensor(crop) if isinstance(crop, Image.Image) else crop.float()
        levels = levels / 255 if isinstance(crop, torch.Tensor) and crop.dtype == torch.uint8 else levels
        out.append(functional.normalize(levels, IMAGENET_MEAN, IMAGENET_STD))
    return torch.stack(out)


def workers(setting: Setting, dataset: Dataset[torch.Tensor]) -> Iterator[Any]:
    loader = DataLoader(dataset, batch_size=setting.batch, num_workers=setting.threads)
    for batch in loader:
        yield batch.to(setting.device, non_blocking=True)


def contenders(setting: Setting) -> dict[str, Contender]:
    """All that can run here, by name."""

    def ours(source: str, decoder: Decoder = "auto") -> Contender:
        return lambda batches: our_pairs(setting, source, decoder, batches)

    def pil(num_frames: int) -> Contender:
        return lambda batches: workers(
            setting, FolderPairs(setting.frames, batches * setting.batch, num_frames)
        )

    def library(name: str) -> Contender:
        return lambda batches: workers(setting, VideoPairs(setting.videos, batches * setting.batch, name))

    found: dict[str, Contender] = {
        "ours, packed": ours(setting.packed),
        "ours, folders": ours(setting.frames),
        "ours, video": ours(setting.videos),
        "ours, packed, decoding alone": lambda _: decode_only(setting),
        "PIL, two frames": pil(2),
        BASELINE: pil(4),
    }
    if setting.device == "cuda":
        found["ours, packed, JPEG engines"] = ours(setting.packed, "mixed")
    for name in ("torchcodec", "decord"):
        if importlib.util.find_spec(name):
            found[f"{name}, two frames"] = library(name)
    return found


def measure(name: str, setting: Setting) -> dict[str, float]:
    """Run one contender: pairs per second, and CPU seconds per pair with all its workers."""
    warm_up = 6
    counted = max(1, setting.pairs // setting.batch)
    # The loader works ahead; what it does for batches beyond the last would count otherwise.
    batches = contenders(setting)[name](warm_up + counted + 16)
    for _ in range(warm_up):
        next(batches)
    synchronize(setting)
    cpu, start = cpu_seconds(), time.perf_counter()
    for _ in range(counted):
        next(batches)
    synchronize(setting)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    # Ends the workers, whose going down is not part of the measurement.
    del batches
    pairs = counted * setting.batch
    result = {"pairs_per_second": pairs / seconds, "cpu_seconds_per_pair": cpu / pairs}
    if setting.device == "cuda" and name.startswith("ours") and "alone" not in name:
        result |= waiting_share(contenders(setting)[name])
    return result


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its living worker processes."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def synchronize(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def waiting_share(start: Contender, steps: int = 40) -> dict[str, float]:
    """A ViT-B/16 training step fed by a loader, against the same step on a batch that stays on the GPU."""
    step = training_step()
    batches = start(steps + 20)
    resident = next(batches).frames

    def timed(feed: Callable[[], torch.Tensor]) -> float:
        for _ in range(8):
            step(feed())
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step(feed())
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    alone = timed(lambda: resident)
    fed = timed(lambda: next(batches).frames)
    return {
        "step_seconds_resident": alone,
        "step_seconds_fed": fed,
        "waiting_share": max(0.0, 1 - alone / fed),
    }


def training_step() -> Callable[[torch.Tensor], None]:
    from fasttrain.backbones import load_backbone
    from fasttrain.projection import Projection
    from fasttrain_kernels import cosettle_loss

    encoder = load_backbone("dino", weights="random").cuda()
    head = Projection(768).cuda()
    grid = encoder.grid(SIZE, SIZE)

    def step(frames: torch.Tensor) -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            views = [encoder.tokens(frames[0]), encoder.tokens(frames[1]), encoder.tokens(frames[0])]
            frozen = torch.stack(views, dim=1)
        with torch.autocast("cuda", torch.bfloat16):
            projected = head(frozen)
        cosettle_loss(frozen.float(), projected.float(), grid=grid).loss.backward()

    return step


def prepare(root: Path, source: Path | None, num_videos: int) -> dict[str, str]:
    """The same frames as JPEG folders, packed, and as H.264 files."""
    frames, videos, packed = root / "frames", root / "videos", root / "packed"
    videos.mkdir(parents=True)
    for number, name, clip in clips(source, num_videos):
        folder = frames / f"{number:04d}_{name}"
        folder.mkdir(parents=True)
        for k, frame in enumerate(clip):
            frame.save(folder / f"{k:05d}.jpg", quality=90)
        write_video(videos / f"{number:04d}_{name}.mp4", clip)
    options = PackOptions(frames=0, short_side=256, quality=90, shard_bytes=2**30, decoder="pyav")
    quiet = Console(file=io.StringIO())
    pack(frames, packed, kind="folders", part=Part(1, 1), options=options, workers=2, console=quiet)
    return {"frames": str(frames), "videos": str(videos), "packed": str(packed)}


def clips(source: Path | None, num_videos: int) -> Iterator[tuple[int, str, list[Image.Image]]]:
    index = open_source(source) if source else None
    for number in range(len(index) if index else num_videos):
        if index:
            arrays = [index.read_frame(number, frame) for frame in range(int(index.num_frames[number]))]
            name = index.names[number].replace("/", "_")
        else:
            arrays = list(render_scene(number, height=HEIGHT, width=WIDTH).frames_THWC)
            name = "scene"
        images = [
            Image.fromarray(array).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for array in arrays
        ]
        yield number, name, images


def write_video(path: Path, clip: list[Image.Image]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for image in clip:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))


def measure_all(setting: Setting, rounds: int) -> dict[str, Any]:
    """Median over the rounds, by contender, with every single reading beside it."""
    names = list(contenders(setting))
    readings: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _, name in itertools.product(range(rounds), names):
        # Spawned, so that no thread or cache of one contender is there for the next.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                readings[name].append(process.submit(measure, name, setting).result())
            # Other people's libraries may install and still not load: say so and go on.
            except (RuntimeError, OSError, ImportError) as error:
                print(f"{name}: left out, {str(error).splitlines()[0]}")
                continue
        print(name, {key: round(value, 5) for key, value in readings[name][-1].items()}, flush=True)
    results = {}
    for name, all_rounds in readings.items():
        if all_rounds:
            keys = all_rounds[0]
            medians = {key: statistics.median(reading[key] for reading in all_rounds) for key in keys}
            results[name] = {
                **medians,
                "pairs_per_cpu_second": 1 / medians["cpu_seconds_per_pair"],
                "rounds": all_rounds,
            }
    return results


def plot(results: Path) -> Path:
    """Bars of pairs per CPU second, from the JSON file alone."""
    import json

    import matplotlib.pyplot as plt

    content = json.loads(results.read_text(encoding="utf-8"))
    rates = {name: result["pairs_per_cpu_second"] for name, result in content["loaders"].items()}
    names = sorted(rates, key=rates.__getitem__)
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(names) + 1.2), layout="constrained")
    colors = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
    bars = axes.barh(names, [rates[name] for name in names], color=colors)
    axes.bar_label(
        bars, [f"{rates[name]:.0f}  ({rates[name] / rates[BASELINE]:.1f}x)" for name in names], padding=3
    )
    axes.set_xlim(right=1.3 * max(rates.values()))
    axes.set_xlabel("frame pairs per CPU second (more is better)")
    axes.set_title(f"{content['frame']} frames, {content['environment']['cpu']['model']}")
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="frame folders or videos to take the frames from")
    parser.add_argument("--videos", type=int, default=16, help="made-up videos where there is no source")
    parser.add_argument("--pairs", type=int, default=768, help="pairs that are counted, per loader and round")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, help="JSON file (results/loaders.json, or loaders-cuda.json)")
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the JSON file")
    args = parser.parse_args()
    out = args.out or RESULTS / ("loaders.json" if args.device == "cpu" else "loaders-cuda.json")
    if not args.plot:
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(
                **prepare(Path(folder), args.source, args.videos),
                batch=args.batch,
                pairs=args.pairs,
                threads=args.threads,
                device=args.device,
            )
            loaders = measure_all(setting, args.rounds)
        places = ("frames", "packed", "videos")
        write_results(
            out,
            {
                "environment": environment(),
                "frame": f"{WIDTH} x {HEIGHT} JPEG",
                "source": "/".join(args.source.parts[-2:]) if args.source else "made-up scenes",
                "setting": {key: value for key, value in asdict(setting).items() if key not in places},
                "goals": goals(loaders),
                "loaders": loaders,
            },
        )
    print(plot(out))


def goals(loaders: dict[str, Any]) -> dict[str, float]:
    """How many times the published scheme's pairs per CPU second."""
    rate = {name: result["pairs_per_cpu_second"] for name, result in loaders.items()}
    return {
        "packed_over_four_frames": rate["ours, packed"] / rate[BASELINE],
        "decoding_over_four_frames": rate["ours, packed, decoding alone"] / rate[BASELINE],
    }


if __name__ == "__main__":
    main()
