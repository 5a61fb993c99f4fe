"""The benchmarks that prove what a projection bought.

The measures, importable here, know nothing of models or files. The benchmarks (`*_task.py`) read a data set,
run an encoder before and after its projection and write figures; `command.py` is `python -m fasttrain eval`.
"""

from fasttrain.evaluation.consistency import consistency_separability
from fasttrain.evaluation.davis import boundary_accuracy, region_similarity
from fasttrain.evaluation.jhmdb import pck
from fasttrain.evaluation.linear import fit_linear
from fasttrain.evaluation.localization import detection_map, edit_score, frame_accuracy, segmental_f1
from fasttrain.evaluation.probe import knn_classify, top_accuracy
from fasttrain.evaluation.propagation import propagate_labels
from fasttrain.evaluation.retrieval import nearest, recall_at
from fasttrain.evaluation.vip import mean_iou

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
