"""The one exception for bad input, such as a wrong recipe, file, weight or folder.

`__main__` prints its message as one line and exits with code 2. Every other exception is a bug in fasttrain
and keeps its traceback.
"""

from argparse import Namespace


class InputError(ValueError):
    """Bad input from the user. The message names the value, what was expected and what to do."""


class LocalInputError(InputError):
    """Bad input on a single rank, which prints the message itself. Rank 0 prints all other errors."""


def check_options(arguments: Namespace, **minimums: float) -> None:
    """Raise InputError if a command-line option is below its minimum."""
    for name, minimum in minimums.items():
        value = getattr(arguments, name, minimum)
        # Checks each number of a list. Written as `not >=` so that NaN is refused, too.
        if not (min(value) if isinstance(value, list) else value) >= minimum:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {minimum}")
