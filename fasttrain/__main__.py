"""`fasttrain RECIPE [key=value ...]` trains the recipe's projection, alone or under torchrun.

The run folder (`output`) gets recipe.yaml, projection.safetensors, checkpoints/, metrics.jsonl, tensorboard/,
figures/ and train.json. The same command continues a run that was stopped. `fasttrain COMMAND` does the rest.
"""

# A command is a module with `add_arguments(parser)` and `run(arguments)`; `train` is this one. Bad input
# (`InputError`, or a path that the system refuses) ends in one line on stderr and exit code 2; every other
# exception is ours and keeps its traceback.

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fasttrain.errors import InputError, LocalInputError
from fasttrain.files import os_reason

if TYPE_CHECKING:
    from fasttrain.recipe import Recipe

# Imported when asked for: `--help` of one command does not load torch for all.
COMMANDS = {
    "train": (__name__, "train a projection; the word `train` may be left out"),
    "pack": ("fasttrain.data.pack", "turn videos or frame folders into shards for fast random access"),
    "eval": ("fasttrain.evaluation.command", "measure a run on a benchmark, before and after"),
    "report": ("fasttrain.evaluation.report", "gather runs into one HTML page"),
    "export": ("fasttrain.tools.export", "write a trained video encoder as one self-contained file"),
    "doctor": ("fasttrain.tools.doctor", "say what this machine has, what it lacks and what that costs"),
    "schema": ("fasttrain.tools.schema", "print the JSON schema of recipes, for editors"),
    "demo": ("fasttrain.tools.demo", "train on synthetic video and show what it bought"),
}
USAGE = """\
usage: fasttrain RECIPE [key=value ...]
       fasttrain COMMAND --help
       torchrun --nproc-per-node=8 -m fasttrain RECIPE [key=value ...]

Turn a frozen image encoder into a video encoder.

commands:"""
# Errors of the system that are the user's to mend, and how.
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room and run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR), "give another path"),
    **dict.fromkeys((errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG), "give another path"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "see whether the disk is whole and mounted"),
    errno.EMFILE: "raise the limit of open files with ulimit -n",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot show must not end a run after hours of work.
        sys.stdout.reconfigure(errors="replace")
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, *(f"  {name:<8}{meaning}" for name, (_, meaning) in COMMANDS.items()), sep="\n")
        return 0
    name = words.pop(0) if words[0] in COMMANDS else "train"
    try:
        module = importlib.import_module(COMMANDS[name][0])
        parser = argparse.ArgumentParser(prog=f"fasttrain {name}", description=module.__doc__)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(parser)
        # Options may stand between positional words, which argparse does not offer for subcommands.
        parse = parser.parse_args if name == "eval" else parser.parse_intermixed_args
        module.run(parse(words))
    except InputError as error:
        # All processes meet the same bad input and one line is enough, unless only this one met it.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LocalInputError):
            print(f"fasttrain: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        advice = ADVICE[error.errno]
        print(f"fasttrain: {error.filename or 'the results'}: {os_reason(error)}; {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


# --- the command `train` -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fasttrain.recipe import keys_table

    parser.add_argument("recipe", help="a YAML file, such as recipes/dinov2.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted recipe keys, such as data.source=PATH train.epochs=1",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="record a few steps: output/profile gets a Chrome trace and a summary of the time by span",
    )
    parser.add_argument(
        "--keys", action="version", version=keys_table(), help="print every recipe key as a table and leave"
    )


def run(arguments: argparse.Namespace) -> None:
    from fasttrain.recipe import load_recipe

    train(load_recipe(arguments.recipe, arguments.overrides), profile=arguments.profile)


def train(recipe: Recipe, *, profile: bool = False) -> None:
    """Train in this process and draw the learning curves of what came out."""
    from fasttrain import distributed
    from fasttrain.trainer import Trainer

    with distributed.start(recipe.device) as world:
        trainer = Trainer(recipe, world, profile=profile)
        if trainer.train() and world.is_main:
            try:
                from fasttrain.evaluation.plots import learning_curves
            except InputError as error:
                print(f"no learning curves: {error}")
                return
            for folder in (one.folder for one in trainer.backbone_trainers):
                learning_curves([folder], folder / "figures" / "learning.png")


if __name__ == "__main__":
    sys.exit(main())
