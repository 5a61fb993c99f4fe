"""Exceptions for bad input, such as an invalid recipe, checkpoint or folder.

`__main__` prints their message as one line and exits with code 2. Any other exception is a bug in fasttrain
and is shown with its traceback.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

# The name of the distribution in pyproject.toml.
DISTRIBUTION = "fasttrain-video"


class InputError(ValueError):
    """Bad input from the user. The message names the value, what was expected and what to do."""


class LocalInputError(InputError):
    """Bad input that only some ranks encounter. Each of them prints it; rank 0 prints all other errors."""


class OtherRankError(RuntimeError):
    """Another rank failed, so this one cannot continue. Rank 0 prints the message, which names the rank."""


class LostContactError(OtherRankError):
    """The process that keeps the ranks together is gone. Each of the others prints this."""


def pip_install(*extras: str) -> str:
    """Return the command that installs one of the optional dependencies, such as `eval`."""
    return " or ".join(f"pip install '{DISTRIBUTION}[{extra}]'" for extra in extras)


@contextmanager
def needing_eval() -> Iterator[None]:
    """Turn the absence of a package of the extra `eval`, imported within the context, into an InputError."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("matplotlib", "scipy"):
            raise
        raise InputError(
            f"package {package!r} is not installed. Install it with: {pip_install('eval')}"
        ) from error


def check_options(arguments: Namespace, **minimums: float) -> None:
    """Raise InputError if a command-line option is below its minimum."""
    for name, minimum in minimums.items():
        value = getattr(arguments, name, minimum)
        # Options may be lists of numbers. The condition is `not >=` so that NaN is refused, too.
        values = value if isinstance(value, list) else [value]
        if not min(values) >= minimum:
            given = " ".join(map(str, values))
            raise InputError(f"--{name.replace('_', '-')} {given}: expected at least {minimum}")
