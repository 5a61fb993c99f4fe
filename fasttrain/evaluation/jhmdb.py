"""Track human poses on JHMDB: propagate the first frame's joints and measure PCK.

The dataset must be in its published layout: joint_positions/CLASS/CLIP/joint_positions.mat,
Rename_Images/CLASS/CLIP/00001.png (and so on) and splits/CLASS_test_splitN.txt. The protocol is that of
github.com/ajabri/videowalk; --list also accepts the lists of clips in its format. The predicted poses are
written in the format of the annotations.
"""

# Shape suffixes: T frames, J joints, H W pixels, h w grid, N = h * w cells, C channels (J + 1) or top cells.

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.io import loadmat, savemat
from torch import Tensor

from fasttrain.distributed import World
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError, check_options
from fasttrain.evaluation import metrics, plots, sequences
from fasttrain.evaluation.frames import read_image
from fasttrain.evaluation.sequences import Evaluation, VideoSequence
from fasttrain.files import open_atomically

JOINTS = (
    *("neck", "belly", "face", "right shoulder", "left shoulder", "right hip", "left hip", "right elbow"),
    *("left elbow", "right knee", "left knee", "right wrist", "left wrist", "right ankle", "left ankle"),
)
METRICS = tuple(f"PCK@{threshold}" for threshold in metrics.THRESHOLDS)
Coordinates = npt.NDArray[np.float64]
POSES, FRAMES = "joint_positions", "Rename_Images"
# Marks the test clips in a split file, after the clip's name.
TEST = "2"


def run(
    arguments: argparse.Namespace, model: EvaluatedModel, output: Path, world: World
) -> dict[str, Any] | None:
    """Evaluate all clips. Returns the results on the main process and None on the others."""
    check_options(arguments, size=1, sigma=0.1)
    listed = find_sequences(arguments.root, arguments.split, arguments.list)
    evaluated = sequences.evaluate_all(listed, evaluate_sequence, arguments, model, output, world)
    if evaluated is None:
        return None
    counts, data = evaluated
    percent = {
        variant: metrics.percentages(result[variant] for result in counts.values())
        for variant in model.variants
    }
    return {
        "data": {**data, "joints": len(JOINTS)},
        "results": {variant: summarise(of_variant) for variant, of_variant in percent.items()},
        "per_joint": {
            variant: {
                joint: dict(zip(METRICS, of_variant[:, number].tolist(), strict=True))
                for number, joint in enumerate(JOINTS)
            }
            for variant, of_variant in percent.items()
        },
        "per_sequence": {
            name: {variant: summarise(metrics.percentages([count])) for variant, count in result.items()}
            for name, result in counts.items()
        },
    }


def find_sequences(root: Path, split: int, listed: Path | None) -> list[VideoSequence]:
    """Find the test clips of a split or list. Raises InputError if part of the layout is missing."""
    sequences.require((root / POSES, root / FRAMES), "JHMDB")
    clips = clips_of_list(listed) if listed else clips_of_split(root / "splits", split)
    return [_find_sequence(root, action, name) for action, name in dict.fromkeys(clips)]


def clips_of_split(folder: Path, split: int) -> list[tuple[str, str]]:
    """Read the class and name of each test clip of a split. Raises InputError if there are none."""
    suffix = f"_test_split{split}.txt"
    clips = []
    for path in sequences.numbered(folder, suffix):
        for line in sequences.read_list(path):
            name, _, mark = line.rpartition(" ")
            if mark == TEST:
                clips.append((path.name.removesuffix(suffix), name.strip().removesuffix(".avi")))
    if not clips:
        raise InputError(
            f"'{folder}' has no CLASS{suffix} with test clips (`CLIP.avi {TEST}`). Add the split or pass "
            "--list."
        )
    return clips


def clips_of_list(path: Path) -> list[tuple[str, str]]:
    """Read the class and name of each clip in a list.

    Published lists contain absolute paths on the authors' machines, so only the ends of the paths are used.
    """
    clips = []
    for line in sequences.read_list(path):
        entry = Path(line.split()[0])
        parts = (entry.parent if entry.suffix == ".mat" else entry).parts
        if len(parts) < 2:
            raise InputError(
                f"'{path}': {line!r} is not a clip; expected CLASS/CLIP or paths that end with it"
            )
        if ".." in parts[-2:]:
            raise InputError(f"'{path}': {line!r} is not a clip; correct the list")
        clips.append((parts[-2], parts[-1]))
    return clips


def _find_sequence(root: Path, action: str, name: str) -> VideoSequence:
    """Find the poses and frames of a clip. Frames after the last pose are ignored."""
    poses = root / POSES / action / name / "joint_positions.mat"
    length = read_poses(poses).shape[2]
    frames = [root / FRAMES / action / name / f"{number:05d}.png" for number in range(1, length + 1)]
    missing = [path for path in frames if not path.is_file()]
    if missing:
        raise InputError(
            f"clip {name!r} has {length} poses, but frame '{missing[0]}' is missing. Restore it."
        )
    return VideoSequence(name, frames, [poses])


def read_poses(path: Path) -> Coordinates:
    """Read the poses (2, J, T) of a clip: x and y in pixels, counted from 0 (in the file, from 1).

    Raises InputError if the file is missing or damaged, or if its poses have another shape.
    """
    try:
        poses_2JT = np.asarray(loadmat(path, variable_names=["pos_img"])["pos_img"]).astype(np.float64)
    # SciPy raises exceptions of many types for damaged files: zlib.error, IndexError, UnboundLocalError, ...
    except Exception as error:
        raise InputError(
            f"annotation '{path}' is missing or has no readable pos_img ({error}). Replace it."
        ) from error
    if poses_2JT.ndim != 3 or poses_2JT.shape[:2] != (2, len(JOINTS)) or poses_2JT.shape[2] < 2:
        raise InputError(
            f"annotation '{path}': pos_img has shape {poses_2JT.shape}; expected (2, {len(JOINTS)}, T) with "
            "T of at least 2"
        )
    return poses_2JT - 1


def evaluate_sequence(sequence: VideoSequence, evaluation: Evaluation) -> dict[str, Any]:
    """Return the counts of correct and of detected keypoints by variant; write poses and pictures."""
    truth_2JT, frames = read_poses(sequence.annotations[0]), sequence.frames
    height, width = read_image(frames[0]).shape[:2]
    size = evaluation.size(evaluation.arguments.size, evaluation.arguments.size)
    grid = evaluation.model.encoder.grid(*size)
    pixels_per_cell = np.array([width / grid[1], height / grid[0]])
    first_hwC = joint_maps(truth_2JT[..., 0] / pixels_per_cell[:, None], grid, evaluation.arguments.sigma)
    propagated, matches_M4 = sequences.propagate(sequence, size, first_hwC, evaluation)
    poses = {
        variant: poses_from_maps(labels_ThwC, pixels_per_cell) for variant, labels_ThwC in propagated.items()
    }
    action = frames[0].parent.parent.name
    for variant, pose_2JT in poses.items():
        path = evaluation.output / POSES / variant / action / sequence.name / "joint_positions.mat"
        with open_atomically(path) as file:
            savemat(file, {"pos_img": np.where(pose_2JT < 0, -1, pose_2JT + 1)})
    counts = {variant: metrics.count_correct(pose_2JT, truth_2JT) for variant, pose_2JT in poses.items()}
    if sequence.name in evaluation.drawn:
        pictures = [read_image(path) for path in frames]
        overlays = {
            row: [plots.overlay_pose(picture, pose_2JT[..., t]) for t, picture in enumerate(pictures)]
            for row, pose_2JT in {**poses, "truth": truth_2JT}.items()
        }
        ends = truth_2JT[..., 0], truth_2JT[..., len(frames) // 2]
        judged = {
            variant: (matches, end_at_their_joint(matches * (width, height, width, height), *ends))
            for variant, matches in matches_M4.items()
        }
        results = {
            variant: f"{summarise(metrics.percentages([count]))[METRICS[0]]:.0f} %"
            for variant, count in counts.items()
        }
        notes = {
            variant: [joints_note(pose_2JT, truth_2JT, t) for t in sequences.shown_frames(len(frames))]
            for variant, pose_2JT in poses.items()
        }
        sequences.draw(
            sequence.name,
            pictures,
            overlays,
            judged,
            evaluation,
            METRICS[0],
            results,
            notes,
            plots.LIMB_COLORS,
        )
    return counts


def joints_note(pose_2JT: Coordinates, truth_2JT: Coordinates, t: int) -> str:
    """Describe how many of the joints found in frame t are correct at the smallest threshold."""
    # The first frame that is passed does not count.
    correct, found_J = metrics.count_correct(pose_2JT[..., [t, t]], truth_2JT[..., [t, t]])
    return f"{correct[0].sum()} of {found_J.sum()} right"


def end_at_their_joint(
    matches_M4: Coordinates, first_2J: Coordinates, second_2J: Coordinates, threshold: float = 0.2
) -> list[bool]:
    """Check, for each match, whether it ends at the joint nearest to its start, within PCK's tolerance."""
    joint_M = np.linalg.norm(matches_M4[:, :2, None] - first_2J, axis=1).argmin(axis=1)
    distance_M = np.linalg.norm(matches_M4[:, 2:] - second_2J[:, joint_M].T, axis=1)
    person = metrics.PERSON_SHARE * np.linalg.norm(np.ptp(second_2J, axis=1))
    return (distance_M <= threshold * person).tolist()


def joint_maps(joints_2J: npt.ArrayLike, grid: tuple[int, int], sigma: float = 0.5) -> Tensor:
    """Draw each joint as a Gaussian on the grid. Returns (h, w, 1 + J) float32, the background first.

    `joints_2J` holds x and y in cells. A Gaussian has its peak of 1 at the cell nearest to the joint (for the
    default sigma) and is cut off at 3 sigma; a map is zero if its Gaussian is outside the grid. The
    background is 1 where all joint maps are 0. This is the drawing routine of Newell et al. (ECCV 2016) as
    used in github.com/ajabri/videowalk, except that positions are rounded in the same way at all borders.
    """
    middle = (6 * sigma + 1) // 2

    def offsets(position_J: Coordinates, cells: int) -> Coordinates:
        """Return the distances (J, cells) from the peak along one axis, infinite beyond 3 sigma."""
        first_J1 = np.floor(position_J - 3 * sigma)[:, None]
        end_J1 = np.floor(position_J + 3 * sigma + 1)[:, None]
        cell = np.arange(cells)
        return np.where((first_J1 <= cell) & (cell < end_J1), cell - first_J1 - middle, np.inf)

    x_J, y_J = np.asarray(joints_2J, dtype=np.float64)
    x_J1w, y_Jh1 = offsets(x_J, grid[1])[:, None], offsets(y_J, grid[0])[..., None]
    maps_Jhw = torch.from_numpy(np.exp(-(y_Jh1**2 + x_J1w**2) / (2 * sigma**2))).float()
    background_1hw = (maps_Jhw.sum(0, keepdim=True) == 0).float()
    return torch.cat([background_1hw, maps_Jhw]).movedim(0, -1).contiguous()


def poses_from_maps(maps_ThwC: Tensor, pixels_per_cell: Coordinates, cells: int = 5) -> Coordinates:
    """Convert joint maps to poses (2, J, T): x and y in pixels, counted from 0.

    A position is the weighted mean of the `cells` cells with the largest values. A joint whose map is zero
    everywhere was not detected; its position is (-1, -1).
    """
    width = maps_ThwC.shape[2]
    maps_TNJ = maps_ThwC[..., 1:].flatten(1, 2).cpu()
    weight_TCJ, cell_TCJ = maps_TNJ.topk(min(cells, maps_TNJ.shape[1]), dim=1)
    x_TJ, y_TJ = (
        (position_TCJ * weight_TCJ).sum(1) / weight_TCJ.sum(1)
        for position_TCJ in (cell_TCJ % width, cell_TCJ // width)
    )
    cells_2JT = torch.stack([x_TJ.T, y_TJ.T]).double().numpy()
    is_detected_JT = (maps_TNJ.sum(1) != 0).T.numpy()
    return np.where(is_detected_JT, cells_2JT * pixels_per_cell[:, None, None], -1)


def summarise(percent: Coordinates) -> dict[str, float]:
    """Return the mean over the joints at each threshold, and each joint's value at the smallest threshold."""
    means = zip(METRICS, metrics.mean_over_joints(percent).tolist(), strict=True)
    smallest = {
        f"{METRICS[0]} {joint}": float(value) for joint, value in zip(JOINTS, percent[0], strict=True)
    }
    return {**dict(means), **smallest}
