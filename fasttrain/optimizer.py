"""Optimiser and learning-rate schedule: torch's fused AdamW, or NVIDIA Apex's fused optimisers.

Weight decay acts on matrices only; the schedule is a linear warm-up from 0 and one cosine down to 0, per step
(Co-Settle, section 4.1, after MAE's `lr_sched.py`).
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.cuda_graph import CapturedCall
from fasttrain.errors import InputError
from fasttrain.recipe import OptimizerRecipe

APEX = {"apex_fused_adam": "FusedAdam", "apex_fused_lamb": "FusedLAMB"}


def build_optimizer(recipe: OptimizerRecipe, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of all trainable parameters of `module`. The learning rate starts at 0: see `set_lr`.

    Raises:
        InputError: an Apex optimiser was asked for, and NVIDIA Apex or the GPU is absent.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    if recipe.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=True)
    try:
        fused = getattr(importlib.import_module("apex.optimizers"), APEX[recipe.name])
    except ImportError:
        raise InputError(
            f"optimizer.name: {recipe.name!r} needs NVIDIA Apex with its CUDA extensions. It is not on PyPI, "
            f"where `apex` is an unrelated project (pip uninstall apex): build it from its repository "
            f"(github.com/NVIDIA/apex, with --cuda_ext), or use optimizer.name=adamw"
        ) from None
    if not all(parameter.is_cuda for parameter in trainable):
        raise InputError(f"optimizer.name: {recipe.name!r} runs on GPUs only; use optimizer.name=adamw here")
    optimizer: torch.optim.Optimizer = fused(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps)
    return optimizer


def learning_rate_factor(step: int, *, total_steps: int, epochs: float, warmup_epochs: float) -> float:
    """Share of the peak rate at `step` (0-based) of `total_steps`; `epochs` is the schedule's length."""
    epoch = step / total_steps * epochs
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    return 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for the next step; does not wait for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def record_update(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """A step of torch's fused AdamW, with its gradients set to zero behind it, as one CUDA graph.

    The learning rate moves to the device, where `set_lr` writes it for the recorded step to read. Weights and
    state are left as they were; gradients are zero.
    """
    for group in optimizer.param_groups:
        group["lr"], group["capturable"] = torch.zeros((), device=group["params"][0].device), True
        for parameter in group["params"]:
            # Passes that were recorded write to the gradients that are there.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    before = copy.deepcopy(optimizer.state_dict()["state"])

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    # At a rate of zero the steps of the recording move no weight, but they age the state.
    recorded = CapturedCall(update, ())
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            value.copy_(before[number][name]) if number in before else value.zero_()
    return recorded


def portable_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` as an unrecorded optimiser has it, so that a run may go on either way."""
    state: dict[str, Any] = optimizer.state_dict()
    for group in state["param_groups"]:
        if isinstance(group["lr"], Tensor):
            group["lr"], group["capturable"] = float(group["lr"]), False
    return state
