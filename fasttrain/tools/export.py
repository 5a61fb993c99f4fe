"""Export a trained video encoder as one self-contained file (a torch.export program).

Using the file requires only torch: `torch.export.load("encoder.pt2").module()(frames)` maps frames
(T, 3, H, W) to projected tokens (T, N, D). T may vary; --size fixes H and W. Frames are RGB with values from
0 to 1, normalised with the mean and std of the encoder, which the file contains as JSON:

    extra = {"preprocessing.json": ""}
    program = torch.export.load("encoder.pt2", extra_files=extra).module()
    json.loads(extra["preprocessing.json"])  # {"mean": [R, G, B], "std": [R, G, B]}
"""

import argparse
import io
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fasttrain.errors import InputError
from fasttrain.files import write_atomically
from fasttrain.loggers import say
from fasttrain.video_encoder import VideoEncoder, load_video_encoder

PREPROCESSING_FILE = "preprocessing.json"


def run(arguments: argparse.Namespace) -> None:
    path = export(arguments.run, arguments.file, size=arguments.size, weights=arguments.weights)
    say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


class _PerFrame(nn.Module):
    """A module from frames (T, 3, H, W) to tokens (T, N, D), with T as the only dynamic dimension."""

    def __init__(self, encoder: VideoEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, frames: Tensor) -> Tensor:
        tokens: Tensor = self.encoder.projection(self.encoder.encoder.tokens(frames))
        return tokens


def export(
    run: str | Path, file: str | Path, *, size: tuple[int, int] | None = None, weights: str | None = None
) -> Path:
    """Export the video encoder of a run, with the mean and std by which frames must be normalised.

    Args:
        run: The run folder.
        file: The file to write, with the suffix .pt2. It is written atomically.
        size: Height and width of the frames in pixels. None: the training crop.
        weights: The new location of the backbone's weights, if they have been moved since training.

    Returns:
        The path of the file.

    Raises:
        InputError: The run cannot be loaded, or the size or the suffix of the file is invalid.
    """
    path = Path(file)
    if path.suffix != ".pt2":
        raise InputError(f"{str(path)!r}: expected a file name with the suffix .pt2, such as encoder.pt2")
    encoder = load_video_encoder(run, weights=weights)
    height, width = size or (encoder.encoder.image_size,) * 2
    # Cache the resized positions before tracing, so that the program contains them as a constant.
    encoder.encoder.positions(encoder.grid(height, width))
    # torch.export would specialise on a dimension of size 1.
    frames = torch.zeros(2, 3, height, width)
    with torch.no_grad():
        program = torch.export.export(
            _PerFrame(encoder), (frames,), dynamic_shapes=({0: torch.export.Dim("frames")},)
        )
    preprocessing = {"mean": encoder.mean, "std": encoder.std}
    # Serialised in memory first: with a file, an error such as a full disk would abort the process.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={PREPROCESSING_FILE: json.dumps(preprocessing)})
    write_atomically(path, buffer.getbuffer())
    return path
