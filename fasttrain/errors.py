"""The one exception for bad input: a wrong recipe, file, weight or folder.

`__main__` prints its message as one line and exits with code 2. Every other exception is a fault of ours
and keeps its traceback.
"""

from argparse import Namespace


class InputError(ValueError):
    """Bad input from the user. The message names the value, what was expected and what to do."""


class LocalInputError(InputError):
    """Bad input that this process met and the others did not: it prints its line whatever its rank."""


def check_options(arguments: Namespace, **least: float) -> None:
    """Raises InputError where an option of a command is below its least value."""
    for name, minimum in least.items():
        given = getattr(arguments, name, minimum)
        # Of several numbers each must be; NaN is below everything.
        if not (min(given) if isinstance(given, list) else given) >= minimum:
            raise InputError(f"--{name.replace('_', '-')} {given}: expected at least {minimum}")
