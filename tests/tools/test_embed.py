"""The command `embed`: the arrays of a file, continuing, refusals, and the names of files."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from synthetic import make_scene, write_folders, write_run

from fasttrain.__main__ import main
from fasttrain.data.sources import open_source
from fasttrain.distributed import World
from fasttrain.errors import InputError
from fasttrain.tools import embed
from fasttrain.tools.embed import output_paths
from fasttrain.tools.synthetic import write_scene
from fasttrain.video_encoder import load_video_encoder

OPTIONS = ("--device", "cpu", "--size", "48", "--batch-size", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def write_files(root: Path) -> Path:
    for number, name in enumerate(("first", "second")):
        write_scene(make_scene(number, frames=9), root / "deeper" / f"{name}.mp4")
    return root


def call(*words: object) -> int:
    return main(["embed", *map(str, words)])


def test_a_file_has_the_tokens_of_the_preprocessed_video(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the kind of source, the format of the file, and the parts in which videos are read."""
    monkeypatch.setattr(embed, "PART", 3)
    encoder = load_video_encoder(run)
    files, folders = write_files(tmp_path / "files"), write_folders(tmp_path / "folders", [5, 1])
    for root, name, length in ((files, "deeper/second.mp4", 9), (folders, "class_0/video_0", 5)):
        out = tmp_path / f"{root.name} out"
        assert call(root, out, "--run", run, "--stride", 2, *OPTIONS) == 0
        assert call(root, out / "npz", "--run", run, "--stride", 2, "--format", "npz", *OPTIONS) == 0
        frames = encoder.preprocess(root / name, size=48, frames=slice(None, None, 2))
        expected = encoder(frames)[0].reshape(len(range(0, length, 2)), 3, frames.shape[-1] // 16, 32)
        with safe_open(out / f"{name}.safetensors", "np") as file:
            tokens, numbers, metadata = file.get_tensor("tokens"), file.get_tensor("frames"), file.metadata()
        np.testing.assert_allclose(tokens, expected, rtol=1e-3, atol=1e-3)
        assert (tokens.dtype, numbers.dtype) == (np.float16, np.int64)
        assert numbers.tolist() == list(range(0, length, 2))
        assert (metadata["video"], metadata["num_frames"], metadata["stride"]) == (name, str(length), "2")
        assert json.loads(metadata["grid"]) == list(tokens.shape[1:3])
        assert json.loads(metadata["frame_size"]) == list(frames.shape[-2:])
        assert metadata["weights_hash"] == encoder.encoder.weights_hash
        content = np.load(out / "npz" / f"{name}.npz")
        np.testing.assert_array_equal(content["tokens"], tokens)
        assert (str(content["video"]), content["grid"].tolist()) == (name, list(tokens.shape[1:3]))


def test_pooled_and_frozen_features(run: Path, tmp_path: Path) -> None:
    root, encoder = write_folders(tmp_path / "folders", [5]), load_video_encoder(run)
    assert call(root, tmp_path / "out", "--run", run, "--pool", "--dtype", "float32", *OPTIONS) == 0
    frozen = ("--baseline-only", "--precision", "bf16")
    assert call(root, tmp_path / "frozen", "--run", run, *frozen, *OPTIONS) == 0
    frames = encoder.preprocess(root, size=48)
    (path,) = (tmp_path / "out").rglob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert "projection_hash" in file.metadata()
        torch.testing.assert_close(file.get_tensor("pooled"), encoder(frames)[0].mean(dim=1))
    (path,) = (tmp_path / "frozen").rglob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert "projection_hash" not in file.metadata()
        tokens = file.get_tensor("tokens").flatten(1, 2).float()
    expected = encoder.frozen(frames)[0]
    assert 0 < (tokens - expected).norm() / expected.norm() < 0.02


def test_repeating_the_command_completes_the_files_and_other_settings_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_folders(tmp_path / "folders", [5, 4]), tmp_path / "out"
    words = (root, out, "--run", run, *OPTIONS)
    assert call(*words) == 0
    first, second = sorted(out.rglob("*.safetensors"))
    content, state = second.read_bytes(), first.stat()
    second.unlink()
    shutil.copytree(root / "class_0" / "video_0", root / "class_2" / "video_2")
    capsys.readouterr()
    assert call(*words) == 0
    assert "videos: 3 (1 from before), frames: 14" in capsys.readouterr().out
    assert second.read_bytes() == content
    assert first.stat().st_mtime_ns == state.st_mtime_ns
    assert call(*words, "--stride", 2) == 2
    assert "other settings (stride was 1, now 2). Use another OUT" in capsys.readouterr().err
    write_run(run / "other", seed=1)
    assert call(root, out, "--run", run / "other", *OPTIONS) == 2
    assert "(projection_hash was " in capsys.readouterr().err
    (out / "embed.json").write_text("[]")
    assert call(*words) == 2
    assert "embed.json' is damaged" in capsys.readouterr().err


def test_unreadable_videos_are_listed_and_the_others_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_folders(tmp_path / "folders", [5, 4, 3]), tmp_path / "out"
    (root / "class_1" / "video_1" / "00002.jpg").write_bytes(b"\xff\xd8 no image")
    words = (root, out, "--run", run, *OPTIONS)
    assert call(*words) == 0
    printed = capsys.readouterr().out
    assert "skipped class_1/video_1: frame 2: " in printed
    assert "videos: 2 (0 from before), frames: 8" in printed
    assert len(list(out.rglob("*.*s"))) == 2
    (name, _), *others = json.loads((out / "embed.json").read_text())["skipped"]
    assert (name, others) == ("class_1/video_1", [])
    shutil.rmtree(root / "class_0")
    shutil.rmtree(out)
    assert call(*words) == 2
    assert "contains no readable video (1 skipped, first class_1/video_1: " in capsys.readouterr().err


def test_files_are_named_as_their_videos_and_never_outside_the_folder(tmp_path: Path) -> None:
    names = ["a.mp4", "b/a.mp4", "/data/a.mp4", "../../a.mp4", "b/./c/../d"]
    expected = ["a.mp4.npz", "b/a.mp4.npz", "data/a.mp4.npz", "_/_/a.mp4.npz", "b/d.npz"]
    assert output_paths(names, tmp_path, "npz") == [tmp_path / name for name in expected]
    with pytest.raises(InputError, match=r"videos 'a\.mp4' and '/a\.mp4' would have the same file"):
        output_paths(["a.mp4", "/a.mp4"], tmp_path, "npz")


def test_each_process_writes_its_share(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OneOfTwo(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, value]

    root, out = write_folders(tmp_path / "folders", [5, 1, 3]), tmp_path / "out"
    for rank, expected in ((1, [1]), (0, [0, 1, 2])):
        world = OneOfTwo(rank=rank, size=2, cores=1, device=torch.device("cpu"))
        monkeypatch.setattr(embed.distributed, "start", lambda _, world=world: nullcontext(world))
        assert call(root, out, "--run", run, *OPTIONS) == 0
        names = open_source(root).names
        assert [i for i, name in enumerate(names) if (out / f"{name}.safetensors").exists()] == expected


@pytest.mark.slow
def test_two_processes_divide_the_videos(run: Path, tmp_path: Path) -> None:
    root = write_folders(tmp_path / "folders", [5, 1, 3])
    words = [root, tmp_path / "two", "--run", run, *OPTIONS]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "fasttrain"]
    done = subprocess.run(
        [sys.executable, *launcher, "embed", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "videos: 3 (0 from before), frames: 9" in done.stdout
    assert call(root, tmp_path / "one", "--run", run, *OPTIONS) == 0
    assert len(list((tmp_path / "one").rglob("*.safetensors"))) == 3
    for path in (tmp_path / "one").rglob("*.safetensors"):
        with (
            safe_open(path, "np") as one,
            safe_open(tmp_path / "two" / path.relative_to(tmp_path / "one"), "np") as two,
        ):
            np.testing.assert_allclose(
                one.get_tensor("tokens"), two.get_tensor("tokens"), rtol=2e-3, atol=1e-3
            )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--size", "1", "2", "3"), "--size 1 2 3: expected the short side, or height and width"),
        (("--stride", "0"), "--stride 0: expected at least 1"),
        (("--size", "64", "0"), "--size 64 0: expected at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    words: tuple[str, ...], part: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, tmp_path / "out", "--run", run, *words) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
