"""Train the recipe's projection: `fasttrain RECIPE [key=value ...]`, alone or under torchrun.

The run folder (`output`) gets recipe.yaml, projection.safetensors, checkpoints/, metrics.jsonl, tensorboard/,
figures/ and train.json. The same command goes on where a run stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fasttrain import distributed
from fasttrain.backbone_trainer import backbone_recipes
from fasttrain.backbones import Backbone
from fasttrain.data import FrameIndex
from fasttrain.errors import InputError
from fasttrain.projection import Projection
from fasttrain.recipe import Recipe, describe_keys, load_recipe
from fasttrain.trainer import Validate, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, such as recipes/dinov2.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted recipe keys, such as data.source=PATH train.epochs=1",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="record a few steps: output/profile gets a Chrome trace and a summary of the time by part",
    )
    parser.add_argument(
        "--keys", action=_PrintKeys, nargs=0, help="print every recipe key as a table and leave"
    )


class _PrintKeys(argparse.Action):
    """Print the table of keys, as Markdown; the README holds the same lines."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(keys_table())
        parser.exit()


def keys_table() -> str:
    """Every recipe key with type, default and meaning, as a Markdown table."""
    rows = [
        f"| `{path}` | {kind} | `{default}` | {meaning} |" for path, kind, default, meaning in describe_keys()
    ]
    return "\n".join(("| key | type | default | meaning |", "|---|---|---|---|", *rows))


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run_recipe(recipe, profile=arguments.profile)


def run_recipe(recipe: Recipe, *, profile: bool = False) -> None:
    """Train in this process and draw the learning curves of what came out."""
    with distributed.start(recipe.device) as world:
        results = train(recipe, world, validate=_validation(recipe), profile=profile)
        if world.is_main and results:
            try:
                from fasttrain.evaluation.plots import learning_curves
            except InputError:
                # Without the extra `eval` there are no curves.
                return
            for student in backbone_recipes(recipe):
                if student.backbone.name in results:
                    learning_curves([Path(student.output)], Path(student.output) / "figures" / "learning.png")


def _validation(recipe: Recipe) -> Validate | None:
    if not recipe.eval.every:
        return None
    from fasttrain.evaluation.validation import validate

    def before_and_after(
        encoder: Backbone, projection: Projection, index: FrameIndex, device: torch.device
    ) -> dict[str, float]:
        return validate(
            encoder,
            projection,
            index,
            device,
            num_videos=recipe.eval.num_videos,
            num_frames=recipe.eval.num_frames,
            image_size=recipe.data.image_size,
        )

    return before_and_after
