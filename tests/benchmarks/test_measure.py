"""Tests of the helpers that compute, store and draw results. Timings are not checked."""

import concurrent.futures
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Timing, cpu_seconds, in_own_process, interleave, speedup
from benchmarks.plot import plot
from fasttrain.errors import InputError


def test_every_second_round_runs_in_reverse_order() -> None:
    calls: list[str] = []
    contenders: dict[str, Any] = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    interleave(contenders, rounds=2, calls=2)
    assert "".join(calls[4:]) == "aabb" + "bbaa"


def test_speedup_is_computed_per_round() -> None:
    slow, fast = Timing([4.0, 9.0, 2.0], [2.0, 2.0, 2.0]), Timing([2.0, 3.0, 2.0], [1.0, 1.0, 1.0])
    assert speedup(slow, fast) == {"wall": 2.0, "wall_least": 1.0, "wall_most": 3.0, "cpu": 2.0}
    assert fast.result(4, steps=2)["pairs_per_second"] == 4.0
    assert fast.result(4, steps=2)["ms"] == 1000.0


def test_a_separate_process_returns_raises_or_times_out_and_its_cpu_time_counts() -> None:
    begun = cpu_seconds()
    assert in_own_process(sum, range(3_000_000)) == sum(range(3_000_000))
    # Starting an interpreter takes several clock ticks, the resolution of CPU time.
    assert cpu_seconds() - begun > 0.02
    with pytest.raises(ValueError, match="invalid literal"):
        in_own_process(int, "x")
    with pytest.raises(concurrent.futures.TimeoutError):
        in_own_process(time.sleep, 600, seconds=0.1)


def test_a_failing_fasttrain_command_shows_its_errors(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="fasttrain pack failed: 'absent' does not exist"):
        measure.run_fasttrain("pack", "absent", "packed")
    assert "'absent' does not exist" in capfd.readouterr().err


def test_a_failed_measurement_does_not_affect_the_others(tmp_path: Path) -> None:
    def fail(error: Exception) -> dict[str, Any]:
        raise error

    arguments = measure.command_line("step", None).parse_args(["--out", str(tmp_path / "step.json")])
    results = measure.Results("step", arguments, copy_bytes_per_second=1e9)
    results.record("good", lambda: {"ms": 1.0})
    results.record("absent", lambda: fail(ModuleNotFoundError("no av", name="av")))
    results.record("refused", lambda: fail(InputError("fp8 needs Ada")))
    results.record("large", lambda: fail(torch.OutOfMemoryError()), group="cases")
    results.record("small", lambda: {"ms": 2.0}, group="cases")
    results.finish()
    results.record("bad", lambda: fail(RuntimeError("no\nand why")))
    results.deadline = 0
    results.record("late", lambda: {"ms": 1.0})
    content = json.loads(results.path.read_text())
    assert (content["good"], content["cases"]) == ({"ms": 1.0}, {"small": {"ms": 2.0}})
    assert content["skipped"] == {
        "absent": "needs av, which is not installed",
        "refused": "fp8 needs Ada",
        "large": "out of memory",
        "bad": "failed: RuntimeError: no",
        "late": "out of time",
    }
    with pytest.raises(SystemExit, match="bad failed: RuntimeError"):
        results.finish()


@pytest.mark.parametrize("name", ["step-cpu", "loaders-cpu", "propagation-cpu"])
def test_recorded_results_can_be_drawn(tmp_path: Path, name: str) -> None:
    assert plot(Path(shutil.copy(measure.RESULTS / f"{name}.json", tmp_path))).stat().st_size > 0


def test_results_without_timings_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"kernels_compile\.json has no timings to draw"):
        plot(measure.RESULTS / "kernels_compile.json")
