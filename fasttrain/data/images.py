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
_JPEG_SCAN = b"\xda"
_JPEG_WITHOUT_LENGTH = frozenset({0x01, 0xD8, 0xD9})
# The marker and the length of a segment of a JPEG, up to the first scan, and the size of the frame, which is
# baseline, extended or progressive, of 8 bits.
_JPEG_SEGMENT = re.compile(rb"\xff([\xc0-\xc2\xc4\xda-\xfe])(..)", re.DOTALL)
_JPEG_FRAME = re.compile(rb"\x08(?P<height>..)(?P<width>..)[\x01\x03\x04]", re.DOTALL)
# The length and the type of a chunk of a PNG, and the first chunk, with the size and the type of colour.
_PNG_CHUNK = re.compile(rb"(.{4})([A-Za-z]{4})", re.DOTALL)
_PNG_HEADER = re.compile(
    rb"\0\0\0\x0dIHDR(?P<width>.{4})(?P<height>.{4})[\1\2\4\x08\x10][\0\2\3\4\6]", re.DOTALL
)

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
    """Read an image file (n,), as `as_intact` returns it. Raises UnreadableFrameError."""
    try:
        # np.fromfile would return uninitialised memory, without an error, if the disk fails.
        with open(path, "rb", buffering=0) as file:
            content = file.readall()
    except OSError as error:
        raise UnreadableFrameError(os_reason(error), frame) from error
    return as_intact(content, frame)


def as_intact(content: bytes, frame: int = 0) -> Bytes:
    """Return the content of an image file (n,) as `as_regular` does. It decides on the format, not the name.

    Raises UnreadableFrameError if the file is empty, truncated or too large, or if Pillow cannot decode an
    irregular image. Truncation is checked here because some decoders turn a truncated file into garbage
    without an error.
    """
    if not content:
        raise UnreadableFrameError("the file is empty", frame)
    # Other data may follow a JPEG. They and an embedded thumbnail may contain an end marker.
    if (
        content.startswith(_JPEG_START)
        and not content.endswith(_JPEG_END)
        and _JPEG_END[1] not in _jpeg_markers(content)
    ):
        raise UnreadableFrameError("truncated JPEG (no end-of-image marker)", frame)
    if content.startswith(_PNG_START) and not content.endswith(_PNG_END) and _PNG_END not in content:
        raise UnreadableFrameError("truncated PNG (no IEND chunk)", frame)
    return as_regular(content, frame)


def as_regular(content: bytes, frame: int = 0) -> Bytes:
    """Return a JPEG or PNG with a regular header unchanged, and any other image as BMP, upright (n,).

    Of the former, all decoders make the same frame: Pillow, DALI and nvJPEG. DALI does not know all other
    formats, and DALI 2.4 crashes if it cannot parse a header. Raises UnreadableFrameError.
    """
    data = np.frombuffer(content, dtype=np.uint8)
    if size := _regular_size(content):
        check_pixels(*size, frame)
        return data
    buffer = io.BytesIO()
    Image.fromarray(decode_image(data, frame)).save(buffer, "BMP")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def check_pixels(width: int, height: int, frame: int = 0) -> None:
    """Raise UnreadableFrameError if an image has more than MAX_PIXELS pixels."""
    if width * height > MAX_PIXELS:
        raise UnreadableFrameError(
            f"{width} x {height} pixels are more than the {MAX_PIXELS} that are supported", frame
        )


def _regular_size(content: bytes) -> tuple[int, int] | None:
    """Return width and height of a JPEG or PNG whose header, or whose chunks, are regular, otherwise None."""
    part = header = None
    if content.startswith(_JPEG_START):
        position = len(_JPEG_START)
        while (part := _JPEG_SEGMENT.match(content, position)) and part[1] != _JPEG_SCAN:
            if part[1] <= b"\xc2":
                header = _JPEG_FRAME.match(content, part.end())
            position += 2 + _integer(part[2])
    elif content.startswith(_PNG_START):
        position = len(_PNG_START)
        header = _PNG_HEADER.match(content, position)
        while (part := _PNG_CHUNK.match(content, position)) and part[2] not in (b"IEND", b"acTL", b"eXIf"):
            position += 12 + _integer(part[1])
    # DALI crashes if EXIF data are damaged, and shows a part of an animation.
    if not (part and header) or part[2] in (b"acTL", b"eXIf"):
        return None
    sides = _integer(header["width"]), _integer(header["height"])
    return sides if all(sides) else None


def _jpeg_markers(content: bytes) -> Iterator[int]:
    """Yield the markers of a JPEG. Like libjpeg, skip bytes between segments."""
    position = 0
    while match := _JPEG_MARKER.search(content, position):
        marker, position = match[1][0], match.end()
        yield marker
        if marker not in _JPEG_WITHOUT_LENGTH:
            position += _integer(content[position : position + 2])


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "big")


def decode_image(data: Bytes, frame: int = 0) -> Frame:
    """Decode an image (n,) to RGB (H, W, 3) uint8 and apply its EXIF orientation.

    Raises UnreadableFrameError.
    """
    try:
        with Image.open(io.BytesIO(data.tobytes())) as file:
            check_pixels(*file.size, frame)
            if (pages := getattr(file, "n_frames", 1)) > 1 and file.format != "MPO":
                raise ValueError(f"{pages} images in one file; store each frame as a file of its own")
            file.load()
            image: Image.Image = file
            if (orientation := exif_orientation(image)) != 1:
                image = image.transpose(_UPRIGHT[orientation])
            if image.mode == "F":
                raise ValueError("its levels are floating-point numbers")
            if image.mode.startswith("I"):
                # Pillow clips 16-bit grey to 255 instead of scaling it.
                grey = np.asarray(image, dtype=np.float64) / 257
                if grey.min() < 0 or grey.max() > 255:
                    raise ValueError("its levels exceed 16 bits")
                return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except UnreadableFrameError:
        raise
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
