"""Pictures: masks, poses and arrows on frames, nearest videos, curves and charts.

Nothing here knows models. Frames are uint8 RGB. Shape suffixes: T frames, H height, W width, C colours or
classes, J joints, M matches.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rcParams
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageOps

from fasttrain.data.images import Frame
from fasttrain.errors import InputError
from fasttrain.evaluation.frames import voc_palette
from fasttrain.loggers import read_records

Labels = npt.NDArray[Any]
Matches = npt.NDArray[np.floating[Any]]
Figures = Mapping[str, float | None]

# Limbs of a JHMDB pose, as pairs of joints (`jhmdb.JOINTS`).
LIMBS = (
    *((0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (1, 6), (3, 7), (4, 8)),
    *((5, 9), (6, 10), (7, 11), (8, 12), (9, 13), (10, 14)),
)
CAPTION_HEIGHT = 22
DPI = 110
_TRADE_OFF = ("intra_normalized_95", "inter_normalized_95")
_BACKGROUND = (255, 255, 255)
_INK = (30, 30, 30)
_RIGHT, _WRONG = (42, 157, 74), (200, 64, 47)
# The names of more classes would run into each other.
_MAX_NAMES = 40

# A name may hold a dollar sign.
rcParams["text.parse_math"] = False


def overlay_masks(frame_HWC: Frame, labels_HW: Labels) -> Frame:
    """The frame with every object tinted in its palette colour and outlined."""
    labels_HW = np.asarray(labels_HW).astype(np.uint8)
    mixed_HWC = frame_HWC * 0.5 + voc_palette()[labels_HW] * 0.5
    edge_HW = np.zeros(labels_HW.shape, dtype=bool)
    edge_HW[:, 1:] |= labels_HW[:, 1:] != labels_HW[:, :-1]
    edge_HW[1:] |= labels_HW[1:] != labels_HW[:-1]
    tinted_HWC = np.where(labels_HW[..., None] > 0, mixed_HWC, frame_HWC)
    return np.where(edge_HW[..., None], 255, tinted_HWC).astype(np.uint8)


def overlay_pose(frame_HWC: Frame, joints_2J: npt.ArrayLike) -> Frame:
    """The frame with the limbs and joints of one pose in pixels; joints at a negative x are left out."""
    joints_J2 = np.asarray(joints_2J, dtype=float).T
    image = Image.fromarray(frame_HWC)
    draw = ImageDraw.Draw(image)
    size = max(2, round(min(image.size) / 80))
    for (start, end), color in zip(LIMBS, voc_palette()[1:], strict=False):
        if joints_J2[start, 0] >= 0 and joints_J2[end, 0] >= 0:
            draw.line([*joints_J2[start], *joints_J2[end]], fill=tuple(color.tolist()), width=size)
    for joint in joints_J2[joints_J2[:, 0] >= 0]:
        draw.circle(tuple(joint), size, fill=_BACKGROUND, outline=_INK)
    return np.asarray(image)


def contact_sheet(rows: Sequence[tuple[str, Sequence[Frame]]], path: Path, tile_width: int = 240) -> None:
    """Rows of pictures, each row under its caption."""
    columns = max(len(pictures) for _, pictures in rows)
    height, width = rows[0][1][0].shape[:2]
    tile_height = tile_width * height / width
    figure_height = len(rows) * (tile_height + CAPTION_HEIGHT)
    figure = Figure(figsize=(columns * tile_width / DPI, figure_height / DPI))
    top, gap = 1 - CAPTION_HEIGHT / figure_height, CAPTION_HEIGHT / tile_height
    figure.subplots_adjust(0, 0, 1, top, wspace=0.01, hspace=gap)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_of_row, (caption, pictures) in zip(grid, rows, strict=True):
        axes_of_row[0].set_title(caption, loc="left", fontsize=9)
        for axes, picture in zip_longest(axes_of_row, pictures):
            axes.axis("off")
            if picture is not None:
                axes.imshow(picture)
    _save(figure, path)


def correspondence_arrows(rows: Sequence[tuple[str, Frame, Frame, Matches]], path: Path) -> None:
    """Lines from points of one frame to where their features are found in another, one row per encoder.

    A row is (name, first HWC, second HWC, matches M4); a match is x, y in the first frame and x, y in the
    second, as shares of width and height. Matches are coloured by their point in the first frame.
    """
    sheet = []
    for name, first_HWC, second_HWC, matches_M4 in rows:
        image = Image.fromarray(np.concatenate([first_HWC, second_HWC], axis=1))
        draw = ImageDraw.Draw(image)
        height, width = first_HWC.shape[:2]
        for x, y, x_there, y_there in matches_M4.tolist():
            start, end = (x * width, y * height), (width + x_there * width, y_there * height)
            color = (round(255 * x), round(255 * y), round(255 * (1 - x)))
            draw.line([start, end], fill=color, width=max(1, width // 320))
            for point in (start, end):
                draw.circle(point, max(2, width // 160), fill=color, outline=_BACKGROUND)
        sheet.append((name, [np.asarray(image)]))
    contact_sheet(sheet, path, tile_width=960)


def framed(picture_HWC: Frame, right: bool | None = None) -> Frame:
    """The picture in a frame: green if it is right, red if it is wrong, white if it is neither."""
    image = Image.fromarray(picture_HWC)
    color = _BACKGROUND if right is None else _RIGHT if right else _WRONG
    return np.asarray(ImageOps.expand(image, max(2, round(image.width / 24)), color))


def learning_curves(runs: Sequence[Path], path: Path) -> None:
    """Everything that the runs' `metrics.jsonl` recorded over the steps: one panel per quantity."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run_name, run in zip(run_names(runs), runs, strict=True):
        for record in read_records(run / "metrics.jsonl"):
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    panels.setdefault(name, {}).setdefault(run_name, []).append((record["step"], value))
    if not panels:
        raise InputError(
            f"no figures in the metrics.jsonl of {', '.join(map(str, runs))}; train some steps first"
        )
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    for number, (name, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        for run_name, points in curves.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=run_name, marker="." if len(points) < 30 else None)
        if len(runs) > 1:
            axes.legend(fontsize=7)
    _save(figure, path)


def trade_off(points: Sequence[tuple[str, Figures, Figures]], path: Path) -> None:
    """Intra- against inter-video distance (over the 95 % diameter), an arrow from before to after per run.

    A point is (name, before, after), each with the keys of `consistency_separability`.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, before, after) in enumerate(points):
        color = f"C{number}"
        (x, y), (x_after, y_after) = np.array(
            [[figures[key] for key in _TRADE_OFF] for figures in (before, after)], dtype=float
        )
        axes.annotate("", (x_after, y_after), (x, y), arrowprops={"arrowstyle": "->", "color": color})
        axes.scatter(x, y, facecolors="none", edgecolors=color)
        axes.scatter(x_after, y_after, color=color, label=name)
    axes.set_xlabel("intra-video distance / 95 % diameter (consistent: left)")
    axes.set_ylabel("inter-video distance / 95 % diameter (separable: up)")
    axes.set_title("Before (ring) and after (dot) the projection")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def has_trade_off(results: Mapping[str, Figures]) -> bool:
    """Whether both variants have numbers to draw: one video alone has no distance to others."""
    found = [results.get(variant, {}).get(key) for variant in ("before", "after") for key in _TRADE_OFF]
    return all(value is not None and math.isfinite(value) for value in found)


def confusion_maps(counts: Mapping[str, Any], classes: Sequence[str], path: Path) -> None:
    """Side by side per variant: the share of each true class (row) that was taken for each class (column)."""
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
        if len(classes) <= _MAX_NAMES:
            names = [_short(name) for name in classes]
            axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=6)
            axes.set_yticks(range(len(classes)), names, fontsize=6)
    figure.colorbar(scale, ax=list(grid), shrink=0.8)
    _save(figure, path)


def segment_bars(
    videos: Sequence[tuple[str, Mapping[str, npt.NDArray[np.integer]]]],
    classes: Sequence[str],
    path: Path,
    background: Sequence[int] = (),
) -> None:
    """Per video a stack of colour bars over time, one for each row (truth, before, after) of labels (T,).

    Background is light grey; classes that do not occur are left out of the legend.
    """
    palette = _palette(len(classes), background)
    figure = Figure(figsize=(10, 1.3 * len(videos) + 1.2), layout="constrained")
    grid = figure.subplots(len(videos), 1, squeeze=False)[:, 0]
    seen: set[int] = set()
    for axes, (name, rows) in zip(grid, videos, strict=True):
        labels_RT = np.stack(list(rows.values()))
        seen |= set(np.unique(labels_RT).tolist())
        axes.imshow(palette[labels_RT], aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=7)
        for border in range(1, len(rows)):
            axes.axhline(border - 0.5, color="white", linewidth=3)
    grid[-1].set_xlabel("frame", fontsize=8)
    handles = [Patch(color=palette[label], label=_short(classes[label])) for label in sorted(seen)]
    figure.legend(handles=handles[:_MAX_NAMES], loc="outside lower center", ncols=6, fontsize=7)
    _save(figure, path)


def run_names(runs: Sequence[Path]) -> list[str]:
    """What runs are called: by their folders, by the paths given where two folders are called alike."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]


def _palette(count: int, background: Sequence[int]) -> npt.NDArray[np.float64]:
    """(C, 3) colours: the 20 of tab20, then around the colour circle."""
    circle = colormaps["hsv"](np.linspace(0, 1, max(count - 20, 1), endpoint=False))
    palette = np.concatenate([colormaps["tab20"](range(20)), circle])[:count, :3]
    palette[list(background)] = to_rgb("0.9")
    return palette


def _short(name: str) -> str:
    return name if len(name) <= 26 else name[:25] + "…"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
