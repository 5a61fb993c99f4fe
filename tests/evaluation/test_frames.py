"""Annotations as they come: damaged ones are a clear line, grey ones of any depth are read."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.errors import InputError
from fasttrain.evaluation.figures import write_label_map
from fasttrain.evaluation.frames import read_label_map


def test_a_damaged_annotation_is_a_clear_line(tmp_path: Path) -> None:
    """Whatever byte of its head is wrong, wherever it is cut off: it is read, or named."""
    path, draw = tmp_path / "00000.png", random.Random(0)
    write_label_map(np.arange(256).reshape(16, 16), path)
    whole = path.read_bytes()
    told = 0
    for number in range(500):
        data = bytearray(whole)
        data[draw.randrange(60)] = draw.randrange(256)
        path.write_bytes(data[: draw.randrange(60)] if number % 4 == 0 else data)
        try:
            read_label_map(path)
        except InputError:
            told += 1
    assert told > 250


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
def test_grey_masks_of_any_depth(mode: str, tmp_path: Path) -> None:
    mask = Image.fromarray(np.uint8([[0, 255], [255, 0]]))
    mask.convert(mode).save(tmp_path / "00000.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "00000.png"), np.asarray(mask))
