"""Frames of unlabelled video -> frame-pair batches on the device."""

from typing import TYPE_CHECKING, Any

from fasttrain.data.index import FrameIndex
from fasttrain.data.sampling import PairSampling
from fasttrain.data.sources import Processes, open_source

if TYPE_CHECKING:
    from fasttrain.data.loader import FramePairs, PairLoader, check_bad_fraction

__all__ = [
    "FrameIndex",
    "FramePairs",
    "PairLoader",
    "PairSampling",
    "Processes",
    "check_bad_fraction",
    "open_source",
]


def __getattr__(name: str) -> Any:
    """What needs DALI, on first use: an evaluation does without, and starts without its import."""
    if name not in ("FramePairs", "PairLoader", "check_bad_fraction"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fasttrain.data import loader

    return getattr(loader, name)
