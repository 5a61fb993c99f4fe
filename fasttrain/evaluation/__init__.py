"""The benchmarks that prove what a projection bought.

The measures, importable here, know nothing of models or files. A runner for each benchmark reads a data set
and runs an encoder before and after its projection; `command.py` is `python -m fasttrain eval`.
"""

from importlib import import_module

from fasttrain.errors import InputError

# The modules below need what the extra `eval` of the installation brings.
try:
    import_module("matplotlib")
    import_module("scipy")
except ModuleNotFoundError as error:
    raise InputError(f"the package {error.name} is not installed; pip install 'fasttrain[eval]'") from error

from fasttrain.evaluation.metrics import boundary_accuracy, mean_iou, pck, region_similarity
from fasttrain.evaluation.propagation import propagate_labels
from fasttrain.evaluation.trade_off import consistency_separability

__all__ = [
    "boundary_accuracy",
    "consistency_separability",
    "mean_iou",
    "pck",
    "propagate_labels",
    "region_similarity",
]
