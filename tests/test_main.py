"""The command line: help texts, and one-line errors with exit code 2 for bad input."""

import errno
import io
import json
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import fasttrain
from fasttrain.__main__ import main
from fasttrain.errors import InputError, LocalInputError, LostContactError, OtherRankError
from fasttrain.options import COMMANDS, TASKS

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_listed_and_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert f"\n  {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_error:
        main([name, "--help"])
    assert exit_error.value.code == 0
    assert f"usage: fasttrain {name}" in capsys.readouterr().out


def test_help_and_version_import_only_the_standard_library() -> None:
    """Torch takes seconds to import, and each package some tenths of a second."""
    words = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    words += [["eval", name, "--help"] for name in TASKS]
    program = f"""
import contextlib, io, sys
before = set(sys.modules)
from fasttrain.__main__ import main
for words in {words}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words)
roots = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*roots - set(sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fasttrain"]


def test_signs_of_life_are_not_printed_into_the_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`fasttrain schema > FILE` must write JSON, however slow the disk is."""

    def import_slowly(name: str) -> ModuleType:
        time.sleep(0.1)
        return import_module(name)

    monkeypatch.setattr("fasttrain.loggers.SILENCE", 0.01)
    monkeypatch.setattr("fasttrain.loggers.importlib", SimpleNamespace(import_module=import_slowly))
    assert main(["schema"]) == 0
    printed = capsys.readouterr()
    assert "properties" in json.loads(printed.out)
    assert "importing PyTorch (0 s so far)" in printed.err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fasttrain {fasttrain.__version__}\n"


def test_recipe_keys_may_be_written_as_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[Any] = []
    monkeypatch.setattr("fasttrain.training.run", passed.append)
    words = ["--train.steps=100", "dino.yaml", "seed=1", "--optimizer.lr", "1e-4", "--prof", "--output=a b"]
    assert main(words) == 0
    assert passed[0].recipe == "dino.yaml"
    # In order, because the last of several values of a key counts.
    assert passed[0].overrides == ["train.steps=100", "seed=1", "optimizer.lr=1e-4", "output=a b"]
    assert passed[0].profile
    hint = "recipe keys are usually written without dashes: train.steps=100 optimizer.lr=1e-4 'output=a b'"
    assert capsys.readouterr().err == f"fasttrain: {hint}\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([RECIPES / "dinov2.yaml", "train.epochz=3"], "'train.epochs'"),
        ([RECIPES / "dinov2.yaml", "--batch-size=3"], "'batch-size'; did you mean 'train.batch_size'?"),
        ([RECIPES / "dinov2.yaml", "--profiles"], "unknown option '--profiles'; did you mean '--profile'?"),
        (["--verison"], "unknown option '--verison'; did you mean '--version'?"),
        ([RECIPES / "quickstart.yaml", "data.source=nowhere"], "nowhere"),
        (
            ["nowhere.yaml"],
            "recipe 'nowhere.yaml' cannot be read: no such file or directory; pass a YAML file",
        ),
        (
            ["trian"],
            "'trian' is neither a command nor a recipe; did you mean 'train'? Recipes are YAML files, or ",
        ),
        (["mine"], "'mine' is neither a command nor a recipe; did you mean 'mine.yaml'?"),
        (
            ["mine.yml"],
            "recipe 'mine.yml' cannot be read: no such file or directory; did you mean 'mine.yaml'?",
        ),
        (["dinov3"], "'dinov3' is neither a command nor a recipe; did you mean 'dinov2'?"),
        (["demo", "--recipe", "quikstart"], "recipe 'quikstart' does not exist; did you mean 'quickstart'?"),
        # By name.
        (["dinov2", "data.source=nowhere"], "nowhere"),
        # Options between positional arguments.
        ([RECIPES / "dino.yaml", "--profile", "data.source=nowhere"], "nowhere"),
        (["pack", "nowhere", "--frames", "2", "packed"], "nowhere"),
        # Paths that the operating system refuses.
        ([RECIPES / "quickstart.yaml", f"data.source={'a' * 300}"], "aaa: file name too long; use another"),
        (
            ["report", ".", "--output", "metrics.jsonl/page.html"],
            "metrics.jsonl/page_figures: not a directory; use another path",
        ),
        pytest.param(
            [RECIPES / "quickstart.yaml", "device=cuda"],
            "device: 'cuda' is not available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)
def test_bad_input_prints_one_line_and_exits_with_code_2(
    words: list[Path | str],
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    # No signs of life, which depend on the speed of the machine.
    monkeypatch.setattr("fasttrain.loggers.SILENCE", 600)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fasttrain: ")
    assert error.count("\n") == 1
    assert part in error


def test_only_the_recipe_is_a_required_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: RECIPE\n")


def test_a_closed_pipe_ends_a_command_without_a_traceback() -> None:
    command = [sys.executable, "-m", "fasttrain", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Error" not in process.stderr.read()


def test_a_full_disk_prints_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fasttrain.tools.doctor.run", fail)
    assert main(["doctor"]) == 2
    expected = "the results: no space left on device; free some space and repeat the command"
    assert capsys.readouterr().err == f"fasttrain: {expected}\n"


def let_doctor_fail(error: Exception, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command `doctor` raise an error, in one of two ranks unless `rank` is empty."""

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("fasttrain.tools.doctor.run", fail)
    if rank:
        names = ("RANK", "LOCAL_RANK", "MASTER_PORT")
        environ = {**dict.fromkeys(names, rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("error", "rank", "line"),
    [
        (LocalInputError("x"), "1", "rank 1: x"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), "1", "rank 1: f: no space left .*"),
        (InputError("x"), "0", "x"),
        (InputError("x"), "1", ""),
        (OtherRankError("rank 1 failed"), "0", "rank 1 failed"),
        (OtherRankError("rank 1 failed"), "1", ""),
        (LostContactError("lost"), "1", "lost"),
    ],
)
def test_errors_in_a_run_of_several_processes_name_the_rank(
    error: Exception,
    rank: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error of all ranks is printed once, by rank 0."""
    let_doctor_fail(error, rank, monkeypatch)
    assert main(["doctor"]) == (1 if isinstance(error, OtherRankError) else 2)
    assert re.fullmatch(f"fasttrain: {line}\n" if line else "", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "rank", "line"),
    [
        (ValueError("x"), "1", "rank 1: failed; its traceback follows"),
        (torch.AcceleratorError("CUDA error"), "", "the GPU or its driver failed; .*nvidia-smi.*"),
    ],
)
def test_a_bug_and_a_failure_of_the_gpu_keep_their_traceback(
    error: Exception,
    rank: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    let_doctor_fail(error, rank, monkeypatch)
    with pytest.raises(type(error)):
        main(["doctor"])
    assert re.fullmatch(f"fasttrain: {line}\n", capsys.readouterr().err)


def test_characters_that_the_terminal_cannot_encode_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii", write_through=True))
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "ü.html")]) == 0
    assert "?.html (" in out.getvalue().decode("ascii")


def test_a_missing_optional_package_prints_one_line() -> None:
    program = "import sys; sys.modules['scipy'] = sys.modules['matplotlib'] = None; "
    # Training needs neither package.
    program += "import fasttrain.trainer; from fasttrain.__main__ import main; "
    words = ["eval", "davis", "--run", "RUN", "--root", "ROOT"]
    command = [sys.executable, "-c", f"{program} sys.exit(main({words}))"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    message = "package 'matplotlib' is not installed. Install it with: pip install 'fasttrain-video.eval.'"
    assert re.fullmatch(f"fasttrain: {message}\n", done.stderr)
