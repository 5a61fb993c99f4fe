"""The kernels' benchmark, on a shape small enough for the interpreter: a GPU hour must not end in a typo."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels as benchmark

TINY = benchmark.Shape(1, (2, 2), 16)


@pytest.fixture
def payload(device: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    # torch.compile of eager has nothing to show here, and takes its time.
    monkeypatch.setattr(torch, "compile", lambda function: function)
    place = torch.device(device)
    shapes = [benchmark.measure_shape(TINY, 1e9, device=place, rounds=2, calls=1)]
    return {"environment": {"device": "none"}, "shapes": shapes}


def test_a_shape_is_measured_plotted_and_judged(
    payload: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = payload["shapes"]
    assert row["out_of_memory"] == []
    for phase in ("forward", "step"):
        assert set(row[phase]) == {"fused", "eager", "compiled"}
        assert set(row[f"{phase}_speedup"]) == {"eager", "compiled"}
        assert row[f"{phase}_share_of_copy_bandwidth"] > 0
    assert row["gradient_difference_from_eager"]["fused"] < 0.05
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(payload))
    benchmark.plot(path)
    assert path.with_suffix(".png").stat().st_size > 0

    read = json.loads(path.read_text())
    assert all("not measured" in line for line in benchmark.goals(read))
    monkeypatch.setattr(benchmark, "PAPER", TINY)
    row["graph"] = {"fused": {"ms": 0.5}}
    row["graph_speedup"] = {"eager": 5.0, "compiled": 4.0}
    row["peak_bytes"] = {"fused": 10, "eager": 100}
    assert [line.partition(": ")[2] for line in benchmark.goals(payload)] == [
        "0.5: met (on none)",
        "5: NOT MET (on none)",
        "4: met (on none)",
        "0.1: met (on none)",
    ]


def test_a_contender_out_of_memory_is_left_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = benchmark.Contender.step

    def small(self: benchmark.Contender, frozen: torch.Tensor) -> None:
        if self.backend == "eager":
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, frozen)

    monkeypatch.setattr(benchmark.Contender, "step", small)
    row = benchmark.measure_shape(TINY, 1e9, device=torch.device(device), compiled=False, rounds=1, calls=1)
    assert row["out_of_memory"] == ["eager"]
    assert set(row["step"]) == {"fused"}
    shapes = [{**row, "batch": 128, "grid": [37, 37]}]
    lines = benchmark.goals({"environment": {"device": None}, "shapes": shapes})
    assert lines[-1] == "goal, N = 1369 at B = 128 runs: met (on None)"


def test_a_contender_that_fails_costs_no_other_figures(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*arguments: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    row = benchmark.measure_shape(TINY, 1e9, device=torch.device(device), rounds=1, calls=1)
    assert row["failed"]["compiled"] == "RuntimeError: no C++ compiler"
    assert set(row["step"]) == {"fused", "eager"}


def test_a_graph_that_cannot_be_recorded_costs_no_other_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

    def record(step: Callable[[], None], inputs: tuple) -> str:
        if step.func.__self__.backend == "eager":
            raise RuntimeError("operation not permitted when stream is capturing")
        return "graph"

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 100))
    monkeypatch.setattr(benchmark, "CapturedCall", record)
    place = torch.device("cpu")
    contenders = {
        name: benchmark.Contender(TINY, name, compiled=False, device=place) for name in ("triton", "eager")
    }
    row: dict = {"skipped": {}, "failed": {}}
    graphs = benchmark.captured(contenders, OnGpu(), {"triton": 10, "eager": 20}, row)
    assert graphs == {"triton": "graph"}
    assert "stream is capturing" in row["failed"]["eager, graph"]
    assert row["skipped"] == {}
    # One too large for the memory costs the others nothing either.
    graphs = benchmark.captured(contenders, OnGpu(), {"triton": 10, "eager": 60}, row)
    assert graphs == {"triton": "graph"}
    assert list(row["skipped"]) == ["eager, graph"]


def test_wrong_gradients_end_the_benchmark(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = benchmark.Contender.step

    def wrong(self: benchmark.Contender, frozen: torch.Tensor) -> None:
        step(self, frozen)
        if self.backend == "triton":
            self.linear.weight.grad += 1

    monkeypatch.setattr(benchmark.Contender, "step", wrong)
    with pytest.raises(RuntimeError, match="the fused gradients differ from eager's by"):
        benchmark.measure_shape(TINY, 1e9, device=torch.device(device), compiled=False, rounds=1, calls=1)


def test_a_shape_that_fails_costs_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole program, as `make gpu-check` runs it."""
    broken, fine = benchmark.Shape(128, (37, 37), 16), benchmark.Shape(2, (2, 2), 16)
    timing = {"ms": 1.0, "ms_least": 1.0, "ms_most": 1.0}

    def measure(shape: benchmark.Shape, *arguments: object, **options: object) -> dict:
        if shape == broken:
            raise RuntimeError("an illegal memory access")
        return {**shape._asdict(), "out_of_memory": [], "failed": {}, "step": {"fused": timing}}

    for name, value in {
        "measure_shape": measure,
        "copy_ceiling": lambda device: 1e12,
        "environment": lambda: {"device": "a GPU"},
        "SHORT": [broken, fine],
    }.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["kernels", "--short", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"B 128, N 1369, D 16, window 2: fused: RuntimeError: an illegal"):
        benchmark.main()
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert ["step" in row for row in written["shapes"]] == [False, True]
    assert benchmark.goals(written)[-1] == "goal, N = 1369 at B = 128 runs: NOT MET (on a GPU)"
    assert (tmp_path / "kernels.png").stat().st_size > 0


def test_the_floor_of_the_papers_shape_is_that_of_the_design() -> None:
    assert benchmark.moved_bytes(benchmark.PAPER, backward=True) == pytest.approx(1.16e9, rel=0.005)
