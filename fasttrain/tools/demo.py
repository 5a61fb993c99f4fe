"""Train recipes/quickstart.yaml on made-up video and show, on clips that it never saw, what that bought.

Nothing is downloaded: scenes with known masks are rendered and encoded as H.264, the backbone is a randomly
initialised ViT. Ends with a table and a picture; the same figures stand in demo.json of the run folder.

Shape suffixes: V videos, T frames, H W pixels, h w grid, P = h * w tokens, D channels, C labels.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fasttrain.__main__ import train
from fasttrain.evaluation import consistency_separability, propagate_labels, region_similarity
from fasttrain.evaluation.frames import normalise
from fasttrain.evaluation.plots import overlay_sheet
from fasttrain.evaluation.sequences import hard_labels, soft_labels
from fasttrain.recipe import Recipe, load_recipe
from fasttrain.tools.synthetic import Scene, render_scene, write_scene
from fasttrain.video_encoder import VideoEncoder, load_video_encoder

TRAINING_SCENES = range(16)
HELD_OUT_SCENES = range(100, 104)

# Name in the figures, heading in the table, whether larger is better.
ROWS = (
    ("J", "label propagation J, mean over held-out objects", True),
    ("cycle_accuracy", "cycle accuracy", True),
    ("intra_original", "intra-video distance", False),
    ("inter_original", "inter-video distance", True),
    ("effective_rank", "effective rank", True),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Figures of one kind of feature, and the label maps that it propagated."""

    figures: dict[str, float]
    labels_VTHW: list[np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted recipe keys")
    parser.add_argument("--recipe", default="recipes/quickstart.yaml", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    make_videos(Path(recipe.data.source))
    train(recipe)
    scenes = [render_scene(seed, num_frames=24) for seed in HELD_OUT_SCENES]
    encoder = load_video_encoder(recipe.output)
    before = measure(scenes, encoder, projected=False)
    after = measure(scenes, encoder, projected=True)
    picture = Path(recipe.output) / "figures" / "demo.png"
    draw(scenes[0], before.labels_VTHW[0], after.labels_VTHW[0], picture)
    figures = {"before": before.figures, "after": after.figures}
    (Path(recipe.output) / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print_table(recipe, before.figures, after.figures, picture)


def make_videos(folder: Path) -> None:
    """Render and encode the training clips that are not there yet."""
    for seed in TRAINING_SCENES:
        path = folder / f"scene_{seed:03d}.mp4"
        if not path.exists():
            partial = path.with_suffix(".partial.mp4")
            write_scene(render_scene(seed), partial)
            partial.replace(path)


def measure(scenes: list[Scene], encoder: VideoEncoder, *, projected: bool) -> Outcome:
    """Propagate the first frame's masks through each scene, and the paper's analysis over all of them."""
    features_VTPD = []
    labels_VTHW = []
    similarities = []
    for scene in scenes:
        frames_1TCHW = normalise(torch.from_numpy(scene.frames_THWC).movedim(-1, 1))[None]
        with torch.inference_mode():
            tokens_TPD = (encoder if projected else encoder.frozen)(frames_1TCHW)[0].float().cpu()
        grid = encoder.grid(*scene.labels_THW.shape[1:])
        features_VTPD.append(central_square(tokens_TPD.unflatten(1, grid)).flatten(1, 2))
        labels_THW = propagate(tokens_TPD, grid, scene.labels_THW)
        labels_VTHW.append(labels_THW)
        similarities += [
            region_similarity(labels_THW[t] == label, scene.labels_THW[t] == label)
            for label in range(1, int(scene.labels_THW.max()) + 1)
            for t in range(1, len(labels_THW) - 1)
        ]
    analysis = consistency_separability(torch.stack(features_VTPD))
    return Outcome(figures={"J": float(np.mean(similarities)), **analysis}, labels_VTHW=labels_VTHW)


def propagate(tokens_TPD: Tensor, grid: tuple[int, int], labels_THW: np.ndarray) -> np.ndarray:
    """Label maps of all frames from the first one's, by label propagation with DAVIS' settings."""
    first_hwC = soft_labels(labels_THW[0], grid, int(labels_THW[0].max()) + 1)
    labels_ThwC = propagate_labels(tokens_TPD.unflatten(1, grid), first_hwC)
    return np.stack([hard_labels(labels_hwC, labels_THW.shape[1:]) for labels_hwC in labels_ThwC])


def central_square(tokens_ThwD: Tensor) -> Tensor:
    """The middle of the grid: the paper's analysis is defined on squares."""
    height, width = tokens_ThwD.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return tokens_ThwD[:, top : top + side, left : left + side]


def draw(scene: Scene, before_THW: np.ndarray, after_THW: np.ndarray, path: Path) -> None:
    """A contact sheet of true and propagated masks."""
    shown = np.linspace(0, len(scene.frames_THWC) - 1, 6).astype(int)
    frames_THWC = scene.frames_THWC[shown]
    overlay_sheet(
        [
            ("truth", frames_THWC, scene.labels_THW[shown].astype(int)),
            ("before: frozen backbone", frames_THWC, before_THW[shown]),
            ("after: with projection", frames_THWC, after_THW[shown]),
        ],
        path,
    )


def print_table(recipe: Recipe, before: dict[str, float], after: dict[str, float], picture: Path) -> None:
    console = Console()
    weights = recipe.backbone.weights
    note = "randomly initialised, not pretrained" if weights == "random" else f"weights {weights}"
    table = Table(
        title=f"{recipe.backbone.name} ViT, {note}; {len(HELD_OUT_SCENES)} held-out made-up videos",
        caption="▲ higher is better, ▼ lower is better",
    )
    table.add_column("figure")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for name, heading, larger in ROWS:
        arrow = "▲" if larger else "▼"
        change = after[name] - before[name]
        table.add_row(f"{heading} {arrow}", f"{before[name]:.3f}", f"{after[name]:.3f}", f"{change:+.3f}")
    console.print(table)
    console.print(f"picture: {picture}", highlight=False, markup=False)
    console.print(
        f"run: {recipe.output}  (load_video_encoder({recipe.output!r}))", highlight=False, markup=False
    )
