"""Single images on the host. Training decodes with DALI; `decode_image` serves evaluation and pack."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fasttrain.files import os_reason

Bytes = npt.NDArray[np.uint8]  # (n,) of a file
Frame = npt.NDArray[np.uint8]  # (H, W, 3) RGB

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class UnreadableFrameError(Exception):
    """A frame that cannot be read: the message is the reason, `frame` its number in the video."""

    def __init__(self, reason: str, frame: int = 0) -> None:
        super().__init__(reason)
        self.frame = frame


def read_encoded(path: str | Path, frame: int = 0) -> Bytes:
    """An image file as it is, (n,). Raises UnreadableFrameError where it is missing, empty or cut off.

    Some decoders turn a truncated file into garbage without an error.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UnreadableFrameError(os_reason(error), frame) from error
    if not len(data):
        raise UnreadableFrameError("the file is empty", frame)
    head, tail = data[:8].tobytes(), data[-8:].tobytes()
    if head.startswith(_JPEG_START) and not tail.endswith(_JPEG_END):
        content = data.tobytes()
        # A small picture in the header has an end marker, too, but only the last scan is this one's.
        if content.rfind(_JPEG_END) <= content.rfind(_JPEG_SCAN):
            raise UnreadableFrameError("truncated JPEG, it has no end-of-image marker", frame)
    if head == _PNG_START and tail != _PNG_END and _PNG_END not in data.tobytes():
        raise UnreadableFrameError("truncated PNG, it has no end chunk", frame)
    return data


def decode_image(data: Bytes) -> Frame:
    """An encoded image (n,) -> RGB (H, W, 3) uint8, upright by its EXIF tag. Raises UnreadableFrameError."""
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                # Pillow clips 16-bit grey to 255 instead of scaling it.
                grey = np.asarray(upright, dtype=np.float64) / 257
                return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
            return np.asarray(upright.convert("RGB"))
    # Pillow's own message holds a memory address, which would make every packed set differ.
    except UnidentifiedImageError as error:
        raise UnreadableFrameError("cannot be decoded: no image of a known kind") from error
    # Broad, because for odd bytes Pillow's plugins raise errors of any kind: SyntaxError, struct.error, ...
    except Exception as error:
        raise UnreadableFrameError(f"cannot be decoded: {error}") from error
