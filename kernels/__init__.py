"""Fused kernels for temporal cycle consistency and semantic separability."""
