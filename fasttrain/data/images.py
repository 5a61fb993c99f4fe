"""Read and decode single images on the CPU. Training decodes images with DALI instead of `decode_image`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fasttrain.files import os_reason

Bytes = npt.NDArray[np.uint8]  # (n,), the content of a file
Frame = npt.NDArray[np.uint8]  # (H, W, 3) RGB

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class UnreadableFrameError(Exception):
    """Raised if a frame cannot be read. The message is the reason; `frame` is the number of the frame."""

    def __init__(self, reason: str, frame: int = 0) -> None:
        super().__init__(reason)
        self.frame = frame


def read_encoded(path: str | Path, frame: int = 0) -> Bytes:
    """Read the bytes (n,) of an image file.

    Raises UnreadableFrameError if the file is missing, empty or truncated. Truncation is checked here because
    some decoders turn a truncated file into garbage without an error.
    """
    try:
        # np.fromfile would return uninitialised memory, without an error, if the disk fails.
        with open(path, "rb", buffering=0) as file:
            data = np.frombuffer(file.readall(), dtype=np.uint8)
    except OSError as error:
        raise UnreadableFrameError(os_reason(error), frame) from error
    if not len(data):
        raise UnreadableFrameError("the file is empty", frame)
    head, tail = data[:8].tobytes(), data[-8:].tobytes()
    if head.startswith(_JPEG_START) and not tail.endswith(_JPEG_END):
        content = data.tobytes()
        # An embedded thumbnail has its own end marker, so the marker must follow the last scan.
        if content.rfind(_JPEG_END) <= content.rfind(_JPEG_SCAN):
            raise UnreadableFrameError("truncated JPEG (no end-of-image marker)", frame)
    if head == _PNG_START and tail != _PNG_END and _PNG_END not in data.tobytes():
        raise UnreadableFrameError("truncated PNG (no IEND chunk)", frame)
    return data


def decode_image(data: Bytes) -> Frame:
    """Decode an image (n,) to RGB (H, W, 3) uint8 and apply its EXIF orientation.

    Raises UnreadableFrameError.
    """
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                # Pillow clips 16-bit grey to 255 instead of scaling it.
                grey = np.asarray(upright, dtype=np.float64) / 257
                return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
            return np.asarray(upright.convert("RGB"))
    # Pillow's message contains a memory address, which would make packed sets irreproducible.
    except UnidentifiedImageError as error:
        raise UnreadableFrameError("cannot be decoded: unknown image format") from error
    # Pillow's plugins raise exceptions of many types for damaged files: SyntaxError, struct.error, ...
    except Exception as error:
        raise UnreadableFrameError(f"cannot be decoded: {error}") from error
