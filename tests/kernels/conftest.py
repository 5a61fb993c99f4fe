"""Enable Triton's interpreter if there is no GPU. This must happen before Triton is imported."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # Tests in other folders may have imported Triton and the kernels already, so import both again. What
    # those tests imported continues to work. Triton's extension module cannot be loaded twice.
    for name in list(sys.modules):
        if name.partition(".")[0] in ("triton", "fasttrain_kernels") and not name.startswith("triton._C"):
            del sys.modules[name]


@pytest.fixture
def device() -> str:
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"
