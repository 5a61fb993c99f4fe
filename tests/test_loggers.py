"""Meters, logs and the progress report."""

import io
import json
import math
from pathlib import Path

import torch
from rich.console import Console

from fasttrain.distributed import World
from fasttrain.loggers import Meter, MetricsLog, ProgressReport

CPU = torch.device("cpu")
WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)


def scalars(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


def test_meter_reads_means_and_starts_again() -> None:
    meter = Meter(CPU)
    meter.add(0, *scalars(1, 2, 3))
    meter.add(1, *scalars(3, 4, 5))
    assert meter.read(WORLD) == ({"loss": 2, "cycle": 3, "separability": 4}, None)
    meter.add(2, *scalars(7, 7, 7))
    assert meter.read(WORLD) == ({"loss": 7, "cycle": 7, "separability": 7}, None)


def test_meter_remembers_the_first_bad_step() -> None:
    meter = Meter(CPU)
    for step, loss in enumerate((1.0, math.nan, 1.0, math.inf)):
        meter.add(step, *scalars(loss, 0, 0))
    assert meter.read(WORLD)[1] == 1


def test_meter_finds_a_bad_first_step() -> None:
    meter = Meter(CPU)
    meter.add(0, *scalars(math.nan, 0, 0))
    assert meter.read(WORLD)[1] == 0


def test_log_drops_what_came_after_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(tmp_path, first_step=2, tensorboard=False)
    log.write(3, {"loss": 0.5})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_tensorboard_gets_the_numbers_and_after_a_resume_no_step_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, steps in ((0, (2, 4, 5)), (4, (5, 6))):
        log = MetricsLog(tmp_path, first_step=first_step, tensorboard=True)
        for step in steps:
            log.write(step, {"loss": first_step + 0.25, "faults": ["a name"]})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (2, 0.25), (4, 0.25), (5, 4.25), (6, 4.25),
    ]  # fmt: skip


RECORD = {
    "pairs_per_second": 12.5,
    "loss": 1.25,
    "cycle": 1.0,
    "separability": 0.5,
    "cycle_accuracy": 0.75,
    "lr": 1e-4,
}


def test_a_terminal_of_80_columns_shows_step_and_time_left() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    report = ProgressReport(console, total_steps=46875, first_step=0, enabled=True)
    report.show(20000, "dinov2", RECORD, 65.0)
    report.advance(20000)
    report.close()
    # The last state of the bar, then the cursor comes back.
    last = out.getvalue().splitlines()[-2]
    for part in ("20000/46875", "dinov2", "12.5 pairs/s", "loss 1.2500", "left -:--:--"):
        assert part in last


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    report = ProgressReport(Console(file=out, width=300), total_steps=10, first_step=0, enabled=True)
    report.show(5, "dino", RECORD, 30 * 3600 + 65.0)
    report.close()
    line = out.getvalue()
    for part in ("dino", "5/10", "12.5 pairs/s", "1.2500", "0.750", "1.00e-04", "left 30:01:05"):
        assert part in line


def test_other_processes_are_silent() -> None:
    out = io.StringIO()
    report = ProgressReport(Console(file=out), total_steps=10, first_step=0, enabled=False)
    report.message("something")
    report.close()
    assert out.getvalue() == ""
