"""Metrics logs, and the progress of long tasks on the terminal."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from fasttrain.loggers import MetricsLog, Progress, TensorBoardEvents, say_block, working


def write_picture(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True)
    Image.new("RGB", size).save(path)


def test_records_after_the_last_checkpoint_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(tmp_path, completed_steps=2)
    log.write(3, {"loss": 0.5})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_tensorboard_events_are_not_duplicated_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_picture(tmp_path / "figures/learning.png", (30, 20))
    write_picture(tmp_path / "eval/davis-1/figures/bear.png", (8, 4))
    for completed_steps, steps in ((0, (2, 4, 5)), (4, (5, 6))):
        events = TensorBoardEvents(tmp_path / "tensorboard", completed_steps, f"seed: {completed_steps}")
        log = MetricsLog(tmp_path, completed_steps=completed_steps, viewers=[events])
        for step in steps:
            log.write(step, {"loss": completed_steps + 0.25, "faults": ["a name"]})
        log.add_pictures(steps[-1])
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (2, 0.25), (4, 0.25), (5, 4.25), (6, 4.25),
    ]  # fmt: skip
    assert [(event.step, event.tensor_proto.string_val[0]) for event in events.Tensors("recipe")] == [
        (0, b"```yaml\nseed: 0\n```"), (4, b"```yaml\nseed: 4\n```"),
    ]  # fmt: skip
    assert events.Tags()["images"] == ["learning", "eval/davis-1/bear"]
    (image,) = events.Images("learning")
    assert (image.step, image.width, image.height) == (6, 30, 20)
    assert image.encoded_image_string == (tmp_path / "figures/learning.png").read_bytes()


def test_a_terminal_with_80_columns_shows_count_and_time_left() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    with Progress("step", 46875, done=10, console=console) as progress:
        progress.show("dinov2 [bold] 12.5 pairs/s  loss 1.2500")
        progress.advance(19990)
    # The final state of the bar is followed by a line that restores the cursor.
    last = out.getvalue().splitlines()[-2]
    for part in ("step", "20000/46875", "dinov2 [bold]", "12.5 pairs/s", "loss 1.2500", "left -:--:--"):
        assert part in last


def test_lines_are_printed_without_a_terminal() -> None:
    out = io.StringIO()
    with Progress("video", 10, console=Console(file=out, width=30)) as progress:
        progress.advance()
        assert out.getvalue() == ""
        progress.show("one line that is longer than the terminal")
        progress.advance(status="[2 bad]")
        progress.show("[2 bad]")
    assert [line.partition("  left ")[0] for line in out.getvalue().splitlines()] == [
        "video 1/10  one line that is longer than the terminal",
        "video 2/10  [2 bad]",
    ]


def test_a_long_task_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out)
    monkeypatch.setattr("fasttrain.loggers.SILENCE", 0.01)
    for context in (working("reading [videos]", console), Progress("video", 10, console=console)):
        with context:
            deadline, count = time.monotonic() + 10, out.getvalue().count("\n")
            while out.getvalue().count("\n") < count + 2 and time.monotonic() < deadline:
                time.sleep(0.01)
    lines = out.getvalue().splitlines()
    assert lines[0] == lines[1] == "reading [videos] (0 s so far)"
    assert lines[-2:] == ["video 0/10  left -:--:--"] * 2


def test_short_tasks_and_quiet_consoles_print_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with working("reading", Console(file=out)):
        pass
    monkeypatch.setattr("fasttrain.loggers.SILENCE", 0.01)
    with working("reading", Console(file=out, quiet=True)):
        time.sleep(0.03)
    assert out.getvalue() == ""


def test_blocks_are_aligned_and_keep_paths_intact() -> None:
    out = io.StringIO()
    path = f"/{'long-name/' * 9}"
    say_block("title", {"a": "word " * 20, "path": f"see {path}"}, Console(file=out, width=100))
    assert out.getvalue().splitlines() == [
        "title",
        f"  a     {'word ' * 13}word",
        f"        {'word ' * 5}word",
        "  path  see",
        f"        {path}",
    ]


def test_work_goes_on_after_the_reader_of_its_output_has_exited(tmp_path: Path) -> None:
    done = tmp_path / "done"
    program = f"from fasttrain.loggers import say; say('a'); say('b'); open({str(done)!r}, 'x')"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert done.exists()


def test_disabled_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("step", 10, enabled=False) as progress:
        progress.show("something")
        progress.advance()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["metrics.jsonl", "tfevents"])
def test_a_full_disk_is_named(
    name: str, tmp_path: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttrain.loggers.write_atomically", lambda path, _: path.touch())

    def log() -> None:
        viewers = [TensorBoardEvents(tmp_path, 0, "seed: 0")] if name == "tfevents" else []
        MetricsLog(tmp_path, completed_steps=0, viewers=viewers).write(1, {"loss": 0.5})

    with pytest.raises(OSError, match="File too large") as raised:
        log()
    assert name in raised.value.filename
