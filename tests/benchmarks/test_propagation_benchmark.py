"""Tests that the research script in the benchmark matches the golden vectors, and that the benchmark runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import propagation as benchmark
from benchmarks.propagation import FRAMES_AT_ONCE, Case, ResearchScript, measure_time
from fasttrain.evaluation import propagate_labels

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["propagation", "propagation_wide"])
def test_script_and_fasttrain_match_the_golden_vectors(shared: Path, name: str) -> None:
    golden = np.load(shared / "golden" / "eval" / f"{name}.npz")
    settings = tuple(golden[key].item() for key in ("context", "radius", "topk", "temperature"))
    features, first = (torch.from_numpy(golden[key]) for key in ("features", "first_labels"))
    script, by_script = ResearchScript(features, CPU, settings), torch.zeros(len(features), *first.shape)
    for start in range(0, len(features), FRAMES_AT_ONCE):
        by_script[0] = first
        script.step(by_script, start)
    by_script[0] = first
    for labels in (by_script, propagate_labels(features, first, *settings)):
        np.testing.assert_allclose(labels.numpy(), golden["labels"], rtol=0, atol=1e-6)


def test_a_case_is_measured() -> None:
    time = measure_time(Case("small", grid=(12, 20), channels=32), CPU, rounds=1)
    assert time["agreeing_tokens"] > 0.999
    assert time["ours"]["ms"] > 0


@pytest.mark.slow
def test_the_whole_program_runs(tmp_path: Path) -> None:
    out = tmp_path / "propagation.json"
    benchmark.main(["--short", "--device", "cpu", "--backbone", "test_vit", "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["skipped"] == {}
    (case,) = content["cases"].values()
    assert case["memory"]["script_over_ours"] > 1
    assert content["davis"]["data_set_seconds"] > 0
