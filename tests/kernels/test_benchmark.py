"""The kernels' benchmark, on a shape small enough for the interpreter: a GPU hour must not end in a typo."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels as benchmark


def test_a_shape_is_measured_judged_and_plotted(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a contender that fails, which costs no other figures."""

    def no_compiler(*arguments: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    monkeypatch.setattr(benchmark, "PAPER", benchmark.Shape(1, (2, 2), 16))
    row = benchmark.measure_shape(benchmark.PAPER, 1e9, device=torch.device(device), rounds=2, calls=1)
    assert row["failed"] == {"compiled": "RuntimeError: no C++ compiler"}
    assert row["gradient_difference_from_eager"]["fused"] < 0.05
    for phase in ("forward", "step"):
        assert set(row[phase]) == {"fused", "eager"}
        assert row[f"{phase}_speedup"]["eager"] > 0
        assert row[f"{phase}_share_of_copy_bandwidth"] > 0
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"environment": {"device": "none"}, "shapes": [row]}))
    benchmark.plot(path)
    assert path.with_suffix(".png").stat().st_size > 0

    row |= {"graph": {"fused": {"ms": 0.5}}, "graph_speedup": {"eager": 5.0}}
    row["peak_bytes"] = {"fused": 10, "eager": 100}
    lines = benchmark.goals({"environment": {"device": "none"}, "shapes": [row]})
    assert [line.rpartition(": ")[2] for line in lines] == [
        "met (on none)",
        "NOT MET (on none)",
        "met (on none)",
    ]


def test_the_floor_of_the_papers_shape_is_that_of_the_design() -> None:
    assert benchmark.moved_bytes(benchmark.PAPER, backward=True) == pytest.approx(1.16e9, rel=0.005)
