"""Cycle consistency alone, of a walk through any number of views.

    A_k = softmax(p_k p_{k+1}^T / tau),  C = A_1 A_2 ... A_{T-1}
    loss = mean over cells i of  log(1 + M e) - log(C_ii + e),  e = 1e-6

A walk of three views is one launch of cycle.py or the streaming kernels of cycle_streaming.py, which never
hold an M x M matrix in memory. Longer ones chain the transition matrices of affinity.py with matrix
products; the last product is a sum, since only C's diagonal counts. Their memory is M x M numbers per step.

Source: arXiv 2603.26597, section 3; walks there and back through a clip: Jabri et al., "Space-Time
Correspondence as a Contrastive Random Walk", NeurIPS 2020. Shape suffixes: B samples, T views, M tokens, D
channels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import reference
from .affinity import affinity_softmax
from .checks import check_temperature, check_tokens
from .cycle import grad_scale
from .cycle_streaming import launch_three_views
from .runtime import Backend, operator, require_kept, use_triton, wants_gradient


@operator(
    "cycle_three_views_backward",
    "(Tensor grad, Tensor loss, Tensor grad_walk, ScalarType dtype) -> Tensor",
    fake=lambda grad, loss, grad_walk, dtype: grad_walk.new_empty(grad_walk.shape, dtype=dtype),
)
def _cycle_three_views_backward(grad: Tensor, loss: Tensor, grad_walk: Tensor, dtype: torch.dtype) -> Tensor:
    """The walk's gradient. The loss, which depends on the walk, makes a second derivative an error."""
    return (grad * grad_walk).to(dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    walk, _, ctx.kept = inputs
    ctx.dtype = walk.dtype
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[1])
    # Or every backward would fill zeros of its size, for nothing.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    require_kept(ctx.kept)
    if grad is None:
        return None, None, None
    return _cycle_three_views_backward(grad, *ctx.saved_tensors, ctx.dtype), None, None


@operator(
    "cycle_three_views",
    "(Tensor walk, float temperature, bool grad) -> (Tensor, Tensor)",
    fake=lambda walk, temperature, grad: (
        walk.new_empty((), dtype=torch.float32),
        walk.new_empty(walk.shape, dtype=torch.float32) if grad else walk.new_empty(0),
    ),
    setup_context=_save,
    backward=_differentiate,
)
def _cycle_three_views(walk_B3MD: Tensor, temperature: float, grad: bool) -> tuple[Tensor, Tensor]:
    """The loss, 0-d, and its gradient for the walk, both in fp32; the latter empty without `grad`."""
    rows = walk_B3MD.shape[0] * walk_B3MD.shape[2]
    figures_1BM, grad_walk = launch_three_views(
        walk_B3MD.contiguous(), temperature, grad_dtype=torch.float32 if grad else None, diagnostics=False
    )
    return figures_1BM.mean(), grad_walk.div_(grad_scale(walk_B3MD.shape[2]) * temperature * rows)


def cycle_consistency_loss(
    walk: Tensor, temperature: float = 0.03, there_and_back: bool = False, backend: Backend = "auto"
) -> Tensor:
    """Cross-entropy of a random walk through the views that is to end in the cell of its start, a 0-d tensor.

    Args:
        walk: (B, T, M, D) tokens of T >= 2 views in the order of the walk, normalised and pooled as they are
            to be compared. Co-Settle walks frame 1, frame 2, frame 1 with asymmetric positions.
        temperature: of the transition probabilities, above 0.
        there_and_back: walk on from the last view through the others back to the first, 2 T - 2 steps in all.
        backend: `auto` (Triton on CUDA tensors where Triton is installed, else eager), `triton` or `eager`.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is expected.
    """
    check_tokens("walk", walk, "BTMD")
    if walk.shape[1] < 2:
        raise ValueError(f"walk must hold 2 views or more in dimension 1, got the shape {tuple(walk.shape)}")
    check_temperature(temperature)
    if there_and_back:
        walk = torch.cat([walk, walk[:, :-1].flip(1)], dim=1)
    if not use_triton(backend, walk=walk):
        return reference.cycle_consistency_loss(walk, temperature)
    if walk.shape[1] == 3:
        loss: Tensor = _cycle_three_views(walk, temperature, wants_gradient(walk))[0]
        return loss
    steps = [affinity_softmax(here, there, temperature, backend) for here, there in pairwise(walk.unbind(1))]
    return reference.cycle_loss_of(reference.return_probability(steps))
