"""What a result says of where it was taken."""

import subprocess

import pytest

from benchmarks import record


def test_a_copy_without_git_names_the_commit_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.delenv("FASTTRAIN_COMMIT", raising=False)
    assert record.environment()["commit"] is None
    monkeypatch.setenv("FASTTRAIN_COMMIT", "0123abc")
    assert record.environment()["commit"] == "0123abc"
