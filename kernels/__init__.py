"""Fused Triton kernels for the Co-Settle objective: temporal cycle consistency and semantic separability.

If Triton or a CUDA device is missing, an eager reference in plain PyTorch computes the same losses.
See README.md.
"""

from .affinity import affinity_softmax
from .cosettle import CosettleLoss, cosettle_head_loss, cosettle_loss
from .cycle import cycle_consistency_loss
from .linear import cosettle_linear_loss
from .reference import CosettleOutput
from .separability import separability_loss

__all__ = [
    "CosettleLoss",
    "CosettleOutput",
    "affinity_softmax",
    "cosettle_head_loss",
    "cosettle_linear_loss",
    "cosettle_loss",
    "cycle_consistency_loss",
    "separability_loss",
]
