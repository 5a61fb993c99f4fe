"""Compute a projection in closed form from one pass over training samples, in one process or under torchrun.

The recipe is that of training: a YAML file, or the name of one that ships with fasttrain, such as dinov2. Its
backbone, data, precision, device and output are used. The closed form has two parameters: the strength with
which the signal within frames is kept, and the power of a partial whitening. They are chosen on held-out
videos, without labels. If none is better than the frozen features with their mean removed, the run folder
gets these.

The results are written to the run folder (recipe key `output`): recipe.yaml, projection.safetensors and
fit.json. All other commands accept it like that of a training run. To start training from it, pass
`projection.weights=FOLDER` and another `output` to `fasttrain train`. docs/theory.md derives the closed form.
"""

# This module does not import PyTorch until the recipe has been checked.

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain.errors import InputError
from fasttrain.options import FIT_PAIRS
from fasttrain.training import TrainingResult

if TYPE_CHECKING:
    from fasttrain.recipe import Recipe


def run(arguments: argparse.Namespace) -> None:
    from fasttrain.recipe import load_recipe

    fit(load_recipe(arguments.recipe, arguments.overrides), pairs=arguments.pairs)


def fit(
    recipe: str | Path | Recipe,
    *,
    source: str | Path | None = None,
    output: str | Path | None = None,
    pairs: int = FIT_PAIRS,
    **overrides: Any,
) -> TrainingResult:
    """Compute a projection in closed form, and print where the results are.

    Under torchrun, call this function in every process; the pairs are divided among them.

    Args:
        recipe: The name of a recipe that ships with fasttrain, such as `dinov2`, a YAML file, or a `Recipe`.
        source: The videos, recipe key `data.source`. None: those of the recipe.
        output: The run folder, recipe key `output`. None: that of the recipe.
        pairs: Number of frame pairs to encode; at most one epoch is.
        **overrides: Other recipe keys, as sections (`data={"gap": 0.1}`) or dotted.

    Returns:
        The content of `fit.json` and, loaded on first use, the encoder. All processes return the same.

    Raises:
        InputError: The recipe, data, weights or run folder cannot be used, or no video can be validated.
    """
    from fasttrain.loggers import import_module
    from fasttrain.recipe import load_recipe

    if pairs < 1:
        raise InputError(f"--pairs: {pairs} is less than 1; pass the number of frame pairs to encode")
    given = {"data.source": source, "output": output}
    given = {key: str(value) for key, value in given.items() if value is not None}
    recipe = load_recipe(recipe, given | overrides)
    if recipe.projection.head != "linear":
        raise InputError(
            f"projection.head: {recipe.projection.head!r} cannot be fitted, because the closed form is a "
            f"linear map; use projection.head=linear"
        )
    import_module("fasttrain.trainer")
    from fasttrain import distributed
    from fasttrain.backbone_trainer import backbone_recipes
    from fasttrain.fitter import fit_all
    from fasttrain.projection import FIT_FILE
    from fasttrain.trainer import Trainer

    for each in backbone_recipes(recipe):
        folder = Path(each.output)
        if (folder / "recipe.yaml").exists() and not (folder / FIT_FILE).exists():
            raise InputError(f"output: {str(folder)!r} holds a training run; use another output=DIR")
    with distributed.start(recipe.device) as world:
        trainer = Trainer(recipe, world)
        results = fit_all(trainer, pairs)
    folders = {trainer.name: trainer.folder for trainer in trainer.backbone_trainers}
    return TrainingResult(results=results, folders=folders)
