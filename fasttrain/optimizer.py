"""Optimiser and learning-rate schedule: torch's fused AdamW, or NVIDIA Apex's fused optimisers.

Weight decay acts on matrices only; the schedule is a linear warm-up from 0 and one cosine down to 0, per step
(Co-Settle, section 4.1, after MAE's `lr_sched.py`).
"""

from __future__ import annotations

import importlib
import math

import torch
from torch import nn

from fasttrain.errors import InputError
from fasttrain.recipe import OptimizerRecipe, TrainRecipe

APEX = {"apex_fused_adam": "FusedAdam", "apex_fused_lamb": "FusedLAMB"}


def build_optimizer(recipe: OptimizerRecipe, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of all trainable parameters of `module`. The learning rate starts at 0.

    Raises InputError if an Apex optimiser was asked for, and NVIDIA Apex or the GPU is absent.
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


def learning_rate_factor(recipe: TrainRecipe, step: int, total_steps: int) -> float:
    """Share of the peak rate at `step` (0-based) of `total_steps`, which take the recipe's epochs."""
    epochs, warmup = recipe.epochs, recipe.warmup_epochs
    epoch = step / total_steps * epochs
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
