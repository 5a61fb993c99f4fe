"""Benchmarks that compare a backbone's features before and after the projection.

The functions exported here compute metrics from arrays and tensors; they need neither a model nor files. Each
benchmark has a module that reads its dataset and evaluates the encoder. `command.py` implements
`fasttrain eval`, and `validation.py` the validation during training.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fasttrain.errors import needing_eval

if TYPE_CHECKING:
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

# Imported on first use, because training validates without the packages of the extra `eval`.
_MODULES = {
    "boundary_accuracy": "metrics",
    "consistency_separability": "trade_off",
    "mean_iou": "metrics",
    "pca_maps": "plots",
    "pck": "metrics",
    "propagate_labels": "propagation",
    "region_similarity": "metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing_eval():
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
