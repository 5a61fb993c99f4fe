"""A linear probe: multinomial logistic regression on frozen features by L-BFGS, L2 chosen on held-out data.

The recipe of CLIP's linear probes (Radford et al., ICML 2021, appendix A.3): L-BFGS, at most 1,000
iterations, the L2 strength swept over a logarithmic grid on a validation part of the training data, then a
fit on all of it. Channels are standardised with the training data's mean and deviation first, so that one
grid fits features of any scale. The objective is convex and everything is float64: nothing is drawn.

Shape suffixes: S samples, D channels, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

from fasttrain.errors import InputError

# From strong to weak: each fit starts where the stronger one ended.
STRENGTHS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
MAX_ITERATIONS = 1000
_LEAST_DEVIATION = 1e-8
# Weaker strengths are the slow ones: the sweep ends after so many in a row that do no better.
_PATIENCE = 3
_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LinearClassifier:
    """Scores of C classes: weight_CD (x - mean_D) / deviation_D + bias_C."""

    mean_D: Tensor
    deviation_D: Tensor
    weight_CD: Tensor
    bias_C: Tensor
    l2: float
    held_out_accuracy: float | None
    """Of the chosen L2 on the held-out part, in percent; None where nothing was held out."""
    converged: bool
    """Whether L-BFGS met its tolerance within the iterations allowed."""

    def describe(self) -> dict[str, float | bool | None]:
        """How it came about, for the JSON of an evaluation."""
        return {
            "l2": self.l2,
            "held_out_accuracy": self.held_out_accuracy,
            "converged": self.converged,
        }

    def scores(self, features_SD: Tensor) -> Tensor:
        """Logits (S, C) float64, on the device of the features."""
        place = features_SD.device
        weight_DC = (self.weight_CD / self.deviation_D).T.to(place)
        bias_C = self.bias_C.to(place) - self.mean_D.to(place) @ weight_DC
        return torch.cat([block_SD.double() @ weight_DC + bias_C for block_SD in features_SD.split(_BLOCK)])

    def probabilities(self, features_SD: Tensor) -> Tensor:
        """(S, C) float64; rows sum to one."""
        return self.scores(features_SD).softmax(dim=-1)


def fit_linear(
    features_SD: Tensor,
    labels_S: Tensor,
    *,
    num_classes: int,
    held_out_S: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    max_iterations: int = MAX_ITERATIONS,
) -> LinearClassifier:
    """Minimise mean cross-entropy + l2 / 2 ||weight||^2 over weight and (unpenalised) bias.

    held_out_S: bool, what the L2 is chosen on, by accuracy, then by cross-entropy, from strong to weak until
    three in a row do no better; it must leave something to train on. Without it, or with one strength, the
    middle one of `strengths` is taken. Raises InputError for labels out of range, and for features that are
    not finite.
    """
    if not len(labels_S) or features_SD.shape[:1] != labels_S.shape:
        raise InputError(f"features {tuple(features_SD.shape)} with {len(labels_S)} labels")
    if int(labels_S.min()) < 0 or int(labels_S.max()) >= num_classes:
        raise InputError(
            f"labels from {int(labels_S.min())} to {int(labels_S.max())}; expected 0..{num_classes - 1}"
        )
    features_SD = features_SD.double()
    if not bool(features_SD.isfinite().all()):
        raise InputError("features that are not finite cannot be classified; is the encoder's output?")
    mean_D = features_SD.mean(dim=0)
    deviation_D = features_SD.std(dim=0, correction=0)
    # A constant channel says nothing, and its rounding error would be blown up.
    deviation_D[deviation_D < _LEAST_DEVIATION] = 1
    standard_SD = (features_SD - mean_D) / deviation_D
    l2, accuracy = float(strengths[len(strengths) // 2]), None
    if held_out_S is not None and bool(held_out_S.any()) and len(strengths) > 1:
        l2, accuracy = _choose(standard_SD, labels_S, held_out_S, num_classes, strengths, max_iterations)
    solution, converged = _minimise(standard_SD, labels_S, num_classes, l2, None, max_iterations)
    return LinearClassifier(
        mean_D=mean_D.cpu(),
        deviation_D=deviation_D.cpu(),
        weight_CD=solution[:, :-1].cpu(),
        bias_C=solution[:, -1].cpu(),
        l2=l2,
        held_out_accuracy=accuracy,
        converged=converged,
    )


def _choose(
    standard_SD: Tensor,
    labels_S: Tensor,
    held_out_S: Tensor,
    num_classes: int,
    strengths: Sequence[float],
    max_iterations: int,
) -> tuple[float, float]:
    """The strength that does best on the held-out samples, and its accuracy there in percent."""
    kept_SD, kept_S = standard_SD[~held_out_S], labels_S[~held_out_S]
    judged_SD, judged_S = standard_SD[held_out_S], labels_S[held_out_S]
    if not len(kept_S):
        raise InputError("every sample is held out; nothing is left to train on")
    start: Tensor | None = None
    outcomes = []
    for l2 in sorted(strengths, reverse=True):
        start, _ = _minimise(kept_SD, kept_S, num_classes, l2, start, max_iterations)
        scores_SC = judged_SD @ start[:, :-1].T + start[:, -1]
        accuracy = 100 * (scores_SC.argmax(dim=1) == judged_S).double().mean().item()
        loss = torch.nn.functional.cross_entropy(scores_SC, judged_S).item()
        outcomes.append((accuracy, -loss, l2))
        if len(outcomes) - 1 - outcomes.index(max(outcomes)) == _PATIENCE:
            break
    accuracy, _, l2 = max(outcomes)
    return l2, accuracy


def _minimise(
    standard_SD: Tensor,
    labels_S: Tensor,
    num_classes: int,
    l2: float,
    start: Tensor | None,
    max_iterations: int,
) -> tuple[Tensor, bool]:
    """Weight and bias (C, D + 1) at the minimum, and whether the tolerance was met."""
    samples, channels = standard_SD.shape
    place = standard_SD.device

    def objective(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        parameters = torch.from_numpy(flat.reshape(num_classes, channels + 1)).to(place)
        weight_CD, bias_C = parameters[:, :-1], parameters[:, -1]
        gradient = torch.empty_like(parameters)
        gradient[:, :-1] = l2 * weight_CD
        gradient[:, -1] = 0
        loss = 0.5 * l2 * weight_CD.square().sum()
        for block_SD, block_S in zip(standard_SD.split(_BLOCK), labels_S.split(_BLOCK), strict=True):
            log_SC = (block_SD @ weight_CD.T + bias_C).log_softmax(dim=1)
            loss -= log_SC.gather(1, block_S[:, None]).sum() / samples
            error_SC = log_SC.exp()
            error_SC.scatter_add_(1, block_S[:, None], torch.full_like(log_SC[:, :1], -1))
            gradient[:, :-1] += error_SC.T @ block_SD / samples
            gradient[:, -1] += error_SC.sum(dim=0) / samples
        return loss.item(), gradient.flatten().cpu().numpy()

    flat = np.zeros(num_classes * (channels + 1)) if start is None else start.cpu().numpy().ravel()
    found = minimize(
        objective,
        flat,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "gtol": 1e-5, "ftol": 1e-12, "maxcor": 20},
    )
    solution = torch.from_numpy(found.x.reshape(num_classes, channels + 1)).to(place)
    return solution, bool(found.success)
