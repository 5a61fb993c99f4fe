"""Write a trained video encoder as one self-contained file, a `torch.export` program.

It needs torch alone: `torch.export.load("encoder.pt2").module()(frames)` maps ImageNet-normalised frames
(T, 3, H, W) to projected tokens (T, N, D). T is free, H and W are fixed by --size.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from fasttrain.errors import InputError
from fasttrain.files import open_atomically
from fasttrain.loggers import say
from fasttrain.video_encoder import VideoEncoder, load_video_encoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="output folder of a training run")
    parser.add_argument("file", help="what to write, such as encoder.pt2")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"),
        help="frame size in pixels, multiples of the patch size; default: the training crop",
    )  # fmt: skip
    parser.add_argument("--weights", help="where the backbone's weights are now, if they moved")


def run(arguments: argparse.Namespace) -> None:
    path = export(arguments.run, arguments.file, size=arguments.size, weights=arguments.weights)
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


class _PerFrame(nn.Module):
    """Frames (T, 3, H, W) -> tokens (T, N, D): one free dimension is what torch.export follows reliably."""

    def __init__(self, encoder: VideoEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, frames: Tensor) -> Tensor:
        tokens: Tensor = self.encoder.projection(self.encoder.encoder.tokens(frames))
        return tokens


def export(
    run: str | Path, file: str | Path, *, size: tuple[int, int] | None = None, weights: str | None = None
) -> Path:
    """Export the encoder of the run folder `run` to `file`, atomically.

    Raises InputError where `run` holds no projection, `size` does not fit the patches, or `file` is no .pt2.
    """
    path = Path(file)
    if path.suffix != ".pt2":
        raise InputError(f"cannot export to {str(path)!r}; expected a file name that ends in .pt2")
    encoder = load_video_encoder(run, weights=weights)
    height, width = size or (encoder.encoder.image_size,) * 2
    # Resized before the tracing, the positions are a constant of the program.
    encoder.encoder.positions(encoder.grid(height, width))
    # Two frames: torch.export takes a size of one for a constant.
    frames = torch.zeros(2, 3, height, width)
    with torch.no_grad():
        program = torch.export.export(
            _PerFrame(encoder), (frames,), dynamic_shapes=({0: torch.export.Dim("frames")},)
        )
    # Given a path, torch would raise an error of its own kind for a folder that cannot be written.
    with open_atomically(path) as opened:
        torch.export.save(program, opened)
    return path
