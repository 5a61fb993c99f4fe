"""Tests of the kernel benchmark, on a shape small enough for the interpreter."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels as benchmark
from benchmarks.measure import Results, Timing, command_line
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


def test_graphs_are_measured_without_those_that_cannot_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_graphs(shape: benchmark.Shape, names: list[str], *_: int) -> dict[str, Timing] | str:
        tried.append(list(names))
        return (
            "compiled: RuntimeError: a wait"
            if "compiled" in names
            else {name: Timing([1.0], [1.0]) for name in names}
        )

    tried: list[list[str]] = []
    monkeypatch.setattr(benchmark, "time_graphs", time_graphs)
    monkeypatch.setattr(
        benchmark, "in_own_process", lambda function, *arguments, seconds: function(*arguments)
    )
    args = command_line("kernels", None).parse_args(["--out", str(tmp_path / "kernels.json")])
    results = Results("kernels", args)
    timings = benchmark.measure_graphs(benchmark.PAPER, results, list(benchmark.CONTENDERS), 1, 1)
    assert timings.keys() == {"fused", "eager"}
    assert tried == [["fused", "eager"], ["fused", "compiled", "eager"], ["fused", "eager"]]
    assert results.skipped == {f"{benchmark.PAPER.label}: compiled, graph": "failed: RuntimeError: a wait"}


def test_wrong_gradients_are_not_timed(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = benchmark.Contender.gradient
    monkeypatch.setattr(
        benchmark.Contender, "gradient", lambda self: (2 if self.name == "fused" else 1) * gradient(self)
    )
    args = command_line("kernels", None).parse_args(["--out", str(tmp_path / "kernels.json")])
    results = Results("kernels", args, copy_bytes_per_second=1e9)
    shape = benchmark.Shape(1, (2, 2), 16)
    row = benchmark.measure_shape(shape, results, torch.device(device), ("fused", "eager"), rounds=1, calls=1)
    assert row["step"].keys() == {"eager"}
    assert "gradients differ" in results.skipped[f"{shape.label}: fused"]


def test_memory_traffic_at_the_papers_shape_matches_the_documentation() -> None:
    assert benchmark.moved_bytes(benchmark.PAPER, backward=True) == pytest.approx(1.16e9, rel=0.005)
