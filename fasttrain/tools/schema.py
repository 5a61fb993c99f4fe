"""Print the JSON schema of recipes, which editors use to complete and check keys.

The first line of each recipe in recipes/ refers to recipes/schema.json. For your own recipes, save the schema
in their folder (`fasttrain schema > schema.json`) and copy that line.
"""

import argparse
import json

from fasttrain.recipe import json_schema


def run(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
