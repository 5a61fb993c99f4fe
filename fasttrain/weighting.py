"""The weights of the two terms of the objective: fixed, or adapted during training.

Adaptive weights are tensors on the device. They are constants of the forward and backward passes of a step,
and are changed in place after it, without waiting for the device. What they follow is averaged over
accumulated passes and ranks, so that a step does not depend on how its global batch is divided.

Every method changes the logarithm of a weight by at most `RATE` per step. L_1 is the cycle loss, L_2 the
separability loss:

- `constrained` minimises L_1 subject to distance <= limit by dual ascent on the multiplier lambda of L_2:
  log(lambda) += RATE * (distance / limit - 1). Sources: Platt and Barr, "Constrained Differential
  Optimization", NIPS 1987; in log space, Rezende and Viola, "Taming VAEs" (GECO), arXiv 1810.00597.
- `uncertainty` descends the sum of w_i L_i - log(w_i) / 2 with respect to the log variances -log(w_i). Its
  minimum is w_i = 1 / (2 L_i). Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to
  Weigh Losses", CVPR 2018, equation 10. There, the optimiser of the network updates the log variances; here,
  its low learning rate would hardly change them.
- `gradnorm` changes lambda until G_2 / G_1 = (R_2 / R_1)^ALPHA, with G_i the norm of the gradient of a
  weighted term with respect to the last linear layer, and R_i the loss relative to that of the first step.
  This minimises L_grad of Chen et al., "GradNorm", ICML 2018, for two terms.

Shape suffixes: D channels, E inputs of the last linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fasttrain.distributed import World
from fasttrain.objective import CosettleOutput
from fasttrain.recipe import Recipe

# The largest change of the logarithm of a weight per step.
RATE = 0.05
# The largest factor between a weight and its start. It bounds the steps in which a weight returns after its
# constraint was inactive for long.
MAX_FACTOR = 1e3
# The strength with which `gradnorm` balances the rates of training; the value of its authors for NYUv2.
ALPHA = 1.5


class Weighting(nn.Module):
    """Fixed weights: the loss stays that of the objective."""

    def forward(
        self, losses: CosettleOutput, weight_DE: Tensor, scale: Callable[[Tensor], Tensor]
    ) -> CosettleOutput:
        """Replace the loss of a pass by the weighted sum of its terms.

        Args:
            losses: The losses of the objective, with gradients.
            weight_DE: The weight of the last linear layer.
            scale: Multiplies a loss before its backward pass, such as `GradScaler.scale`.
        """
        return losses

    def update(self, world: World) -> None:
        """Adapt the weights to the passes since the last update; call it after each optimiser step."""

    def reset(self) -> None:
        """Forget the passes since the last update."""

    def metrics(self, separability: float) -> dict[str, float]:
        """Return what to log in addition to the given separability loss. The host waits for the device."""
        return {}


class _Adaptive(Weighting):
    """Weights that start at 1 and `objective.lambda_reg`."""

    log_weights: Tensor
    _start: Tensor
    _terms: Tensor

    def __init__(self, recipe: Recipe, grid: tuple[int, int], weight_DE: Tensor) -> None:
        super().__init__()
        self._limit, self._passes = recipe.objective.separability_limit, recipe.train.accumulate
        self._distance = distance_factor(recipe.objective.regularizer, grid, weight_DE.shape[0])
        start = torch.tensor([0.0, math.log(recipe.objective.lambda_reg)], device=weight_DE.device)
        self.register_buffer("log_weights", start.clone())
        self.register_buffer("_start", start, persistent=False)
        # Sums over the passes since the last update.
        self.register_buffer("_terms", torch.zeros_like(start), persistent=False)

    def forward(
        self, losses: CosettleOutput, weight_DE: Tensor, scale: Callable[[Tensor], Tensor]
    ) -> CosettleOutput:
        terms = torch.stack((losses.cycle, losses.separability))
        self._terms += terms.detach()
        return losses._replace(loss=(self.log_weights.exp() * terms).sum())

    @torch.no_grad()
    def update(self, world: World) -> None:
        change = self._change(world.mean(self._terms / self._passes), world)
        # Gradients change nothing if they overflow in fp16, or are zero behind the gate of a `residual` head.
        self.log_weights += RATE * change.nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)
        bound = math.log(MAX_FACTOR)
        self.log_weights.copy_(self.log_weights.clamp(self._start - bound, self._start + bound))
        self.reset()

    def _change(self, terms: Tensor, world: World) -> Tensor:
        """Return the changes of both log weights in units of `RATE`, given the means of both terms."""
        raise NotImplementedError

    def reset(self) -> None:
        self._terms.zero_()

    def metrics(self, separability: float) -> dict[str, float]:
        cycle, weight = self.log_weights.tolist()
        return {"lambda": math.exp(weight - cycle), "cosine_distance": self._distance * separability}


class _Constrained(_Adaptive):
    def _change(self, terms: Tensor, world: World) -> Tensor:
        violation = self._distance * terms[1] / self._limit - 1.0
        return torch.stack((torch.zeros_like(violation), violation))


class _Uncertainty(_Adaptive):
    def _change(self, terms: Tensor, world: World) -> Tensor:
        return 0.5 - self.log_weights.exp() * terms


class _GradNorm(_Adaptive):
    first_terms: Tensor
    _gradients: Tensor

    def __init__(self, recipe: Recipe, grid: tuple[int, int], weight_DE: Tensor) -> None:
        super().__init__(recipe, grid, weight_DE)
        self.register_buffer("first_terms", torch.full_like(self._start, torch.nan))
        self.register_buffer("_gradients", weight_DE.new_zeros(2, *weight_DE.shape), persistent=False)

    def forward(
        self, losses: CosettleOutput, weight_DE: Tensor, scale: Callable[[Tensor], Tensor]
    ) -> CosettleOutput:
        for total_DE, term in zip(self._gradients, (losses.cycle, losses.separability), strict=True):
            # Only the ratio of the norms counts, so the scale cancels out.
            total_DE += torch.autograd.grad(scale(term), weight_DE, retain_graph=True)[0]
        return super().forward(losses, weight_DE, scale)

    def _change(self, terms: Tensor, world: World) -> Tensor:
        self.first_terms.copy_(torch.where(self.first_terms.isnan(), terms, self.first_terms))
        rates = (terms / self.first_terms).log()
        norms = world.mean(self._gradients).flatten(1).norm(dim=1).log() + self.log_weights
        change = ALPHA * (rates[1] - rates[0]) - (norms[1] - norms[0])
        return torch.stack((torch.zeros_like(change), change))

    def reset(self) -> None:
        super().reset()
        self._gradients.zero_()


_ADAPTIVE = {"constrained": _Constrained, "uncertainty": _Uncertainty, "gradnorm": _GradNorm}


def build_weighting(recipe: Recipe, grid: tuple[int, int], weight_DE: Tensor) -> Weighting:
    """Create what `objective.weighting` selects, on the device of the weight of the last linear layer."""
    method = recipe.objective.weighting
    return Weighting() if method == "fixed" else _ADAPTIVE[method](recipe, grid, weight_DE)


def distance_factor(regularizer: str, grid: tuple[int, int], channels: int) -> float:
    """Return the factor from a separability loss to the mean of 1 - cos(frozen, projected) over tokens.

    With unit vectors z and p, `mse` is |z - p|^2 / D = 2 (1 - cos) / D. `kl` is the sum over 3 N tokens of a
    divergence that is, to second order, half the variance of z - p over channels: (1 - cos) / D less half the
    square of its mean. With T + 1 views, the objective scales that sum to three views.
    """
    return channels / 2 if regularizer == "mse" else channels / (3 * math.prod(grid))
