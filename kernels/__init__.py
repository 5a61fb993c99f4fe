"""Fused kernels for temporal cycle consistency and semantic separability.

Needs torch alone; with Triton and a CUDA device the fused kernels run, else the eager reference. See
README.md.
"""

from .affinity import affinity_softmax
from .cosettle import CosettleLoss, cosettle_head_loss, cosettle_loss
from .cycle import cycle_consistency_loss
from .separability import separability_loss

__all__ = [
    "CosettleLoss",
    "affinity_softmax",
    "cosettle_head_loss",
    "cosettle_loss",
    "cycle_consistency_loss",
    "separability_loss",
]
