"""The research script as the benchmark writes it is the published protocol, and so is ours beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import propagation as benchmark
from benchmarks.propagation import Case, make_sequence, measure, run_script
from fasttrain.evaluation import propagate_labels

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["propagation", "propagation_wide"])
def test_both_give_the_published_numbers(shared: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    golden = np.load(shared / "golden" / "eval" / f"{name}.npz")
    settings = {key: golden[key].item() for key in ("context", "radius", "topk", "temperature")}
    for key, value in settings.items():
        monkeypatch.setattr(benchmark, key.upper(), value)
    features, first = (torch.from_numpy(golden[key]) for key in ("features", "first_labels"))
    for labels in (run_script(features, first, CPU), propagate_labels(features, first, **settings)):
        np.testing.assert_allclose(labels.numpy(), golden["labels"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("pixels", [None, 130])
def test_the_timed_frames_agree(pixels: int | None) -> None:
    case = Case(name="small", grid=(12, 20), channels=32, script_pixels=pixels)
    found = measure(case, CPU, rounds=1)
    assert found["agreeing_tokens"] > 0.999
    assert found["ours"]["ms"] > 0


def test_a_whole_sequence_agrees() -> None:
    case = Case(name="small", grid=(6, 9), channels=32, frames=7)
    features, first = make_sequence(case)
    difference = (run_script(features, first, CPU) - propagate_labels(features, first)).abs()
    assert difference.max() < 1e-5
