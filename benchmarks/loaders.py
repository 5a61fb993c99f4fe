"""Compare loaders of frame pairs on the same videos: fasttrain, the published implementation, torchcodec.

    python -m benchmarks.loaders [--short] [--source SOURCE]

Each loader runs in a separate process. CPU time includes that of its workers. Video files are measured only
if PyAV is installed, and torchcodec only if both are. On a GPU, the results contain the number of its JPEG
engines, and how busy they and the video decoders were. `benchmarks.step` measures how much a training
step slows down because it waits for data.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

from benchmarks.measure import (
    WARM_UPS,
    Results,
    command_line,
    in_own_process,
    interleave,
    run_command,
    run_fasttrain,
)
from fasttrain.data.images import Frame
from fasttrain.data.loader import PairLoader
from fasttrain.data.nvdec import has_dali
from fasttrain.data.packed import is_packed
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD
from fasttrain.recipe import Recipe, recipe_from_dict
from fasttrain.tools.synthetic import render_scene

SIZE = 224
# A common frame size of Kinetics-400 resized to a short side of 256.
WIDTH, HEIGHT = 340, 256
GAP, AREA, RATIO = 0.15, (0.5, 1.0), (3 / 4, 4 / 3)
# The loader of the published implementation, with which the others are compared.
BASELINE = "PIL, four frames (published)"
OURS, OUR_VIDEO = "ours, packed", "ours, video"
# Other settings of fasttrain's loader, measured on GPUs only. The JPEG engine decodes the given share of the
# images. The rest is decoded by the host and the CUDA cores together.
SWEEP: dict[str, dict[str, Any]] = {
    **{f"prefetch {n}": {"prefetch": n} for n in (3, 4)},
    **{f"JPEG engine {n:.0%}": {"decoder": "mixed", "jpeg_engine_load": n} for n in (0.65, 0.9, 1.0)},
    **{f"threads {n}": {"num_threads": n} for n in (1, 4, 8)},
}
# Decodes one image with nvImageCodec.
DECODE_ONE = """
import io, numpy, torch
from PIL import Image
from fasttrain.data.dali import Graph, bytes_input, decode_images
file = io.BytesIO()
Image.new("RGB", (64, 64)).save(file, "JPEG")
decode = lambda: decode_images(bytes_input(), device="mixed", engine_load=1.0)
graph = Graph(decode, batch_size=1, device=torch.device("cuda"))
graph.submit(stored=[numpy.frombuffer(file.getvalue(), numpy.uint8)])
graph.collect()
"""


def our_batches(recipe: Recipe, world: World, batches: int) -> Generator[Tensor, None, None]:
    """Yield batches of frames (2, B, 3, S, S) that fasttrain loads from the recipe's source."""
    index = open_source(recipe.data.source, cache_size=recipe.data.cache_size)
    loader = PairLoader(index=index, recipe=recipe, world=world, first_step_index=0, num_steps=batches)
    try:
        for batch in loader:
            yield batch.frames
    finally:
        loader.close()


def worker_batches(
    folder: str, load: Callable[[str], Tensor], batch_size: int, batches: int, device: torch.device
) -> Generator[Tensor, None, None]:
    """Yield frames (B, 2, 3, S, S) from a DataLoader that calls `load` on the entries of a folder."""
    entries = sorted(map(str, Path(folder).iterdir()))
    loader = DataLoader(
        [entries[number % len(entries)] for number in range(batches * batch_size)],
        batch_size=batch_size,
        num_workers=len(os.sched_getaffinity(0)),
        collate_fn=partial(load_all, load),
        # A forked worker could deadlock on a lock that a thread of DALI holds.
        multiprocessing_context="spawn",
    )
    for batch in loader:
        yield batch.to(device, non_blocking=True)


def load_all(load: Callable[[str], Tensor], entries: list[str]) -> Tensor:
    return torch.stack([load(entry) for entry in entries])


def published_pair(folder: str) -> Tensor:
    """Load two frames of a folder with PIL. Like the published implementation, decode four and use two."""
    files = sorted(os.listdir(folder))
    squares = []
    # All four are resized twice: the whole frame to a square, then its crop. The second and fourth are used.
    for frame in [frame - back for frame in draw_pair(len(files)) for back in (1, 0)]:
        with Image.open(os.path.join(folder, files[frame])) as image:
            square = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            squares.append(functional.to_tensor(square))
    return augment(squares)[1::2]


def torchcodec_pair(path: str) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1)
    return augment(list(decoder.get_frames_at(draw_pair(len(decoder))).data))


def draw_pair(length: int) -> list[int]:
    gap = int(GAP * length)
    first = random.randrange(1, length - gap)
    return [first, first + gap]


def augment(images: list[Tensor]) -> Tensor:
    """Apply one crop and flip to all images, and resize and normalise them: (frames, 3, SIZE, SIZE)."""
    box = RandomResizedCrop.get_params(images[0], AREA, RATIO)
    flip = random.random() < 0.5
    out = []
    for image in images:
        crop = functional.resized_crop(image, *box, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True)
        crop = functional.hflip(crop) if flip else crop
        levels = functional.convert_image_dtype(crop, torch.float32)
        out.append(functional.normalize(levels, IMAGENET_MEAN, IMAGENET_STD))
    return torch.stack(out)


def contenders(setting: dict[str, Any], batches: int = 0) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """Return functions that start the loaders available on this machine, by name.

    The most important loaders come first, because time may run out. `setting` contains `batch`, `device`, the
    paths from `prepare`, and that of video files if there are any.
    """
    batch, device = setting["batch"], torch.device(setting["device"])
    on_gpu = device.type == "cuda"

    def ours(kind: str, **data: Any) -> Callable[[], Iterator[Tensor]]:
        # Draw many pairs per video, since an epoch of a small source must contain at least one batch.
        source = {"source": setting[kind], "pairs_per_video": batch, **data}
        crop = {"image_size": SIZE, "gap": GAP, "crop_area": AREA, "crop_ratio": RATIO}
        train = {"batch_size": batch, "precision": "bf16" if on_gpu else "fp32"}
        recipe = recipe_from_dict({"data": {**crop, **source}, "train": train})
        return partial(our_batches, recipe, World.single(device), batches)

    def theirs(kind: str, load: Callable[[str], Tensor]) -> Callable[[], Iterator[Tensor]]:
        return partial(worker_batches, setting[kind], load, batch, batches, device)

    loaders = {OURS: ours("packed"), BASELINE: theirs("frames", published_pair)}
    for name, data in SWEEP.items() if on_gpu else ():
        loaders[f"{OURS}, {name}"] = ours("packed", **data)
    if "videos" in setting:
        loaders[OUR_VIDEO] = ours("videos")
        if importlib.util.find_spec("torchcodec"):
            loaders["torchcodec, two frames"] = theirs("videos", torchcodec_pair)
    return loaders


def measure(name: str, setting: dict[str, Any]) -> dict[str, float]:
    """Measure the wall time and CPU time per batch of one loader."""
    batch, rounds = setting["batch"], setting["rounds"]
    calls = max(1, setting["pairs"] // batch)
    # Loaders prefetch. Extra batches keep them busy until the end of the last round.
    batches = contenders(setting, WARM_UPS + rounds * calls + 16)[name]()
    with engine_use() as use:
        timing = interleave({name: lambda: next(batches)}, rounds=rounds, calls=calls)[name]
    for _ in batches:
        pass  # Consume the rest: workers that are stopped in the middle of a batch may abort.
    result = timing.result(batch)
    return {**result, "pairs_per_cpu_second": 1e3 * batch / result["cpu_ms"], **use}


@contextmanager
def engine_use() -> Iterator[dict[str, float]]:
    """Yield a dictionary that receives the mean utilisation in % of the GPU, its decoders and JPEG engines.

    It stays empty without nvidia-smi, and lacks what the driver does not report.
    """
    use: dict[str, float] = {}
    names = ("gpu", "decoder", "jpeg")
    query = ",".join(f"utilization.{name}" for name in names)
    command = [
        "nvidia-smi",
        f"--query-gpu={query}",
        "--format=csv,noheader,nounits",
        "--loop-ms=100",
        "--id=0",
    ]
    try:
        watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        yield use
        return
    try:
        yield use
    finally:
        watch.terminate()
        lines, _ = watch.communicate()
    for name, *values in zip(names, *(line.split(",") for line in lines.splitlines()), strict=False):
        numbers = [float(value) for value in values if value.strip().isdigit()]
        if numbers:
            use[f"{name}_percent"] = sum(numbers) / len(numbers)


def jpeg_engines() -> int:
    """Return the number of the GPU's JPEG engines that nvImageCodec finds.

    There are none in a container without the driver capability `video`, and DALI then decodes without them.
    Raises ModuleNotFoundError if DALI is not installed.
    """
    # `Results` then skips this measurement and names the package.
    import nvidia.dali  # noqa: F401

    environment = {**os.environ, "DALI_NVIMGCODEC_LOG_LEVEL": "3"}
    decode = subprocess.run(
        [sys.executable, "-c", DECODE_ONE], env=environment, capture_output=True, text=True
    )
    if decode.returncode:
        raise RuntimeError((decode.stderr.splitlines() or ["no image was decoded"])[-1])
    found = re.search(r"num_hw_engines=(\d+)", decode.stdout + decode.stderr)
    return int(found[1]) if found else 0


def prepare(root: Path, source: Path | None, num_videos: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the same frames as frame folders and as a packed set; return their paths and a description.

    The frames of a packed set are taken as they are. Those of another source and of synthetic scenes are
    resized to WIDTH x HEIGHT.
    """
    frames, packed = root / "frames", root / "packed"
    if source is not None and is_packed(source):
        packed = source
        stored = open_source(source)
        for video, length in enumerate(stored.num_frames.tolist()):
            folder = frames / f"{video:04d}"
            folder.mkdir(parents=True)
            for frame, encoded in enumerate(stored.read(video, range(length))):
                (folder / f"{frame:05d}.jpg").write_bytes(encoded)
    else:
        for number, clip in enumerate(clips(source, num_videos)):
            folder = frames / f"{number:04d}"
            folder.mkdir(parents=True)
            for frame, pixels in enumerate(clip):
                image = Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
                image.save(folder / f"{frame:05d}.jpg", quality=90)
        run_fasttrain("pack", "--kind", "folders", str(frames), str(packed))
    index = open_source(packed)
    described = {
        "source": "/".join(source.parts[-2:]) if source else "synthetic scenes",
        "videos": len(index),
        "frames": int(index.num_frames.sum()),
        "loader": "DALI" if has_dali() else "PyTorch",
    }
    return {"frames": str(frames), "packed": str(packed)}, described


def encode_videos(packed: str, folder: Path) -> str:
    """Write the videos of a packed set as H.264 files of WIDTH x HEIGHT pixels, and return their folder."""
    import av

    folder.mkdir()
    for number, clip in enumerate(clips(Path(packed), 0)):
        with av.open(str(folder / f"{number:04d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "20"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for pixels in clip:
                image = Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode(None))
    return str(folder)


def clips(source: Path | None, num_videos: int) -> Iterator[list[Frame]]:
    """Yield the frames of each video of the source, or of synthetic scenes."""
    if source is None:
        for seed in range(num_videos):
            yield list(render_scene(seed, height=HEIGHT, width=WIDTH).frames_THWC)
    else:
        index = open_source(source)
        for video, length in enumerate(index.num_frames.tolist()):
            yield [index.read_frame(video, frame) for frame in range(length)]


def main(arguments: list[str] | None = None) -> None:
    parser = command_line("loaders", __doc__)
    parser.add_argument(
        "--source",
        type=Path,
        metavar="SOURCE",
        help="videos, frame folders or a packed set to load (default: synthetic scenes)",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        metavar="N",
        help="pairs per round (default: 768, or 384 with --short; 4 times as many on a GPU)",
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="pairs per batch (default: 64 on a CPU, 128 on a GPU)"
    )
    args = parser.parse_args(arguments)
    on_gpu = args.device == "cuda"
    setting: dict[str, Any] = {
        "batch": args.batch or (128 if on_gpu else 64),
        "pairs": args.pairs or (384 if args.short else 768) * (4 if on_gpu else 1),
        "rounds": 3,
        "threads": len(os.sched_getaffinity(0)),
        "device": args.device,
    }
    results = Results("loaders", args, setting=setting)
    if on_gpu:
        results.record("jpeg_engines", jpeg_engines)
    with tempfile.TemporaryDirectory() as folder:
        paths, results.content["data"] = prepare(Path(folder), args.source, 4 if args.short else 16)
        if videos := results.attempt(
            OUR_VIDEO, partial(encode_videos, paths["packed"], Path(folder, "videos"))
        ):
            paths["videos"] = videos
        setting = {**setting, **paths}
        for name in contenders(setting):
            left = results.deadline - time.monotonic()
            run = partial(in_own_process, measure, name, setting, seconds=left)
            results.record(name, run, group="loaders")
    results.finish()


if __name__ == "__main__":
    run_command(main)
