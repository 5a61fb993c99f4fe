"""The benchmark of the loaders: what fails costs no other figure, and its arithmetic; no timing is judged."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from workers import READING, behave

from benchmarks import loaders
from benchmarks.loaders import BASELINE, DECODING, OURS, Job, Setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    places = loaders.prepare(tmp_path_factory.mktemp("loaders"), None, 2)
    return Setting(**places, batch=2, pairs=4, threads=1, device="cpu", steps=2, compile="none", small=True)


def test_a_training_step_is_fed_by_a_loader(setting: Setting) -> None:
    """What only a GPU measures, on a CPU with a small ViT."""
    told = loaders.measure_step(OURS, setting)
    assert told["step_seconds_resident"] > 0
    assert told["step_seconds_fed"] > 0
    assert 0 <= told["waiting_share"] < 1


@pytest.mark.parametrize("name", [OURS, "ours, folders", "ours, video", DECODING])
def test_our_loaders_are_measured(setting: Setting, name: str) -> None:
    told = loaders.measure(name, setting)
    assert told["pairs_per_second"] > 0
    assert told["cpu_seconds_per_pair"] >= 0


def test_a_gpu_measures_every_way_to_decode(setting: Setting) -> None:
    on_gpu = dataclasses.replace(setting, device="cuda")
    wanted = loaders.jobs(on_gpu, short=False)
    assert wanted[:3] == [("loaders", OURS), ("loaders", BASELINE), ("training_step", OURS)]
    for load in ("65%", "100%"):
        assert ("loaders", f"{OURS}, JPEG engine {load}") in wanted
        assert ("training_step", f"{OURS}, JPEG engine {load}") in wanted
    assert ("loaders", "ours, video on the host") in wanted
    shortly = loaders.jobs(on_gpu, short=True)
    assert {name for kind, name in shortly if kind == "training_step"} == set(loaders.SHORTLY_FED)
    assert [job for job in shortly if job[0] == "loaders"] == [job for job in wanted if job[0] == "loaders"]
    theirs, ours = loaders.groups(shortly, on_gpu, short=True)
    assert sorted(ours + theirs) == sorted(shortly)
    assert all(name.startswith("ours") for _, name in ours)
    assert loaders.groups(wanted, on_gpu, short=False) == [[job] for job in wanted]


def test_what_fails_dies_or_hangs_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "PATIENCE", 5.0)
    names = ["good", "fails", "dies", "fine", "hangs", "last"]
    group: list[Job] = [("loaders", name) for name in names]
    told = {
        job[1]: outcome
        for job, outcome in loaders.run_group(group, None, time.monotonic() + 600, worker=behave)
    }
    assert told == {
        "good": READING,
        "fails": "RuntimeError: no",
        "dies": "its process died with exit code 7",
        "fine": READING,
        "hangs": "it hangs",
        "last": READING,
    }


def test_no_time_left_is_said(setting: Setting) -> None:
    group: list[Job] = [("loaders", OURS), ("loaders", BASELINE)]
    told = list(loaders.run_group(group, setting, time.monotonic() - 1))
    assert told == [(group[0], "out of time"), (group[1], "out of time")]


def reading(pairs: float, per_cpu: float) -> dict[str, Any]:
    return {"pairs_per_second": pairs, "cpu_seconds_per_pair": 1 / per_cpu, "pairs_per_cpu_second": per_cpu}


def test_the_goals_are_taken_from_what_is_there() -> None:
    nothing = {"loaders": {}, "training_step": {}, "skipped": {}}
    assert loaders.goals(nothing) == {}
    on_cpu = {OURS: reading(500, 400), BASELINE: reading(90, 80), DECODING: reading(900, 800)}
    assert loaders.goals({**nothing, "loaders": on_cpu}) == {
        "packed_over_four_frames": 5.0,
        "decoding_over_four_frames": 10.0,
    }
    engine = f"{OURS}, JPEG engine 95%"
    on_gpu = {
        "loaders": {OURS: reading(4000, 300), engine: reading(5000, 900), DECODING: reading(9000, 800)},
        "training_step": {OURS: {"waiting_share": 0.02}, engine: {"waiting_share": 0.01}},
        "skipped": {BASELINE: "it hangs"},
    }
    assert loaders.goals(on_gpu) == {
        "fastest_decoding": engine,
        "frames_per_second_on_device": 10_000,
        "least_waiting": engine,
        "waiting_share": 0.01,
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("names", [[OURS, BASELINE], [OURS], []])
def test_the_plot_draws_what_is_there(tmp_path: Path, device: str, names: list[str]) -> None:
    content = {
        "environment": {"device": None, "cpu": {"model": "a CPU"}},
        "frame": "340 x 256 JPEG",
        "setting": {"device": device},
        "loaders": {name: reading(100, 50) for name in names},
    }
    path = tmp_path / "loaders.json"
    path.write_text(json.dumps(content))
    assert loaders.plot(path).stat().st_size > 1000
