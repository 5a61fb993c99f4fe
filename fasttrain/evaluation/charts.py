"""Pictures of the tasks on whole videos: nearest videos, confusion, segments over time.

Draws only what it is given, as `figures.py` does. Shape suffixes: T frames, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fasttrain.errors import InputError
from fasttrain.evaluation.plots import as_written, contact_sheet, save_figure

Frame = npt.NDArray[np.uint8]

# Beyond so many classes their names would run into each other.
_MOST_NAMES = 40
_RIGHT, _WRONG, _QUERY = (42, 157, 74), (200, 64, 47), (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class RetrievalRow:
    """A query and its nearest videos, nearest first, with whether each is of the query's class."""

    caption: str
    query: Frame
    neighbours: Sequence[Frame]
    right: Sequence[bool]


def retrieval_sheet(rows: Sequence[RetrievalRow], path: Path) -> Path:
    """A row per query: its picture, then its nearest, framed green if of the query's class, else red."""
    sheet = []
    for row in rows:
        colors = [_RIGHT if right else _WRONG for right in row.right]
        framed = [_framed(*one) for one in zip(row.neighbours, colors, strict=True)]
        sheet.append((row.caption, [_framed(row.query, _QUERY), *framed]))
    return contact_sheet(sheet, path, tile_width=128)


def _framed(picture_HWC: Frame, color: tuple[int, int, int]) -> Frame:
    width = max(2, round(picture_HWC.shape[1] / 24))
    height, length = picture_HWC.shape[:2]
    framed_HWC = np.full((height + 2 * width, length + 2 * width, 3), color, dtype=np.uint8)
    framed_HWC[width:-width, width:-width] = picture_HWC
    return framed_HWC


def confusion_maps(counts: Mapping[str, Any], classes: Sequence[str], path: Path) -> Path:
    """Side by side per variant: the share of each true class (row) that was taken for each class (column)."""
    if not counts:
        raise InputError("a confusion map needs the counts of at least one variant")
    side = float(np.clip(0.22 * len(classes), 3.5, 9))
    figure = Figure(figsize=(side * len(counts) + 1.5, side + 0.6), layout="constrained")
    grid = figure.subplots(1, len(counts), squeeze=False)[0]
    scale = ScalarMappable(Normalize(0, 1), "viridis")
    for axes, (variant, counts_CC) in zip(grid, counts.items(), strict=True):
        counts_CC = np.asarray(counts_CC, dtype=float)
        # A class without a test video is an empty row.
        shares_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares_CC, norm=scale.norm, cmap=scale.cmap, interpolation="nearest")
        axes.set_title(
            f"{variant}: {100 * np.trace(counts_CC) / max(1, counts_CC.sum()):.1f} % right", fontsize=10
        )
        axes.set_xlabel("predicted", fontsize=8)
        axes.set_ylabel("true", fontsize=8)
        if len(classes) <= _MOST_NAMES:
            names = [_short(name) for name in classes]
            axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=6)
            axes.set_yticks(range(len(classes)), names, fontsize=6)
    figure.colorbar(scale, ax=list(grid), shrink=0.8)
    return save_figure(figure, path)


def segment_bars(
    videos: Sequence[tuple[str, Mapping[str, npt.NDArray[np.integer]]]],
    classes: Sequence[str],
    path: Path,
    background: Sequence[int] = (),
) -> Path:
    """Per video a stack of colour bars over time, one for each row (truth, before, after) of labels (T,).

    Background is light grey; classes that do not occur are left out of the legend.
    """
    if not videos:
        raise InputError("colour bars of segments need at least one video")
    palette = _palette(len(classes), background)
    figure = Figure(figsize=(10, 1.3 * len(videos) + 1.2), layout="constrained")
    grid = figure.subplots(len(videos), 1, squeeze=False)[:, 0]
    seen: set[int] = set()
    for axes, (name, rows) in zip(grid, videos, strict=True):
        labels_RT = np.stack(list(rows.values()))
        seen |= set(np.unique(labels_RT).tolist())
        axes.imshow(palette[labels_RT], aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.set_title(as_written(name), fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=7)
        for border in range(1, len(rows)):
            axes.axhline(border - 0.5, color="white", linewidth=3)
    grid[-1].set_xlabel("frame", fontsize=8)
    handles = [Patch(color=palette[label], label=_short(classes[label])) for label in sorted(seen)][
        :_MOST_NAMES
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=7)
    return save_figure(figure, path)


def _palette(count: int, background: Sequence[int]) -> npt.NDArray[np.float64]:
    """(C, 3) colours: the 20 of tab20, then around the colour circle."""
    few = [color[:3] for color in colormaps["tab20"](range(20))]
    circle = [color[:3] for color in colormaps["hsv"](np.linspace(0, 1, max(count - 20, 1), endpoint=False))]
    palette = np.array([*few, *circle][:count])
    for label in background:
        palette[label] = to_rgb("0.9")
    return palette


def _short(name: str) -> str:
    return as_written(name if len(name) <= 26 else name[:25] + "…")
