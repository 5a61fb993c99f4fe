"""Single images on the host."""

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
def test_pictures_are_set_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(Image.fromarray(picture(0, 0)), "JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decoded(data), upright)


def test_whatever_pillow_raises_is_an_unreadable_frame() -> None:
    data = bytearray(encoded(Image.new("RGBA", (8, 8)), "DDS"))
    # Flags of a pixel format that there is not; Pillow: NotImplementedError.
    data[80:84] = bytes(4)
    with pytest.raises(UnreadableFrameError, match="cannot be decoded"):
        decoded(bytes(data))
