"""The distributions: their names, versions and files outside Python."""

import sys
from pathlib import Path

import pytest

import fasttrain
from fasttrain.errors import DISTRIBUTION, pip_install

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]


def project(path: str) -> dict[str, object]:
    return tomllib.loads((ROOT / path).read_text())["project"]


def test_messages_name_the_distribution() -> None:
    assert project("pyproject.toml")["name"] == DISTRIBUTION
    assert pip_install("cuda12", "eval") == (
        "pip install 'fasttrain-video[cuda12]' or pip install 'fasttrain-video[eval]'"
    )


def test_the_kernels_have_the_version_of_fasttrain() -> None:
    assert project("kernels/pyproject.toml")["version"] == fasttrain.__version__


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ImportError, match="install it in WSL 2"):
        exec(compile((ROOT / "fasttrain/__init__.py").read_text(), "fasttrain/__init__.py", "exec"), {})
