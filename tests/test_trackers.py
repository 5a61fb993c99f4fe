"""Experiment trackers, with a stand-in for both packages, and with the packages themselves."""

import json
import os
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from synthetic import write_folders

from fasttrain.__main__ import main
from fasttrain.errors import InputError
from fasttrain.loggers import MetricsLog
from fasttrain.trackers import Tracker, check_installed

PACKAGES = ["trackio", "wandb"]


class StandIn:
    """The interface that trackio and wandb have in common. `runs` has the rows of each run, by its name."""

    def __init__(self) -> None:
        self.settings: list[dict[str, Any]] = []
        self.runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}

    def init(self, **settings: Any) -> SimpleNamespace:
        self.settings.append(settings)
        rows = self.runs.setdefault(settings["name"], [])
        following = max((step + 1 for step, _ in rows), default=0)
        return SimpleNamespace(
            log=lambda values, step: rows.append((step, values)),
            finish=lambda **options: rows.append((-1, options)),
            offline=False,
            starting_step=following,
            _next_step=following,
        )

    def Image(self, path: str) -> Image.Image:
        return Image.open(path)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, stand_in)
        monkeypatch.delenv(f"{package.upper()}_PROJECT", raising=False)
    monkeypatch.setattr("fasttrain.trainer.check_installed", lambda package: None)
    return stand_in


def open_log(
    package: str, folder: Path, completed_steps: int = 0, lines: list[str] | None = None
) -> MetricsLog:
    tracker = Tracker(
        package,
        folder,
        config={"seed": 3},
        completed_steps=completed_steps,
        group=None,
        say=[].append if lines is None else lines.append,
    )
    return MetricsLog(folder, completed_steps=completed_steps, viewers=[tracker])


def train_in_two_parts(package: str, folder: Path) -> Iterator[None]:
    """Log as a run that is killed after step 5 and resumes after its checkpoint at step 4."""
    for completed_steps, steps in ((0, (2, 4, 5)), (4, (5, 6))):
        log = open_log(package, folder, completed_steps)
        for step in steps:
            log.write(step, {"loss": step / 4, "faults": ["a name"]})
        log.close()
        yield


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_a_resumed_run_neither_repeats_nor_loses_steps(
    package: str, lost: int, stand_in: StandIn, tmp_path: Path
) -> None:
    parts = train_in_two_parts(package, tmp_path / "dino")
    next(parts)
    (rows,) = stand_in.runs.values()
    # The tracker was killed, too, and has not sent its last rows.
    del rows[3 - lost :]
    next(parts)
    assert [row for row in rows if row[0] >= 0] == [(step, {"loss": step / 4}) for step in (2, 4, 5, 6)]
    first, second = stand_in.settings
    assert first == second
    assert first["project"] == "fasttrain"
    assert first["config"] == {"seed": 3}
    assert first["resume"] == "allow"
    assert first["name"].startswith("dino")


def test_a_tracker_that_is_added_to_a_run_gets_its_earlier_metrics(stand_in: StandIn, tmp_path: Path) -> None:
    list(train_in_two_parts("wandb", tmp_path / "dino"))
    open_log("trackio", tmp_path / "dino", 6)
    trackio, wandb = (stand_in.runs[name] for name in sorted(stand_in.runs, key=len, reverse=True))
    assert trackio == [row for row in wandb if row[0] >= 0]


def test_runs_of_the_same_name_stay_apart(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for package in PACKAGES:
        for parent in ("one", "two"):
            open_log(package, tmp_path / parent / "dino")
    assert {settings["project"] for settings in stand_in.settings} == {"mine"}
    identities = [settings.get("id", settings["name"]) for settings in stand_in.settings]
    assert len(set(identities)) == 4


def test_a_failure_at_the_start_ends_the_command_and_later_ones_do_not(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    log = open_log("wandb", tmp_path, lines=lines)
    # Neither a number nor a picture can be logged, nor the run finished.
    monkeypatch.setattr(log._viewers[0], "_run", SimpleNamespace(log=fail, finish=fail))
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 1.0})
    log.close()
    assert len(lines) == 1
    assert lines[0].startswith("warning: wandb does not get all metrics and pictures (no login)")
    monkeypatch.setattr(stand_in, "init", fail)
    with pytest.raises(InputError, match=r"^train.tracker: wandb cannot be started \(no login\)"):
        open_log("wandb", tmp_path / "other")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    # As after an earlier run in this folder.
    (tmp_path / "wandb").mkdir()
    with pytest.raises(InputError, match=r"'wandb' is not installed.*\[wandb\]"):
        check_installed("wandb")


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("no\nlogin")


SIZES = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}


def train(videos: Path, output: Path, *overrides: str, names: tuple[str, ...] = ()) -> int:
    backbones = [{"name": name, **SIZES} for name in names or ("dino",)]
    encoders = f"backbones={json.dumps(backbones)}" if names else f"backbone={json.dumps(backbones[0])}"
    return main(
        [
            *("recipes/base.yaml", encoders),
            *("device=cpu", "data.image_size=32", f"data.source={videos}", f"output={output}"),
            *("train.accumulate=1", "train.steps=2", "train.batch_size=2", "train.precision=fp32"),
            *("train.log_every=1", "train.tensorboard=false", "data.num_threads=1", "data.pairs_per_video=4"),
            *overrides,
        ]
    )


def test_several_backbones_have_a_run_each(stand_in: StandIn, tmp_path: Path) -> None:
    videos, output = write_folders(tmp_path / "videos", [8] * 4), tmp_path / "all"
    assert train(videos, output, "eval.every=0", "train.tracker=wandb", names=("dino", "mae")) == 0
    assert [settings["group"] for settings in stand_in.settings] == ["all", "all"]
    assert list(stand_in.runs) == ["dino", "mae"]
    for name, rows in stand_in.runs.items():
        assert [step for step, _ in rows] == [1, 2, 2, -1]
        records = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        assert [{"step": step, **values} for step, values in rows[:2]] == records
        assert list(rows[2][1]) == ["learning"]
    assert stand_in.settings[0]["config"]["backbone"]["name"] == "dino"


@pytest.mark.parametrize(("package", "options"), [("wandb", {"exit_code": 1}), ("trackio", {})])
def test_a_run_that_fails_is_not_recorded_as_finished(
    package: str, options: dict[str, int], stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = write_folders(tmp_path / "videos", [8] * 4)
    monkeypatch.setattr("fasttrain.trainer.BackboneTrainer.update", fail)
    with pytest.raises(RuntimeError, match="no\nlogin"):
        train(videos, tmp_path / "run", f"train.tracker={package}")
    (rows,) = stand_in.runs.values()
    assert rows[-1] == (-1, options)


# --- the packages themselves ---


def wandb_rows(path: Path) -> Iterator[tuple[int, set[str]]]:
    """Yield step and names of each row in a file of wandb, which is a log in the format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        # The only or the last part of a record.
        if kind in (1, 4):
            parsed, record = Record.FromString(record), b""
            if parsed.WhichOneof("record_type") == "history":
                yield (
                    parsed.history.step.num,
                    {item.key or item.nested_key[0] for item in parsed.history.item},
                )


@pytest.mark.slow
def test_wandb_writes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in train_in_two_parts("wandb", tmp_path):
        # wandb names its folders after the second in which they were created.
        time.sleep(1)
    log = open_log("wandb", tmp_path, 6)
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "figures/learning.png")
    log.add_pictures(7)
    log.close()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=os.path.getctime)
    rows = [row for file in files for row in wandb_rows(file)]
    assert [step for step, _ in rows] == [2, 4, 5, 6, 7]
    assert all("loss" in names for _, names in rows[:4])
    assert "learning" in rows[4][1]


@pytest.mark.slow
def test_trackio_writes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    list(train_in_two_parts("trackio", tmp_path / "dino"))
    with sqlite3.connect(tmp_path / "trackio/fasttrain.db") as database:
        rows = database.execute("SELECT step, run_name FROM metrics ORDER BY id").fetchall()
    assert [step for step, _ in rows] == [2, 4, 5, 6]
    assert len({name for _, name in rows}) == 1
