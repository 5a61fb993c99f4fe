"""Small made-up data: pictures, frame folders, video files through PyAV's encoders, samplings and loaders."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from fasttrain.data import FrameIndex, PairLoader, PairSampling


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
