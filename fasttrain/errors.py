"""The one exception for bad input: a wrong recipe, file, weight or folder.

`__main__` prints its message as one line and exits with code 2. Every other exception is a fault of ours
and keeps its traceback.
"""


class InputError(ValueError):
    """Bad input from the user. The message names the value, what was expected and what to do."""


class LocalInputError(InputError):
    """Bad input that this process met and the others did not: it prints its line whatever its rank."""
