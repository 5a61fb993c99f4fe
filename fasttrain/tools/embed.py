"""Write the features of videos for use in other programs, one file per video.

The features are those after the projection, if there is one. OUT/NAME.safetensors has the arrays

    tokens  (T, h, w, D)  the patch tokens on their grid; with --pool instead
    pooled  (T, D)        the mean over the tokens of each frame
    frames  (T,) int64    the numbers of the encoded frames in the video, from 0

and describes the video and the encoder in its metadata. NAME is the path of the video in VIDEOS. Repeat a
command that was stopped to continue: videos that have a file are skipped. Under torchrun, the processes
divide the videos among themselves:

    torchrun --nproc-per-node=8 -m -- fasttrain embed VIDEOS OUT --run RUN
"""

# Shape suffixes: T frames, B frames of a batch, H W pixels, h w token grid, N = h * w, D channels.

import argparse
import errno
import json
import os
import posixpath
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fasttrain import distributed
from fasttrain.data.images import UnreadableFrameError
from fasttrain.data.index import FrameIndex
from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.preprocessing import encoded_size, normalise, resize, stream_frames
from fasttrain.data.sources import describe_left_out, describe_unreadable, open_source
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel, describe_model, load_model
from fasttrain.errors import InputError, check_options
from fasttrain.files import open_atomically, os_reason, parse_json, printable, write_json
from fasttrain.loggers import Progress, say

# In OUT: the settings of all files and the videos that were skipped.
SETTINGS_FILE = "embed.json"
# The number of frames that a thread reads at a time. It has to decode a video from the key frame before them.
PART = 256
MAX_WORKERS = 16
MAX_PRINTED = 20
# The names of dtypes in safetensors files.
_DTYPES = {"float16": "F16", "float32": "F32", "int64": "I64"}


class _Array(NamedTuple):
    """An array that is written in parts, because all of it may not fit in memory."""

    dtype: str
    shape: tuple[int, ...]
    parts: Iterable[npt.NDArray[Any]]


class _SkippedError(Exception):
    """Raised if a video has no file. The message is the reason."""


def run(arguments: argparse.Namespace) -> None:
    """Write the features of all videos. Raises InputError if the options or the videos cannot be used."""
    try:
        with distributed.start(arguments.device) as world:
            _run(arguments, world)
    except KeyboardInterrupt:
        say("Stopped. Run the same command again to continue.")
        raise


def _run(arguments: argparse.Namespace, world: World) -> None:
    model, settings = world.run_on_all(lambda: _prepare(arguments, world.device))
    index = open_source(arguments.videos, world=world)
    paths = output_paths(index.names, arguments.out, arguments.format)
    if world.is_main:
        write_json(arguments.out / SETTINGS_FILE, {"settings": settings, "skipped": []})
    share = world.shard(range(len(index)))
    todo = [video for video in share if not os.path.exists(paths[video])]
    mine = _embed(todo, index, paths, model, settings, arguments, world)
    written = [video for video in share if index.names[video] not in mine]
    counts = (
        len(written),
        len(share) - len(todo),
        sum(len(_numbers(index, video, arguments)) for video in written),
        sum(os.path.getsize(paths[video]) for video in written),
    )
    videos, earlier, frames, size = (sum(values) for values in zip(*world.gather(counts), strict=True))
    skipped = [*index.skipped, *world.merge(mine).items()]
    if not world.is_main:
        return
    write_json(arguments.out / SETTINGS_FILE, {"settings": settings, "skipped": skipped})
    if not videos:
        raise InputError(f"{arguments.videos!r} {describe_unreadable(skipped, index.left_out)}")
    for name, reason in skipped[:MAX_PRINTED]:
        say(f"skipped {name}: {reason}")
    if index.left_out:
        say(describe_left_out(index.left_out))
    listed = f" (listed in {arguments.out / SETTINGS_FILE})" if skipped else ""
    say(
        f"videos: {videos} ({earlier} from before), frames: {frames}, size: {size / 1e6:.1f} MB, "
        f"skipped: {len(skipped)}{listed}"
    )
    example = next(path for path in paths if os.path.exists(path))
    reader = (
        "numpy import load" if arguments.format == "npz" else "safetensors.numpy import load_file as load"
    )
    array, shape = ("pooled", "(T, D)") if arguments.pool else ("tokens", "(T, h, w, D)")
    say(f"to read one: from {reader}; {array} = load({str(example)!r})[{array!r}]  # {shape}")


def _prepare(arguments: argparse.Namespace, device: torch.device) -> tuple[EvaluatedModel, dict[str, Any]]:
    """Check the options, load the encoder, and compare the settings with those of the files in OUT."""
    check_options(arguments, size=1, stride=1, batch_size=1)
    if len(arguments.size) > 2:
        sides = " ".join(map(str, arguments.size))
        raise InputError(f"--size {sides}: expected the short side, or height and width")
    arguments.size = arguments.size if len(arguments.size) == 2 else arguments.size[0]
    model = load_model(arguments, device)
    described = describe_model(model.encoder, model.projection if model.variants[-1] == "after" else None)
    # The features do not depend on the place of the weights.
    del described["weights"]
    options = ("size", "stride", "pool", "precision", "dtype", "format")
    settings = described | {name: getattr(arguments, name) for name in options}
    # With lists instead of tuples, as in the file.
    settings = json.loads(json.dumps(settings))
    path = arguments.out / SETTINGS_FILE
    if path.exists():
        try:
            earlier = parse_json(path.read_bytes())["settings"]
            differing = [
                f"{key} was {earlier.get(key)}, now {value}"
                for key, value in settings.items()
                if earlier.get(key) != value
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"'{path}' is damaged ({error}). Use another OUT, or delete this one."
            ) from error
        if differing:
            raise InputError(
                f"'{arguments.out}' has features with other settings ({'; '.join(differing)}). Use another "
                "OUT, or the same settings."
            )
    return model, settings


def output_paths(names: Iterable[str], out: Path, suffix: str) -> list[Path]:
    """Return the file of each video, which is named as the video and never outside OUT.

    Raises InputError if two videos would have the same file.
    """
    paths: dict[Path, str] = {}
    for name in names:
        # A list may contain absolute paths, and paths that lead upwards.
        parts = posixpath.normpath(name).lstrip("/").split("/")
        path = out / "/".join(
            "_" if part == ".." else part for part in (*parts[:-1], f"{parts[-1]}.{suffix}")
        )
        if path in paths:
            raise InputError(
                f"videos {paths[path]!r} and {name!r} would have the same file '{path}'. List one of them "
                "under another path, or use two folders."
            )
        paths[path] = name
    return list(paths)


def _numbers(index: FrameIndex, video: int, arguments: argparse.Namespace) -> range:
    """Return the numbers of the frames to encode."""
    return range(0, int(index.num_frames[video]), arguments.stride)


def _embed(
    videos: list[int],
    index: FrameIndex,
    paths: list[Path],
    model: EvaluatedModel,
    settings: dict[str, Any],
    arguments: argparse.Namespace,
    world: World,
) -> dict[str, str]:
    """Write the files of some videos. Returns the reason for each that is skipped, by name.

    Threads read and resize the frames of several videos ahead. This one encodes and writes, in order.
    """
    numbers = {video: _numbers(index, video, arguments) for video in videos}

    @lru_cache(maxsize=1024)
    def size_of(video: int) -> tuple[int, int]:
        frame_HWC = index.read_frame(video, 0)
        return encoded_size(frame_HWC.shape[:2], arguments.size, model.encoder.patch_size)

    def read(part: tuple[int, range]) -> Tensor | UnreadableFrameError:
        """Read frames: (T, 3, H, W) uint8, or the reason why they cannot be read."""
        video, frames = part
        try:
            size = size_of(video)
            return torch.stack([resize(frame, size) for frame in stream_frames(index, video, frames)])
        except UnreadableFrameError as error:
            return error

    def encode(parts: Iterable[Tensor | UnreadableFrameError]) -> Iterator[npt.NDArray[Any]]:
        """Encode frames in batches: (B, h, w, D) or (B, D)."""
        for part in parts:
            if isinstance(part, UnreadableFrameError):
                raise _SkippedError(f"frame {part.frame}: {part}" if part.frame else str(part))
            grid = model.encoder.grid(part.shape[-2], part.shape[-1])
            for batch_B3HW in part.split(arguments.batch_size):
                frames_B3HW = normalise(batch_B3HW.to(world.device), model.encoder.mean, model.encoder.std)
                with torch.autocast(world.device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
                    tokens_BND = model.tokens(frames_B3HW)[model.variants[-1]]
                features = tokens_BND.mean(dim=1) if arguments.pool else tokens_BND.unflatten(1, grid)
                features = features.to(getattr(torch, arguments.dtype))
                if not features.isfinite().all():
                    raise _SkippedError(f"its features are not all finite in {arguments.dtype}")
                yield features.cpu().numpy()
                progress.advance(len(batch_B3HW))

    def write(video: int, parts: Iterable[Tensor | UnreadableFrameError]) -> None:
        frames = numbers[video]
        features = encode(parts)
        first = next(features)
        size = size_of(video)
        arrays = {
            "frames": _Array("int64", (len(frames),), [np.array(frames, dtype=np.int64)]),
            "pooled" if arguments.pool else "tokens": _Array(
                arguments.dtype, (len(frames), *first.shape[1:]), chain([first], features)
            ),
        }
        metadata = {
            "video": printable(index.names[video]),
            "num_frames": int(index.num_frames[video]),
            "frame_size": size,
            "grid": model.encoder.grid(*size),
            **{name: value for name, value in settings.items() if name != "format" and value is not None},
        }
        with open_atomically(paths[video]) as file:
            (_write_npz if arguments.format == "npz" else _write_safetensors)(file, arrays, metadata)

    split = (
        (video, frames[start : start + PART])
        for video, frames in numbers.items()
        for start in range(0, len(frames), PART)
    )
    workers = min(MAX_WORKERS, world.cores)
    skipped: dict[str, str] = {}
    total = sum(map(len, numbers.values()))
    with (
        closing(map_ahead(read, split, workers=workers, depth=workers + 1)) as decoded,
        Progress("frames", total, enabled=world.is_main) as progress,
    ):
        for video, frames in numbers.items():
            progress.advance(0, index.names[video])
            parts = islice(decoded, -(-len(frames) // PART))
            try:
                write(video, parts)
            except _SkippedError as error:
                skipped[index.names[video]] = str(error)
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                skipped[index.names[video]] = os_reason(error)
            for _ in parts:
                pass
    return skipped


# --- the formats of files --------------------------------------------------------------------------------


def _write_safetensors(file: IO[bytes], arrays: Mapping[str, _Array], metadata: Mapping[str, Any]) -> None:
    """Write arrays as safetensors (github.com/huggingface/safetensors), whose library needs whole arrays."""
    header: dict[str, Any] = {
        "__metadata__": {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()
        }
    }
    end = 0
    for name, (dtype, shape, _) in arrays.items():
        start, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    # Spaces align the arrays.
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        for part in array.parts:
            file.write(part.tobytes())


def _write_npz(file: IO[bytes], arrays: Mapping[str, _Array], metadata: Mapping[str, Any]) -> None:
    """Write arrays and metadata as `numpy.savez` does, which needs whole arrays."""
    fields = {name: np.asarray(value) for name, value in metadata.items()}
    arrays = {name: _Array(field.dtype.str, field.shape, [field]) for name, field in fields.items()} | dict(
        arrays
    )
    with zipfile.ZipFile(file, "w") as archive:
        for name, (dtype, shape, parts) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                descr = np.dtype(dtype).str
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(part.tobytes())
