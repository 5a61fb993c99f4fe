"""The tables of speed: both READMEs hold what the committed results say, and a GPU's results read well."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import readme

ROOT = Path(__file__).resolve().parents[2]
MS = {"ms": 0.512, "ms_least": 0.508, "ms_most": 0.531}


def kernels_row(**more: Any) -> dict[str, Any]:
    shape = {"batch": 128, "grid": [14, 14], "channels": 768, "window": 2}
    return {**shape, "out_of_memory": [], "skipped": {}, "failed": {}, **more}


def measured(fused: float) -> dict[str, Any]:
    timings = {
        name: {**MS, "ms": fused * times} for name, times in (("fused", 1), ("compiled", 4), ("eager", 8))
    }
    phases = dict.fromkeys(("forward", "step", "graph"), timings)
    over = {f"{phase}_speedup": {"compiled": 4.0, "eager": 8.0} for phase in phases}
    shares = {f"{phase}_share_of_copy_bandwidth": 0.525 for phase in phases}
    return {**phases, **over, **shares, "peak_bytes": {"fused": 3e8, "compiled": 9e8, "eager": 2e9}}


def test_the_committed_readmes_say_what_the_results_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("README.md", "kernels/README.md")
    (tmp_path / "kernels").mkdir()
    for name in names:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    readme.main()
    for name in names:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()


def test_a_gpus_kernels_are_a_table() -> None:
    large = {"grid": [37, 37], "window": 1}
    alone = {name: {"fused": MS} for name in ("forward", "step")}
    content = {
        "environment": {"device": "a GPU", "versions": {"torch": "2.11.0", "triton": "3.6.0"}},
        "copy_bytes_per_second": 3e12,
        "shapes": [
            kernels_row(**measured(0.512)),
            kernels_row(
                **large,
                **alone,
                step_speedup={},
                step_share_of_copy_bandwidth=0.1,
                peak_bytes={"fused": 2e9},
                out_of_memory=["eager"],
                skipped={"fused, graph": "needs twice 2.0 GB, 3.0 are free"},
            ),
            kernels_row(channels=384, failed={"fused": "RuntimeError: no\nand why"}),
        ],
    }
    text = readme.kernel_lines(content)
    assert "**a GPU**, torch 2.11.0, triton 3.6.0, copy at 3.00 TB/s" in text
    assert (
        "| 128 | 196 | 768 | 2 | 0.512 | 0.512 (0.508 to 0.531) | 8.0x | 4.0x | 52% | 0.30, 0.90, 2.00 |"
        in text
    )
    assert "| 128 | 1369 | 768 | 1 | 0.512 | 0.512 (0.508 to 0.531)* | - | - | 10% | 2.00, -, - |" in text
    assert "| 128 | 196 | 384 | 2 | - | - | - | - | - | - |" in text
    assert "- goal on an H200, milliseconds <= 0.6: 0.512: met (on a GPU)" in text
    assert "128, 1369, 768, 1: eager (out of memory)" in text
    assert "128, 196, 384, 2: fused (RuntimeError: no)." in text


def test_a_gpus_steps_tell_the_share_of_data() -> None:
    timing = {"ms": 28.44, "ms_least": 28.4, "ms_most": 28.61, "pairs_per_second": 4500.0}
    ratio = {"wall": 4.0, "cpu": 2.0}
    content = {
        "environment": {"device": "a GPU", "cpu": {"model": "a CPU"}},
        "backbone": {"embed_dim": None, "depth": None},
        "image_size": 224,
        "batch_size": 128,
        "precision": "bf16",
        "steps": {"precision": "bf16", "timings": {"ours": timing}, "speedup": {"ours over peer": ratio}},
        "switches": {"as it is": timing, "CUDA graph": timing},
        "end_to_end": {
            "timings": {"ours": timing, "peer": timing},
            "speedup": {"ours over peer": ratio},
            "data_overhead": 0.012,
            "kinetics400_hours": 0.074,
        },
        "skipped": {"processes": "needs two GPUs", "scaling": "out of time"},
    }
    text = readme.speed_lines(content)
    assert "| step on resident frames, bf16, ours | 4500 | 28.4 (28.4 to 28.6) | 4.00x, 2.00x |" in text
    assert text.count("step on resident frames, bf16, ours, CUDA graph") == 1
    assert "1.012 times as long as on resident frames" in text
    assert text.endswith("Not measured: processes (needs two GPUs); scaling (out of time).")


def test_a_gpus_other_results_are_a_paragraph_each() -> None:
    environment = {"device": "a GPU"}
    goals = {
        "fastest_decoding": "ours, packed",
        "frames_per_second_on_device": 9123.4,
        "least_waiting": "ours, packed",
        "waiting_share": 0.021,
    }
    setting = {"threads": 16, "compile": "auto"}
    text = readme.loader_lines({"environment": environment, "goals": goals, "setting": setting})
    assert "9,123 frames/s on the device with 16 threads" in text
    assert "2.1% of a training step (compile=auto)" in text
    assert readme.loader_lines({"environment": environment, "goals": {}}).endswith("nothing was measured.")
    case = {
        "case": {"name": "patch 16"},
        "time": {"ours": {"ms": 1.234}, "speedup": {"wall": 7.25}, "agreeing_tokens": 0.9999},
        "memory": {"script_over_ours": 12.0},
    }
    text = readme.propagation_lines({"environment": environment, "cases": [case]})
    assert "patch 16 1.23 ms a frame, 7.2 times the script's speed, 12.0 times less memory, 99.99%" in text
    found = {"sequences": 30, "seconds": 95.4, "seconds_without_pictures": 71.2}
    text = readme.davis_lines(
        {"environment": environment, "backbone": {"embed_dim": 768}, "frames": 67, "data_set": found}
    )
    assert "95 s for the 30 sequences of DAVIS 2017, 71 s without pictures" in text
