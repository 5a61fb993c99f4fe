"""Label maps (damaged files raise InputError; greyscale files of any mode are accepted)."""

import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.errors import InputError
from fasttrain.evaluation.frames import read_label_map, write_label_map


def test_damaged_annotation_raises_or_reads_intact(tmp_path: Path) -> None:
    """Truncate the file and flip a bit at every offset up to the pixel data."""
    path, labels = tmp_path / "00000.png", np.arange(256).reshape(16, 16)
    write_label_map(labels, path)
    original = path.read_bytes()
    for offset in range(original.index(b"IDAT") + 4):
        flipped = bytearray(original)
        flipped[offset] ^= 1
        for content in (original[:offset], flipped):
            path.write_bytes(content)
            # Some damage, such as to the length of a chunk, leaves all pixels readable.
            with suppress(InputError):
                np.testing.assert_array_equal(read_label_map(path), labels)


def test_an_annotation_that_claims_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "00000.png"
    write_label_map(np.zeros((16, 16)), path)
    data = path.read_bytes()
    size = (9000).to_bytes(4, "big")
    header = b"IHDR" + size + size + data[24:29]
    path.write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:])
    with pytest.raises(InputError, match="9000 x 9000 pixels are more than"):
        read_label_map(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
def test_greyscale_masks_of_any_mode(mode: str, tmp_path: Path) -> None:
    mask = Image.fromarray(np.uint8([[0, 255], [255, 0]]))
    mask.convert(mode).save(tmp_path / "00000.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "00000.png"), np.asarray(mask))


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_no_label_map(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large"):
        write_label_map(np.zeros((4, 4)), tmp_path / "0.png")
    assert not any(tmp_path.iterdir())
