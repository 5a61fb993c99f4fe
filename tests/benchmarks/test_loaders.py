"""Tests that the benchmark of the loaders runs. Timings are not checked."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import loaders
from benchmarks.loaders import BASELINE, OUR_VIDEO, OURS


def test_loaders_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "WIDTH", 64)
    monkeypatch.setattr(loaders, "HEIGHT", 48)
    paths, data = loaders.prepare(tmp_path, None, 2)
    assert data == {"source": "synthetic scenes", "videos": 2, "frames": 80, "loader": "DALI"}
    paths["videos"] = loaders.encode_videos(paths["packed"], tmp_path / "videos")
    setting = {**paths, "batch": 2, "pairs": 4, "rounds": 1, "device": "cpu"}
    # The published loader starts processes, so only the whole program runs it.
    for name in (OURS, OUR_VIDEO):
        assert loaders.measure(name, setting)["pairs_per_cpu_second"] > 0
    assert f"{OURS}, JPEG engine 65%" in loaders.contenders({**setting, "device": "cuda"})
    # The frames of a packed set are unpacked as they are.
    again, data = loaders.prepare(tmp_path / "again", Path(paths["packed"]), 0)
    assert again["packed"] == paths["packed"]
    assert data["source"].endswith("/packed")
    files = [sorted(Path(each["frames"]).rglob("*.jpg")) for each in (paths, again)]
    assert len(files[0]) == 80
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def write_program(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def test_the_use_of_the_engines_is_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}")
    with loaders.engine_use() as use:
        pass
    assert use == {}
    started = tmp_path / "started"
    write_program(
        tmp_path / "nvidia-smi", f"echo '10, 0, [N/A]'; echo '30, 4, [N/A]'; : >{started}; exec /bin/sleep 60"
    )
    with loaders.engine_use() as use:
        while not started.exists():
            time.sleep(0.01)
    assert use == {"gpu_percent": 20, "decoder_percent": 2}


def test_jpeg_engines_are_read_from_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(program))
    for lines, count in (("echo '[INFO] HW decoder available num_hw_engines=7 x=1' >&2", 7), (":", 0)):
        write_program(program, f'test "$DALI_NVIMGCODEC_LOG_LEVEL" = 3 && {lines}')
        assert loaders.jpeg_engines() == count
    write_program(program, "echo 'RuntimeError: no driver' >&2; exit 1")
    with pytest.raises(RuntimeError, match="no driver"):
        loaders.jpeg_engines()


@pytest.mark.slow
def test_the_whole_program_runs(tmp_path: Path) -> None:
    out = tmp_path / "loaders.json"
    loaders.main(["--short", "--device", "cpu", "--pairs", "4", "--batch", "2", "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["skipped"] == {}
    assert content["loaders"].keys() >= {OURS, OUR_VIDEO, BASELINE}
