"""JHMDB: propagate the first frame's pose through each clip, write poses, score them with PCK.

Reads the data set's own layout: joint_positions/CLASS/CLIP/joint_positions.mat (`pos_img`, (2, 15, T) pixels
counted from 1), Rename_Images/CLASS/CLIP/*.png, and splits/CLASS_test_splitN.txt; or a list of clips as label
propagation is published with. The measure is in `jhmdb.py`. Shape suffixes: T frames, J joints, H W pixels,
h w grid.
"""

import argparse
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import loadmat, savemat
from scipy.io.matlab import MatReadError
from torch import Tensor

from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.evaluation import plots, sequences
from fasttrain.evaluation.frames import fit_to_patches, read_image
from fasttrain.evaluation.metrics import (
    JOINTS,
    THRESHOLDS,
    Coordinates,
    count_correct,
    joint_maps,
    joints_from_maps,
    mean_over_joints,
    percentages,
)
from fasttrain.evaluation.model import EvaluatedModel
from fasttrain.evaluation.propagation import TOPK
from fasttrain.evaluation.sequences import Evaluation, VideoSequence

POSES, FRAMES = "joint_positions", "Rename_Images"
# Lists of the test clips that label propagation has been published with.
PUBLISHED_LISTS = ("testlist_split{split}.txt", "jhmdb_vallist.txt")
TEST = "2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="test split (default: 1)")
    parser.add_argument(
        "--list", type=Path, help="a list file instead: a clip a line, by CLASS/CLIP or by its paths"
    )
    parser.add_argument("--size", type=int, default=320, help="side of the frames as encoded (default: 320)")
    parser.add_argument("--sigma", type=float, default=0.5, help="of the joint maps, in cells (default: 0.5)")
    sequences.add_arguments(parser, topk=TOPK)


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Figures of all clips, on the main process."""
    for name in ("size", "sigma"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise InputError(f"--{name} {getattr(arguments, name)}: expected a number above 0")
    found = find_sequences(arguments.root, arguments.split, arguments.list)
    for sequence in found:
        read_poses(sequence)
    merged = sequences.evaluate_all(found, evaluate_sequence, arguments, model, output, world)
    if merged is None:
        return None
    notes = sequences.take_notes(merged)
    percent = {variant: total_percentages(list(merged.values()), variant) for variant in model.variants}
    return {
        "data": {
            "sequences": len(found),
            "frames": sum(len(one.frames) for one in found),
            "joints": len(JOINTS),
            "notes": notes,
        },
        "results": {variant: summarise(of_variant) for variant, of_variant in percent.items()},
        "per_joint": {
            variant: {
                joint: dict(zip(map(measure_name, THRESHOLDS), of_variant[:, number].tolist(), strict=True))
                for number, joint in enumerate(JOINTS)
            }
            for variant, of_variant in percent.items()
        },
        "per_sequence": {
            name: {variant: summarise(total_percentages([result], variant)) for variant in model.variants}
            for name, result in merged.items()
        },
    }


def find_sequences(root: Path, split: int, listed: Path | None) -> list[VideoSequence]:
    """The test clips of a split or list. Raises InputError, naming the path, where the layout is another."""
    for path in (root / POSES, root / FRAMES, *([listed] if listed else [])):
        if not path.exists():
            raise InputError(f"{path} does not exist; --root must hold JHMDB in its own layout")
    clips = clips_of_list(listed) if listed else clips_of_split(root, split)
    actions: dict[str, str] = {}
    for action, name in clips:
        if actions.setdefault(name, action) != action:
            raise InputError(
                f"clip {name} is listed in {actions[name]} and in {action}; figures go by a clip's name, so "
                "list one of them"
            )
    return [_find_sequence(root, *clip) for clip in dict.fromkeys(clips)]


def clips_of_split(root: Path, split: int) -> list[tuple[str, str]]:
    """Class and name of each test clip. Raises InputError where `root` holds no list of them."""
    suffix = f"_test_split{split}.txt"
    clips = []
    for path in sorted((root / "splits").glob(f"[!.]*{suffix}")):
        for line in sequences.read_list(path):
            name, *part = line.rsplit(maxsplit=1)
            if not part or not part[0].isdecimal():
                raise InputError(f"list {path}: {line!r}; expected CLIP.avi and a number")
            if part == [TEST]:
                clips.append((path.name.removesuffix(suffix), name.removesuffix(".avi")))
    if clips:
        return clips
    candidates = [root / name.format(split=split) for name in PUBLISHED_LISTS]
    for path in candidates:
        if path.exists():
            return clips_of_list(path)
    raise InputError(
        f"{root / 'splits'} holds no CLASS{suffix} with test clips (CLIP.avi {TEST}), and there is no "
        f"{' or '.join(path.name for path in candidates)}; give --list"
    )


def clips_of_list(path: Path) -> list[tuple[str, str]]:
    """Class and name of each clip, from CLASS/CLIP or from the paths of its poses and frames, wherever those
    once lay."""
    clips = []
    for line in sequences.read_list(path):
        place = Path(line.split()[0])
        parts = (place.parent if place.suffix == ".mat" else place).parts
        if len(parts) < 2:
            raise InputError(f"{path}: {line!r} names no clip; expected CLASS/CLIP or paths that end so")
        clips.append((parts[-2], parts[-1]))
    return clips


def _find_sequence(root: Path, action: str, name: str) -> VideoSequence:
    poses = root / POSES / action / name / "joint_positions.mat"
    if not poses.is_file():
        raise InputError(f"clip {name}: annotation {poses} is missing")
    frames = sequences.numbered(root / FRAMES / action / name, ".png")
    if len(frames) < 2:
        raise InputError(
            f"clip {name} has {len(frames)} frames in {root / FRAMES / action / name} (*.png); expected at "
            f"least 2, replace or unlist it"
        )
    for number, frame in enumerate(frames, start=1):
        if not frame.stem.isdigit() or int(frame.stem) != number:
            raise InputError(f"clip {name}: frame {number} is missing, {frame} stands in its place")
    return VideoSequence(name, frames, [poses])


def read_poses(sequence: VideoSequence) -> Coordinates:
    """(2, J, T) pixels x, y counted from 0. Raises InputError for a file that does not hold such poses.

    The frames after the last pose are no part of the clip.
    """
    path = sequence.annotations[0]
    try:
        content = loadmat(path)
    except (OSError, ValueError, TypeError, NotImplementedError, MatReadError, zlib.error) as error:
        raise InputError(f"annotation {path} cannot be read ({error}); replace it") from error
    if "pos_img" not in content:
        raise InputError(f"annotation {path} holds no pos_img; expected JHMDB's joint_positions.mat")
    poses_2JT = np.asarray(content["pos_img"])
    if poses_2JT.ndim != 3 or poses_2JT.shape[:2] != (2, len(JOINTS)) or poses_2JT.dtype.kind not in "fiu":
        raise InputError(
            f"annotation {path}: pos_img has shape {poses_2JT.shape}; expected (2, {len(JOINTS)}, frames)"
        )
    if not np.isfinite(poses_2JT).all():
        raise InputError(f"annotation {path}: pos_img holds numbers that are not finite; replace it")
    length = poses_2JT.shape[2]
    if length < 2:
        raise InputError(f"annotation {path}: poses of {length} frames; expected at least 2")
    if length > len(sequence.frames):
        missing = sequence.frames[-1].parent
        raise InputError(
            f"clip {sequence.name}: {length} poses, but {missing} holds {len(sequence.frames)} frames; the "
            "last ones are missing"
        )
    return poses_2JT.astype(np.float64) - 1


def evaluate_sequence(sequence: VideoSequence, evaluation: Evaluation, drawn: bool) -> dict[str, Any]:
    """Per variant how many keypoints are correct and found; writes poses, contact sheet and video."""
    truth_2JT = read_poses(sequence)
    frames = sequence.frames[: truth_2JT.shape[2]]
    height, width = read_image(frames[0]).shape[:2]
    size = fit_to_patches(
        (evaluation.arguments.size, evaluation.arguments.size), evaluation.model.encoder.patch_size
    )
    grid = evaluation.model.encoder.grid(*size)
    pixels_per_cell = np.array([width / grid[1], height / grid[0]])
    first_hwC = joint_maps(truth_2JT[..., 0] / pixels_per_cell[:, None], grid, evaluation.arguments.sigma)
    if not first_hwC[..., 1:].any():
        raise InputError(
            f"clip {sequence.name}: no joint of the first frame lies within its {width} x {height} pixels; "
            f"look at {sequence.annotations[0]} or unlist it"
        )
    found = sequences.propagate(frames, size, first_hwC, evaluation)
    result: dict[str, Any] = {"notes": []}
    poses = {
        variant: poses_from_maps(labels_ThwC, pixels_per_cell)
        for variant, labels_ThwC in found.labels_ThwC.items()
    }
    action = frames[0].parent.parent.name
    for variant, pose_2JT in poses.items():
        path = evaluation.output / POSES / variant / action / sequence.name / "joint_positions.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        savemat(path, {"pos_img": np.where(pose_2JT < 0, -1, pose_2JT + 1)})
        correct, found_J = count_correct(pose_2JT, truth_2JT)
        result[variant] = {"correct": correct.tolist(), "found": found_J.tolist()}
    if drawn:
        pictures = [read_image(path) for path in frames]
        overlays = {
            row: [plots.overlay_pose(picture, pose_2JT[..., t]) for t, picture in enumerate(pictures)]
            for row, pose_2JT in {"truth": truth_2JT, **poses}.items()
        }
        sequences.draw(sequence.name, pictures, overlays, found.matches_M4, evaluation.output / "figures")
    return result


def poses_from_maps(maps_ThwC: Tensor, pixels_per_cell: Coordinates) -> Coordinates:
    """(2, J, T) pixels x, y counted from 0, -1 where a joint was not found."""
    cells_2JT = (
        torch.stack([joints_from_maps(maps_hwC) for maps_hwC in maps_ThwC.cpu()], dim=-1).double().numpy()
    )
    return np.where(cells_2JT < 0, -1, cells_2JT * pixels_per_cell[:, None, None])


def total_percentages(results: list[dict[str, Any]], variant: str) -> Coordinates:
    """(thresholds, joints) percentages over the clips."""
    correct = np.sum([result[variant]["correct"] for result in results], axis=0)
    return percentages(correct, np.sum([result[variant]["found"] for result in results], axis=0))


def measure_name(threshold: float) -> str:
    return f"PCK@{threshold}"


def summarise(percent: Coordinates) -> dict[str, float]:
    """Mean over the joints at each threshold, and each joint at the smallest."""
    means = dict(zip(map(measure_name, THRESHOLDS), mean_over_joints(percent).tolist(), strict=True))
    smallest = measure_name(THRESHOLDS[0])
    return means | {
        f"{smallest} {joint}": float(value) for joint, value in zip(JOINTS, percent[0], strict=True)
    }
