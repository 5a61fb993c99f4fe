"""What a run prints before and after training: its settings, warnings, and where the results are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

import fasttrain
from fasttrain.backbone_trainer import BackboneTrainer
from fasttrain.data.index import FrameIndex
from fasttrain.distributed import World
from fasttrain.evaluation.validation import describe_kept, has_improved
from fasttrain.loggers import count, say, say_block
from fasttrain.projection import LAST_PROJECTION_FILE, PROJECTION_FILE
from fasttrain.recipe import ObjectiveRecipe, Recipe

# The scaled learning rates of the paper (512 frame pairs) and of recipes/quickstart.yaml (16), and the factor
# from which on a rate is far from them. AdamW moves a weight by about the learning rate in a step, so a low
# rate leaves the projection close to its initial values.
PEAK_LRS, FACTOR_FAR = (2e-4, 3e-3), 10
FEW_STEPS = 100


def say_settings(
    recipe: Recipe,
    world: World,
    index: FrameIndex,
    backbone_trainers: Sequence[BackboneTrainer],
    console: Console,
    *,
    global_batch: int,
    peak_lr: float,
    completed_steps: int,
    total_steps: int,
) -> None:
    """Print the settings of a run, in the order in which its parts are set up."""
    data, train = recipe.data, recipe.train
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    else:
        device = f"CPU, {count(world.cores, 'core')}"
    if backbone_trainers[0].starts_at_frozen:
        start = "start at the frozen features"
    else:
        start = f"weights {recipe.projection.weights!r}"
    objective, usual = asdict(recipe.objective), asdict(ObjectiveRecipe())
    changed = [f"{key}={value}" for key, value in objective.items() if value != usual[key]]
    videos, pairs = len(index), len(index) * data.pairs_per_video
    held_out = f"; {recipe.eval.held_out} more held out" if recipe.eval.held_out else ""
    epochs = f"{total_steps / (pairs / global_batch):.3g}"
    steps = f"{count(total_steps, 'step')} = {epochs} epoch{'s' * (epochs != '1')}"
    if completed_steps:
        steps = f"resuming after {completed_steps} of {steps}"
    warm_up = min(1, train.warmup_epochs / train.epochs) * total_steps
    lines = {
        "device": f"{device}, {train.precision}",
        "backbone": "; ".join(trainer.encoder.summary for trainer in backbone_trainers),
        "projection": f"{recipe.projection.head}, {start}",
        **({"objective": ", ".join(changed)} if changed else {}),
        "data": f"{data.source}: {count(videos, 'video')}, "
        f"{count(int(index.num_frames.sum()), 'frame')}{held_out}",
        "epoch": f"{count(pairs, 'pair')} = {count(videos, 'video')} x {count(data.pairs_per_video, 'pair')}",
        "global batch": f"{count(global_batch, 'pair')} = batch_size {train.batch_size} x "
        f"accumulate {train.accumulate} x {count(world.size, 'process')}",
        "training": f"{steps}, warm-up {warm_up:,.0f}",
        "learning rate": f"{peak_lr:.2g} at its peak = {recipe.optimizer.lr:g} x {global_batch} / 256",
        "output": recipe.output,
    }
    say_block(f"fasttrain {fasttrain.__version__}", lines, console)


def run_warnings(recipe: Recipe, global_batch: int, peak_lr: float, total_steps: int) -> Iterator[str]:
    """Yield what is far from the recipes of this project or has no effect, and what to do about it."""
    (low, high), scale = PEAK_LRS, global_batch / 256
    scaled = f"the learning rate for a global batch of {global_batch}, {peak_lr:.2g}, is far"
    if peak_lr < low / FACTOR_FAR:
        yield (
            f"{scaled} below the {low:g} of the paper; raise train.accumulate, or optimizer.lr to "
            f"{low / scale:.2g}"
        )
    elif peak_lr > high * FACTOR_FAR:
        yield f"{scaled} above the {high:g} of the demo; lower optimizer.lr to {high / scale:.2g} or less"
    epochs, warm_up = recipe.train.epochs, recipe.train.warmup_epochs
    if warm_up >= epochs:
        yield (
            f"the learning rate only rises, because train.warmup_epochs={warm_up:g} is not less than "
            f"train.epochs={epochs:g}; a fifth is usual: train.warmup_epochs={epochs / 5:g}"
        )
    if total_steps < FEW_STEPS:
        yield (
            f"a run of {count(total_steps, 'step')} is short; raise train.steps, train.epochs or "
            f"data.pairs_per_video, or use a smaller global batch"
        )
    yield from random_weights(recipe)
    yield from settings_without_effect(recipe)


def random_weights(recipe: Recipe) -> Iterator[str]:
    """Yield a warning if backbones have random weights."""
    random = [each.name for each in recipe.backbones or (recipe.backbone,) if each.weights == "random"]
    where = "weights in the entries of backbones" if recipe.backbones else "backbone.weights"
    if random:
        yield (
            f"the weights of {', '.join(random)} are random, so the features are meaningless; pass "
            f"pretrained ones as {where}"
        )


def settings_without_effect(recipe: Recipe) -> Iterator[str]:
    """Yield which keys have no effect, or not the one that is asked for, and what to do about it."""
    objective, held_out = recipe.objective, recipe.eval.held_out
    if held_out and not recipe.eval.every:
        yield (
            f"eval.held_out={held_out} only leaves videos out, because nothing is validated; set eval.every, "
            f"for example to 500"
        )
    if objective.frames == 2 and (objective.sub_cycles or objective.curriculum):
        yield "objective.sub_cycles and objective.curriculum do nothing with 2 frames; raise objective.frames"
    if (objective.frames - 1) * recipe.data.gap > 1:
        yield (
            f"objective.frames={objective.frames} with data.gap={recipe.data.gap:g} need more than a video, "
            f"so the frames are closer to each other; lower one of them"
        )
    limit = objective.separability_limit
    if limit != ObjectiveRecipe.separability_limit and objective.weighting != "constrained":
        yield (
            f"objective.separability_limit={limit:g} does nothing with objective.weighting="
            f"{objective.weighting}; use constrained"
        )


def say_results(
    backbone_trainers: Sequence[BackboneTrainer], results: Mapping[str, Mapping[str, Any]], console: Console
) -> None:
    """Print where the results are, and commands to continue with. `results` are the last metrics by name."""
    files = {
        "projection": PROJECTION_FILE,
        "metrics": "metrics.jsonl",
        "learning curves": "figures/learning.png",
        "last projection": LAST_PROJECTION_FILE,
    }
    for trainer in backbone_trainers:
        folder = trainer.folder
        found = {name: str(folder / file) for name, file in files.items() if (folder / file).exists()}
        record = results[trainer.name]
        if kept := describe_kept(record):
            found["kept"] = kept
        say_block("results", found, console)
        if kept and not has_improved(record):
            advice = what_to_change(trainer.recipe, trainer.starts_at_frozen)
            say(f"warning: training {trainer.name} did not improve its features; {advice}", console)
    folders = [str(trainer.folder) for trainer in backbone_trainers]
    run, source = shlex.quote(folders[0]), shlex.quote(backbone_trainers[0].recipe.data.source)
    load = f"import fasttrain; encoder = fasttrain.load_video_encoder({json.dumps(folders[0])})"
    say("next, for example", console)
    # Not wrapped, so that they can be copied.
    say(f"  fasttrain eval consistency --run {run} --root {source}", console)
    say(f"  fasttrain report {shlex.join(folders)}", console)
    say(f"  python -i -c {shlex.quote(load)}", console)


def what_to_change(recipe: Recipe, starts_at_frozen: bool) -> str:
    """Return what may help if no projection is better than the frozen features."""
    constrained = recipe.objective.weighting == "constrained"
    weight = "lower objective.separability_limit" if constrained else "raise objective.lambda_reg"
    starts_at_random = recipe.projection.weights == "random" and not starts_at_frozen
    start = "start at the frozen features with projection.init=frozen, " if starts_at_random else ""
    return (
        f"{weight}, lower optimizer.lr, train on more videos, {start}or fit without training: fasttrain fit"
    )
