"""The research script as the benchmark writes it is the published protocol, and so is ours beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import propagation as benchmark
from benchmarks.propagation import FRAMES_AT_ONCE, Case, ResearchScript, measure_case
from fasttrain.evaluation import propagate_labels

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["propagation", "propagation_wide"])
def test_both_give_the_published_numbers(shared: Path, name: str) -> None:
    golden = np.load(shared / "golden" / "eval" / f"{name}.npz")
    settings = tuple(golden[key].item() for key in ("context", "radius", "topk", "temperature"))
    features, first = (torch.from_numpy(golden[key]) for key in ("features", "first_labels"))
    script, found = ResearchScript(features, CPU, settings), torch.zeros(len(features), *first.shape)
    for start in range(0, len(features), FRAMES_AT_ONCE):
        found[0] = first
        script.step(found, start)
    found[0] = first
    for labels in (found, propagate_labels(features, first, *settings)):
        np.testing.assert_allclose(labels.numpy(), golden["labels"], rtol=0, atol=1e-6)


def test_a_case_is_measured() -> None:
    found = measure_case(Case("small", grid=(12, 20), channels=32), CPU, rounds=1)
    assert found["time"]["agreeing_tokens"] > 0.999
    assert found["time"]["ours"]["ms"] > 0
    assert found["memory"]["script_over_ours"] > 1


@pytest.mark.slow
def test_the_whole_program_runs(tmp_path: Path) -> None:
    out = tmp_path / "propagation.json"
    benchmark.main(["--short", "--device", "cpu", "--backbone", "test_vit", "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["skipped"] == {}
    assert content["cases"].keys() == {"patch 16, 320 x 320"}
    assert content["davis"]["data_set_seconds"] > 0
