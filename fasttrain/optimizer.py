"""The optimiser and the learning-rate schedule (Co-Settle, section 4.1).

The optimiser is PyTorch's fused AdamW or a fused optimiser of NVIDIA Apex; weight decay applies to matrices
only. The learning rate is updated at every step: linear warm-up from 0, then a cosine decay to 0, as in MAE's
`lr_sched.py`.
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
    """Create the optimiser for all trainable parameters of `module`, with an initial learning rate of 0.

    Raises:
        InputError: The recipe selects an Apex optimiser, but NVIDIA Apex or a GPU is missing.
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
            f"where `apex` is an unrelated project. Build it from github.com/NVIDIA/apex with --cuda_ext, or "
            f"use optimizer.name=adamw"
        ) from None
    if not all(parameter.is_cuda for parameter in trainable):
        raise InputError(f"optimizer.name: {recipe.name!r} needs a GPU. Use optimizer.name=adamw on a CPU")
    optimizer: torch.optim.Optimizer = fused(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps)
    return optimizer


def learning_rate_factor(recipe: TrainRecipe, step_index: int, total_steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak. The schedule spans `total_steps`."""
    epochs, warmup = recipe.epochs, recipe.warmup_epochs
    epoch = step_index / total_steps * epochs
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
