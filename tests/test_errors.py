"""Packages that only an extra brings."""

import subprocess
import sys

import pytest

from fasttrain.errors import InputError, needs_extra


def test_a_missing_package_names_the_extras_that_bring_it() -> None:
    expected = r"nowhere is not .*'fasttrain\[cuda12\]' or .*'fasttrain\[cuda13\]'$"
    with pytest.raises(InputError, match=expected), needs_extra("cuda12", "cuda13"):
        import nowhere  # noqa: F401


def test_a_command_without_its_extra_is_one_line() -> None:
    program = (
        "import sys; sys.modules['scipy'] = None; "
        "from fasttrain.__main__ import main; sys.exit(main(['eval']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "fasttrain: the package scipy is not installed; pip install 'fasttrain[eval]'\n"
