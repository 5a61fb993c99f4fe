"""Without a GPU the kernels run under Triton's interpreter, which must be chosen before they are decorated."""

import importlib
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # Another test may have imported the package without the interpreter; what it holds keeps working.
    for name in [name for name in sys.modules if name.partition(".")[0] == "fasttrain_kernels"]:
        del sys.modules[name]
    runtime = importlib.import_module("fasttrain_kernels.runtime")
    # From here on nothing else, such as torch.compile, is to be interpreted.
    del os.environ["TRITON_INTERPRET"]
    if runtime.triton is not None:
        assert runtime.INTERPRETED


@pytest.fixture
def device() -> str:
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"
