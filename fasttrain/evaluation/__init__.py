"""The benchmarks that prove what a projection bought.

The measures, importable here, know nothing of models or files. The benchmarks (`*_task.py`) read a data set,
run an encoder before and after its projection and write figures; `command.py` is `python -m fasttrain eval`.
"""

from fasttrain.evaluation.consistency import consistency_separability
from fasttrain.evaluation.davis import boundary_accuracy, region_similarity
from fasttrain.evaluation.jhmdb import pck
from fasttrain.evaluation.propagation import propagate_labels
from fasttrain.evaluation.vip import mean_iou

__all__ = [
    "boundary_accuracy",
    "consistency_separability",
    "mean_iou",
    "pck",
    "propagate_labels",
    "region_similarity",
]
