"""Read frames, read and write label maps, write short videos. Shape suffixes: H W pixels, C colours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fasttrain.data.images import Frame, UnreadableFrameError, check_pixels, decode_image, read_encoded
from fasttrain.data.video import require_pyav
from fasttrain.errors import InputError
from fasttrain.files import open_atomically


def read_image(path: Path) -> Frame:
    """Read an image as (H, W, 3) uint8 RGB. Raises InputError if it is missing or damaged."""
    try:
        return decode_image(read_encoded(path))
    except UnreadableFrameError as error:
        raise InputError(f"frame '{path}' is unreadable ({error}). Replace it.") from error


def read_label_map(path: Path) -> npt.NDArray[np.uint8]:
    """Read the labels (H, W) of a palette or greyscale PNG. Raises InputError for any other file."""
    try:
        with Image.open(path) as image:
            check_pixels(*image.size)
            image.load()
    # Pillow's plugins raise exceptions of many types for damaged files: SyntaxError, struct.error, ...
    except Exception as error:
        raise InputError(f"annotation '{path}' is unreadable ({error}). Replace it.") from error
    if image.mode in ("P", "L"):
        return np.asarray(image)
    # One annotation of DAVIS 2016 (bear/00077.png) is greyscale, but has four channels.
    if image.mode in ("1", "LA", "RGB", "RGBA"):
        channels_HWC = np.asarray(image.convert("RGB"))
        if (channels_HWC == channels_HWC[..., :1]).all():
            return channels_HWC[..., 0]
    raise InputError(f"annotation '{path}' has mode {image.mode}; expected a palette or greyscale PNG")


def write_label_map(labels_HW: npt.NDArray[Any], path: Path) -> None:
    """Write a label map (0 to 255) as a palette PNG, the format of the DAVIS and VIP annotations."""
    image = Image.fromarray(np.asarray(labels_HW).astype(np.uint8), mode="P")
    image.putpalette(voc_palette().tobytes())
    with open_atomically(path) as file:
        image.save(file, "PNG")


def voc_palette() -> npt.NDArray[np.uint8]:
    """Return the colours (256, 3) that PASCAL VOC and DAVIS use for labels."""
    # The definition: bit 3 i + c of a label is bit 7 - i of its colour's channel c.
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, count=9, bitorder="little")
    return np.packbits(bits.reshape(256, 3, 3), axis=1)[:, 0]


def write_video(frames: Sequence[Frame], path: Path, rate: int = 12, **options: str) -> None:
    """Encode frames of equal size as H.264, with `rate` frames per second and `options` of libx264.

    The encoder needs even sizes, so an odd last row or column is cropped. Raises InputError if PyAV is not
    installed.
    """
    require_pyav("writing")
    import av

    with open_atomically(path) as file, av.open(file, "w", format=path.suffix[1:]) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "23", **options})
        stream.height, stream.width = (size // 2 * 2 for size in frames[0].shape[:2])
        stream.pix_fmt = "yuv420p"
        for frame_HWC in frames:
            picture = np.ascontiguousarray(frame_HWC[: stream.height, : stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
