"""Shared parts of the label-propagation benchmarks: options, the loop over sequences, label maps, pictures.

`davis.py`, `vip.py` and `jhmdb.py` use this module; the algorithm itself is in `propagation.py`.

Shape suffixes: T frames, H W pixels, h w grid, N = h * w tokens, D channels, C classes, M matches.
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fasttrain.data.map_ahead import map_ahead
from fasttrain.data.preprocessing import fit_to_patches, normalise, resize
from fasttrain.data.sampling import evenly_spaced
from fasttrain.data.video import HAS_PYAV
from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError, LocalInputError
from fasttrain.evaluation import plots
from fasttrain.evaluation.frames import (
    Frame,
    read_image,
    write_label_map,
    write_video,
)
from fasttrain.evaluation.propagation import Propagator, check_settings
from fasttrain.files import read_lines
from fasttrain.loggers import Progress, say

# The first frame, whose labels are given, and three moments.
SHOWN_FRAMES = 4
# The maximum height of the frames in contact sheets and videos.
PICTURE_HEIGHT = 480
MAX_MATCHES = 12

LabelMap = npt.NDArray[np.uint8]
# The result of `find_matches`, which `plots.correspondence_arrows` draws.
Matches = npt.NDArray[np.float64]


@dataclass(frozen=True)
class VideoSequence:
    """The frames of a sequence, in order, and its annotations: one file per frame or one for all frames."""

    name: str
    frames: list[Path]
    annotations: list[Path]

    def __post_init__(self) -> None:
        """Raise InputError if the name, which is part of the paths of results, is a path itself."""
        if self.name in ("", ".", "..") or "/" in self.name:
            raise InputError(f"sequence {self.name!r}: expected the name of a folder; correct the list")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The settings that all sequences of one command share."""

    arguments: argparse.Namespace
    model: EvaluatedModel
    output: Path
    device: torch.device
    progress: Progress
    """It advances by one per frame."""
    drawn: Collection[str] = ()
    """Names of the sequences to draw."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Round a frame size to whole patches of the encoder."""
        return fit_to_patches((height, width), self.model.encoder.patch_size)


def evaluate_all(
    sequences: Sequence[VideoSequence],
    evaluate: Callable[[VideoSequence, Evaluation], dict[str, Any]],
    arguments: argparse.Namespace,
    model: EvaluatedModel,
    output: Path,
    world: World,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Evaluate the sequences on all processes.

    Returns the results of `evaluate` by sequence name and the `data` entry of the JSON file on the main
    process, and None on the others. `notes` in the results are printed and moved to `data`. Raises InputError
    for invalid settings or a sequence that cannot be evaluated.
    """
    check_settings(arguments.context, arguments.radius, arguments.topk, arguments.temperature)
    if arguments.pictures > 0 and world.is_main and not HAS_PYAV:
        say("PyAV is not installed, so the predictions are drawn as pictures only, not as videos")
    drawn = {sequences[i].name for i in evenly_spaced(len(sequences), max(0, arguments.pictures))}
    share, mine = world.shard(sequences), {}
    with Progress("frames", sum(len(one.frames) for one in share), enabled=world.is_main) as progress:
        evaluation = Evaluation(
            arguments=arguments,
            model=model,
            output=output,
            device=world.device,
            progress=progress,
            drawn=drawn,
        )
        try:
            for sequence in share:
                progress.advance(0, sequence.name)
                mine[sequence.name] = evaluate(sequence, evaluation)
        except InputError as error:
            raise LocalInputError(str(error)) from error
    results = world.merge(mine)
    if not world.is_main:
        return None
    notes = [note for result in results.values() for note in result.pop("notes", [])]
    for note in notes:
        say(f"note: {note}")
    frames = sum(len(sequence.frames) for sequence in sequences)
    return results, {"sequences": len(sequences), "frames": frames, "notes": notes}


def propagate(
    sequence: VideoSequence, size: tuple[int, int], first_labels_hwC: Tensor, evaluation: Evaluation
) -> tuple[dict[str, Tensor], dict[str, Matches]]:
    """Encode all frames at `size` and propagate the labels of the first frame.

    Returns, by variant, the soft labels (T, h, w, C) and the matches (M, 4) between the first and the middle
    frame. Draws PCA maps of the tokens if the sequence was chosen. Raises InputError for an unreadable frame.
    """
    frames = sequence.frames
    shown = shown_frames(len(frames)) if sequence.name in evaluation.drawn else []
    shown_tokens: dict[str, list[Tensor]] = {variant: [] for variant in evaluation.model.variants}
    model, options = evaluation.model, evaluation.arguments
    settings = options.context, options.radius, options.topk, options.temperature
    first_labels_hwC = first_labels_hwC.to(evaluation.device)
    propagators: dict[str, Propagator] = {}
    labels = {variant: [first_labels_hwC] for variant in model.variants}
    matched: dict[str, list[Tensor]] = {variant: [] for variant in model.variants}
    mean, std = model.encoder.mean, model.encoder.std
    pixels = map_ahead(lambda path: normalise(resize(read_image(path), size), mean, std), frames)
    for number, frame_3HW in enumerate(pixels):
        for variant, tokens_1ND in model.tokens(frame_3HW[None].to(evaluation.device)).items():
            tokens_hwD = tokens_1ND[0].unflatten(0, model.encoder.grid(*size))
            if number == 0:
                propagators[variant] = Propagator(tokens_hwD, first_labels_hwC, *settings)
            else:
                labels[variant].append(propagators[variant].step(tokens_hwD))
            if number in shown:
                shown_tokens[variant].append(tokens_hwD)
            if number in (0, len(frames) // 2):
                matched[variant].append(tokens_hwD)
        evaluation.progress.advance()
    matches = {
        variant: find_matches(first_hwD, middle_hwD, first_labels_hwC)
        for variant, (first_hwD, middle_hwD) in matched.items()
    }
    if shown:
        pictures = [shrink(read_image(frames[t])) for t in shown]
        tokens_ThwD = {variant: torch.stack(tokens) for variant, tokens in shown_tokens.items()}
        # The same colours before and after.
        like_ThwD = tokens_ThwD[model.variants[0]]
        rows = {variant: list(plots.pca_maps(tokens, like_ThwD)) for variant, tokens in tokens_ThwD.items()}
        plots.contact_sheet(
            [plots.Row(name, row) for name, row in {"frames": pictures, **rows}.items()],
            evaluation.output / "figures" / f"{sequence.name}_pca.png",
            [f"frame {t + 1}" for t in shown],
            title=f"{sequence.name}, {model.title}: PCA of the tokens",
        )
    return {variant: torch.stack(maps) for variant, maps in labels.items()}, matches


def find_matches(first_hwD: Tensor, second_hwD: Tensor, labels_hwC: Tensor) -> Matches:
    """Match labelled cells of the first frame to the most similar cells of the second.

    Returns (M, 4): x and y of a cell's centre in the first frame, then in the second, as fractions of width
    and height. At most MAX_MATCHES cells are chosen, among those whose most likely label is not background.
    Each is from a different row, so that few arrows overlap in a picture.
    """
    height, width = first_hwD.shape[:2]
    is_labelled_hw = labels_hwC.argmax(-1) > 0
    rows = is_labelled_hw.any(1).nonzero().flatten()
    chosen = []
    for number, row in enumerate(rows[evenly_spaced(len(rows), MAX_MATCHES)].tolist()):
        columns = is_labelled_hw[row].nonzero().flatten().tolist()
        # Multiples of the golden ratio are spread evenly over the columns.
        chosen.append(row * width + columns[int(0.618 * number % 1 * len(columns))])
    chosen_M = torch.tensor(chosen, dtype=torch.long, device=first_hwD.device)
    query_MD = functional.normalize(first_hwD.flatten(0, 1)[chosen_M].float(), dim=-1)
    nearest_M = (query_MD @ functional.normalize(second_hwD.flatten(0, 1).float(), dim=-1).T).argmax(-1)
    cells_M2 = torch.stack([chosen_M, nearest_M], dim=1)
    x_M2, y_M2 = (cells_M2 % width + 0.5) / width, (cells_M2 // width + 0.5) / height
    return torch.stack([x_M2, y_M2], dim=-1).flatten(1).cpu().double().numpy()


def soft_labels(labels_HW: LabelMap, grid: tuple[int, int], classes: int) -> Tensor:
    """Downsample one-hot labels bilinearly to the grid. Returns (h, w, C) float32."""
    one_hot_1CHW = functional.one_hot(torch.tensor(labels_HW).long(), classes).movedim(-1, 0)[None]
    soft_1Chw = functional.interpolate(one_hot_1CHW.float(), size=grid, mode="bilinear")
    return soft_1Chw[0].movedim(0, -1).contiguous()


def hard_labels(labels_hwC: Tensor, size: tuple[int, ...]) -> LabelMap:
    """Upsample soft labels bilinearly and choose the most likely label per pixel. Returns (H, W) uint8."""
    labels_1Chw = labels_hwC.movedim(-1, 0)[None].contiguous()
    full_CHW = functional.interpolate(labels_1Chw, size=size, mode="bilinear")[0]
    # On a CPU, argmax over a short leading dimension is about twenty times slower than max.
    return full_CHW.max(0).indices.byte().cpu().numpy()


def save_masks(
    sequence: VideoSequence,
    masks: dict[str, list[LabelMap]],
    truth: Sequence[LabelMap],
    matches_M4: dict[str, Matches],
    evaluation: Evaluation,
    metric: str,
    scores: Mapping[str, float],
    score: Callable[[LabelMap, LabelMap], float],
    legend: Mapping[str, str] | None = None,
) -> None:
    """Write the masks of each variant under the annotations' names; draw the sequence if it was chosen.

    The picture shows `metric`: the results of the sequence, `scores`, and the `score` of single frames, given
    the predicted and the true labels.
    """
    for variant, maps in masks.items():
        folder = evaluation.output / "masks" / variant / sequence.name
        paths = [folder / path.name for path in sequence.annotations]
        list(map_ahead(lambda one: write_label_map(*one), zip(maps, paths, strict=True)))
    if sequence.name not in evaluation.drawn:
        return
    frames = list(map_ahead(lambda path: shrink(read_image(path)), sequence.frames))

    def overlay(frame_and_labels: tuple[Frame, LabelMap]) -> Frame:
        frame, labels = frame_and_labels
        return plots.overlay_masks(frame, resize_labels(labels, frame.shape[:2]))

    overlays = {
        name: list(map_ahead(overlay, zip(frames, maps, strict=True)))
        for name, maps in {**masks, "truth": truth}.items()
    }
    notes = {}
    for name, maps in masks.items():
        values = [score(maps[t], truth[t]) for t in shown_frames(len(frames))]
        notes[name] = ["" if np.isnan(value) else f"{metric} {value:.2f}" for value in values]
    results = {variant: f"{value:.2f}" for variant, value in scores.items()}
    ends = truth[0], truth[len(frames) // 2]
    judged = {variant: (matches, keep_their_label(matches, *ends)) for variant, matches in matches_M4.items()}
    draw(sequence.name, frames, overlays, judged, evaluation, metric, results, notes, legend)


def shown_frames(length: int) -> list[int]:
    """Choose the frames of a contact sheet, evenly spaced."""
    return evenly_spaced(length, SHOWN_FRAMES)


def keep_their_label(matches_M4: Matches, first_HW: LabelMap, second_HW: LabelMap) -> list[bool]:
    """Check, for each match, whether the labels at its start and end are the same."""
    x_M2, y_M2 = matches_M4[:, ::2], matches_M4[:, 1::2]
    first_M, second_M = (
        labels_HW[(y_M * labels_HW.shape[0]).astype(int), (x_M * labels_HW.shape[1]).astype(int)]
        for labels_HW, x_M, y_M in zip((first_HW, second_HW), x_M2.T, y_M2.T, strict=True)
    )
    return (first_M == second_M).tolist()


def draw(
    name: str,
    frames: list[Frame],
    overlays: dict[str, list[Frame]],
    matches: dict[str, tuple[Matches, list[bool]]],
    evaluation: Evaluation,
    metric: str,
    results: Mapping[str, str],
    notes: Mapping[str, Sequence[str]],
    legend: Mapping[str, str] | None = None,
) -> None:
    """Write a contact sheet of all overlays, a video of the predictions and a picture of the matches.

    `results` holds the metric of the sequence by variant. The notes are written on the pictures, except that
    the labels of the first frame are marked as given.
    """
    folder, about = evaluation.output / "figures", f"{name}, {evaluation.model.title}"
    shown = shown_frames(len(frames))
    sheet = [
        plots.Row(
            row,
            [pictures[t] for t in shown],
            () if row == "truth" else ("given", *notes[row][1:]),
        )
        for row, pictures in overlays.items()
    ]
    columns = [f"frame {t + 1}" for t in shown]
    title = f"{about}: {metric} {', '.join(f'{result} {variant}' for variant, result in results.items())}"
    plots.contact_sheet(sheet, folder / f"{name}.png", columns, legend, title)
    predicted = [pictures for row, pictures in overlays.items() if row != "truth"]
    side_by_side = [np.concatenate(pictures, axis=1) for pictures in zip(*predicted, strict=True)]
    if HAS_PYAV:
        write_video(side_by_side, folder / f"{name}.mp4")
    middle = len(frames) // 2
    arrows = [
        (variant, frames[0], frames[middle], matches_M4, is_correct_M)
        for variant, (matches_M4, is_correct_M) in matches.items()
    ]
    columns_of_arrows = "frame 1", f"frame {middle + 1}"
    path, title = folder / f"{name}_arrows.png", f"{about}: most similar tokens"
    plots.correspondence_arrows(arrows, columns_of_arrows, path, title)


def shrink(frame_HWC: Frame) -> Frame:
    """Shrink a frame that is taller than PICTURE_HEIGHT."""
    picture = Image.fromarray(frame_HWC)
    picture.thumbnail((picture.width, PICTURE_HEIGHT), Image.Resampling.BILINEAR, reducing_gap=None)
    return np.asarray(picture)


def resize_labels(labels_HW: LabelMap, size: tuple[int, ...]) -> LabelMap:
    """Resize a label map to (height, width) by nearest-neighbour interpolation."""
    resized = Image.fromarray(labels_HW).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(resized)


def find_pairs(name: str, frames: Path, annotations: Path, min_frames: int) -> VideoSequence:
    """Find the JPEG frames of a sequence and the annotation `STEM.png` of each.

    Raises InputError if there are fewer than `min_frames` frames or if a frame or an annotation is missing.
    """
    images, masks = numbered(frames, ".jpg"), numbered(annotations, ".png")
    if len(images) < min_frames:
        raise InputError(
            f"sequence {name!r}: expected at least {min_frames} frames in '{frames}', found {len(images)}. "
            "Restore them or remove the sequence from the list."
        )
    unpaired = {path.stem for path in images} ^ {path.stem for path in masks}
    if unpaired:
        raise InputError(
            f"sequence {name!r}: frame {min(unpaired)} is missing its image or its annotation "
            f"({len(unpaired)} in total). Compare '{frames}' and '{annotations}'."
        )
    return VideoSequence(name, images, masks)


def read_list(path: Path) -> list[str]:
    """Read the non-empty lines of a list. Raises InputError if there are none or the file is unreadable."""
    lines = read_lines(path)
    if not lines:
        raise InputError(f"'{path}' is empty; expected one sequence per line")
    return lines


def numbered(folder: Path, suffix: str) -> list[Path]:
    """List a folder's files with a suffix by number, so that frame 10 follows frame 9 without zero-padding.

    Hidden files are left out, such as the `._NAME` that macOS adds next to every NAME when it copies files.
    """
    return sorted(folder.glob(f"[!.]*{suffix}"), key=lambda path: (len(path.stem), path.stem))


def require(paths: Iterable[Path], dataset: str) -> None:
    """Raise InputError for the first path that does not exist."""
    for path in paths:
        if not path.exists():
            raise InputError(f"'{path}' does not exist. Pass {dataset} in its published layout as --root.")
