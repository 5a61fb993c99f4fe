"""Train a projection as a recipe describes, in one process or under torchrun.

The recipe is a YAML file, or the name of one that ships with fasttrain, such as dinov2. The results are
written to the run folder (recipe key `output`): recipe.yaml, projection.safetensors, checkpoints/,
metrics.jsonl, tensorboard/, figures/ and train.json. To continue an interrupted run, repeat the same command.
"""

# This module does not import PyTorch until the recipe has been checked.

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain.errors import InputError, needing_eval
from fasttrain.files import naming

if TYPE_CHECKING:
    from fasttrain.recipe import Recipe
    from fasttrain.trainer import Trainer
    from fasttrain.video_encoder import VideoEncoder

LEARNING_CURVES = Path("figures", "learning.png")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training run has produced. All of it is also in the run folders.

    Attributes:
        results: The last metrics of each backbone, by its name, as in `train.json`.
        folders: The run folder of each backbone, by its name.
    """

    results: dict[str, dict[str, Any]]
    folders: dict[str, Path]

    @cached_property
    def encoders(self) -> dict[str, VideoEncoder]:
        """The video encoder of each backbone, by its name, in float32 on the CPU.

        They are loaded from the run folders on first use, because training may have cast their weights.
        """
        from fasttrain.video_encoder import load_video_encoder

        return {name: load_video_encoder(folder) for name, folder in self.folders.items()}

    @property
    def encoder(self) -> VideoEncoder:
        """The video encoder of a run with one backbone. Raises InputError if there are several."""
        if len(self.folders) > 1:
            raise InputError(
                f"this run has several encoders ({', '.join(self.folders)}); choose one: encoders[NAME]"
            )
        return next(iter(self.encoders.values()))


def run(arguments: argparse.Namespace) -> None:
    from fasttrain.recipe import load_recipe

    train(load_recipe(arguments.recipe, arguments.overrides), profile=arguments.profile)


def train(
    recipe: str | Path | Recipe,
    *,
    source: str | Path | None = None,
    output: str | Path | None = None,
    profile: bool = False,
    **overrides: Any,
) -> TrainingResult:
    """Train a projection as a recipe describes, plot the learning curves, and print where the results are.

    If `output` holds an interrupted run of the same recipe, it is continued. Under torchrun, call this
    function in every process.

    Args:
        recipe: The name of a recipe that ships with fasttrain, such as `dinov2`, a YAML file, or a `Recipe`.
        source: The videos to train on, recipe key `data.source`. None: those of the recipe.
        output: The run folder, recipe key `output`. None: that of the recipe.
        profile: Whether to profile a few early steps and write the trace to `output/profile`.
        **overrides: Other recipe keys, as sections (`train={"epochs": 3}`) or dotted
            (`**{"train.epochs": 3}`).

    Returns:
        The metrics and, loaded on first use, the encoder. All processes return the same metrics.

    Raises:
        InputError: The recipe, data, weights or run folder cannot be used, or training cannot continue.
        KeyboardInterrupt: A signal was received, such as Ctrl-C or SIGTERM. A checkpoint has been written.
    """
    from fasttrain.loggers import import_module
    from fasttrain.recipe import load_recipe

    given = {"data.source": source, "output": output}
    given = {key: str(value) for key, value in given.items() if value is not None}
    recipe = load_recipe(recipe, given | overrides)
    import_module("fasttrain.trainer")
    from fasttrain import distributed
    from fasttrain.backbone_trainer import backbone_recipes
    from fasttrain.projection import FIT_FILE
    from fasttrain.summary import say_results
    from fasttrain.trainer import Trainer

    for each in backbone_recipes(recipe):
        if Path(each.output, FIT_FILE).exists():
            raise InputError(
                f"output: {each.output!r} holds a projection of `fasttrain fit`. To start from it, pass "
                f"projection.weights={shlex.quote(each.output)} and another output=DIR"
            )
    with distributed.start(recipe.device) as world:
        trainer = Trainer(recipe, world, profile=profile)
        has_trained = bool(trainer.train(partial(_draw_learning_curves, trainer)))
        folders = {each.name: each.folder for each in trainer.backbone_trainers}
        # The files of rank 0, which other nodes may not see.
        results = world.gather(_read_results(folders) if world.is_main else None)[0]
        if world.is_main:
            missing = [folder for folder in folders.values() if not (folder / LEARNING_CURVES).exists()]
            # A completed run may have ended before they were drawn.
            if missing and not has_trained:
                _draw_learning_curves(trainer, missing)
            say_results(trainer.backbone_trainers, results, trainer.console)
    return TrainingResult(results=results, folders=folders)


def _read_results(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        path = folder / "train.json"
        with naming(path):
            results[name] = json.loads(path.read_bytes()) if path.exists() else {}
    return results


def _draw_learning_curves(trainer: Trainer, folders: Iterable[Path]) -> None:
    with trainer.working("drawing the learning curves"):
        try:
            with needing_eval():
                from fasttrain.evaluation.plots import learning_curves
        except InputError as error:
            trainer.say(f"no learning curves: {error}")
        else:
            for folder in folders:
                learning_curves([folder], folder / LEARNING_CURVES)
