"""`fasttrain eval davis`, `vip` and `jhmdb` on synthetic data in the published layouts."""

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from processes import run_two_ranks
from scipy.io import loadmat, savemat
from synthetic import (
    FRAMES,
    MODEL,
    NAMES,
    SMALL,
    make_scene,
    pose,
    result_of,
    write_davis,
    write_jhmdb,
    write_projection,
    write_vip,
)
from torch import Tensor
from torch.nn import functional

from fasttrain.__main__ import main
from fasttrain.encoder_options import EvaluatedModel
from fasttrain.errors import InputError
from fasttrain.evaluation import boundary_accuracy, mean_iou, pck, plots, region_similarity
from fasttrain.evaluation.davis import mean_similarity
from fasttrain.evaluation.frames import read_label_map, write_label_map
from fasttrain.evaluation.jhmdb import joint_maps, poses_from_maps
from fasttrain.evaluation.sequences import Evaluation, VideoSequence, find_matches, find_pairs, propagate
from fasttrain.evaluation.vip import encoded_size
from fasttrain.loggers import Progress

WRITERS = {"davis": write_davis, "vip": write_vip, "jhmdb": write_jhmdb}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {task: write(folder / task) for task, write in WRITERS.items()}


@pytest.fixture(scope="module")
def projection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_projection(tmp_path_factory.mktemp("head") / "projection.safetensors")


def command(task: str, root: Path, output: Path, *options: str) -> list[str]:
    folders = ("--root", str(root), "--output", str(output))
    return ["eval", task, *folders, *MODEL, *SMALL[task], *options]


def read_report(output: Path, task: str) -> dict[str, Any]:
    return json.loads(result_of(output, task).read_text())


@pytest.fixture(scope="module")
def evaluated(
    roots: dict[str, Path], projection: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Evaluate each task with an untrained projection. Returns the folders of pictures and predictions."""
    folder = tmp_path_factory.mktemp("eval")
    for task, root in roots.items():
        assert main(command(task, root, folder / task, "--projection", str(projection))) == 0
    return {task: result_of(folder / task, task).with_suffix("") for task in roots}


@pytest.mark.parametrize("task", WRITERS)
def test_results_before_and_after_and_their_difference(evaluated: dict[str, Path], task: str) -> None:
    report = read_report(evaluated[task].parent, task)
    before, after, difference = (report["results"][key] for key in ("before", "after", "difference"))
    headline = {"davis": "J&F-Mean", "vip": "mIoU", "jhmdb": "PCK@0.1"}[task]
    assert next(iter(before)) == headline
    assert difference[headline] == pytest.approx(after[headline] - before[headline])
    assert before[headline] != after[headline]
    assert report["data"]["sequences"] == 3
    assert report["data"]["frames"] == 3 * FRAMES
    assert list(report["per_sequence"]) == list(NAMES)
    assert report["settings"]["topk"] == {"davis": 7, "vip": 10, "jhmdb": 7}[task]
    assert torch.__version__.startswith(report["versions"]["torch"])


@pytest.mark.parametrize("task", WRITERS)
def test_pictures_of_the_chosen_sequences(
    evaluated: dict[str, Path],
    roots: dict[str, Path],
    tmp_path: Path,
    task: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sheets: dict[str, Figure] = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path, **_: sheets.update({path.name: figure}))
    names = {path.name for path in (evaluated[task] / "figures").iterdir()}
    assert names == {f"alpha{end}" for end in (".png", ".mp4", "_arrows.png", "_pca.png")}
    assert main(command(task, roots[task], tmp_path, "--pictures", "2")) == 0
    chosen = "alpha", "gamma"
    assert {path.name for path in tmp_path.glob("*/figures/*")} == {f"{name}.mp4" for name in chosen}
    ends = ".png", "_arrows.png", "_pca.png"
    assert set(sheets) == {f"{name}{end}" for name in chosen for end in ends}
    # The title has the result of the sequence; each frame but the first has its own.
    result = read_report(tmp_path, task)["per_sequence"]["alpha"]["before"]
    title, note = {
        "davis": lambda: (f"J {np.mean([one['J']['mean'] for one in result.values()]):.2f}", r"J \d\.\d\d"),
        "vip": lambda: (f"mIoU {result['mIoU']:.2f}", r"mIoU \d\.\d\d"),
        "jhmdb": lambda: (f"PCK@0.1 {result['PCK@0.1']:.0f} %", r"\d+ of 15 right"),
    }[task]()
    assert sheets["alpha.png"].get_suptitle() == f"alpha, test_vit (random weights): {title} before"
    notes = [axes.texts[0].get_text() for axes in sheets["alpha.png"].axes]
    assert (notes[0], notes[4:]) == ("given", [""] * 4)
    assert all(re.fullmatch(note, text) for text in notes[1:4])
    legend = {"davis": [], "vip": ["hair", "pants"], "jhmdb": [*plots.LIMB_COLORS]}[task]
    assert [text.get_text() for one in sheets["alpha.png"].legends for text in one.get_texts()] == legend


def test_titles_name_the_weights_once() -> None:
    def title(weights: str) -> str:
        encoder: Any = SimpleNamespace(name="dinov2", weights=weights)
        return EvaluatedModel(encoder=encoder, projection=None, variants=()).title

    assert title("data/demo/vit_tiny_patch14.safetensors") == "dinov2 (vit_tiny_patch14)"
    assert title("hf://facebook/dinov2-small") == "dinov2-small"


def test_only_frames_with_objects_have_a_score() -> None:
    truth = np.array([[0, 1, 1, 2]])
    assert mean_similarity(np.array([[0, 1, 0, 2]]), truth) == 0.75
    assert np.isnan(mean_similarity(truth, np.zeros_like(truth)))


def test_davis_masks_have_the_reported_scores(evaluated: dict[str, Path], roots: dict[str, Path]) -> None:
    report = read_report(evaluated["davis"].parent, "davis")
    scores: dict[str, list[float]] = {"J": [], "F": []}
    for name in NAMES:
        pairs = []
        for number in range(FRAMES):
            path = evaluated["davis"] / "masks/after" / name / f"{number:05d}.png"
            with Image.open(path) as image:
                assert image.mode == "P"
                assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
            truth = read_label_map(roots["davis"] / "Annotations/480p" / name / path.name)
            pairs.append((read_label_map(path), truth))
        assert np.array_equal(*pairs[0])
        for label in (1, 2):
            for key, metric in (("J", region_similarity), ("F", boundary_accuracy)):
                values = [metric(mask == label, truth == label) for mask, truth in pairs[1:-1]]
                scores[key].append(float(np.mean(values)))
    for key, values in scores.items():
        assert report["results"]["after"][f"{key}-Mean"] == pytest.approx(np.mean(values), rel=1e-12)


def test_vip_masks_have_the_reported_scores(evaluated: dict[str, Path], roots: dict[str, Path]) -> None:
    results = read_report(evaluated["vip"].parent, "vip")["results"]["before"]
    folder = roots["vip"] / "VIP_Fine/Annotations/Category_ids"
    truths = [read_label_map(path) for path in sorted(folder.glob("*/*.png"))]
    masks = [read_label_map(path) for path in sorted((evaluated["vip"] / "masks/before").glob("*/*.png"))]
    assert results["mIoU"] == pytest.approx(mean_iou(masks, truths), rel=1e-12)
    assert results["hat"] is None
    assert 0 < results["hair"] < 1


def test_jhmdb_poses_have_the_reported_scores(evaluated: dict[str, Path], roots: dict[str, Path]) -> None:
    report = read_report(evaluated["jhmdb"].parent, "jhmdb")
    poses = [
        [
            loadmat(folder / "wave" / name / "joint_positions.mat")["pos_img"]
            for folder in (evaluated["jhmdb"] / "joint_positions/after", roots["jhmdb"] / "joint_positions")
        ]
        for name in NAMES
    ]
    predictions = [np.where(prediction < 0, -1, prediction - 1) for prediction, _ in poses]
    expected = pck(predictions, [truth - 1 for _, truth in poses])
    after = report["results"]["after"]
    np.testing.assert_allclose([after[f"PCK@{t / 10}"] for t in range(1, 6)], expected, rtol=1e-12)
    per_joint = report["per_joint"]["after"]
    assert len(per_joint) == 15
    assert per_joint["neck"]["PCK@0.1"] == after["PCK@0.1 neck"]


@pytest.mark.parametrize("option", ["--baseline-only", "--projection-only"])
def test_single_variant(
    roots: dict[str, Path], evaluated: dict[str, Path], projection: Path, tmp_path: Path, option: str
) -> None:
    assert main(command("jhmdb", roots["jhmdb"], tmp_path, "--projection", str(projection), option)) == 0
    variant = "before" if option == "--baseline-only" else "after"
    both = read_report(evaluated["jhmdb"].parent, "jhmdb")["results"]
    assert read_report(tmp_path, "jhmdb")["results"] == {variant: both[variant]}


def assert_same_output(folder: Path, expected: Path, task: str) -> None:
    report, expected_report = read_report(folder, task), read_report(expected, task)
    for key in ("results", "data", "per_sequence"):
        assert report[key] == expected_report[key]
    pictures = [
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*.png")}
        for top in (folder, expected)
    ]
    assert pictures[0] == pictures[1]


def test_two_processes_give_the_results_of_one(
    roots: dict[str, Path], evaluated: dict[str, Path], projection: Path, tmp_path: Path
) -> None:
    words = command("davis", roots["davis"], tmp_path, "--projection", str(projection))
    run_two_ranks(words)
    assert_same_output(tmp_path, evaluated["davis"].parent, "davis")


@pytest.mark.gpu
@pytest.mark.parametrize("task", WRITERS)
def test_gpu_equals_cpu(
    roots: dict[str, Path], evaluated: dict[str, Path], projection: Path, tmp_path: Path, task: str
) -> None:
    words = command(task, roots[task], tmp_path, "--projection", str(projection), "--device", "cuda")
    assert main(words) == 0
    # The encoder rounds differently on a GPU, which changes the order of a few nearly equal affinities.
    for variant in ("before", "after"):
        on_gpu, on_cpu = (
            read_report(folder, task)["results"][variant] for folder in (tmp_path, evaluated[task].parent)
        )
        scale = 100 if task == "jhmdb" else 1
        key = next(iter(on_cpu))
        assert on_gpu[key] == pytest.approx(on_cpu[key], abs=0.05 * scale)


@pytest.mark.parametrize("listing", ["2016", "480p"])
def test_davis_2016_merges_all_objects(tmp_path: Path, listing: str) -> None:
    """With the list and masks of either release: labels of objects (2017), or 0 and 255 (2016)."""
    root = write_davis(tmp_path / "davis", year=listing)
    if listing == "480p":
        lines = [
            f"/JPEGImages/480p/{name}/{number:05d}.jpg /Annotations/480p/{name}/{number:05d}.png"
            for name in NAMES
            for number in range(FRAMES)
        ]
        (root / "ImageSets/480p/val.txt").write_text("\n".join(lines))
        for path in (root / "Annotations/480p").glob("*/*.png"):
            image = Image.fromarray(np.uint8(255 * (read_label_map(path) > 0)))
            # The 2016 release has one mask with four channels.
            (image.convert("RGBA") if path.match("beta/00002.png") else image).save(path)
    assert main(command("davis", root, tmp_path, "--year", "2016", "--pictures", "0")) == 0
    report = read_report(tmp_path, "davis")
    assert report["data"]["objects"] == 3
    assert set(report["per_sequence"]["alpha"]["before"]) == {"1"}
    mask = result_of(tmp_path, "davis").with_suffix("") / "masks/before/alpha/00003.png"
    assert set(np.unique(read_label_map(mask))) == {0, 1}


def test_jhmdb_lists_and_frames_without_pose(roots: dict[str, Path], tmp_path: Path) -> None:
    """Only the ends of listed paths matter; frames after the last pose are left out."""
    root = tmp_path / "jhmdb"
    shutil.copytree(roots["jhmdb"], root)
    lines = [f"/a/joint_positions/wave/{n}/joint_positions.mat /a/Rename_Images/wave/{n}" for n in NAMES[:2]]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(lines))
    frames = root / "Rename_Images/wave/alpha"
    shutil.copy(frames / "00001.png", frames / f"{FRAMES + 1:05d}.png")
    assert main(command("jhmdb", root, tmp_path, "--pictures", "0", "--list", str(listed))) == 0
    report = read_report(tmp_path, "jhmdb")
    assert list(report["per_sequence"]) == ["alpha", "beta"]
    assert report["data"]["frames"] == 2 * FRAMES
    listed.write_text("wave/gamma\n")
    assert main(command("jhmdb", root, tmp_path / "one", "--pictures", "0", "--list", str(listed))) == 0
    assert list(read_report(tmp_path / "one", "jhmdb")["per_sequence"]) == ["gamma"]


def test_vip_list_and_folder(
    roots: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "vallist.txt"
    listed.write_text("datasets/VIP/Images/beta datasets/VIP/Annotations/Category_ids/beta\n")
    assert main(command("vip", roots["vip"] / "VIP_Fine", tmp_path, "--list", str(listed))) == 0
    assert list(read_report(tmp_path, "vip")["per_sequence"]) == ["beta"]
    listed.unlink()
    assert_one_line(command("vip", roots["vip"], tmp_path, "--list", str(listed)), f"{listed}", capsys)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((720, 1280), (448, 880)),
        ((1280, 720), (880, 448)),
        ((1080, 1920), (448, 880)),
        ((480, 480), (880, 832)),
    ],
)
def test_vip_frame_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert encoded_size(*size, 880) == expected


class Oracle:
    """An encoder with perfect features: each token is the one-hot index of the scene point in its cell."""

    patch_size, mean, std = 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, points_Thw: Tensor) -> None:
        self.points = iter(points_Thw)
        self.count = int(points_Thw.max()) + 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size, width // self.patch_size

    def tokens(self, frames: Tensor) -> Tensor:
        return functional.one_hot(next(self.points).flatten(), self.count)[None].float()


def propagate_with_oracle(points_Thw: Tensor, first_hwC: Tensor, folder: Path) -> Tensor:
    frames, (height, width) = [], (16 * side for side in points_Thw.shape[1:])
    for number in range(len(points_Thw)):
        frames.append(folder / f"{number:05d}.png")
        Image.new("RGB", (width, height)).save(frames[-1])
    arguments = argparse.Namespace(context=20, radius=20, topk=7, temperature=0.7)
    model = EvaluatedModel(encoder=Oracle(points_Thw), projection=None, variants=("before",))
    evaluation = Evaluation(
        arguments=arguments,
        model=model,
        output=folder,
        device=torch.device("cpu"),
        progress=Progress("frames", 2),
    )
    labels_ThwC, matches_M4 = propagate(
        VideoSequence("alpha", frames, []), (height, width), first_hwC, evaluation
    )
    matches = find_matches(*functional.one_hot(points_Thw[[0, len(frames) // 2]]).float(), first_hwC)
    np.testing.assert_array_equal(matches_M4["before"], matches)
    return labels_ThwC["before"]


def test_oracle_masks(tmp_path: Path) -> None:
    """With perfect features, the masks of two moving objects are propagated without errors."""
    truth = torch.zeros(9, 10, 16, dtype=torch.long)
    points = torch.zeros_like(truth)
    for t in range(9):
        points[t, 1:4, t : t + 3] = torch.arange(1, 10).view(3, 3)
        points[t, 5:9, 12 - t : 14 - t] = torch.arange(10, 18).view(4, 2)
        truth[t, 1:4, t : t + 3], truth[t, 5:9, 12 - t : 14 - t] = 1, 2
    labels = propagate_with_oracle(points, functional.one_hot(truth[0]).float(), tmp_path)
    assert torch.equal(labels.argmax(-1), truth)
    # All matches of an object's cell belong to the object, so its label has the full weight.
    assert torch.equal(labels.amax(-1)[truth > 0], torch.ones(int((truth > 0).sum())))


def test_oracle_poses(tmp_path: Path) -> None:
    """While the camera pans over distinct points, joints at cell centres are tracked without errors."""
    height, width = 12, 20
    world = torch.arange(1, 1 + height * 40).view(height, 40)
    # Points that come into view equal those of the bottom row, which has no joint.
    world[:, width:] = world[-1] = 0
    points = torch.stack([world[:, t : t + width] for t in range(8)])
    joints = np.stack([9 + np.arange(15) % 9, 2 + np.arange(15) % 8]).astype(float)
    truth = np.stack([joints - [[t], [0]] for t in range(8)], axis=-1)
    maps = propagate_with_oracle(points, joint_maps(joints, (height, width)), tmp_path)
    poses = poses_from_maps(maps, np.array([16.0, 16.0]))
    np.testing.assert_allclose(poses, 16 * truth, atol=1e-4)


def test_frames_are_sorted_by_number_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for stem in ("1", "2", "9", "10", "11"):
        for name in (f"{stem}.jpg", f"{stem}.png", f"._{stem}.jpg"):
            (tmp_path / name).touch()
    sequence = find_pairs("name", tmp_path, tmp_path, min_frames=3)
    assert [path.name for path in sequence.frames] == ["1.jpg", "2.jpg", "9.jpg", "10.jpg", "11.jpg"]
    assert [path.name for path in sequence.annotations] == ["1.png", "2.png", "9.png", "10.png", "11.png"]


# Folders of the sequence `beta`.
DAVIS_FRAMES, DAVIS_MASKS = "JPEGImages/480p/beta", "Annotations/480p/beta"
VIP_MASKS = "VIP_Fine/Annotations/Category_ids/beta"
FIRST_PARTS = f"{VIP_MASKS}/{0:012d}.png"
JHMDB_FRAMES, POSES = "Rename_Images/wave/beta", "joint_positions/wave/beta/joint_positions.mat"
EMPTY = np.zeros((64, 96), dtype=np.uint8)
TRUTH = pose(make_scene(1).labels_THW)


def shorten(*folders: Path) -> None:
    for folder in folders:
        for path in sorted(folder.iterdir())[1:]:
            path.unlink()


def overwrite_compressed(path: Path) -> None:
    savemat(path, {"pos_img": TRUTH}, do_compression=True)
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes(50) + data[250:])


@pytest.mark.parametrize(
    ("task", "damage", "message"),
    [
        ("davis", lambda root: shutil.rmtree(root / "JPEGImages"), "JPEGImages/480p' does not exist"),
        ("davis", lambda root: (root / "ImageSets/2017/val.txt").write_text("\n"), "val.txt' is empty"),
        ("davis", lambda root: (root / DAVIS_FRAMES / "00002.jpg").unlink(), "00002 is missing its image"),
        ("davis", lambda root: (root / DAVIS_MASKS / "00003.png").unlink(), "00003 is missing its image"),
        ("davis", lambda root: (root / DAVIS_FRAMES / "00002.jpg").write_bytes(b""), "jpg' is unreadable"),
        (
            "davis",
            lambda root: shorten(root / DAVIS_FRAMES, root / DAVIS_MASKS),
            "sequence 'beta': expected at least 3 frames",
        ),
        ("davis", lambda root: write_label_map(EMPTY, root / DAVIS_MASKS / "00000.png"), "has no object"),
        (
            "davis",
            lambda root: write_label_map(EMPTY[:9], root / DAVIS_MASKS / "00004.png"),
            "has shape (9, 96); expected (64, 96)",
        ),
        ("vip", lambda root: shutil.rmtree(root / "VIP_Fine/lists"), "val_videos.txt' does not exist"),
        (
            "vip",
            lambda root: write_label_map(EMPTY + 40, root / FIRST_PARTS),
            "has label 40; expected",
        ),
        ("jhmdb", lambda root: shutil.rmtree(root / "Rename_Images"), "Rename_Images' does not exist"),
        ("jhmdb", lambda root: shutil.rmtree(root / "splits"), "has no CLASS_test_split1.txt"),
        ("jhmdb", lambda root: (root / JHMDB_FRAMES / "00005.png").unlink(), "clip 'beta' has 5 poses, but"),
        ("jhmdb", lambda root: (root / POSES).unlink(), "has no readable pos_img"),
        (
            "jhmdb",
            lambda root: (root / POSES).write_bytes(b"no poses" * 40),
            "has no readable pos_img",
        ),
        (
            "jhmdb",
            lambda root: savemat(root / POSES, {"pos_world": TRUTH}),
            "has no readable pos_img",
        ),
        # SciPy raises zlib.error.
        ("jhmdb", lambda root: overwrite_compressed(root / POSES), "has no readable pos_img"),
        ("jhmdb", lambda root: savemat(root / POSES, {"pos_img": "text"}), "has no readable pos_img"),
        ("jhmdb", lambda root: savemat(root / POSES, {"pos_img": TRUTH[:, :7]}), "has shape (2, 7, 5)"),
    ],
)
def test_damaged_datasets(
    roots: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    root = tmp_path / task
    shutil.copytree(roots[task], root)
    damage(root)
    assert_one_line(command(task, root, tmp_path / "out"), message, capsys)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("davis", ("--topk", "0"), "topk 0, radius 20.0, temperature 0.7: expected"),
        ("davis", ("--height", "0"), "--height 0: expected at least 1"),
        ("vip", ("--long-side", "32"), "--long-side 32: expected at least 64"),
        ("jhmdb", ("--sigma", "0"), "--sigma 0.0: expected at least"),
        ("jhmdb", ("--split", "2"), "has no CLASS_test_split2.txt"),
    ],
)
def test_invalid_settings(
    roots: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    options: tuple[str, str],
    message: str,
) -> None:
    assert_one_line(command(task, roots[task], tmp_path, *options), message, capsys)


def assert_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_objects_missing_in_the_first_frame_are_noted(
    roots: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The toolkit scores objects up to the highest label in the first frame."""
    root = tmp_path / "davis"
    shutil.copytree(roots["davis"], root)
    path = root / DAVIS_MASKS / "00003.png"
    labels = read_label_map(path).copy()
    labels[:5, :5] = 3
    write_label_map(labels, path)
    first = root / "Annotations/480p/alpha/00000.png"
    write_label_map(np.where(read_label_map(first) == 1, 0, read_label_map(first)), first)
    assert main(command("davis", root, tmp_path, "--pictures", "0")) == 0
    report = read_report(tmp_path, "davis")
    alpha, beta = report["data"]["notes"]
    assert alpha.startswith("sequence 'alpha': object 1 is not in the first frame")
    assert "scored as missed" in alpha
    assert beta.startswith("sequence 'beta': object 3 is not in the first frame")
    assert "not scored" in beta
    assert f"note: {beta}" in capsys.readouterr().out
    assert set(report["per_sequence"]["beta"]["before"]) == {"1", "2"}
    assert report["per_sequence"]["alpha"]["before"]["1"]["J"]["mean"] == 0


def test_output_folder_that_cannot_be_created(
    roots: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = command("davis", roots["davis"], tmp_path / "file" / "folder")
    assert_one_line(words, "not a directory", capsys)


def test_joints_are_recovered_from_joint_maps() -> None:
    joints = np.array([[3.0, 0.0, 9.7, 40.0], [2.0, 0.0, 5.2, 3.0]])
    maps = joint_maps(joints, (8, 12))
    assert maps.shape == (8, 12, 5)
    # In the corner, a quarter of the Gaussian is inside the grid, with weights 1, e^-2, e^-2 and e^-4.
    corner = math.exp(-2) / (1 + math.exp(-2))
    # The Gaussian of the last joint is outside the grid.
    expected = [[3.0, corner, 10.0, -1], [2.0, corner, 5.0, -1]]
    np.testing.assert_allclose(poses_from_maps(maps[None], np.ones(2))[..., 0], expected, atol=1e-6)
    assert torch.equal(maps[..., 0] == 1, maps[..., 1:].sum(-1) == 0)


@pytest.mark.parametrize("name", ["", "..", "../../name"])
def test_a_sequence_cannot_lead_out_of_the_output_folder(name: str) -> None:
    with pytest.raises(InputError, match="expected the name of a folder"):
        VideoSequence(name, [], [])
