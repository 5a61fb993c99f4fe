"""`fasttrain.train`: what it accepts and returns, in a script, a notebook and a thread."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import write_folders

import fasttrain
from fasttrain.errors import InputError
from fasttrain.stopping import SIGNALS

# Two steps of two pairs.
TINY: dict[str, Any] = {
    "device": "cpu",
    "data": {"image_size": 32, "num_threads": 1},
    "train": {"steps": 2, "batch_size": 2, "accumulate": 1, "precision": "fp32", "tensorboard": False},
    "backbone": {"weights": "random", "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("frames"), [8] * 4)


def test_training_by_name_returns_metrics_and_the_encoder(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice in a process; the second time, the run is complete."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    keys = {**TINY, "train.epochs": 1}
    first = fasttrain.train("dino", source=frames, output=tmp_path, **keys)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert "the learning rate only rises, because train.warmup_epochs=1 is not" in capsys.readouterr().out
    second = fasttrain.train("dino", source=str(frames), output=str(tmp_path), **keys)
    assert first == second
    assert first.results["dino"] == json.loads((tmp_path / "train.json").read_text())
    assert first.folders == {"dino": tmp_path}
    assert first.encoder is first.encoders["dino"]
    video = torch.zeros(1, 2, 3, 32, 32)
    assert torch.equal(first.encoder(video), fasttrain.load_video_encoder(tmp_path)(video))


def test_a_run_of_several_backbones_returns_several_encoders(frames: Path, tmp_path: Path) -> None:
    several, small = TINY.copy(), TINY["backbone"]
    del several["backbone"]
    several |= {"backbones": [{"name": "dino", **small}, {"name": "mae", **small}]}
    trained = fasttrain.train("base", source=frames, output=tmp_path, **several)
    assert list(trained.results) == list(trained.encoders) == ["dino", "mae"]
    assert trained.folders["mae"] == tmp_path / "mae"
    with pytest.raises(InputError, match=r"several encoders \(dino, mae\); choose one"):
        _ = trained.encoder


def test_keys_are_checked_before_anything_is_imported_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'train\.epochz'; did you mean 'train\.epochs'"):
        fasttrain.train("dino", output=tmp_path / "run", train={"epochz": 1})
    assert not (tmp_path / "run").exists()


def test_training_works_in_a_thread(frames: Path, tmp_path: Path) -> None:
    """Python allows signal handlers in the main thread only."""
    results: list[fasttrain.TrainingResult] = []
    thread = threading.Thread(
        target=lambda: results.append(fasttrain.train("dino", source=frames, output=tmp_path, **TINY))
    )
    thread.start()
    thread.join()
    assert results[0].results["dino"]["loss"] > 0


def test_a_second_interrupt_in_a_notebook_leaves_the_process_alive(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one waits for the end of a step, which takes long here."""

    def interrupt_twice(*_: object, **__: object) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        pytest.fail("the step was not interrupted")

    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)  # as IPython does
    monkeypatch.setattr("fasttrain.stopping.SAME_SIGNAL", 0.2)
    monkeypatch.setattr("fasttrain.trainer.Trainer.train_step", interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        fasttrain.train("dino", source=frames, output=tmp_path, **TINY)
    assert "received SIGINT; writing a checkpoint after this step" in capsys.readouterr().out
