"""Frame-pair loaders on the same files: ours, PIL the obvious way, the published scheme, torchcodec, decord.

    python -m benchmarks.loaders --source FRAME_FOLDERS      measure, write results/loaders.json and its plot
    python -m benchmarks.loaders --short                     one round of fewer pairs
    python -m benchmarks.loaders --plot                      draw the plot again from the JSON

Every contender runs in a process of its own, all of them once a round, so that a busy machine is busy for
all. CPU seconds are those of the process and its workers, from the kernel's books; the first batches, in
which workers start and pipelines fill, do not count. Without --source, made-up scenes are rendered.

On a GPU (results/loaders-cuda.json) JPEG is decoded on the host and by the JPEG engine at several shares, and
a ViT-B/16 training step on each of our loaders is set against the same step on a batch that stays on the GPU:
the share of the step that is spent waiting for data. There the short form measures many in one process.

What cannot run, dies or hangs stands in the JSON under `skipped` with the reason, and costs no other figure.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, functional

from benchmarks.measure import cpu_seconds, synchronize
from benchmarks.record import RESULTS, environment, write_results
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.data import FramePairs, PairLoader, PairSampling, open_source
from fasttrain.data.dali import Decoder, HostDecoder
from fasttrain.data.images import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.data.pack import PackOptions, pack
from fasttrain.data.packed import Part
from fasttrain.data.sampling import draw_crop
from fasttrain.distributed import World
from fasttrain.recipe import recipe_from_dict
from fasttrain.tools.synthetic import render_scene

SIZE = 224
# The usual size of Kinetics-400 with a short side of 256.
WIDTH, HEIGHT = 340, 256
GAP, AREA, RATIO = 0.15, (0.5, 1.0), (3 / 4, 4 / 3)
# The published scheme: what every other loader is compared with.
BASELINE = "PIL, four frames (published)"
OURS = "ours, packed"
DECODING = "ours, packed, decoding alone"
# Shares of the JPEG engine; its CUDA cores decode the rest.
ENGINE_LOADS = (0.65, 0.75, 0.85, 0.95, 1.0)
SHORTLY_FED = (OURS, f"{OURS}, JPEG engine 65%", f"{OURS}, JPEG engine 100%", "ours, video")
# A contender that has not answered by then hangs.
PATIENCE = 300.0


# Given the number of batches, starts a loader.
Contender = Callable[[int], Iterator[Any]]
# What is measured of a contender: the loader alone, or a training step on it.
Job = tuple[Literal["loaders", "training_step"], str]


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
    # Of the training step.
    steps: int = 40
    compile: str = "auto"
    small: bool = False


def our_pairs(
    setting: Setting, source: str, decoder: Decoder, batches: int, *, engine_load: float = 0.65
) -> Iterator[FramePairs]:
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
        jpeg_engine_load=engine_load,
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

    def ours(source: str, decoder: Decoder = "auto", engine_load: float = 0.65) -> Contender:
        return lambda batches: our_pairs(setting, source, decoder, batches, engine_load=engine_load)

    def pil(num_frames: int) -> Contender:
        return lambda batches: workers(
            setting, FolderPairs(setting.frames, batches * setting.batch, num_frames)
        )

    def library(name: str) -> Contender:
        return lambda batches: workers(setting, VideoPairs(setting.videos, batches * setting.batch, name))

    found: dict[str, Contender] = {
        OURS: ours(setting.packed),
        "ours, folders": ours(setting.frames),
        "ours, video": ours(setting.videos),
        DECODING: lambda _: decode_only(setting),
        "PIL, two frames": pil(2),
        BASELINE: pil(4),
    }
    if setting.device == "cuda":
        for load in ENGINE_LOADS:
            found[f"{OURS}, JPEG engine {load:.0%}"] = ours(setting.packed, "mixed", load)
        found["ours, video on the host"] = ours(setting.videos, "cpu")
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
    synchronize(torch.device(setting.device))
    cpu, start = cpu_seconds(), time.perf_counter()
    for _ in range(counted):
        next(batches)
    synchronize(torch.device(setting.device))
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    # Ends the workers, whose going down is not part of the measurement.
    del batches
    pairs = counted * setting.batch
    return {"pairs_per_second": pairs / seconds, "cpu_seconds_per_pair": cpu / pairs}


def measure_step(name: str, setting: Setting) -> dict[str, float]:
    """A training step fed by a loader, against the same step on a batch that stays on the device."""
    warm_up = 8
    step = training_step(setting)
    batches = contenders(setting)[name](setting.steps + warm_up + 16)
    resident = next(batches).frames

    def timed(feed: Callable[[], torch.Tensor]) -> float:
        for _ in range(warm_up):
            step(feed())
        synchronize(torch.device(setting.device))
        begin = time.perf_counter()
        for _ in range(setting.steps):
            step(feed())
        synchronize(torch.device(setting.device))
        return (time.perf_counter() - begin) / setting.steps

    alone = timed(lambda: resident)
    fed = timed(lambda: next(batches).frames)
    return {
        "step_seconds_resident": alone,
        "step_seconds_fed": fed,
        "waiting_share": max(0.0, 1 - alone / fed),
    }


@lru_cache(maxsize=1)
def training_step(setting: Setting) -> Callable[[torch.Tensor], None]:
    """The trainer's own step: ViT-B/16 with its head, loss and optimiser, log steps left out."""
    sizes = {"embed_dim": 64, "depth": 2} if setting.small else {}
    recipe = recipe_from_dict(
        {
            "backbone": {"name": "dino", "patch_size": 16, **sizes},
            "encoder": {"compile": setting.compile},
            "data": {"image_size": SIZE},
            "train": {
                "batch_size": setting.batch,
                "precision": "bf16" if setting.device == "cuda" else "fp32",
            },
        }
    )
    device = torch.device(setting.device, 0) if setting.device == "cuda" else torch.device("cpu")
    student = BackboneTrainer(recipe, World(rank=0, size=1, local_rank=0, local_size=1, device=device))
    student.warm_up()

    def step(frames: torch.Tensor) -> None:
        student.forward_backward(frames, 1, last=True, diagnostics=False)
        student.update(1e-4)

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


def jobs(setting: Setting, *, short: bool) -> list[Job]:
    """What is measured, the most wanted first: time may run out."""
    names = list(contenders(setting))
    wanted: list[Job] = [("loaders", name) for name in names]
    if setting.device == "cuda":
        fed = [name for name in names if name.startswith("ours") and name != DECODING]
        # The ends of the sweep tell whether what lies between is worth a look.
        fed = [name for name in fed if not short or name in SHORTLY_FED]
        wanted += [("training_step", name) for name in fed]
    first = {("loaders", OURS): 0, ("loaders", BASELINE): 1, ("training_step", OURS): 2}
    # A decoder is made for every clip of NVDEC, which may take all the time there is: last.
    return sorted(wanted, key=lambda job: first.get(job, 4 if job[1] == "ours, video" else 3))


def groups(wanted: list[Job], setting: Setting, *, short: bool) -> list[list[Job]]:
    """Jobs that share a process: none do, but on a GPU, where starting takes longest, in the short form."""
    if not short or setting.device == "cpu":
        return [[job] for job in wanted]
    theirs = [job for job in wanted if not job[1].startswith("ours")]
    # Theirs take little time, and ours are compared with them.
    return [theirs, [job for job in wanted if job not in theirs]]


def run_group(
    group: list[Job], setting: Setting, deadline: float, worker: Callable[..., None] | None = None
) -> Iterator[tuple[Job, Any]]:
    """Every job with its readings or, as a string, why there are none; `worker` stands in for `answer`."""
    # Spawned, so that no thread or cache of one contender is there for the next.
    context = multiprocessing.get_context("spawn")
    left = list(group)
    while left:
        if time.monotonic() > deadline:
            yield left.pop(0), "out of time"
            continue
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=worker or answer, args=(theirs, list(left), setting))
        process.start()
        theirs.close()
        try:
            while left:
                patience = min(PATIENCE, deadline - time.monotonic())
                if not ours.poll(max(0.0, patience)):
                    yield left.pop(0), "out of time" if patience < PATIENCE else "it hangs"
                    break
                outcome = ours.recv()
                yield left.pop(0), outcome
        except EOFError:
            process.join()
            yield left.pop(0), f"its process died with exit code {process.exitcode}"
        finally:
            # What has answered all has nothing left to lose, and what hangs would not leave.
            process.join(5 if not left else 0)
            process.kill()
            process.join()


def answer(pipe: Connection, group: list[Job], setting: Setting) -> None:
    """In a process of its own: measure and send, one job after the other."""
    for kind, name in group:
        try:
            pipe.send(measure(name, setting) if kind == "loaders" else measure_step(name, setting))
        # Other people's libraries may install and still not load; whatever it is, the others go on.
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def measure_all(setting: Setting, rounds: int, *, short: bool, seconds: float) -> dict[str, Any]:
    """Sections `loaders`, `training_step` and `skipped`: medians over the rounds, with every reading."""
    deadline = time.monotonic() + seconds
    readings: dict[Job, list[dict[str, float]]] = {}
    skipped: dict[str, str] = {}
    for _ in range(rounds):
        for group in groups(jobs(setting, short=short), setting, short=short):
            for job, outcome in run_group(group, setting, deadline):
                label = job[1] if job[0] == "loaders" else f"{job[1]}, training step"
                if isinstance(outcome, str):
                    skipped[label] = outcome
                    print(f"{label}: left out, {outcome}", flush=True)
                    continue
                readings.setdefault(job, []).append(outcome)
                print(label, {key: round(value, 5) for key, value in outcome.items()}, flush=True)
    results: dict[str, Any] = {"loaders": {}, "training_step": {}, "skipped": skipped}
    for (kind, name), all_rounds in readings.items():
        medians = {key: statistics.median(reading[key] for reading in all_rounds) for key in all_rounds[0]}
        if kind == "loaders":
            medians["pairs_per_cpu_second"] = 1 / max(medians["cpu_seconds_per_pair"], 1e-9)
        results[kind][name] = {**medians, "rounds": all_rounds}
    return results


def plot(results: Path) -> Path:
    """Bars of pairs per CPU second, on a GPU of pairs per second; from the JSON file alone."""
    import matplotlib.pyplot as plt

    content = json.loads(results.read_text(encoding="utf-8"))
    on_gpu = content["setting"]["device"] == "cuda"
    key = "pairs_per_second" if on_gpu else "pairs_per_cpu_second"
    rates = {name: result[key] for name, result in content["loaders"].items()}
    names = sorted(rates, key=rates.__getitem__)
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(names) + 1.2), layout="constrained")
    colors = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
    bars = axes.barh(names, [rates[name] for name in names], color=colors)
    ratios = {name: f"  ({rate / rates[BASELINE]:.1f}x)" for name, rate in rates.items() if BASELINE in rates}
    axes.bar_label(bars, [f"{rates[name]:.0f}{ratios.get(name, '')}" for name in names], padding=3)
    axes.set_xlim(right=1.3 * max(rates.values(), default=1.0))
    axes.set_xlabel(f"frame pairs per {'second' if on_gpu else 'CPU second'} (more is better)")
    environment = content["environment"]
    axes.set_title(f"{content['frame']} frames, {environment['device'] or environment['cpu']['model']}")
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="frame folders or videos to take the frames from")
    parser.add_argument("--videos", type=int, help="made-up videos where there is no source (16; short: 4)")
    parser.add_argument(
        "--pairs", type=int, help="pairs that are counted, per loader and round (768; short: 384)"
    )
    parser.add_argument("--batch", type=int, help="pairs in a batch (64; on a GPU 128)")
    parser.add_argument("--rounds", type=int, help="(3; short: 1)")
    parser.add_argument("--short", action="store_true", help="one round, fewer pairs and steps")
    parser.add_argument(
        "--limit", type=float, default=3600, metavar="SECONDS", help="measure no longer (3600); then write"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, help="JSON file (results/loaders.json, or loaders-cuda.json)")
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the JSON file")
    args = parser.parse_args()
    out = args.out or RESULTS / ("loaders.json" if args.device == "cpu" else "loaders-cuda.json")
    if not args.plot:
        on_gpu = args.device == "cuda"
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(
                **prepare(Path(folder), args.source, args.videos or (4 if args.short else 16)),
                batch=args.batch or (128 if on_gpu else 64),
                pairs=args.pairs or (384 if args.short else 768) * (4 if on_gpu else 1),
                threads=args.threads,
                device=args.device,
                steps=20 if args.short else 40,
                compile="none" if args.short else "auto",
            )
            results = measure_all(
                setting,
                args.rounds or (1 if args.short else 3),
                short=args.short,
                seconds=args.limit - (time.monotonic() - begin),
            )
        places = ("frames", "packed", "videos")
        write_results(
            out,
            {
                "environment": environment(),
                "frame": f"{WIDTH} x {HEIGHT} JPEG",
                "source": "/".join(args.source.parts[-2:]) if args.source else "made-up scenes",
                "setting": {key: value for key, value in asdict(setting).items() if key not in places},
                "goals": goals(results),
                **results,
            },
        )
    print(plot(out))


def goals(results: dict[str, Any]) -> dict[str, Any]:
    """What the figures say of the goals, as far as they are there.

    On any machine: how many times the published scheme's pairs per CPU second (goals 2 and 7). On a GPU:
    frames/s on the device (goal 9,000 with 16 cores) and the share of a step spent waiting (goal 0.03), each
    of the best way to decode, and which that is.
    """
    loaders, steps = results["loaders"], results["training_step"]
    told: dict[str, Any] = {}
    for key, name in (("packed_over_four_frames", OURS), ("decoding_over_four_frames", DECODING)):
        if name in loaders and BASELINE in loaders:
            told[key] = loaders[name]["pairs_per_cpu_second"] / loaders[BASELINE]["pairs_per_cpu_second"]
    if steps:
        from_packed = {name: reading for name, reading in loaders.items() if name.startswith(OURS)}
        from_packed.pop(DECODING, None)
        if from_packed:
            best = max(from_packed, key=lambda name: from_packed[name]["pairs_per_second"])
            told["fastest_decoding"] = best
            told["frames_per_second_on_device"] = 2 * from_packed[best]["pairs_per_second"]
        best = min(steps, key=lambda name: steps[name]["waiting_share"])
        told["least_waiting"] = best
        told["waiting_share"] = steps[best]["waiting_share"]
    return told


if __name__ == "__main__":
    main()
