"""Fused kernels for temporal cycle consistency and semantic separability."""

from .cosettle import CosettleLoss, cosettle_loss

__all__ = ["CosettleLoss", "cosettle_loss"]
