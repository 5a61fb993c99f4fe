"""Writing, deleting and reading checkpoints."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.checkpoint import drop_checkpoints, load_checkpoint, save_checkpoint, saved_steps
from fasttrain.errors import InputError


def test_the_latest_checkpoints_are_kept_and_read(tmp_path: Path) -> None:
    for steps in (1, 2, 10):
        save_checkpoint(tmp_path, steps, {"projection": {"weight": torch.full((2,), float(steps))}})
    drop_checkpoints(tmp_path, 10, keep=2)
    assert saved_steps(tmp_path) == [2, 10]
    assert torch.equal(load_checkpoint(tmp_path, 10)["projection"]["weight"], torch.tensor([10.0, 10.0]))
    drop_checkpoints(tmp_path, 2, keep=2)
    assert saved_steps(tmp_path) == [2]
    assert saved_steps(tmp_path / "nowhere") == []


def test_the_message_about_a_damaged_file_names_it(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, {"weight": torch.zeros(1000)})
    content = path.read_bytes()
    middle = content.index(bytes(4000)) + 2000
    one_bit = content[:middle] + b"\1" + content[middle + 1 :]
    for damaged, reason in [(b"", ""), (content[:100], ""), (one_bit, "checksum")]:
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"step_00000003.*{reason}"):
            load_checkpoint(tmp_path, 3)


@pytest.mark.parametrize(
    "state",
    [{}, [1], {"projection": {}, "bad_samples": "x"}, {"projection": {}, "data": torch.zeros(2)}],
)
def test_a_file_with_other_contents_is_refused(state: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, state)
    with pytest.raises(InputError, match=r"step_00000001\.pt' cannot be read"):
        load_checkpoint(tmp_path, 1)


def test_a_disk_error_does_not_suggest_to_delete_the_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {})
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        load_checkpoint(tmp_path, 1)


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000))
    with pytest.raises(InputError, match="it is compressed"):
        load_checkpoint(tmp_path, 1)
