"""The export of a video encoder to a file."""

import json
from pathlib import Path

import pytest
import torch
from synthetic import write_run

from fasttrain.errors import InputError
from fasttrain.tools.export import export
from fasttrain.video_encoder import load_video_encoder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), name="dinov2", image_size=32, depth=2)


def test_the_exported_program_computes_the_encoders_tokens(run: Path, tmp_path: Path) -> None:
    path = export(run, tmp_path / "new" / "encoder.pt2", size=(32, 48))
    frames = torch.randn(5, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    tokens = torch.export.load(path).module()(frames)
    truth = load_video_encoder(run).double()(frames.double()[None])[0]
    eager = load_video_encoder(run)(frames[None])[0]
    assert tokens.shape == (5, 6, 32)
    assert (tokens - truth).norm() <= 2 * (eager - truth).norm()


def test_the_file_contains_the_mean_and_std_of_the_encoder(tmp_path: Path) -> None:
    mean, std = (0.5, 0.4, 0.6), (0.5, 0.25, 0.3)
    path = export(write_run(tmp_path / "run", mean=mean, std=std), tmp_path / "encoder.pt2")
    extra = {"preprocessing.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["preprocessing.json"]) == {"mean": list(mean), "std": list(std)}


@pytest.mark.parametrize(
    ("file", "size", "part"), [("encoder.onnx", None, "pt2"), ("encoder.pt2", (32, 40), "40")]
)
def test_bad_input_is_refused_before_the_file_is_written(
    file: str, size: tuple[int, int] | None, part: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=part):
        export(run, tmp_path / file, size=size)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_neither_ends_the_process_nor_leaves_a_file(run: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large") as raised:
        export(run, tmp_path / "encoder.pt2")
    assert raised.value.filename == str(tmp_path / "encoder.pt2")
    assert not any(tmp_path.iterdir())
