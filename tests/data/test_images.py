"""Decoding of single images on the CPU."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from synthetic import picture

from fasttrain.data.images import MAX_PIXELS, UnreadableFrameError, decode_image, read_encoded


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


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM"])
def test_images_of_other_formats_are_read_whatever_their_name(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = Image.fromarray(picture(0, 0))
    # GIF, BMP and PPM have no EXIF data.
    options = {"exif": exif} if kind in ("WEBP", "AVIF", "TIFF") else {}
    data = encoded(stored, kind, **options)
    (tmp_path / "0.jpg").write_bytes(data)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    read = read_encoded(tmp_path / "0.jpg")
    # DALI reads BMP.
    assert read[:2].tobytes() == b"BM"
    np.testing.assert_array_equal(decode_image(read), upright)
    (tmp_path / "0.jpg").write_bytes(data[: len(data) // 3])
    with pytest.raises(UnreadableFrameError, match="cannot be decoded") as caught:
        read_encoded(tmp_path / "0.jpg", 7)
    assert caught.value.frame == 7


@pytest.mark.parametrize(("tag", "kind"), [(0x11A, 1), (0x11A, 6), (0x132, 11), (0x8825, 6)])
def test_damaged_exif_tags_do_not_matter(tag: int, kind: int) -> None:
    """Pillow raises exceptions of several types for them, but other decoders do not read them."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", tag, kind, 1, 0xFFFF)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    image = Image.fromarray(picture(0, 0))
    turned = np.rot90(decoded(encoded(image, "JPEG")), -1)
    np.testing.assert_array_equal(decoded(encoded(image, "JPEG", exif=exif)), turned)


@pytest.mark.parametrize(
    "trailer", [bytes(999), b"\xff\xda" * 9, encoded(Image.new("L", (9, 9)), "JPEG")[:-2]]
)
def test_data_may_follow_a_jpeg(tmp_path: Path, trailer: bytes) -> None:
    """Such as another picture or the video of a moving photo."""
    path = tmp_path / "0.jpg"
    intact = encoded(Image.fromarray(picture(0, 0)), "JPEG", progressive=True)
    path.write_bytes(intact + trailer)
    np.testing.assert_array_equal(decode_image(read_encoded(path)), decoded(intact))
    path.write_bytes(intact[:-99])
    with pytest.raises(UnreadableFrameError, match="truncated JPEG"):
        read_encoded(path)


JPEG = encoded(Image.fromarray(picture(0, 0)), "JPEG")


# Fill bytes before a marker, and bytes between segments.
@pytest.mark.parametrize("irregular", [JPEG[:2] + b"\xff\xff" + JPEG[2:], JPEG[:20] + b"\0\0" + JPEG[20:]])
def test_an_irregular_image_does_not_reach_dali(tmp_path: Path, irregular: bytes) -> None:
    """DALI 2.4 crashes in batches of some 40 images or more if it cannot parse the header of one."""
    (tmp_path / "0.jpg").write_bytes(irregular)
    read = read_encoded(tmp_path / "0.jpg")
    assert read[:2].tobytes() == b"BM"
    np.testing.assert_array_equal(decode_image(read), decoded(irregular))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_an_animation_is_not_a_frame(tmp_path: Path, kind: str) -> None:
    first, *others = (Image.fromarray(picture(0, frame)) for frame in range(3))
    first.save(tmp_path / "0.png", kind, save_all=True, append_images=others)
    with pytest.raises(UnreadableFrameError, match="3 images in one file"):
        read_encoded(tmp_path / "0.png")


def with_size(data: bytes, width: int, height: int) -> bytes:
    """Change the size in the header of a JPEG, PNG or BMP, as damage to the file may do."""
    sizes = [value.to_bytes(4, "big") for value in (width, height)]
    if data.startswith(b"\x89PNG"):
        return data[:16] + b"".join(sizes) + data[24:]
    if data.startswith(b"BM"):
        return data[:18] + b"".join(size[::-1] for size in sizes) + data[26:]
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + sizes[1][2:] + sizes[0][2:] + data[start + 4 :]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_an_image_that_claims_too_many_pixels_is_not_decoded(kind: str, tmp_path: Path) -> None:
    intact = encoded(Image.fromarray(picture(0, 0)), kind)
    damaged = with_size(intact, 30_000, 60_000)
    (tmp_path / "intact.jpg").write_bytes(intact)
    (tmp_path / "damaged.jpg").write_bytes(damaged)
    assert len(read_encoded(tmp_path / "intact.jpg")) == len(intact)
    # Pillow, which reads the header of a BMP, has another message.
    limit = "1800000000 pixels" if kind == "BMP" else f"30000 x 60000 pixels are more than the {MAX_PIXELS}"
    with pytest.raises(UnreadableFrameError, match=limit):
        read_encoded(tmp_path / "damaged.jpg")


def test_decoding_refuses_an_image_of_too_many_pixels(tmp_path: Path) -> None:
    # Pillow itself accepts up to 179 million pixels, which take more than a gigabyte.
    data = with_size(encoded(Image.fromarray(picture(0, 0)), "JPEG"), 10_000, 10_000)
    with pytest.raises(UnreadableFrameError, match="10000 x 10000 pixels"):
        decoded(data)


def test_a_disk_error_is_not_an_image() -> None:
    with pytest.raises(UnreadableFrameError, match="input/output error"):
        # Its first page is not mapped.
        read_encoded("/proc/self/mem")
