"""Read and decode single images on the CPU. If DALI is installed, training decodes JPEG and PNG with it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from fasttrain.files import os_reason

Bytes = npt.NDArray[np.uint8]  # (n,), the content of a file
Frame = npt.NDArray[np.uint8]  # (H, W, 3) RGB

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
)

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"

# A larger image is unreadable. Decoders allocate the memory for all pixels that a header claims, even if the
# header is damaged: up to 13 GB for a JPEG. Frames of 8K video have half as many pixels.
MAX_PIXELS = 2**26

# A JPEG marker, except for the restart markers and escaped bytes within coded data.
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_JPEG_SCAN = 0xDA
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of the headers with a size
_JPEG_WITHOUT_LENGTH = frozenset({0x01, 0xD8, 0xD9})

# EXIF orientation -> what turns the image upright. Pillow's `exif_transpose` fails if another tag is damaged.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableFrameError(Exception):
    """Raised if a frame cannot be read. The message is the reason; `frame` is the number of the frame."""

    def __init__(self, reason: str, frame: int = 0) -> None:
        super().__init__(reason)
        self.frame = frame


def read_encoded(path: str | Path, frame: int = 0) -> Bytes:
    """Read an image file (n,). Images of other formats than JPEG and PNG are returned as BMP, upright.

    Those are the formats of which all decoders make the same frame: Pillow, DALI and nvJPEG. The content of a
    file decides on its format, not its name.

    Raises UnreadableFrameError if the file is missing, empty, truncated or too large, or an image of another
    format that cannot be decoded. Truncation is checked here because some decoders turn a truncated file into
    garbage without an error.
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
    if head.startswith(_JPEG_START):
        # Other data may follow the image. They and an embedded thumbnail may contain an end marker.
        is_complete = tail.endswith(_JPEG_END) or any(
            marker == _JPEG_END[1] for marker, _ in _jpeg_segments(data.tobytes())
        )
        if not is_complete:
            raise UnreadableFrameError("truncated JPEG (no end-of-image marker)", frame)
    elif head == _PNG_START:
        if tail != _PNG_END and _PNG_END not in data.tobytes():
            raise UnreadableFrameError("truncated PNG (no IEND chunk)", frame)
    else:
        buffer = io.BytesIO()
        Image.fromarray(decode_image(data, frame)).save(buffer, "BMP")
        return np.frombuffer(buffer.getvalue(), dtype=np.uint8)
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
    for marker, start in _jpeg_segments(content):
        if marker in _JPEG_SIZES:
            return _integer(content[start + 5 : start + 7]), _integer(content[start + 3 : start + 5])
        if marker == _JPEG_SCAN:
            return None
    return None


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker of a JPEG and the position after it. Like libjpeg, skip bytes between segments."""
    position = 0
    while match := _JPEG_MARKER.search(content, position):
        marker, position = match[1][0], match.end()
        yield marker, position
        if marker not in _JPEG_WITHOUT_LENGTH:
            position += _integer(content[position : position + 2])


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "big")


def decode_image(data: Bytes, frame: int = 0) -> Frame:
    """Decode an image (n,) to RGB (H, W, 3) uint8 and apply its EXIF orientation.

    Raises UnreadableFrameError.
    """
    check_size(data, frame)
    try:
        with Image.open(io.BytesIO(data.tobytes())) as file:
            file.load()
            image: Image.Image = file
            if (orientation := exif_orientation(image)) != 1:
                image = image.transpose(_UPRIGHT[orientation])
            if image.mode.startswith("I"):
                # Pillow clips 16-bit grey to 255 instead of scaling it.
                grey = np.asarray(image, dtype=np.float64) / 257
                return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    # Pillow's message contains a memory address, which would make packed sets irreproducible.
    except UnidentifiedImageError as error:
        raise UnreadableFrameError("cannot be decoded: unknown image format", frame) from error
    # Pillow's plugins raise exceptions of many types for damaged files: SyntaxError, struct.error, ...
    except Exception as error:
        raise UnreadableFrameError(f"cannot be decoded: {error}", frame) from error


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 2 to 8, or 1 if it is upright or has none that is valid."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Pillow raises exceptions of many types for damaged EXIF data, which other decoders ignore.
    except Exception:
        return 1
    return orientation if orientation in _UPRIGHT else 1
