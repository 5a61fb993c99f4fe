"""Tests of the kernel benchmark, on a shape small enough for the interpreter."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels as benchmark
from benchmarks.measure import Results, command_line
from benchmarks.plot import plot


def test_a_shape_is_measured_and_plotted(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contender that fails does not affect the results of the others."""

    def no_compiler(*arguments: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    shape = benchmark.Shape(1, (2, 2), 16)
    args = command_line("kernels", None).parse_args(["--out", str(tmp_path / "kernels.json")])
    results = Results("kernels", args, copy_bytes_per_second=1e9)
    results.record(
        shape.label,
        lambda: benchmark.measure_shape(shape, results, torch.device(device), rounds=2, calls=1),
    )
    assert results.skipped == {f"{shape.label}: compiled": "failed: RuntimeError: no C++ compiler"}
    row = results.content[shape.label]
    assert row["gradient_difference_from_eager"]["fused"] < 0.05
    for phase in ("forward", "step"):
        assert set(row[phase]) == {"fused", "eager"}
        assert row[f"{phase}_speedup"]["eager"] > 0
        assert row[f"{phase}_share_of_copy_bandwidth"] > 0
    assert plot(results.path).stat().st_size > 0


def test_memory_traffic_at_the_papers_shape_matches_the_documentation() -> None:
    assert benchmark.moved_bytes(benchmark.PAPER, backward=True) == pytest.approx(1.16e9, rel=0.005)
