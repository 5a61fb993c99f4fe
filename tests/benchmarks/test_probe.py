"""Tests that the probe of the encoder's operations runs. Timings are not checked."""

import json
from pathlib import Path

import pytest

from benchmarks import probe


@pytest.mark.slow
def test_every_section_runs(tmp_path: Path) -> None:
    out = tmp_path / "probe.json"
    probe.main(["--device", "cpu", "--out", str(out)])
    content = json.loads(out.read_text())
    assert content["skipped"] == {"streams": "streams: needs a GPU"}
    assert content["matrices"].keys() >= {f"{name}, bf16" for name in ("qkv", "proj", "fc1", "fc2")}
    assert content["attention"]["math"]["tflops"] > 0
    assert content["passes"].keys() >= {"GELU", "LayerNorm", "residual, then LayerNorm", "copy"}
    # What bf16 rounds is 2^-9 of a value; the tanh form is off by less.
    assert content["activation"]["difference_from_exact"]["tanh form"] == pytest.approx(0, abs=0.004)
