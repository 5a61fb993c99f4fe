"""Mean intersection over union of propagated part labels (VIP).

The measure alone. Zhou et al., "Adaptive Temporal Encoding Network for Video Instance-level Human Parsing"
(ACM MM 2018), evaluated as in github ajabri/videowalk. Shape suffixes: H W pixels, M counted pixels, C
classes.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fasttrain.errors import InputError

CLASSES = (
    *("background", "hat", "hair", "sun-glasses", "upper-clothes", "dress", "coat", "socks", "pants"),
    *("gloves", "scarf", "skirt", "torso-skin", "face", "right-arm", "left-arm", "right-leg", "left-leg"),
    *("right-shoe", "left-shoe"),
)


def mean_iou(
    predictions: Sequence[npt.ArrayLike | Tensor],
    truths: Sequence[npt.ArrayLike | Tensor],
    num_classes: int = 20,
) -> float:
    """Mean over the classes of the intersection over union of all (H, W) label maps together, 0..1.

    A class that occurs in no map is left out of the mean; true labels outside 0..num_classes-1 are not
    counted. Raises InputError where lists or shapes differ or a prediction is no class.
    """
    if len(predictions) != len(truths):
        raise InputError(f"{len(predictions)} predictions for {len(truths)} truths; expected as many")
    pairs = zip(predictions, truths, strict=True)
    return float(np.nanmean(class_iou(sum_confusions(pairs, num_classes))))


def sum_confusions(
    pairs: Iterable[tuple[npt.ArrayLike | Tensor, npt.ArrayLike | Tensor]], num_classes: int
) -> npt.NDArray[np.int64]:
    """(true class, predicted class) counts of pixels over pairs of (prediction, truth)."""
    total_CC = np.zeros((num_classes, num_classes), dtype=np.int64)
    for prediction, truth in pairs:
        prediction_HW, truth_HW = np.asarray(prediction), np.asarray(truth)
        if prediction_HW.shape != truth_HW.shape:
            raise InputError(f"label map of shape {prediction_HW.shape} against truth of {truth_HW.shape}")
        counted = (truth_HW >= 0) & (truth_HW < num_classes)
        predicted_M = prediction_HW[counted].astype(np.int64)
        if len(predicted_M) and not 0 <= predicted_M.min() <= predicted_M.max() < num_classes:
            raise InputError(f"predicted class {predicted_M.max()}; expected 0 to {num_classes - 1}")
        cell_M = num_classes * truth_HW[counted].astype(np.int64) + predicted_M
        total_CC += np.bincount(cell_M, minlength=num_classes**2).reshape(num_classes, num_classes)
    return total_CC


def class_iou(confusion_CC: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Intersection over union of each class; NaN for a class that never occurs."""
    correct_C = np.diag(confusion_CC)
    with np.errstate(invalid="ignore"):
        return correct_C / (confusion_CC.sum(0) + confusion_CC.sum(1) - correct_C)
