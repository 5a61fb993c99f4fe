"""The export of a video encoder to a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from synthetic import write_run

from fasttrain.errors import InputError
from fasttrain.families import FAMILIES
from fasttrain.projection import PROJECTION_FILE, Head, Projection
from fasttrain.tools.export import export
from fasttrain.video_encoder import load_video_encoder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    colours = {"mean": (0.5, 0.4, 0.6), "std": (0.5, 0.25, 0.3)}
    return write_run(tmp_path_factory.mktemp("run"), name="dinov2", image_size=32, **colours)


Compute = Callable[[torch.Tensor], torch.Tensor]


def load(path: Path) -> tuple[Compute, dict[str, Any]]:
    """Load an exported file as its users do; return a function from frames to tokens, and mean and std."""
    if path.suffix == ".pt2":
        extra = {"preprocessing.json": ""}
        program = torch.export.load(path, extra_files=extra).module()
        return program, json.loads(extra["preprocessing.json"])
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    return (
        lambda frames: torch.from_numpy(session.run(["tokens"], {"frames": frames.numpy()})[0]),
        {name: json.loads(value) for name, value in metadata.items()},
    )


def check(run: Path, file: Path, size: tuple[int, int]) -> float:
    """Export a run, compare the tokens of several numbers of frames, and return the largest deviation."""
    compute, preprocessing = load(export(run, file, size=size))
    encoder, exact = load_video_encoder(run), load_video_encoder(run).double()
    assert preprocessing == {"mean": list(encoder.mean), "std": list(encoder.std)}
    deviations = []
    for count in (1, 5):
        frames = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))
        tokens, eager, truth = compute(frames), encoder(frames[None])[0], exact(frames.double()[None])[0]
        assert tokens.shape == truth.shape
        assert (tokens - truth).norm() <= 2 * (eager - truth).norm()
        deviations.append(float((tokens - eager).abs().max()))
    return max(deviations)


@pytest.mark.parametrize(("suffix", "head"), [(".pt2", "linear"), (".onnx", "residual")])
def test_the_file_computes_the_encoders_tokens(
    suffix: str, head: Head, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if head != "linear":
        projection = Projection(32, head=head)
        for parameter in projection.parameters():
            torch.nn.init.uniform_(parameter, -1, 1)
        metadata = Projection.find(str(run)).metadata
        run = tmp_path / "run"
        projection.save(run / PROJECTION_FILE, metadata)
    check(run, tmp_path / "new" / f"encoder{suffix}", size=(32, 48))
    assert capfd.readouterr() == ("", "")


# Small timm models keep their own patch sizes. The last three have rotary positions.
TIMM = {
    "test_vit": 16,
    "naflexvit_base_patch16_gap": 16,
    "vit_small_patch16_dinov3": 16,
    "eva02_tiny_patch14_224": 14,
    "vit_pe_core_small_patch16_384": 16,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *TIMM])
def test_every_family_is_exported_to_onnx(name: str, tmp_path: Path) -> None:
    patch_size = TIMM.get(name, 8)
    sizes = {"patch_size": None, "embed_dim": None, "num_heads": None} if name in TIMM else {"patch_size": 8}
    run = write_run(tmp_path / "run", name=name, image_size=2 * patch_size, depth=2, **sizes)
    deviation = check(run, tmp_path / "encoder.onnx", size=(2 * patch_size, 3 * patch_size))
    print(f"{name}: largest deviation {deviation:.1e}")


def test_a_file_that_computes_other_tokens_does_not_get_its_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "encoder.pt2"
    path.write_text("an earlier file")
    monkeypatch.setattr("fasttrain.tools.export.MAX_ERROR", 0.0)
    with pytest.raises(InputError, match="the file was not kept"):
        export(run, path)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["an earlier file"]


def test_an_encoder_that_is_too_large_for_onnx_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttrain.tools.export.MAX_ONNX_BYTES", 1000)
    with pytest.raises(InputError, match=r"export it to a \.pt2 file"):
        export(run, tmp_path / "encoder.onnx")


def test_a_missing_package_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(InputError, match=r"'onnxscript' is not installed.*\[onnx\]"):
        export(run, tmp_path / "encoder.onnx")


@pytest.mark.parametrize(
    ("file", "size", "part"), [("encoder.pt", None, "onnx"), ("encoder.pt2", (32, 40), "40")]
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
