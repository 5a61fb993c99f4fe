"""The command line.

Each command has options (see `options`) and a module with the function `run(arguments)`, which is imported
after the options have been parsed. For bad input (an `InputError`, or an OS error in `ADVICE`), one line is
printed to stderr, and the exit code is 2. Any other exception is a bug, so its traceback is shown.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import fasttrain
from fasttrain.errors import InputError, LocalInputError, LostContactError, OtherRankError, needing_eval
from fasttrain.files import os_reason, printable
from fasttrain.launcher import describe_processes
from fasttrain.options import COMMANDS, new_parser

USAGE = """\
usage: fasttrain RECIPE [KEY=VALUE ...]
       fasttrain COMMAND --help
       fasttrain --version
       torchrun --nproc-per-node=8 -m fasttrain RECIPE [KEY=VALUE ...]

Turn a frozen image encoder into a video encoder. RECIPE is a YAML file, or the name of one that ships with
fasttrain, such as dinov2.

commands:"""
# OS errors that the user can resolve, and how.
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space and repeat the command"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR), "use another path"),
    **dict.fromkeys((errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP), "use another path"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check that the disk is healthy and mounted"),
    errno.EMFILE: "raise the limit of open files with ulimit -n",
}
GPU_FAILED = (
    "the GPU or its driver failed; the traceback follows. Repeat the command, which continues from the last "
    "checkpoint. If it fails again, run nvidia-smi, and look for Xid errors in the kernel log (dmesg)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        try:
            return _run_command(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of stdout has exited (`fasttrain schema | head`). fasttrain writes to no other pipe.
        # Python will flush stdout again at exit (see "Note on SIGPIPE" in the documentation of `signal`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run_command(words: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name that the terminal cannot encode must not end a run after hours of work.
        sys.stdout.reconfigure(errors="replace")
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, *(f"  {name:<8}{summary}" for name, (_, summary, _) in COMMANDS.items()), sep="\n")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"fasttrain {fasttrain.__version__}")
        return 0
    try:
        describe_processes()
        name = _take_command(words)
        parser = new_parser(name)
        if name in ("train", "fit", "demo"):
            words = _without_dashes(words, parser)
        # Intermixed parsing allows options between positional arguments. argparse does not support it with
        # subcommands, which `eval` has.
        parse = parser.parse_args if name == "eval" else parser.parse_intermixed_args
        arguments = parse(words)
        from fasttrain.loggers import import_module

        with needing_eval():
            command = import_module(COMMANDS[name].module)
        command.run(arguments)
    except InputError as error:
        # All ranks usually raise the same error, so only rank 0 prints it, unless it is specific to a rank.
        if isinstance(error, LocalInputError):
            _print_error(f"{_rank()}{error}")
        elif os.environ.get("RANK", "0") == "0":
            _print_error(str(error))
        return 2
    except OtherRankError as error:
        if os.environ["RANK"] == "0" or isinstance(error, LostContactError):
            _print_error(str(error))
        return 1
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        advice = ADVICE[error.errno]
        _print_error(f"{_rank()}{error.filename or 'the results'}: {os_reason(error)}; {advice}")
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        torch = sys.modules.get("torch")  # not imported here, because that takes seconds
        if torch is not None and isinstance(error, torch.AcceleratorError):
            _print_error(f"{_rank()}{GPU_FAILED}")
        elif _rank():
            _print_error(f"{_rank()}failed; its traceback follows")
        raise
    return 0


def _print_error(line: str) -> None:
    print(f"fasttrain: {printable(line)}", file=sys.stderr, flush=True)


def _rank() -> str:
    """Return a prefix that names this rank if the run has several."""
    return f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _take_command(words: list[str]) -> str:
    """Remove the command from `words` and return it; return `train` if a recipe or an option comes first."""
    word = words[0]
    if word in COMMANDS:
        return words.pop(0)
    if not word.startswith("-") and Path(word).suffix not in (".yaml", ".yml") and not Path(word).is_file():
        from fasttrain.recipe import shipped_recipes, unknown_name

        if word not in shipped_recipes():
            raise InputError(
                f"{word!r} is neither a command nor a recipe{unknown_name(word, COMMANDS)}. "
                f"Commands: {', '.join(COMMANDS)}"
            )
    return "train"


def _without_dashes(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Turn recipe keys that are written as options, `--KEY=VALUE` or `--KEY VALUE`, into `KEY=VALUE`."""
    result, converted = [], []
    remaining = iter(words)
    for word in remaining:
        option, equals, value = word.partition("=")
        # Like argparse, accept abbreviations of options. `--` is one of all of them.
        if option.startswith("--") and not any(
            own.startswith(option) for own in parser._option_string_actions
        ):
            from fasttrain.recipe import check_key

            key = option[2:]
            try:
                check_key(key)
            except InputError:
                options = [*parser._option_string_actions, "--version"]
                if not (nearest := get_close_matches(option, options, n=1, cutoff=0.8)):
                    raise
                raise InputError(f"unknown option {option!r}; did you mean {nearest[0]!r}?") from None
            word = f"{key}={value if equals else next(remaining, '')}"
            converted.append(shlex.quote(word))
        result.append(word)
    if converted and os.environ.get("RANK", "0") == "0":
        _print_error(f"recipe keys are usually written without dashes: {' '.join(converted)}")
    # The first argument is the recipe. The order of the others matters if a key is repeated.
    return sorted(result, key=lambda word: "=" in word and not word.startswith("-"))


if __name__ == "__main__":
    sys.exit(main())
