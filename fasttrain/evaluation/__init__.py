"""Benchmarks that compare a backbone's features before and after the projection.

The functions exported here compute metrics from arrays and tensors; they need neither a model nor files. Each
benchmark has a module that reads its dataset and evaluates the encoder. `command.py` implements
`fasttrain eval`.
"""

from importlib import import_module

from fasttrain.errors import InputError, pip_install

# The modules below import packages of the `eval` extra.
try:
    import_module("matplotlib")
    import_module("scipy")
except ModuleNotFoundError as error:
    raise InputError(
        f"package {error.name!r} is not installed. Install it with: {pip_install('eval')}"
    ) from error

from fasttrain.evaluation.metrics import boundary_accuracy, mean_iou, pck, region_similarity
from fasttrain.evaluation.plots import pca_maps
from fasttrain.evaluation.propagation import propagate_labels
from fasttrain.evaluation.trade_off import consistency_separability

__all__ = [
    "boundary_accuracy",
    "consistency_separability",
    "mean_iou",
    "pca_maps",
    "pck",
    "propagate_labels",
    "region_similarity",
]
