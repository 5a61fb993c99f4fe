"""The command line: `python -m fasttrain RECIPE [key=value ...]`, or a subcommand.

A subcommand is a module with `add_arguments(parser)` and `run(arguments)`. Bad input (`InputError`, or a
place that the system keeps from us) ends in one line on stderr and exit code 2; every other exception is ours
and keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from fasttrain.distributed import rank_from_environment
from fasttrain.errors import InputError, LocalInputError
from fasttrain.files import os_reason

# Imported when asked for: `--help` of one command does not load torch for all.
COMMANDS = {
    "train": ("fasttrain.train", "train a projection; the word `train` may be left out"),
    "pack": ("fasttrain.data.pack", "turn videos or frame folders into shards for fast random access"),
    "eval": ("fasttrain.evaluation.command", "measure a run on a benchmark, before and after"),
    "report": ("fasttrain.evaluation.report", "gather runs into one HTML page"),
    "export": ("fasttrain.tools.export", "write a trained video encoder as one self-contained file"),
    "doctor": ("fasttrain.tools.doctor", "say what this machine has, what it lacks and what that costs"),
    "schema": ("fasttrain.tools.schema", "print the JSON schema of recipes, for editors"),
    "demo": ("fasttrain.tools.demo", "train on made-up video and show what it bought"),
}
# What the system says of a place that was named badly, or may not be written.
BAD_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
# Of these, a write has no name of a file with it.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot show is no reason to fail at the end of the work.
        sys.stdout.reconfigure(errors="replace")
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name = words.pop(0) if words[0] in COMMANDS else "train"
    try:
        module = importlib.import_module(COMMANDS[name][0])
        parser = argparse.ArgumentParser(prog=f"fasttrain {name}", description=module.__doc__)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(parser)
        # Options may stand between positional words, except where argparse does not mix: subcommands, `--`.
        plain = name == "eval" or "--" in words
        arguments = parser.parse_args(words) if plain else parser.parse_intermixed_args(words)
        if name == "train":
            _refuse_mistyped_command(arguments.recipe)
        module.run(arguments)
    except InputError as error:
        # All processes meet the same bad input and one line is enough, unless only this one met it.
        if rank_from_environment() == 0 or isinstance(error, LocalInputError):
            print(f"fasttrain: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno in NO_ROOM:
            place = f"at {error.filename}" if error.filename else "where the results are written"
            print(
                f"fasttrain: {os_reason(error)} {place}; make room and run the same command again",
                file=sys.stderr,
            )
            return 2
        if error.errno not in BAD_PLACE or error.filename is None:
            raise
        print(f"fasttrain: cannot use {error.filename}: {error.strerror}; give another", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        (
            "usage: fasttrain RECIPE [key=value ...]",
            "       fasttrain COMMAND --help",
            "       torchrun --nproc-per-node=8 -m fasttrain RECIPE [key=value ...]",
            "",
            "Turn a frozen image encoder into a video encoder.",
            "",
            "commands:",
            *lines,
        )
    )


def _refuse_mistyped_command(word: str) -> None:
    """`fasttrain evla` means a command, not a recipe of that name."""
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    if close and not Path(word).exists() and Path(word).suffix == "":
        print(
            f"fasttrain: {word!r} is neither a recipe nor a command; did you mean {close[0]!r}?",
            file=sys.stderr,
        )
        raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
