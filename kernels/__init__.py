"""Fused kernels for temporal cycle consistency and semantic separability.

Needs torch alone; with Triton and a CUDA device the fused kernels run, else the eager reference. See
README.md.
"""

from .cosettle import CosettleLoss, cosettle_head_loss, cosettle_loss

__all__ = ["CosettleLoss", "cosettle_head_loss", "cosettle_loss"]
