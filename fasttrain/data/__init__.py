"""Frames of unlabelled video -> frame-pair batches on the device."""

from fasttrain.data.index import FrameIndex
from fasttrain.data.loader import FramePairs, PairLoader, check_bad_fraction
from fasttrain.data.sampling import PairSampling
from fasttrain.data.sources import Processes, open_source

__all__ = [
    "FrameIndex",
    "FramePairs",
    "PairLoader",
    "PairSampling",
    "Processes",
    "check_bad_fraction",
    "open_source",
]
