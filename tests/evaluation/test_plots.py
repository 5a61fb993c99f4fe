"""Pictures: the size of text, the colours, and which matches count as correct."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from fasttrain.errors import InputError
from fasttrain.evaluation import plots
from fasttrain.evaluation.jhmdb import JOINTS, end_at_their_joint
from fasttrain.evaluation.sequences import find_matches, keep_their_label

FRAME = np.full((30, 40, 3), (200, 100, 0), dtype=np.uint8)
TRADE_OFF = {"intra_normalized_95": 0.4, "inter_normalized_95": 0.7}
HISTORY = """{"step": 1, "loss": 2, "cycle_accuracy": 0.1, "seconds": 3, "bad_samples": 0}
{"step": 2, "loss": 1, "before/cycle_accuracy": 0.4, "after/cycle_accuracy": 0.5, "grad_norm": 0.3}
"""


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a test saves."""
    saved: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path, **_: (saved.append(figure), save(figure, path)))
    return saved


def write_history(run: Path) -> Path:
    run.mkdir()
    (run / "metrics.jsonl").write_text(HISTORY)
    return run


def draw_arrows(path: Path) -> None:
    matches = np.array([[0.1, 0.1, 0.9, 0.9], [0.5, 0.5, 0.5, 0.5]])
    rows = [("before", FRAME, FRAME, matches, [True, False]), ("after", FRAME, FRAME, matches[:0], [])]
    plots.correspondence_arrows(rows, ("frame 1", "frame 5"), path, "title")


def draw_sheet(path: Path) -> None:
    rows = [plots.Row("truth", [FRAME, FRAME]), plots.Row("before", [FRAME], ["J 0.50"], ["name"])]
    plots.contact_sheet(rows, path, ["frame 1", "frame 2"], plots.LIMB_COLORS, "title")


def draw_segments(path: Path) -> None:
    labels = {"truth": np.array([0, 0, 1, 2]), "before": np.array([0, 1, 1, 2])}
    plots.segment_bars([("video", labels)], ["none", "cut", "pour"], path, background=[0])


DRAWINGS: dict[str, Callable[[Path], None]] = {
    "sheet": draw_sheet,
    "arrows": draw_arrows,
    "segments": draw_segments,
    "trade-off": lambda path: plots.trade_off([(f"run {i}", TRADE_OFF, TRADE_OFF) for i in range(9)], path),
    "curves": lambda path: plots.learning_curves([write_history(path.parent / "run")], path),
    "confusion": lambda path: plots.confusion_maps({"before": np.eye(3), "after": np.eye(3)}, "abc", path),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_text_is_legible_at_half_size(tmp_path: Path, figures: list[Figure], name: str) -> None:
    settings = dict(rcParams)
    DRAWINGS[name](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
    texts: list[Any] = figures[0].findobj(Text)
    assert min(text.get_fontsize() for text in texts if text.get_text()) >= 14
    # The style does not leak into the user's own figures.
    assert dict(rcParams) == settings


def test_runs_have_different_markers_and_colours() -> None:
    styles = [plots._run_style(number) for number in range(8)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 8


def test_masks_are_tinted_and_outlined() -> None:
    labels = np.zeros((30, 40), dtype=np.uint8)
    labels[5:25, 5:20], labels[5:25, 20:35] = 1, 2
    picture = plots.overlay_masks(FRAME, labels)
    assert picture[0, 0].tolist() == [100, 100, 100]
    assert picture[15, [5, 20]].min() == 255
    assert picture[15, 3].tolist() == [0, 0, 0]
    for x, color in ((12, plots.OKABE_ITO[1]), (28, plots.OKABE_ITO[2])):
        np.testing.assert_allclose(picture[15, x], 30 + 178.5 * np.array(to_rgb(color)), atol=1)
    # The legend shows the colour on medium grey.
    grey = np.full_like(FRAME, 128)
    drawn = plots.overlay_masks(grey, labels)[15, 28]
    np.testing.assert_allclose(drawn, 255 * np.array(to_rgb(plots.label_color(2))), atol=1)


# How people without red or green cones see linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}


@pytest.mark.parametrize("vision", VISION)
def test_masks_differ_for_everyone(vision: str) -> None:
    """Every mask has its own colour, in CIELAB units, on red, green and grey frames alike."""
    labels = np.repeat(np.arange(1, 22, dtype=np.uint8), 12)[None].repeat(12, axis=0)
    for frame_color in ((200, 20, 20), (20, 160, 20), (128, 128, 128)):
        frame = np.full((*labels.shape, 3), frame_color, dtype=np.uint8)
        lab = cielab(plots.overlay_masks(frame, labels)[6, 6::12] / 255, np.array(VISION[vision]))
        distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1000 * np.eye(len(lab))
        assert distance[:7, :7].min() > 10
        assert distance.min() > 3


def cielab(rgb_C3: Any, simulation_33: Any) -> Any:
    linear_C3 = np.where(rgb_C3 > 0.04045, ((rgb_C3 + 0.055) / 1.055) ** 2.4, rgb_C3 / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz_C3 = np.clip(linear_C3 @ simulation_33.T, 0, 1) @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
    x_C, y_C, z_C = np.where(xyz_C3 > 0.008856, np.cbrt(xyz_C3), 7.787 * xyz_C3 + 16 / 116).T
    return np.stack([116 * y_C - 16, 500 * (x_C - y_C), 200 * (y_C - z_C)], axis=1)


def test_nothing_in_a_sheet_overlaps_or_widens_it(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [plots.Row(name, [FRAME[:, :15]] * 4) for name in ("before", "truth")]
    title = "a-name-as-long-as-those-of-kinetics_000123_000133, vit_base_patch14_dinov2: J 0.70"
    plots.contact_sheet(rows, tmp_path / "sheet.png", legend=plots.LIMB_COLORS, title=title)
    figures[0].draw_without_rendering()
    legend = figures[0].legends[0].get_window_extent()
    assert legend.y1 < min(axes.get_window_extent().y0 for axes in figures[0].axes)
    assert figures[0].texts[0].get_window_extent().width < figures[0].bbox.width


def test_notes_are_on_their_pictures_and_captions_below(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [plots.Row(name, [FRAME] * 4, ["12 of 15 right"], ["name"]) for name in ("before", "after")]
    plots.contact_sheet(rows, tmp_path / "sheet.png")
    figures[0].draw_without_rendering()
    for axes in (figures[0].axes[0], figures[0].axes[4]):
        tile, note = (one.get_window_extent() for one in (axes, axes.texts[0]))
        assert tile.count_contains(note.corners()) == 4
        assert axes.xaxis.label.get_window_extent().y1 < tile.y0


def test_training_and_validation_metrics_have_separate_panels(tmp_path: Path, figures: list[Figure]) -> None:
    plots.learning_curves([write_history(tmp_path / "run")], tmp_path / "curves.png")
    panels = [(axes.get_title(loc="left"), axes.get_ylabel(), len(axes.lines)) for axes in figures[0].axes]
    assert panels == [
        ("total loss", "lower is better", 1),
        ("cycle accuracy", "higher is better", 1),
        ("cycle accuracy", "validation\nhigher is better", 2),
        ("grad norm", "", 1),
    ]
    with pytest.raises(InputError, match="no metrics"):
        plots.learning_curves([tmp_path], tmp_path / "none.png")


def test_titles_of_curves_fit_and_only_some_metrics_have_a_better_side(
    tmp_path: Path, figures: list[Figure]
) -> None:
    records = [{"step": step, **dict.fromkeys(plots.TITLES, step)} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    plots.learning_curves([tmp_path], tmp_path / "curves.png")
    figures[0].draw_without_rendering()
    titles = plots.TITLES.values()
    for title in figures[0].findobj(lambda artist: isinstance(artist, Text) and artist.get_text() in titles):
        assert title.get_window_extent().width < figures[0].bbox.width / 3
    labels = {axes.get_title(loc="left"): axes.get_ylabel() for axes in figures[0].axes}
    neither = {title for title, label in labels.items() if not label}
    assert neither == {"weight of the separability loss", "cosine distance from frozen"}


def test_curves_start_at_zero_and_constant_metrics_have_no_panel(
    tmp_path: Path, figures: list[Figure]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 9, "rank": 1, "before/cycle_accuracy": 0.4, "after/cycle_accuracy": 0.5}\n'
        '{"step": 2, "loss": 8, "rank": 1, "before/cycle_accuracy": 0.4, "after/cycle_accuracy": 0.6}\n'
    )
    plots.learning_curves([tmp_path], tmp_path / "curves.png")
    loss, accuracy = figures[0].axes
    assert (loss.get_ylim()[0], accuracy.get_ylim()[0]) == (0, 0)
    assert {line.get_linestyle() for line in accuracy.lines} == {"-", "--"}


@pytest.mark.parametrize("steps", [[1], [2], [0, 1], [0, 4]])
def test_ticks_of_short_curves_are_whole_steps(
    steps: list[int], tmp_path: Path, figures: list[Figure]
) -> None:
    lines = (json.dumps({"step": step, "loss": 1.0}) for step in steps)
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    plots.learning_curves([tmp_path], tmp_path / "curves.png")
    ticks = figures[0].axes[0].get_xticks()
    assert np.array_equal(ticks, ticks.round())


def test_long_curves_of_many_runs_are_smooth_and_named(tmp_path: Path, figures: list[Figure]) -> None:
    runs = [tmp_path / f"run-with-a-name-that-is-quite-long-{number}" for number in range(8)]
    for run in runs:
        run.mkdir()
        records = (
            {"step": step, "loss": 1 + step % 2 + 999 * (step == 299), "before/rank": 1, "after/rank": step}
            for step in range(300)
        )
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    plots.learning_curves(runs, tmp_path / "curves.png")
    raw, means = figures[0].axes[0].lines[:2]
    assert len(raw.get_xdata()) == 300
    assert (len(means.get_xdata()), np.ptp(means.get_ydata()[:-1])) == (50, 0)
    # The outlier does not determine the axis.
    assert figures[0].axes[0].get_ylim()[1] < 300
    (legend,) = figures[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*(run.name for run in runs), "before (frozen encoder)"]
    assert legend.get_window_extent().width < figures[0].bbox.width


def test_pca_maps_do_not_depend_on_rotation_shift_and_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 6, 8, 5, generator=generator) * torch.tensor([5.0, 4, 3, 2, 1])
    maps = plots.pca_maps(tokens)
    assert maps.shape == (2, 6, 8, 3)
    assert (maps.min(), maps.max()) == (0, 255)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    moved = plots.pca_maps(3 * tokens @ rotation + 7).astype(int)
    assert np.abs(moved - maps).max() <= 1
    like = plots.pca_maps(tokens * torch.tensor([-2, 3, 3, 1, 1]), tokens).astype(int)
    assert np.abs(like - maps).mean() < 5
    # The first component, which has the largest variance, is red.
    assert abs(np.corrcoef(maps[..., 0].ravel(), tokens[..., 0].flatten())[0, 1]) > 0.9
    assert plots.pca_maps(torch.ones(1, 2, 2, 3)).max() == 0


def test_matches_are_judged_by_the_label_where_they_end() -> None:
    first, second = np.zeros((2, 20, 40), dtype=np.uint8)
    first[5:15, 10:20], second[5:15, 20:30] = 1, 1
    matches = np.array([[0.3, 0.5, 0.6, 0.5], [0.6, 0.5, 0.2, 0.5], [0.3, 0.5, 0.9, 0.5]])
    assert keep_their_label(matches, first, second) == [True, True, False]


def test_matches_start_in_different_rows() -> None:
    labels = torch.zeros(16, 8, 2)
    labels[2:14, 1:7, 1], labels[..., 0] = 1, 0.5
    features = torch.eye(128).view(16, 8, 128)
    matches = find_matches(features, features, labels)
    np.testing.assert_array_equal(matches[:, :2], matches[:, 2:])
    assert len(np.unique(matches[:, 1])) == len(matches) == 12
    assert len(np.unique(matches[:, 0])) > 3
    assert find_matches(features, features, labels.flip(-1)[:, :, :1]).shape == (0, 4)


def test_matches_of_a_pose_are_judged_by_the_distance_to_the_same_joint() -> None:
    first = np.stack([np.arange(len(JOINTS)) * 10.0, np.zeros(len(JOINTS))])
    second = first + np.array([[5.0], [50.0]])
    # The person measures 0.6 * 140 = 84 pixels, of which 20 % are 16.8.
    matches = np.array([[21, 1, 25, 50], [21, 1, 25, 66], [21, 1, 25, 68], [21, 1, 21, 1]], dtype=float)
    assert end_at_their_joint(matches, first, second) == [True, True, False, False]
