"""Reading label maps: damaged files raise InputError; greyscale files of any mode are accepted."""

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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
def test_greyscale_masks_of_any_mode(mode: str, tmp_path: Path) -> None:
    mask = Image.fromarray(np.uint8([[0, 255], [255, 0]]))
    mask.convert(mode).save(tmp_path / "00000.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "00000.png"), np.asarray(mask))
