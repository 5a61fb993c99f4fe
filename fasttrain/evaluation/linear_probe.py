"""Linear probe: multinomial logistic regression on frozen features with an L2 penalty.

The procedure is that of CLIP's linear probes (Radford et al., ICML 2021, appendix A.3): L-BFGS with at most
1,000 iterations, a sweep of the L2 strength over a logarithmic grid on held-out training data, then a fit to
all training data. Channels are first standardised with the training data's mean and standard deviation, so
that one grid suits features of any scale. The objective is convex, the computation is in float64 and nothing
is random.

Shape suffixes: S samples, D channels, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from fasttrain.errors import InputError
from fasttrain.options import MAX_ITERATIONS

# From strong to weak: each fit starts from the solution of the previous one.
STRENGTHS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_MIN_DEVIATION = 1e-8
# End the sweep after this many strengths without improvement, because fits with a weaker penalty are slower.
_PATIENCE = 3


@dataclass(frozen=True, kw_only=True)
class LinearClassifier:
    """A linear classifier of C classes with the scores `features_SD @ weight_DC + bias_C`."""

    weight_DC: Tensor
    bias_C: Tensor
    l2: float
    held_out_accuracy: float | None
    """Accuracy of the chosen L2 on the held-out data, in percent; None if nothing was held out."""
    converged: bool
    """Whether L-BFGS met its tolerance within the maximum number of iterations."""

    def describe(self) -> dict[str, float | bool | None]:
        """Describe the fit, for the JSON file of an evaluation."""
        return {name: getattr(self, name) for name in ("l2", "held_out_accuracy", "converged")}

    def scores(self, features_SD: Tensor) -> Tensor:
        """Compute the logits (S, C) float64 of features (S, D)."""
        return features_SD.double() @ self.weight_DC + self.bias_C


def fit_linear(
    features_SD: Tensor,
    labels_S: Tensor,
    *,
    num_classes: int,
    held_out_S: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    max_iterations: int = MAX_ITERATIONS,
) -> LinearClassifier:
    """Minimise mean cross-entropy + l2 / 2 ||weight||^2 over the weight and the bias, which has no penalty.

    `held_out_S` (bool) selects the samples on which the L2 is chosen, by accuracy and then by cross-entropy.
    The sweep goes from strong to weak and ends after three strengths without improvement. Without held-out
    samples, or with a single strength, the middle one of `strengths` is used. Raises InputError if the
    features are not finite.
    """
    features_SD = features_SD.double()
    if not features_SD.isfinite().all():
        raise InputError("features are not all finite. Check the encoder's weights and output.")
    mean_D = features_SD.mean(dim=0)
    deviation_D = features_SD.std(dim=0, correction=0)
    # Dividing a constant channel by its deviation would only amplify rounding errors.
    deviation_D[deviation_D < _MIN_DEVIATION] = 1
    standard_SD = (features_SD - mean_D) / deviation_D
    zeros = standard_SD.new_zeros(num_classes, standard_SD.shape[1] + 1)
    l2, accuracy = float(strengths[len(strengths) // 2]), None
    if held_out_S is not None and held_out_S.any() and len(strengths) > 1:
        kept_SD, kept_S = standard_SD[~held_out_S], labels_S[~held_out_S]
        validation_SD, validation_S = standard_SD[held_out_S], labels_S[held_out_S]
        solution = zeros
        outcomes: list[tuple[float, float, float]] = []
        for strength in sorted(strengths, reverse=True):
            solution, _ = _minimise(kept_SD, kept_S, strength, solution, max_iterations)
            scores_SC = validation_SD @ solution[:, :-1].T + solution[:, -1]
            correct_S = scores_SC.argmax(dim=1) == validation_S
            loss = functional.cross_entropy(scores_SC, validation_S).item()
            outcomes.append((100 * correct_S.double().mean().item(), -loss, strength))
            if len(outcomes) - 1 - outcomes.index(max(outcomes)) == _PATIENCE:
                break
        accuracy, _, l2 = max(outcomes)
    solution, converged = _minimise(standard_SD, labels_S, l2, zeros, max_iterations)
    weight_DC = (solution[:, :-1] / deviation_D).T
    return LinearClassifier(
        weight_DC=weight_DC,
        bias_C=solution[:, -1] - mean_D @ weight_DC,
        l2=l2,
        held_out_accuracy=accuracy,
        converged=converged,
    )


def _minimise(
    standard_SD: Tensor, labels_S: Tensor, l2: float, start: Tensor, max_iterations: int
) -> tuple[Tensor, bool]:
    """Minimise the objective. Returns weight and bias (C, D + 1) and whether the tolerance was met."""

    def objective(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        parameters = torch.from_numpy(flat).reshape(start.shape).to(start.device).requires_grad_()
        weight_CD, bias_C = parameters[:, :-1], parameters[:, -1]
        loss = functional.cross_entropy(standard_SD @ weight_CD.T + bias_C, labels_S)
        loss = loss + 0.5 * l2 * weight_CD.square().sum()
        (gradient,) = torch.autograd.grad(loss, parameters)
        return loss.item(), gradient.flatten().cpu().numpy()

    result = minimize(
        objective,
        start.flatten().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "gtol": 1e-5, "ftol": 1e-12, "maxcor": 20},
    )
    return torch.from_numpy(result.x).reshape(start.shape).to(start.device), bool(result.success)
