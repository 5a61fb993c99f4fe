"""The benchmarks that prove what a projection bought.

The measures, importable here, know nothing of models or files. A runner for each benchmark reads a data set
and runs an encoder before and after its projection; `command.py` is `python -m fasttrain eval`.
"""

from fasttrain.errors import needs_extra

with needs_extra("eval"):
    import matplotlib  # noqa: F401
    import scipy  # noqa: F401

from fasttrain.evaluation.linear_probe import fit_linear
from fasttrain.evaluation.metrics import (
    boundary_accuracy,
    detection_map,
    edit_score,
    frame_accuracy,
    knn_classify,
    mean_iou,
    nearest,
    pck,
    recall_at,
    region_similarity,
    segmental_f1,
    top_accuracy,
)
from fasttrain.evaluation.propagation import propagate_labels
from fasttrain.evaluation.trade_off import consistency_separability

__all__ = [
    "boundary_accuracy",
    "consistency_separability",
    "detection_map",
    "edit_score",
    "fit_linear",
    "frame_accuracy",
    "knn_classify",
    "mean_iou",
    "nearest",
    "pck",
    "propagate_labels",
    "recall_at",
    "region_similarity",
    "segmental_f1",
    "top_accuracy",
]
