"""Synthetic video with known masks: textured shapes that move and rotate over a panning background.

A scene is determined by its seed and size. Shape suffixes: T frames, H height, W width, C colours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A rendered clip with its label maps."""

    frames_THWC: NDArray[np.uint8]
    labels_THW: NDArray[np.uint8]
    """0 is the background; objects are numbered from 1, from back to front."""


def render_scene(
    seed: int, *, num_frames: int = 40, height: int = 192, width: int = 256, num_objects: int = 2
) -> Scene:
    """Render the scene that belongs to a seed."""
    rng = np.random.default_rng(seed)
    # The vertical coordinate ranges from -1 to 1, and pixels are square.
    y_HW, x_HW = np.mgrid[0:height, 0:width].astype(np.float64)
    y_HW = 2 * y_HW / height - 1
    x_HW = (2 * x_HW - width) / height
    aspect = width / height
    background = _texture(rng, scale=4.0)
    pan = rng.uniform(-0.4, 0.4, size=2)
    objects = [_moving_object(rng, aspect) for _ in range(num_objects)]
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    labels = np.zeros((num_frames, height, width), np.uint8)
    for t in range(num_frames):
        time = t / max(1, num_frames - 1)
        image = background(x_HW + pan[0] * time, y_HW + pan[1] * time)
        for number, appearance in enumerate(objects, start=1):
            inside, color = appearance(x_HW, y_HW, time)
            image = np.where(inside[..., None], color, image)
            labels[t][inside] = number
        frames[t] = np.round(255 * np.clip(image, 0, 1))
    return Scene(frames_THWC=frames, labels_THW=labels)


def write_scene(scene: Scene, path: Path) -> None:
    """Encode the frames as an H.264 file with 24 frames per second."""
    # Imported on demand, because it needs Matplotlib, unlike rendering.
    from fasttrain.evaluation.frames import write_video

    # With a single thread, the same encoder writes the same file on every machine.
    write_video(list(scene.frames_THWC), path, rate=24, crf="18", g="12", threads="1")


Texture = Callable[[Array, Array], Array]
MovingObject = Callable[[Array, Array, float], tuple[NDArray[np.bool_], Array]]


def _texture(rng: np.random.Generator, *, scale: float) -> Texture:
    """Create a texture, which maps points of the plane to colours: a base colour plus random waves."""
    base = rng.uniform(0.25, 0.75, size=3)
    waves = 6
    frequency = scale * rng.uniform(0.5, 3.0, size=waves)
    angle = rng.uniform(0, 2 * np.pi, size=waves)
    phase = rng.uniform(0, 2 * np.pi, size=waves)
    amplitude = rng.uniform(-0.35, 0.35, size=(waves, 3)) / np.sqrt(frequency / scale)[:, None] / 2

    def color(x_HW: Array, y_HW: Array) -> Array:
        image = np.broadcast_to(base, (*x_HW.shape, 3)).copy()
        for i in range(waves):
            wave = np.sin(frequency[i] * (x_HW * np.cos(angle[i]) + y_HW * np.sin(angle[i])) + phase[i])
            image += wave[..., None] * amplitude[i]
        return image

    return color


def _moving_object(rng: np.random.Generator, aspect: float) -> MovingObject:
    """Create a textured, star-shaped object that moves along a smooth path."""
    texture = _texture(rng, scale=9.0)
    radius = rng.uniform(0.3, 0.45)
    lobes, depth = rng.integers(2, 6), rng.uniform(0.05, 0.3)
    start = rng.uniform(-0.5, 0.5, size=2) * (aspect, 1)
    travel = rng.uniform(0.3, 0.8) * np.array([aspect * rng.choice([-1, 1]), rng.uniform(-1, 1)])
    sway, turn, growth = rng.uniform(0.0, 0.2), rng.uniform(-1.5, 1.5), rng.uniform(0.8, 1.25)

    def appearance(x_HW: Array, y_HW: Array, time: float) -> tuple[NDArray[np.bool_], Array]:
        # The path extends to both sides of `start`, so that the object stays in view.
        swing = np.sin(np.pi * (time - 0.5)) / 2
        center_x = start[0] + travel[0] * swing
        center_y = start[1] + travel[1] * swing + sway * np.sin(2 * np.pi * time)
        angle, size = turn * time, radius * growth**time
        dx, dy = (x_HW - center_x) / size, (y_HW - center_y) / size
        u = dx * np.cos(angle) + dy * np.sin(angle)
        v = dy * np.cos(angle) - dx * np.sin(angle)
        inside = np.hypot(u, v) < 1 + depth * np.cos(lobes * np.arctan2(v, u))
        return inside, texture(radius * u, radius * v)

    return appearance
