"""What the label-propagation benchmarks share: options, the loop over sequences, label maps, pictures.

Used by `davis.py`, `vip.py` and `jhmdb.py`; the search is in `propagation.py`. Shape suffixes:
T frames, H W pixels, h w grid, N = h * w tokens, D channels, C classes.
"""

import argparse
import math
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
from fasttrain.data.sampling import evenly_spaced
from fasttrain.distributed import World
from fasttrain.errors import InputError, LocalInputError
from fasttrain.evaluation import plots
from fasttrain.evaluation.frames import (
    Frame,
    fit_to_patches,
    read_image,
    resize,
    write_label_map,
    write_video,
)
from fasttrain.evaluation.metrics import region_similarity
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.propagation import CONTEXT, RADIUS, TEMPERATURE, Propagator, check_settings
from fasttrain.files import read_lines
from fasttrain.loggers import Progress

SHOWN_FRAMES = 6
# Pictures are drawn at this height at most: a sheet or a short film needs no more.
PICTURE_HEIGHT = 480
ARROWS = 20

LabelMap = npt.NDArray[np.uint8]
# As `find_matches` finds them and `plots.correspondence_arrows` draws them.
Matches = npt.NDArray[np.float64]


@dataclass(frozen=True)
class VideoSequence:
    """One sequence: its frames in order and what annotates them, a file for each or one for all."""

    name: str
    frames: list[Path]
    annotations: list[Path]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What every sequence of one command is evaluated with."""

    arguments: argparse.Namespace
    model: EvaluatedModel
    output: Path
    device: torch.device
    drawn: Collection[str] = ()
    """Names of the sequences that pictures are wanted of."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The nearest size of frames that the encoder takes."""
        return fit_to_patches((height, width), self.model.encoder.patch_size)


def add_arguments(parser: argparse.ArgumentParser, *, topk: int) -> None:
    """The settings of the propagation, with what the benchmarks have in common as defaults."""
    parser.add_argument(
        "--context", type=int, default=CONTEXT, help="last frames attended to (default: %(default)s)"
    )
    parser.add_argument(
        "--radius", type=float, default=RADIUS, help="of the keys, in grid cells (default: %(default)s)"
    )
    parser.add_argument("--topk", type=int, default=topk, help="keys of a query (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=TEMPERATURE, help="of the softmax (default: %(default)s)"
    )
    parser.add_argument(
        "--pictures", type=int, default=8, help="sequences that are drawn, evenly chosen (default: 8)"
    )


def evaluate_all(
    sequences: Sequence[VideoSequence],
    evaluate: Callable[[VideoSequence, Evaluation], dict[str, Any]],
    arguments: argparse.Namespace,
    model: EvaluatedModel,
    output: Path,
    world: World,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What `evaluate` returns of every sequence, by name, and facts for the JSON; on the main process.

    The `notes` of the sequences are printed and end up among the facts. Raises InputError for settings that
    nothing can be propagated with and for a sequence that cannot be evaluated.
    """
    check_settings(arguments.context, arguments.radius, arguments.topk, arguments.temperature)
    drawn = {sequences[i].name for i in evenly_spaced(len(sequences), max(0, arguments.pictures))}
    evaluation = Evaluation(arguments=arguments, model=model, output=output, device=world.device, drawn=drawn)
    share, mine = world.shard(sequences), {}
    with Progress("sequences", len(share), enabled=world.is_main) as progress:
        try:
            for sequence in share:
                mine[sequence.name] = evaluate(sequence, evaluation)
                progress.advance()
        except InputError as error:
            raise LocalInputError(str(error)) from error
    results = world.merge(mine)
    if not world.is_main:
        return None
    notes = [note for result in results.values() for note in result.pop("notes", [])]
    for note in notes:
        print(f"note: {note}")
    frames = sum(len(one.frames) for one in sequences)
    return results, {"sequences": len(sequences), "frames": frames, "notes": notes}


def propagate(
    frames: Sequence[Path], size: tuple[int, int], first_labels_hwC: Tensor, evaluation: Evaluation
) -> tuple[dict[str, Tensor], dict[str, Matches]]:
    """Per variant the soft labels (T, h, w, C) of every frame, and matches of the first frame and the middle.

    Every frame is encoded at `size` once. Raises InputError for a frame that cannot be read.
    """
    model, options = evaluation.model, evaluation.arguments
    settings = options.context, options.radius, options.topk, options.temperature
    first_labels_hwC = first_labels_hwC.to(evaluation.device)
    propagators: dict[str, Propagator] = {}
    labels = {variant: [first_labels_hwC] for variant in model.variants}
    matched: dict[str, list[Tensor]] = {variant: [] for variant in model.variants}
    pixels = map_ahead(lambda path: resize(read_image(path), size), frames)
    for number, frame_3HW in enumerate(pixels):
        for variant, tokens_1ND in model.tokens(frame_3HW[None].to(evaluation.device)).items():
            tokens_hwD = tokens_1ND[0].unflatten(0, model.encoder.grid(*size))
            if number == 0:
                propagators[variant] = Propagator(tokens_hwD, first_labels_hwC, *settings)
            else:
                labels[variant].append(propagators[variant].step(tokens_hwD))
            if number in (0, len(frames) // 2):
                matched[variant].append(tokens_hwD)
    matches = {
        variant: find_matches(first_hwD, middle_hwD, first_labels_hwC)
        for variant, (first_hwD, middle_hwD) in matched.items()
    }
    return {variant: torch.stack(maps) for variant, maps in labels.items()}, matches


def find_matches(first_hwD: Tensor, second_hwD: Tensor, labels_hwC: Tensor) -> Matches:
    """(M, 4) centres of labelled cells of the first frame and of the most similar cells of the second.

    x, y in the first frame and x, y in the second, as shares of width and height; at most ARROWS cells,
    evenly over those whose likeliest label is not the background.
    """
    height, width = first_hwD.shape[:2]
    labelled_M = labels_hwC.flatten(0, 1).argmax(-1).nonzero().flatten()
    chosen_M = labelled_M[evenly_spaced(len(labelled_M), ARROWS)]
    query_MD = functional.normalize(first_hwD.flatten(0, 1)[chosen_M].float(), dim=-1)
    found_M = (query_MD @ functional.normalize(second_hwD.flatten(0, 1).float(), dim=-1).T).argmax(-1)
    cells_M2 = torch.stack([chosen_M, found_M], dim=1)
    x_M2, y_M2 = (cells_M2 % width + 0.5) / width, (cells_M2 // width + 0.5) / height
    return torch.stack([x_M2, y_M2], dim=-1).flatten(1).cpu().double().numpy()


def soft_labels(labels_HW: LabelMap, grid: tuple[int, int], classes: int) -> Tensor:
    """(h, w, C) float32: the one-hot labels at the middle of each cell, bilinearly."""
    one_hot_1CHW = functional.one_hot(torch.tensor(labels_HW).long(), classes).movedim(-1, 0)[None]
    soft_1Chw = functional.interpolate(one_hot_1CHW.float(), size=grid, mode="bilinear")
    return soft_1Chw[0].movedim(0, -1).contiguous()


def hard_labels(labels_hwC: Tensor, size: tuple[int, ...]) -> LabelMap:
    """(H, W) uint8: the most likely label of each pixel, bilinearly between cells."""
    labels_1Chw = labels_hwC.movedim(-1, 0)[None].contiguous()
    full_CHW = functional.interpolate(labels_1Chw, size=size, mode="bilinear")[0]
    # argmax over few leading entries takes a CPU some twenty times as long.
    return full_CHW.max(0).indices.byte().cpu().numpy()


def save_masks(
    sequence: VideoSequence,
    masks: dict[str, list[LabelMap]],
    truth: Sequence[LabelMap],
    matches_M4: dict[str, Matches],
    evaluation: Evaluation,
) -> None:
    """Masks per variant as palette PNGs, named as the annotations are; pictures, where they are wanted."""
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
        for name, maps in {"truth": truth, **masks}.items()
    }
    notes = {
        name: [f"J {mean_similarity(maps[t], truth[t]):.2f}" for t in shown_frames(len(frames))]
        for name, maps in masks.items()
    }
    ends = truth[0], truth[len(frames) // 2]
    judged = {variant: (matches, keep_their_label(matches, *ends)) for variant, matches in matches_M4.items()}
    draw(sequence.name, frames, overlays, judged, evaluation.output / "figures", notes)


def shown_frames(length: int) -> list[int]:
    """The frames of a contact sheet."""
    return evenly_spaced(length, SHOWN_FRAMES)


def mean_similarity(labels_HW: LabelMap, truth_HW: LabelMap) -> float:
    """The mean J over the labels that a frame shows; NaN if it shows none. Void pixels (255) do not count."""
    predicted_HW = np.where(truth_HW == 255, 0, labels_HW)
    shown = np.setdiff1d(truth_HW, (0, 255))
    values = [region_similarity(predicted_HW == label, truth_HW == label) for label in shown]
    return float(np.mean(values)) if values else math.nan


def keep_their_label(matches_M4: Matches, first_HW: LabelMap, second_HW: LabelMap) -> list[bool]:
    """Whether the label at the end of each match is the one at its start."""
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
    folder: Path,
    notes: Mapping[str, Sequence[str]] | None = None,
    legend: Mapping[str, str] | None = None,
) -> None:
    """Draw a contact sheet with a row per overlay, a short film of the predicted ones, and the arrows."""
    shown = shown_frames(len(frames))
    sheet = [
        plots.Row(row, [pictures[t] for t in shown], (notes or {}).get(row, ()))
        for row, pictures in overlays.items()
    ]
    columns = [f"frame {t + 1}" for t in shown]
    plots.contact_sheet(sheet, folder / f"{name}.png", columns, legend)
    predicted = [pictures for row, pictures in overlays.items() if row != "truth"]
    film = [np.concatenate(side_by_side, axis=1) for side_by_side in zip(*predicted, strict=True)]
    write_video(film, folder / f"{name}.mp4")
    middle = len(frames) // 2
    arrows = [
        (variant, frames[0], frames[middle], matches_M4, is_correct_M)
        for variant, (matches_M4, is_correct_M) in matches.items()
    ]
    columns_of_arrows = "frame 1", f"frame {middle + 1}"
    plots.correspondence_arrows(arrows, columns_of_arrows, folder / f"{name}_arrows.png")


def shrink(frame_HWC: Frame) -> Frame:
    """The frame at PICTURE_HEIGHT at most."""
    picture = Image.fromarray(frame_HWC)
    picture.thumbnail((picture.width, PICTURE_HEIGHT), Image.Resampling.BILINEAR, reducing_gap=None)
    return np.asarray(picture)


def resize_labels(labels_HW: LabelMap, size: tuple[int, ...]) -> LabelMap:
    """A label map at another height and width, from the nearest pixels."""
    resized = Image.fromarray(labels_HW).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(resized)


def find_pairs(name: str, frames: Path, annotations: Path, fewest: int) -> VideoSequence:
    """The JPEG frames of a folder and the annotation `STEM.png` of each.

    Raises InputError for too few frames, and for a frame or an annotation without the other.
    """
    images, masks = numbered(frames, ".jpg"), numbered(annotations, ".png")
    if len(images) < fewest:
        raise InputError(
            f"sequence {name} has {len(images)} frames; expected at least {fewest}, replace or unlist it"
        )
    single = {path.stem for path in images} ^ {path.stem for path in masks}
    if single:
        raise InputError(
            f"sequence {name}: {min(single)} lacks its image or its annotation ({len(single)} such frames); "
            f"look into {frames} and {annotations}"
        )
    return VideoSequence(name, images, masks)


def read_list(path: Path) -> list[str]:
    """The lines of a list file that say something. Raises InputError where there is none, or no text."""
    lines = read_lines(path)
    if not lines:
        raise InputError(f"{path} lists no sequence; expected one a line")
    return lines


def numbered(folder: Path, suffix: str) -> list[Path]:
    """A folder's files of a kind, by number: frame 10 comes after frame 9 without leading zeros, too.

    Copies made on a Mac have a hidden `._NAME` beside every NAME, which is left out.
    """
    return sorted(folder.glob(f"[!.]*{suffix}"), key=lambda path: (len(path.stem), path.stem))


def require(paths: Iterable[Path], data_set: str) -> None:
    """Raises InputError for the first path that is not there."""
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist; --root must hold {data_set} in its own layout")
