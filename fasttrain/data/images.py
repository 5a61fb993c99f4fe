"""Read and decode single images on the CPU. If DALI is installed, training decodes with it instead."""

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

# A larger image is unreadable. Decoders allocate the memory for all pixels that a header claims, even if the
# header is damaged: up to 13 GB for a JPEG. Frames of 8K video have half as many pixels.
MAX_PIXELS = 2**26

_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of the headers with a size
_JPEG_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD9), 0xFF})


class UnreadableFrameError(Exception):
    """Raised if a frame cannot be read. The message is the reason; `frame` is the number of the frame."""

    def __init__(self, reason: str, frame: int = 0) -> None:
        super().__init__(reason)
        self.frame = frame


def read_encoded(path: str | Path, frame: int = 0) -> Bytes:
    """Read the bytes (n,) of an image file.

    Raises UnreadableFrameError if the file is missing, empty, truncated or too large. Truncation is checked
    here because some decoders turn a truncated file into garbage without an error.
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
    check_size(data, frame)
    return data


def check_size(data: Bytes, frame: int = 0) -> None:
    """Raise UnreadableFrameError if the header of an image (n,) claims more than MAX_PIXELS pixels."""
    content = data.tobytes()
    size: tuple[int, int] | None = None
    if content.startswith(_JPEG_START):
        size = _jpeg_size(content)
    elif content.startswith(_PNG_START):
        size = _integer(content[16:20]), _integer(content[20:24])
    else:
        # Some files contain another format than their name says.
        try:
            with Image.open(io.BytesIO(content)) as image:
                size = image.size
        except Image.DecompressionBombError as error:
            raise UnreadableFrameError(str(error), frame) from error
        # Pillow's plugins raise exceptions of many types. The decoder will report the damage.
        except Exception:
            return
    if size is not None:
        check_pixels(*size, frame)


def check_pixels(width: int, height: int, frame: int = 0) -> None:
    """Raise UnreadableFrameError if an image has more than MAX_PIXELS pixels."""
    if width * height > MAX_PIXELS:
        raise UnreadableFrameError(
            f"{width} x {height} pixels are more than the {MAX_PIXELS} that are supported", frame
        )


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return width and height of a JPEG, or None if no header before the first scan has them.

    Pillow refuses some damaged headers that libjpeg, and thus DALI, accepts.
    """
    position = len(_JPEG_START)
    # Like libjpeg, skip bytes between two segments.
    while 0 <= (position := content.find(b"\xff", position)) < len(content) - 9:
        marker = content[position + 1]
        if marker in _JPEG_SIZES:
            return _integer(content[position + 7 : position + 9]), _integer(
                content[position + 5 : position + 7]
            )
        if marker in _JPEG_WITHOUT_LENGTH:
            position += 1
        elif marker == _JPEG_SCAN[1]:
            return None
        else:
            position += 2 + _integer(content[position + 2 : position + 4])
    return None


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "big")


def decode_image(data: Bytes) -> Frame:
    """Decode an image (n,) to RGB (H, W, 3) uint8 and apply its EXIF orientation.

    Raises UnreadableFrameError.
    """
    check_size(data)
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):
                # Pillow clips 16-bit grey to 255 instead of scaling it.
                grey = np.asarray(image, dtype=np.float64) / 257
                return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    # Pillow's message contains a memory address, which would make packed sets irreproducible.
    except UnidentifiedImageError as error:
        raise UnreadableFrameError("cannot be decoded: unknown image format") from error
    # Pillow's plugins raise exceptions of many types for damaged files: SyntaxError, struct.error, ...
    except Exception as error:
        raise UnreadableFrameError(f"cannot be decoded: {error}") from error
