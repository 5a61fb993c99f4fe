"""Frames of unlabelled video -> frame-pair batches on the device."""

from typing import TYPE_CHECKING, Any

from fasttrain.data.index import FrameIndex
from fasttrain.data.sources import open_source

if TYPE_CHECKING:
    from fasttrain.data.loader import FramePairs, PairLoader

__all__ = ["FrameIndex", "FramePairs", "PairLoader", "open_source"]


def __getattr__(name: str) -> Any:
    """What needs DALI, on first use: an evaluation does without, and starts without its import."""
    if name not in ("FramePairs", "PairLoader"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fasttrain.data import loader

    return getattr(loader, name)
