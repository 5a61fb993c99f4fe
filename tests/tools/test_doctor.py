"""The components that `fasttrain doctor` detects."""

import importlib.metadata
from pathlib import Path

import pytest

from fasttrain.__main__ import main
from fasttrain.tools.doctor import check_machine


def test_required_components_are_detected(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(component.detected for component in check_machine() if component.required)
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_dali_and_pyav_are_optional(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "av" or "dali" in name:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    consequences = {component.name: component.consequence for component in check_machine()}
    assert "Pillow and PyTorch load the training data" in consequences["DALI"]
    assert "video files cannot be read or written" in consequences["PyAV"]
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.count("missing") >= 2


def test_the_compiler_that_triton_uses_is_detected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def detected() -> str | None:
        return next(component.detected for component in check_machine() if component.name == "C compiler")

    headers, compiler = tmp_path / "Python.h", tmp_path / "clang"
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: str(tmp_path))
    headers.touch()
    assert detected() is None
    compiler.touch(mode=0o755)
    assert detected() == str(compiler)
    # If CC is set, Triton uses no other compiler.
    monkeypatch.setenv("CC", "no-such-compiler")
    assert detected() is None
    monkeypatch.setenv("CC", str(compiler))
    assert detected() == str(compiler)
    headers.unlink()
    assert detected() is None
