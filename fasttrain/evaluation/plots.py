"""Pictures: contact sheets of masks and poses, matches between frames, and charts.

Frames are uint8 RGB. Shape suffixes: T frames, H height, W width, C colours or classes, J joints, M matches.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageOps
from scipy.linalg import orthogonal_procrustes
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor

from fasttrain.data.images import Frame
from fasttrain.errors import InputError
from fasttrain.evaluation.results import better
from fasttrain.files import open_atomically
from fasttrain.loggers import read_records

Labels = npt.NDArray[Any]
Matches = npt.NDArray[np.floating[Any]]
Metrics = Mapping[str, float | None]

# The palette of Okabe and Ito, which colour-blind readers can tell apart. Black is reserved for text.
OKABE_ITO = ("#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#F0E442")
CORRECT, WRONG = OKABE_ITO[:2]
# Dashes and markers also distinguish the runs. Yellow is too light for lines.
_LINE_COLORS, _MARKERS = OKABE_ITO[:6], "os^DvPX"
_DASHES = ("-", "--", "-.", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
# Widths in inches. At half size, a picture fills a column or a page of print, and its text is 7 pt.
COLUMN, PAGE = 7, 14
STYLE: dict[Any, Any] = {
    "font.size": 14,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    # The grid is below everything, including arrows.
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.9",
    "lines.linewidth": 2,
    "legend.frameon": False,
    "figure.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.05,
    "savefig.dpi": 130,
    # A name may contain a dollar sign.
    "text.parse_math": False,
}

# Limbs of a JHMDB pose as pairs of joints (`jhmdb.JOINTS`). From 3 on, odd joints are on the right side.
LIMBS = (
    *((0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (1, 6), (3, 7), (4, 8)),
    *((5, 9), (6, 10), (7, 11), (8, 12), (9, 13), (10, 14)),
)
LIMB_COLORS = {"trunk": OKABE_ITO[6], "right limbs": OKABE_ITO[1], "left limbs": OKABE_ITO[2]}
# The titles of metrics in pictures.
TITLES = {
    "loss": "total loss",
    "cycle": "cycle loss",
    "separability": "separability loss",
    "cycle_accuracy": "cycle accuracy",
    "identity_similarity": "identity similarity",
    "lambda": "weight of the separability loss",
    "cosine_distance": "cosine distance from frozen",
    "effective_rank": "effective rank",
    "score": "score: mutual nearest neighbours",
    "intra_normalized_95": "intra-video distance / 95 % diameter",
    "inter_normalized_95": "inter-video distance / 95 % diameter",
}
# Keys of metrics.jsonl that are not drawn.
_BOOKKEEPING = (
    *("step", "epoch", "seconds", "pairs_per_second", "lr", "bad_samples", "bad_files"),
    *("best_step", "best_score", "whitening"),
)
# The lines of what training does not change.
_FROZEN: dict[str, tuple[Literal["--", ":"], str]] = {
    "before": ("--", "before (frozen encoder)"),
    "centred": (":", "frozen encoder, mean removed"),
}
_TRADE_OFF = ("intra_normalized_95", "inter_normalized_95")
# The maximum numbers of class names along an axis and in the legend, and of the points of a curve.
_MAX_TICKS, _MAX_HANDLES, _MAX_POINTS = 20, 40, 50


class Row(NamedTuple):
    """A row of a contact sheet."""

    label: str
    pictures: Sequence[Frame]
    notes: Sequence[str] = ()
    """Short texts on the pictures."""
    captions: Sequence[str] = ()
    """Texts below the pictures."""


def overlay_masks(frame_HWC: Frame, labels_HW: Labels) -> Frame:
    """Tint every object in its colour, outlined in white and black, and turn the background grey.

    On grey, the colours are visible whatever the object wears.
    """
    labels_HW = np.asarray(labels_HW).astype(np.uint8)
    is_object_HW = labels_HW > 0
    grey_HWC = _grey(frame_HWC)
    tinted_HWC = 0.3 * grey_HWC + 0.7 * 255 * _palette(255)[labels_HW - is_object_HW]
    picture_HWC = np.where(is_object_HW[..., None], tinted_HWC, grey_HWC).astype(np.uint8)
    width = max(1, round(labels_HW.shape[1] / 400))
    # The outer line is drawn on the background only, so that the colour of a small object remains visible.
    for distance, brightness, drawn_HW in ((2 * width, 0, ~is_object_HW), (width, 255, True)):
        window = 2 * distance + 1
        is_edge_HW = maximum_filter(labels_HW, window) != minimum_filter(labels_HW, window)
        picture_HWC[is_edge_HW & drawn_HW] = brightness
    return picture_HWC


def label_color(label: int) -> str:
    """Return the colour of a label in `overlay_masks`, on medium grey, such as "#0072b2"."""
    return to_hex(0.3 * 0.5 + 0.7 * _palette(label)[-1])


def _grey(frame_HWC: Frame) -> Frame:
    return np.repeat(frame_HWC.mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)


def overlay_pose(frame_HWC: Frame, joints_2J: npt.ArrayLike) -> Frame:
    """Draw one pose, in pixels, on the greyscale frame; joints with a negative x are left out."""
    joints_J2 = np.asarray(joints_2J, dtype=float).T
    image = Image.fromarray(_grey(frame_HWC))
    draw = ImageDraw.Draw(image)
    size = max(2, round(min(image.size) / 50))
    for start, end in LIMBS:
        if joints_J2[start, 0] >= 0 and joints_J2[end, 0] >= 0:
            limbs = "trunk" if start < 3 else "right limbs" if end % 2 else "left limbs"
            for fill, width in (("black", size + 2), (LIMB_COLORS[limbs], size)):
                draw.line([*joints_J2[start], *joints_J2[end]], fill=fill, width=width)
    for joint in joints_J2[joints_J2[:, 0] >= 0]:
        draw.circle(tuple(joint), 0.6 * size, fill="white", outline="black")
    return np.asarray(image)


@rc_context(STYLE)
def contact_sheet(
    rows: Sequence[Row],
    path: Path,
    columns: Sequence[str] = (),
    legend: Mapping[str, str] | None = None,
    title: str = "",
    page: bool = False,
) -> None:
    """Draw rows of pictures under the headings `columns`; `legend` maps names to colours.

    The pictures may be large or small, such as maps with a pixel per token. All have one aspect ratio. The
    sheet is as wide as a column of print or, for photos of many colours, as a `page`.
    """
    sheet_width = PAGE if page else COLUMN
    legend_columns = _legend_columns(list(legend), sheet_width) if legend else 1
    count = max(len(row.pictures) for row in rows)
    height, width = rows[0].pictures[0].shape[:2]
    title = _wrapped(title, sheet_width)
    lines = sum(bool(row.captions) for row in rows) + 1.2 * len(title.splitlines())
    if legend:
        lines += 0.4 + math.ceil(len(legend) / legend_columns)
    # A few large pictures would make a tower.
    tile = min((sheet_width - 0.4) / count, 2.5 * width / height)
    sheet_width = min(sheet_width, count * tile + 0.4)
    figure = Figure(figsize=(sheet_width, len(rows) * tile * height / width + 0.3 * lines + 0.5))
    # Legible on any ground.
    outline = [withStroke(linewidth=4, foreground="black")]
    figure.set_layout_engine("compressed", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes_of_row, row in zip(grid, rows, strict=True):
        cells = zip_longest(axes_of_row, row.pictures, row.notes, row.captions)
        for axes, picture, note, caption in cells:
            axes.set(xticks=[], yticks=[], frame_on=False)
            if picture is not None:
                # The extent gives maps with a pixel per token the size of the frames.
                axes.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
            axes.text(0.03, 0.04, note or "", color="white", path_effects=outline, transform=axes.transAxes)
            axes.set_xlabel(caption or "", labelpad=2)
        axes_of_row[0].set_ylabel(row.label)
    for axes, heading in zip(grid[0], columns, strict=False):
        axes.set_title(heading, loc="center")
    if title:
        figure.suptitle(title)
    if legend:
        handles = [Patch(facecolor=color, edgecolor="black", label=name) for name, color in legend.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns)
    _save(figure, path, many_colors=page)


@rc_context(STYLE)
def correspondence_arrows(
    rows: Sequence[tuple[str, Frame, Frame, Matches, Sequence[bool]]],
    columns: tuple[str, str],
    path: Path,
    title: str,
) -> None:
    """Join points of one frame and their matches in another by lines, one row per variant.

    A row is (name, first HWC, second HWC, matches M4, whether each match is correct); a match is x, y in the
    first frame and x, y in the second, as fractions of width and height. `columns` names the two frames.
    """
    height, width = rows[0][1].shape[:2]
    figure = Figure(figsize=(COLUMN, len(rows) * (COLUMN / 2 * height / width + 0.3) + 0.8))
    figure.suptitle(_wrapped(title, COLUMN))
    styles: list[dict[str, Any]] = [
        {"color": WRONG, "linestyle": (0, (3, 1.5)), "linewidth": 1.2},
        {"color": CORRECT, "linestyle": "-", "linewidth": 1.2},
    ]
    halo = [withStroke(linewidth=2.2, foreground="white")]
    grid = figure.subplots(len(rows), squeeze=False)[:, 0]
    for axes, (name, first_HWC, second_HWC, matches_M4, is_correct_M) in zip(grid, rows, strict=True):
        height, width = first_HWC.shape[:2]
        offset = round(1.02 * width)
        gap_HWC = np.full((height, offset - width, 3), 255, dtype=np.uint8)
        axes.imshow(np.concatenate([_grey(first_HWC), gap_HWC, _grey(second_HWC)], axis=1))
        for (x, y, x_match, y_match), is_correct in zip(matches_M4.tolist(), is_correct_M, strict=True):
            style = styles[is_correct]
            start, end = (x * width, y * height), (offset + x_match * width, y_match * height)
            axes.plot(*zip(start, end, strict=True), path_effects=halo, **style)
            marker, size = ("o", 7) if is_correct else ("X", 10)
            # Above the lines of all matches.
            end_style = {"color": style["color"], "markeredgecolor": "white", "markersize": size, "zorder": 3}
            for point in (start, end):
                axes.plot(*point, marker, **end_style)
        axes.set(xticks=[], yticks=[], frame_on=False, ylabel=name)
        axes.set_xlabel(f"{sum(is_correct_M)} of {len(matches_M4)} matches right")
    grid[0].tick_params(labeltop=True, labelbottom=False, length=0)
    grid[0].set_xticks([width / 2, offset + width / 2], columns)
    wrong, correct = (
        Line2D([], [], marker=marker, markersize=9, **style)
        for marker, style in zip("Xo", styles, strict=True)
    )
    figure.legend([correct, wrong], ["right", "wrong"], loc="outside lower center", ncols=2)
    _save(figure, path)


def pca_maps(tokens_ThwD: Tensor, like_ThwD: Tensor | None = None) -> Frame:
    """Show tokens as colours: their first three principal components as red, green and blue.

    The components are computed over all frames together, so that a colour means the same in all of them. The
    2nd to 98th percentiles of each component become 0 to 255. The sign of a component is such that its
    largest absolute value is positive. The maps are thus the same for rotated, shifted and scaled tokens, up
    to rounding. With other tokens of the same frames, `like_ThwD`, the components are instead rotated among
    themselves so that the colours resemble the maps of those tokens. Returns (T, h, w, 3) uint8. Source of
    the idea: DINOv2 (Oquab et al., 2023).
    """
    components_N3 = _principal_components(tokens_ThwD)
    if like_ThwD is not None:
        rotation_33, _ = orthogonal_procrustes(components_N3, _principal_components(like_ThwD))
        components_N3 = components_N3 @ rotation_33
    low_3, high_3 = np.percentile(components_N3, (2, 98), axis=0)
    scaled_N3 = (components_N3 - low_3) / np.maximum(high_3 - low_3, np.finfo(np.float64).tiny)
    maps_N3 = (255 * scaled_N3.clip(0, 1)).round().astype(np.uint8)
    return maps_N3.reshape(*tokens_ThwD.shape[:3], 3)


def _principal_components(tokens_ThwD: Tensor) -> npt.NDArray[np.float64]:
    """Return the first three principal components (N, 3) of N tokens, each with a variance of 1."""
    tokens_ND = tokens_ThwD.flatten(0, 2).float()
    tokens_ND = tokens_ND - tokens_ND.mean(0)
    # Eigenvectors of the covariance need less memory than a singular value decomposition of the tokens.
    axes_DD = torch.linalg.eigh((tokens_ND.T @ tokens_ND).cpu().double()).eigenvectors
    components_N3 = tokens_ND.cpu().double().numpy() @ axes_DD[:, -3:].flip(1).numpy()
    largest_3 = np.take_along_axis(components_N3, np.abs(components_N3).argmax(0)[None], axis=0)
    components_N3 *= np.where(largest_3 < 0, -1, 1)
    return components_N3 / np.maximum(components_N3.std(0), np.finfo(np.float64).tiny)


def framed(picture_HWC: Frame, correct: bool | None = None) -> Frame:
    """Add a border: blue if the picture is correct, orange if it is wrong, white if it is neither."""
    image = Image.fromarray(picture_HWC)
    color = "white" if correct is None else CORRECT if correct else WRONG
    return np.asarray(ImageOps.expand(image, max(2, round(image.width / 20)), color))


@rc_context(STYLE)
def learning_curves(runs: Sequence[Path], path: Path) -> None:
    """Draw each metric in the runs' `metrics.jsonl` over the steps, on axes from zero.

    A metric that never changes has no panel. Training does not change the frozen encoder, so its metrics,
    with and without its mean, are broken lines in the panels of the video encoder. A long curve is drawn
    pale, and over it the means of consecutive points. Raises InputError if no run has metrics.
    """
    panels: dict[tuple[str, bool], dict[tuple[int, str], list[tuple[int, float]]]] = {}
    for number, run in enumerate(runs):
        for record in read_records(run / "metrics.jsonl"):
            for key, value in record.items():
                variant, _, name = key.rpartition("/")
                if name not in _BOOKKEEPING and isinstance(value, int | float):
                    curves = panels.setdefault((name, bool(variant)), {})
                    curves.setdefault((number, variant), []).append((record["step"], value))
    if not panels:
        paths = ", ".join(f"'{run}'" for run in runs)
        raise InputError(f"{paths}: no metrics in metrics.jsonl. Train for some steps first.")
    changing = {
        panel: curves
        for panel, curves in panels.items()
        if any(len(points) == 1 or len({value for _, value in points}) > 1 for points in curves.values())
    }
    panels = changing or panels
    names = run_names(runs)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawn = {variant for curves in panels.values() for _, variant in curves}
    entries = len(names) + len(drawn & _FROZEN.keys())
    width = PAGE / 3 * columns
    legend_columns = min(3, _legend_columns(names, width))
    figure = Figure(figsize=(width, 3.3 * rows + 0.3 * math.ceil(entries / legend_columns)))
    lines: dict[str, Line2D] = {}
    for position, ((key, is_validation), curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, position, xlabel="step")
        direction = f"{side} is better" if key in TITLES and (side := better(key)) else ""
        axes.set(
            title=TITLES.get(key, key.replace("_", " ")),
            ylabel=f"validation\n{direction}" if is_validation else direction,
        )
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.grid()
        for (number, variant), points in curves.items():
            style = _run_style(number)
            if variant in _FROZEN:
                axes.axhline(points[-1][1], color=style["color"], linestyle=_FROZEN[variant][0])
                continue
            points_N2 = np.array(points)
            if len(points) > _MAX_POINTS:
                axes.plot(*points_N2.T, color=style["color"], alpha=0.2, linewidth=0.7, zorder=1)
                points_N2 = np.array([part.mean(0) for part in np.array_split(points_N2, _MAX_POINTS)])
            # Markers distinguish more runs than colours do; many markers would hide the line.
            style |= {"linestyle": "-", "markevery": math.ceil(len(points_N2) / 12)}
            (lines[names[number]],) = axes.plot(*points_N2.T, label=names[number], **style)
        # Ratios are visible only on an axis from zero.
        if axes.dataLim.ymin > 0:
            # A single outlier would flatten the curve.
            highest = max(np.max(line.get_ydata()) for line in axes.lines if line.get_alpha() is None)
            axes.set_ylim(0, min(1.08 * axes.dataLim.ymax, 1.5 * highest))
    handles = list(lines.values())
    for variant, (line, label) in _FROZEN.items():
        handles += [Line2D([], [], color="0.5", linestyle=line, label=label)] if variant in drawn else []
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns)
    _save(figure, path)


@rc_context(STYLE)
def trade_off(points: Sequence[tuple[str, Metrics, Metrics]], path: Path) -> None:
    """Draw intra- against inter-video distance, with an arrow from before to after per run.

    A point is (name, before, after), each with the keys of `consistency_separability`.
    """
    columns = min(2, _legend_columns([name for name, *_ in points], COLUMN))
    figure = Figure(figsize=(COLUMN, 4.8 + 0.3 * math.ceil((len(points) + 2) / columns)))
    axes = figure.add_subplot()
    for number, (name, before, after) in enumerate(points):
        style = _run_style(number)
        (x, y), (x_after, y_after) = np.array(
            [[metrics[key] for key in _TRADE_OFF] for metrics in (before, after)], dtype=float
        )
        arrow = {"arrowstyle": "->", "color": style["color"], "linewidth": 1.5, "shrinkA": 6, "shrinkB": 6}
        axes.annotate("", (x_after, y_after), (x, y), arrowprops=arrow, zorder=1)
        axes.plot(x, y, **style | {"linestyle": "none", "markerfacecolor": "white"})
        axes.plot(x_after, y_after, **style | {"linestyle": "none"}, label=name)
    for label, fill in {"before (frozen encoder)": "white", "after (with projection)": "0.5"}.items():
        axes.plot([], [], "o", markerfacecolor=fill, markeredgecolor="0.5", label=label)
    axes.margins(0.1)
    # The axes span at least 20 % of the values, so that a negligible change looks small.
    for limits, set_limits in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        middle = sum(limits) / 2
        margin = max(limits[1] - middle, 0.1 * middle)
        set_limits(middle - margin, middle + margin)
    axes.locator_params(nbins=5)
    x_label, y_label = (f"{TITLES[key]}\n({better(key)} is better)" for key in _TRADE_OFF)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid()
    figure.legend(loc="outside lower center", ncols=columns, handlelength=1)
    _save(figure, path)


@rc_context(STYLE)
def predicted_trade_off(
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    points: Mapping[str, tuple[float, float]],
    path: Path,
) -> None:
    """Draw curves and points of intra- and inter-video distances relative to those of the frozen features."""
    columns = min(2, _legend_columns([*curves, *points], COLUMN))
    figure = Figure(figsize=(COLUMN, 5 + 0.3 * math.ceil((len(curves) + len(points)) / columns)))
    axes = figure.add_subplot(title=_wrapped(title, COLUMN))
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(*np.array(curve).T, color=_LINE_COLORS[number], linestyle=_DASHES[number], label=name)
    for number, (name, (x, y)) in enumerate(points.items(), start=len(curves)):
        style = _run_style(number) | {"linestyle": "none", "markersize": 9, "markeredgecolor": "black"}
        axes.plot(x, y, **style, label=name, zorder=3)
    axes.margins(0.1)
    # Ratios are visible only on axes from zero.
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set(
        xlabel="intra-video distance / that of the frozen encoder\n(lower is better)",
        ylabel="inter-video distance / frozen\n(higher is better)",
    )
    axes.grid()
    figure.legend(loc="outside lower center", ncols=columns)
    _save(figure, path)


def has_trade_off(results: Mapping[str, Metrics]) -> bool:
    """Whether both variants have a defined trade-off; a single video has no inter-video distance."""
    values = [results.get(variant, {}).get(key) for variant in ("before", "after") for key in _TRADE_OFF]
    return all(value is not None and math.isfinite(value) for value in values)


@rc_context(STYLE)
def confusion_maps(counts: Mapping[str, Any], classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix per variant, side by side, each row as fractions of its true class."""
    side = float(np.clip(0.3 * len(classes), 4.5, 6))
    figure = Figure(figsize=(side * len(counts) + 3, side + 2))
    grid = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    scale = ScalarMappable(Normalize(0, 1), "Blues")
    for axes, (variant, counts_CC) in zip(grid, counts.items(), strict=True):
        counts_CC = np.asarray(counts_CC, dtype=float)
        # A class without a test video is an empty row.
        fractions_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
        axes.imshow(fractions_CC, norm=scale.norm, cmap=scale.cmap, interpolation="nearest")
        axes.spines[:].set_visible(True)
        accuracy = 100 * np.trace(counts_CC) / max(1, counts_CC.sum())
        axes.set(title=f"{variant}: linear top-1 {accuracy:.1f} %", xlabel="predicted class")
        if len(classes) <= _MAX_TICKS:
            names = [shorten(name) for name in classes]
            axes.set_xticks(range(len(classes)), names, rotation=90)
            axes.set_yticks(range(len(classes)), names)
    grid[0].set_ylabel("true class")
    figure.colorbar(scale, ax=list(grid), shrink=0.8, label="fraction of the true class")
    _save(figure, path)


@rc_context(STYLE)
def segment_bars(
    videos: Sequence[tuple[str, Mapping[str, npt.NDArray[np.integer]]]],
    classes: Sequence[str],
    path: Path,
    background: Sequence[int] = (),
) -> None:
    """Draw the labels of each video over time, one colour bar per row (truth, before, after) of labels (T,).

    The background is light grey; classes that do not occur are omitted from the legend. The title of a video
    has the share of frames whose labels are true.
    """
    seen = sorted({int(label) for _, rows in videos for row_T in rows.values() for label in np.unique(row_T)})
    palette = np.tile(to_rgb("0.9"), (len(classes), 1))
    drawn = [label for label in seen if label not in background]
    palette[drawn] = _palette(len(drawn))
    names = {label: shorten(classes[label]) for label in seen}
    columns = min(4, _legend_columns(list(names.values()), PAGE))
    figure = Figure(figsize=(PAGE, 1.9 * len(videos) + 0.3 * math.ceil(len(seen) / columns) + 0.7))
    grid = figure.subplots(len(videos), 1, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(grid, videos, strict=True):
        axes.imshow(palette[np.stack(list(rows.values()))], aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        shares = [
            f"{100 * np.mean(row_T == rows['truth']):.1f} % {row}"
            for row, row_T in rows.items()
            if row != "truth"
        ]
        axes.set_title(f"{name}: frame accuracy {', '.join(shares)}")
        for border in range(1, len(rows)):
            axes.axhline(border - 0.5, color="white", linewidth=4)
    grid[-1].set_xlabel("frame")
    handles = [Patch(color=palette[label], label=names[label]) for label in seen[:_MAX_HANDLES]]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    _save(figure, path)


def run_names(runs: Sequence[Path]) -> list[str]:
    """Name each run by its folder, or by the given path if two folders have the same name."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]


def _run_style(number: int) -> dict[str, Any]:
    color, marker = _LINE_COLORS[number % len(_LINE_COLORS)], _MARKERS[number % len(_MARKERS)]
    return {"color": color, "marker": marker, "linestyle": _DASHES[number % len(_DASHES)]}


def _wrapped(text: str, width: float) -> str:
    """Break a title into lines that fit into a figure `width` inches wide."""
    return textwrap.fill(text, int(10 * width))


def _legend_columns(names: Sequence[str], width: float) -> int:
    """Return how many columns of a legend fit into a figure `width` inches wide, but at least one."""
    # An inch holds about 9 characters; a handle and the gaps next to it are as wide as 8.
    return max(1, int(9 * width / (8 + max(map(len, names)))))


def _palette(count: int) -> npt.NDArray[np.float64]:
    """Return colours (count, 3): those of Okabe and Ito, then darker and lighter ones, repeated as needed."""
    # Blue, the darkest, comes last.
    colors = np.array([to_rgb(color) for color in (*OKABE_ITO[1:], OKABE_ITO[0])])
    return np.resize(np.concatenate([colors, 0.4 * colors, 0.5 + 0.5 * colors]), (count, 3))


def shorten(name: str, length: int = 26) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _save(figure: Figure, path: Path, *, many_colors: bool = False) -> None:
    """Write the figure as a PNG, by default with 256 colours, which is smaller."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    with open_atomically(path) as file:
        image = Image.open(drawn).convert("RGB")
        if not many_colors:
            image = image.quantize(256, dither=Image.Dither.NONE)
        image.save(file, format="PNG", optimize=True)
