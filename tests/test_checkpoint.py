"""Checkpoints appear whole or not at all."""

from pathlib import Path

import pytest
import torch

from fasttrain.checkpoint import drop_checkpoints, load_checkpoint, save_checkpoint, saved_steps
from fasttrain.errors import InputError


def test_keeps_the_newest_and_reads_them_back(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"weight": torch.full((2,), float(step))})
    drop_checkpoints(tmp_path, 10, keep=2)
    assert saved_steps(tmp_path) == [2, 10]
    assert torch.equal(load_checkpoint(tmp_path, 10)["weight"], torch.tensor([10.0, 10.0]))
    drop_checkpoints(tmp_path, 2, keep=2)
    assert saved_steps(tmp_path) == [2]


def test_an_interrupted_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, {"x": 1})

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fasttrain.checkpoint.os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, 2, {"x": 2})
    assert saved_steps(tmp_path) == [1]
    assert load_checkpoint(tmp_path, 1) == {"x": 1}


@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_file_is_named(size: int, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, {"weight": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="step_00000003"):
        load_checkpoint(tmp_path, 3)


def test_a_single_damaged_bit_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, {"weight": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"step_00000003.*checksum"):
        load_checkpoint(tmp_path, 3)


def test_no_folder_means_no_steps(tmp_path: Path) -> None:
    assert saved_steps(tmp_path / "nowhere") == []
