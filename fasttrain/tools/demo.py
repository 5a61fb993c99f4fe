"""Train recipes/quickstart.yaml on synthetic video, and evaluate it on held-out clips.

The frozen features (before) are compared with the projected ones (after). Nothing is downloaded: the videos
are rendered with known masks and encoded as H.264, and the backbone is a randomly initialised ViT. The
results are printed as a table and written to demo.json and figures/demo.png in the run folder.
"""

# Shape suffixes: V videos, T frames, H and W pixels, h x w grid, P = h * w tokens, D channels, C labels.

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasttrain.__main__ import train
from fasttrain.data.sampling import evenly_spaced
from fasttrain.evaluation import consistency_separability, propagate_labels, region_similarity
from fasttrain.evaluation.frames import normalise
from fasttrain.evaluation.plots import Row, contact_sheet, overlay_masks
from fasttrain.evaluation.results import print_table, with_difference
from fasttrain.evaluation.sequences import hard_labels, similarity_note, soft_labels
from fasttrain.files import write_json
from fasttrain.loggers import say
from fasttrain.recipe import load_recipe
from fasttrain.tools.synthetic import Scene, render_scene, write_scene
from fasttrain.video_encoder import VideoEncoder, load_video_encoder

TRAINING_SCENES = range(16)
HELD_OUT_SCENES = range(100, 104)
NUM_FRAMES = 24
SHOWN_SCENE = 1
SHOWN_FRAMES = evenly_spaced(NUM_FRAMES, 6)
# Rows of the table (▲ higher is better, ▼ lower is better).
HEADINGS = {
    "J": "label propagation J, mean over held-out objects ▲",
    "cycle_accuracy": "cycle accuracy ▲",
    "intra_original": "intra-video distance ▼",
    "inter_original": "inter-video distance ▲",
    "effective_rank": "effective rank ▲",
}


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    make_videos(Path(recipe.data.source))
    train(recipe)
    scenes = [render_scene(seed, num_frames=NUM_FRAMES) for seed in HELD_OUT_SCENES]
    encoder = load_video_encoder(recipe.output)
    before, labels_before = measure(scenes, encoder, encoder.frozen)
    after, labels_after = measure(scenes, encoder, encoder)
    results = {"before": before, "after": after}
    write_json(Path(recipe.output) / "demo.json", results)
    picture = Path(recipe.output) / "figures" / "demo.png"
    draw(scenes[SHOWN_SCENE], labels_before[SHOWN_SCENE], labels_after[SHOWN_SCENE], picture)
    weights = recipe.backbone.weights
    note = "randomly initialised, not pretrained" if weights == "random" else f"weights {weights}"
    title = f"{recipe.backbone.name} ViT, {note}; {len(scenes)} held-out synthetic videos"
    table = {name: {HEADINGS[key]: metrics[key] for key in HEADINGS} for name, metrics in results.items()}
    print_table(title, with_difference(table))
    say(f"picture: {picture}")
    say(f"run folder: {recipe.output}")


def draw(scene: Scene, before_THW: np.ndarray, after_THW: np.ndarray, path: Path) -> None:
    """Draw a contact sheet: true and propagated masks of a few frames, with J below the propagated ones."""
    sheet = []
    for name, labels_THW in {"truth": scene.labels_THW, "before": before_THW, "after": after_THW}.items():
        pictures = [overlay_masks(scene.frames_THWC[t], labels_THW[t]) for t in SHOWN_FRAMES]
        notes = [similarity_note(labels_THW[t], scene.labels_THW[t]) for t in SHOWN_FRAMES]
        sheet.append(Row(name, pictures, () if name == "truth" else notes))
    contact_sheet(sheet, path, columns=[f"frame {t + 1}" for t in SHOWN_FRAMES])


def make_videos(folder: Path) -> None:
    """Render and encode the training clips that do not exist yet."""
    for seed in TRAINING_SCENES:
        path = folder / f"scene_{seed:03d}.mp4"
        if not path.exists():
            write_scene(render_scene(seed), path)


@torch.inference_mode()
def measure(
    scenes: list[Scene], encoder: VideoEncoder, encode: Callable[[Tensor], Tensor]
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Return the mean J and the consistency metrics, and the propagated masks (T, H, W) of each scene."""
    features_VTPD, labels_VTHW, similarities = [], [], []
    for scene in scenes:
        truth_THW = scene.labels_THW
        frames_1TCHW = normalise(
            torch.from_numpy(scene.frames_THWC).movedim(-1, 1), encoder.mean, encoder.std
        )[None]
        grid = encoder.grid(*truth_THW.shape[1:])
        tokens_ThwD = encode(frames_1TCHW)[0].float().unflatten(1, grid)
        first_hwC = soft_labels(truth_THW[0], grid, int(truth_THW[0].max()) + 1)
        labels_ThwC = propagate_labels(tokens_ThwD, first_hwC)
        labels_THW = np.stack([hard_labels(labels_hwC, truth_THW.shape[1:]) for labels_hwC in labels_ThwC])
        labels_VTHW.append(labels_THW)
        similarities += [
            region_similarity(labels_THW[t] == label, truth_THW[t] == label)
            for label in range(1, int(truth_THW.max()) + 1)
            for t in range(1, len(labels_THW) - 1)
        ]
        # The consistency metrics are defined on square grids, so use the centre square.
        side = min(grid)
        top, left = (grid[0] - side) // 2, (grid[1] - side) // 2
        features_VTPD.append(tokens_ThwD[:, top : top + side, left : left + side].flatten(1, 2))
    analysis = consistency_separability(torch.stack(features_VTPD))
    return {"J": float(np.mean(similarities)), **analysis}, labels_VTHW
