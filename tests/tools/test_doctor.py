"""What the doctor finds, and what it says of what is missing."""

from pathlib import Path

import pytest

from fasttrain.__main__ import main
from fasttrain.tools.doctor import check_machine


def test_doctor_finds_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(component.detected for component in check_machine() if component.required)
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_doctor_looks_for_what_triton_builds_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found() -> str | None:
        return next(component.detected for component in check_machine() if component.name == "C compiler")

    headers, compiler = tmp_path / "Python.h", tmp_path / "clang"
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: str(tmp_path))
    headers.touch()
    assert found() is None
    compiler.touch(mode=0o755)
    assert found() == str(compiler)
    # Triton takes no other than the one that is named.
    monkeypatch.setenv("CC", "no-such-compiler")
    assert found() is None
    monkeypatch.setenv("CC", str(compiler))
    assert found() == str(compiler)
    headers.unlink()
    assert found() is None
