"""Print the JSON schema of recipes, by which editors complete and check their keys.

The project's recipes name recipes/schema.json in their first line. For a recipe of your own, write the
schema beside it (`fasttrain schema > schema.json`) and begin it as they do.
"""

import argparse
import json

from fasttrain.recipe import json_schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments: the schema follows from fasttrain/recipe.py."""


def run(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
