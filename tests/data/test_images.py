"""Decoding of single images on the CPU."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from synthetic import picture

from fasttrain.data.images import UnreadableFrameError, decode_image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return decode_image(np.frombuffer(data, dtype=np.uint8))


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(Image.fromarray(picture(0, 0)), "JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decoded(data), upright)


def test_all_errors_of_pillow_become_unreadable_frame_errors() -> None:
    data = bytearray(encoded(Image.new("RGBA", (8, 8)), "DDS"))
    # Pillow raises NotImplementedError for a pixel format without flags.
    data[80:84] = bytes(4)
    with pytest.raises(UnreadableFrameError, match="cannot be decoded"):
        decoded(bytes(data))
