"""Export a trained video encoder as one self-contained file that runs without fasttrain.

The suffix of the file chooses the format: `.pt2` is a torch.export program, which needs only torch, and
`.onnx` is an ONNX model, for onnxruntime and others. Both map frames (T, 3, H, W) in float32 to projected
tokens (T, N, D). T may vary; --size fixes H and W. Frames are RGB with values from 0 to 1, normalised with
the mean and std of the encoder, which the file contains as JSON:

    extra = {"preprocessing.json": ""}
    program = torch.export.load("encoder.pt2", extra_files=extra).module()
    tokens = program(frames)
    json.loads(extra["preprocessing.json"])  # {"mean": [R, G, B], "std": [R, G, B]}

    session = onnxruntime.InferenceSession("encoder.onnx")
    (tokens,) = session.run(["tokens"], {"frames": frames.numpy()})
    json.loads(session.get_modelmeta().custom_metadata_map["mean"])  # [R, G, B]
"""

import argparse
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fasttrain.errors import InputError, pip_install
from fasttrain.files import open_atomically
from fasttrain.loggers import say
from fasttrain.video_encoder import VideoEncoder, load_video_encoder

PREPROCESSING_FILE = "preprocessing.json"
# An ONNX model is a protocol buffer, which cannot exceed 2 GiB. Positions and the graph need the rest.
MAX_ONNX_BYTES = 2 * 10**9
# The largest accepted ratio of the error of the file, against float64, to that of the encoder in float32.
MAX_ERROR = 10.0


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

    The file is read back, and its tokens are compared with those of the encoder, before it gets its name.

    Args:
        run: The run folder.
        file: The file to write, with the suffix .pt2 (torch.export) or .onnx. It is written atomically.
        size: Height and width of the frames in pixels. None: the training crop.
        weights: The new location of the backbone's weights, if they have been moved since training.

    Returns:
        The path of the file.

    Raises:
        InputError: The run cannot be loaded, the size or the suffix of the file is invalid, a package for
            ONNX is missing, the encoder is too large for ONNX, or the file computes other tokens than the
            encoder.
    """
    path = Path(file)
    if path.suffix not in (".pt2", ".onnx"):
        raise InputError(
            f"{str(path)!r}: expected a file name with the suffix .pt2 or .onnx, such as encoder.pt2"
        )
    is_onnx = path.suffix == ".onnx"
    for package in ("onnx", "onnxscript", "onnxruntime") if is_onnx else ():
        if importlib.util.find_spec(package) is None:
            raise InputError(f"package {package!r} is not installed. Install it with: {pip_install('onnx')}")
    encoder = load_video_encoder(run, weights=weights)
    num_bytes = sum(parameter.nbytes for parameter in encoder.parameters())
    if is_onnx and num_bytes > MAX_ONNX_BYTES:
        raise InputError(
            f"{str(path)!r}: the encoder has {num_bytes / 1e9:.1f} GB of weights, but a single ONNX file "
            f"cannot exceed 2 GB; export it to a .pt2 file"
        )
    height, width = size or (encoder.encoder.image_size,) * 2
    # Cache the resized positions before tracing, so that the program contains them as a constant.
    encoder.encoder.positions(encoder.grid(height, width))
    per_frame = _PerFrame(encoder)
    # torch.export would specialise on a dimension of size 1.
    frames = torch.zeros(2, 3, height, width)
    with torch.no_grad():
        program = torch.export.export(per_frame, (frames,), dynamic_shapes=({0: torch.export.Dim("frames")},))
    # Serialised in memory first: with a file, an error such as a full disk would abort the process.
    content = (_to_onnx if is_onnx else _to_pt2)(program, {"mean": encoder.mean, "std": encoder.std})
    # Another number of frames than in the trace.
    frames = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = per_frame(frames)
        # Only now, because the program shares the parameters.
        truth = per_frame.double()(frames.double())
    with open_atomically(path) as opened:
        opened.write(content)
        opened.flush()
        loaded = (_load_onnx if is_onnx else _load_pt2)(Path(opened.name))
        error = _distance(loaded(frames), truth)
        # Also false for NaN.
        if not error <= MAX_ERROR * _distance(tokens, truth):
            raise InputError(
                f"{str(path)!r}: the exported encoder is wrong by {error:.1e} (relative to float64), so the "
                f"file was not kept; use other versions of {'onnxruntime and ' * is_onnx}torch"
            )
    return path


def _distance(tokens: Tensor, truth: Tensor) -> float:
    return float((tokens - truth).norm() / truth.norm())


# --- the formats ---------------------------------------------------------------------------------------


def _to_pt2(program: torch.export.ExportedProgram, preprocessing: dict[str, tuple[float, ...]]) -> memoryview:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={PREPROCESSING_FILE: json.dumps(preprocessing)})
    return buffer.getbuffer()


def _load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    # Not by its name, because PyTorch expects the suffix .pt2, which the temporary file lacks.
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _to_onnx(
    program: torch.export.ExportedProgram, preprocessing: dict[str, tuple[float, ...]]
) -> memoryview:
    with _quiet():
        model = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["frames"],
            output_names=["tokens"],
            dynamic_shapes=({0: "frames"},),
            verbose=False,
        )
    assert model is not None
    content = model.model_proto
    for name, value in preprocessing.items():
        content.metadata_props.add(key=name, value=json.dumps(value))
    return memoryview(content.SerializeToString())


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    # Imported on demand, because it is optional.
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda frames: torch.from_numpy(session.run(["tokens"], {"frames": frames.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard warnings and log records, which the conversion to ONNX prints about its own steps."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
