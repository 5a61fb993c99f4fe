"""Optimiser and learning-rate schedule: torch's fused AdamW, or NVIDIA Apex's fused optimisers.

Weight decay acts on matrices only; the schedule is a linear warm-up from 0 and one cosine down to 0, per step
(Co-Settle, section 4.1, after MAE's `lr_sched.py`).
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import torch
from torch import nn

from fasttrain.errors import InputError
from fasttrain.recipe import OptimizerRecipe

APEX_HELP = (
    "NVIDIA Apex is not on PyPI: build it from its repository (github.com/NVIDIA/apex, with --cuda_ext), "
    "or use optimizer.name=adamw"
)


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
    optimizers = import_apex_optimizers(recipe.name)
    if not all(parameter.is_cuda for parameter in trainable):
        raise InputError(f"optimizer.name: {recipe.name!r} runs on GPUs only; use optimizer.name=adamw here")
    name = {"apex_fused_adam": "FusedAdam", "apex_fused_lamb": "FusedLAMB"}[recipe.name]
    optimizer: torch.optim.Optimizer = getattr(optimizers, name)(
        groups, lr=0.0, betas=recipe.betas, eps=recipe.eps
    )
    return optimizer


def import_apex_optimizers(asked_for: str) -> ModuleType:
    """`apex.optimizers` of NVIDIA Apex.

    Raises:
        InputError: there is no `apex`, or it is PyPI's unrelated project of that name.
    """
    try:
        importlib.import_module("apex")
    except ImportError:
        raise InputError(
            f"optimizer.name: {asked_for!r} needs NVIDIA Apex, which is absent. {APEX_HELP}"
        ) from None
    try:
        return importlib.import_module("apex.optimizers")
    except ImportError:
        raise InputError(
            f"optimizer.name: {asked_for!r} needs NVIDIA Apex, but the installed `apex` is PyPI's unrelated "
            f"project or lacks the CUDA extensions (pip uninstall apex). {APEX_HELP}"
        ) from None


def learning_rate_factor(step: int, *, total_steps: int, epochs: float, warmup_epochs: float) -> float:
    """Share of the peak rate at `step` (0-based) of `total_steps`; `epochs` is the schedule's length."""
    epoch = step / total_steps * epochs
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    return 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
