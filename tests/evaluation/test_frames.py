"""Annotations as they come: damaged ones are a clear line, grey ones of any depth are read."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.errors import InputError
from fasttrain.evaluation.frames import read_label_map, write_label_map


def test_a_damaged_annotation_is_a_clear_line(tmp_path: Path) -> None:
    """Whatever byte of its head is wrong, wherever it is cut off: it is named, or read whole."""
    path, labels = tmp_path / "00000.png", np.arange(256).reshape(16, 16)
    write_label_map(labels, path)
    whole = path.read_bytes()
    for place in range(whole.index(b"IDAT") + 4):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        for content in (whole[:place], flipped):
            path.write_bytes(content)
            # Where less is coded than its length says, all of it is there.
            with suppress(InputError):
                np.testing.assert_array_equal(read_label_map(path), labels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
def test_grey_masks_of_any_depth(mode: str, tmp_path: Path) -> None:
    mask = Image.fromarray(np.uint8([[0, 255], [255, 0]]))
    mask.convert(mode).save(tmp_path / "00000.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "00000.png"), np.asarray(mask))
