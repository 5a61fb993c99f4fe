"""The command line: every command has help; bad input is one line and exit code 2."""

import errno
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttrain.__main__ import COMMANDS, main

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_listed_and_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert f"\n  {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as leave:
        main([name, "--help"])
    assert leave.value.code == 0
    assert f"usage: fasttrain {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([RECIPES / "dinov2.yaml", "train.epochz=3"], "'train.epochs'"),
        ([RECIPES / "quickstart.yaml", "data.source=nowhere"], "nowhere"),
        (["nowhere.yaml"], "cannot read recipe 'nowhere.yaml': No such file or directory; give a YAML file"),
        # Options may stand between words.
        ([RECIPES / "dino.yaml", "--profile", "data.source=nowhere"], "nowhere"),
        (["pack", "nowhere", "--frames", "2", "packed"], "nowhere"),
        # Paths that the system refuses.
        ([RECIPES / "quickstart.yaml", f"data.source={'a' * 300}"], "aaa: file name too long; give another"),
        (["report", ".", "--output", "metrics.jsonl/page.html"], "not a directory; give another"),
        pytest.param(
            [RECIPES / "quickstart.yaml", "device=cuda"],
            "'cuda' was asked for",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    words: list[Path | str],
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fasttrain: ")
    assert error.count("\n") == 1
    assert part in error


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fasttrain.tools.doctor.run", fail)
    assert main(["doctor"]) == 2
    wanted = "the results: no space left on device; make room and run the same command again"
    assert capsys.readouterr().err == f"fasttrain: {wanted}\n"


def test_names_that_the_terminal_cannot_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "ü.html")]) == 0
    assert shown.getvalue().decode("ascii").endswith("?.html\n")


@pytest.mark.parametrize(
    ("absent", "word", "message"),
    [
        ("scipy", "eval", "package 'scipy' is not installed. Install it with: pip install 'fasttrain.eval.'"),
        ("nvidia.dali", "recipes/dino.yaml", "DALI is not installed, .*cuda12.* or 'fasttrain.cuda13.'"),
    ],
)
def test_a_missing_extra_is_one_line(absent: str, word: str, message: str) -> None:
    program = f"import sys; sys.modules[{absent!r}] = None; from fasttrain import __main__ as module; "
    command = [sys.executable, "-c", f"{program} sys.exit(module.main([{word!r}]))"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(f"fasttrain: {message}\n", done.stderr)
