"""Recipes: parsing, overrides, error messages, and generated documentation."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.__main__ import main
from fasttrain.errors import InputError
from fasttrain.recipe import (
    BackboneRecipe,
    ObjectiveRecipe,
    OptimizerRecipe,
    Recipe,
    TrainRecipe,
    differences,
    load_recipe,
    recipe_from_dict,
    recipe_hash,
    to_yaml,
)

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FAMILIES = ("mae", "ijepa", "clip", "blip", "mocov3", "ibot", "dino", "dinov2")


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_has_the_hyperparameters_of_the_paper(family: str) -> None:
    recipe = load_recipe(RECIPES / f"{family}.yaml")
    assert recipe.backbone.name == family
    assert recipe.backbone.weights.startswith("hf://yafeng19/Co-Settle/ckpts/base/")
    assert recipe.objective == ObjectiveRecipe(temperature=0.03, lambda_reg=3.0, asymmetric_ratio=10.0)
    assert recipe.optimizer == OptimizerRecipe(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    assert recipe.train.batch_size * recipe.train.accumulate == 512
    assert (recipe.train.epochs, recipe.train.warmup_epochs) == (5, 1)
    assert (recipe.data.gap, recipe.data.crop_area) == (0.15, (0.5, 1.0))


def test_all_yaml_lists_the_backbones_of_the_single_recipes() -> None:
    backbones = load_recipe(RECIPES / "all.yaml").backbones
    assert backbones == tuple(load_recipe(RECIPES / f"{family}.yaml").backbone for family in FAMILIES)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_resolved_recipe_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4", ".1e-3"])
def test_scientific_notation_is_a_float(text: str, tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, f"optimizer: {{lr: {text}}}")).optimizer.lr == 1e-4
    assert load_recipe(write(tmp_path, ""), [f"optimizer.lr={text}"]).optimizer.lr == 1e-4


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_float_round_trip(value: float) -> None:
    recipe = recipe_from_dict({"optimizer": {"lr": value}})
    assert recipe_from_dict(yaml.safe_load(to_yaml(recipe))) == recipe


def test_overrides_take_precedence_over_the_file_and_the_file_over_its_base(tmp_path: Path) -> None:
    """An override of a section is merged with it, and a path may look like a date or a number."""
    (tmp_path / "base.yaml").write_text("seed: 1\ntrain: {epochs: 2, batch_size: 3}\noutput: 2024-02-28\n")
    path = write(tmp_path, "base: base.yaml\ntrain: {epochs: 4}\n")
    recipe = load_recipe(path, ["data.source=2024-02-30", "train={batch_size: 7}"])
    assert (recipe.seed, recipe.train.epochs, recipe.train.batch_size) == (1, 4.0, 7)
    assert (recipe.output, recipe.data.source) == ("2024-02-28", "2024-02-30")
    assert load_recipe(path, ["output=2024"]).output == "2024"


def test_tilde_in_output_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(write(tmp_path, "output: ~/run\n")).output == str(tmp_path / "run")


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = "backbones:\n  - &first {name: mae, depth: 2}\n  - {<<: *first, name: dino}\n"
    mae, dino = load_recipe(write(tmp_path, text)).backbones
    assert (mae, dino) == (BackboneRecipe(name="mae", depth=2), BackboneRecipe(name="dino", depth=2))


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("base: all\nbackbone: {depth: 2}", {}),
        ("backbones: [{name: mae}]\nbackbone: {name: dino}", {}),
        ("base: all", {"backbone.depth": 2}),
        ("base: all", {"backbone.name": "dinov2"}),
        ("base: base", {"backbone": {"depth": 2}, "backbones": [{"name": "mae"}]}),
    ],
)
def test_a_backbone_that_the_list_of_backbones_would_hide_is_refused(
    text: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"^backbone: this section has no effect .* set backbones=\[\]"):
        load_recipe(write(tmp_path, text), overrides)


def test_backbones_replace_an_inherited_backbone_and_the_reverse(tmp_path: Path) -> None:
    (several,) = load_recipe("dinov2", ["backbones=[{name: mae}]"]).backbones
    assert several.name == "mae"
    single = load_recipe("all", ["backbones=[]", "backbone.name=dino"])
    assert (single.backbones, single.backbone.name) == ((), "dino")


def test_backbones_are_selected_by_name() -> None:
    listed = load_recipe(RECIPES / "all.yaml").backbones
    selected = load_recipe(RECIPES / "all.yaml", ["backbones=[dino,mae]"]).backbones
    assert [backbone.name for backbone in selected] == ["dino", "mae"]
    assert set(selected) < set(listed)
    with pytest.raises(InputError, match="'dyno' is not one of the recipe's backbones: mae, ijepa, "):
        load_recipe(RECIPES / "all.yaml", ["backbones=[dyno]"])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epochz=3", ("'train.epochz'", "'train.epochs'")),
        ("epochs=3", ("'epochs'", "'train.epochs'")),
        ("lr=1e-3", ("'lr'", "'optimizer.lr'")),
        ("train.epochs=five", ("train.epochs: expected a valid number, got 'five'",)),
        ("train.batch_size=2.5", ("train.batch_size: expected a valid integer, got 2.5",)),
        ("train.batch_size=0", ("train.batch_size: expected a value greater than or equal to 1, got 0",)),
        (f"data.pairs_per_video={10**21}", ("data.pairs_per_video", f"{10**21}", "less than or equal to")),
        ("output=", ("output", "''", "expected a folder")),
        ("train.tensorboard=3", ("train.tensorboard: expected a valid boolean, got 3",)),
        ("train.epochs=.nan", ("train.epochs: expected a finite number, got nan",)),
        ("resume=", ("resume: an empty value is not one of: auto, never",)),
        ("train.precision=bf15", ("train.precision: 'bf15' is not one of: fp32, bf16, fp16",)),
        ("data.crop_area=[0.9, 0.5]", ("data.crop_area: expected the smaller number first, got [0.9, 0.5]",)),
        ("data.crop_area=[0.9]", ("data.crop_area[1]: expected a value, got [0.9]",)),
        ("data.crop_area=[1, 1, 1]", ("data.crop_area: expected 2 values, got [1, 1, 1]",)),
        ("data.crop_area=[0, 1]", ("data.crop_area[0]: expected a value greater than 0",)),
        ("backbone.mean=0.5", ("backbone.mean: expected a list, got 0.5",)),
        ("backbone.mean=[0.5]", ("backbone.mean[1]: expected a value, got [0.5]",)),
        ("backbone.mean=[123.7, 116.3, 103.5]", ("backbone.mean[0]: expected", "equal to 1, got 123.7")),
        ("backbone.std=[0.5, 0, 0.5]", ("backbone.std[1]: expected a value greater than 0, got 0",)),
        ("backbone.std=[1, 1, 1, 1]", ("backbone.std: expected 3 values, got [1, 1, 1, 1]",)),
        ("train=3", ("train: expected a section of keys, got 3",)),
        ("train.epochs.x=3", ("train.epochs: expected a valid number, got {'x': 3}",)),
        ("backbones={}", ("backbones: expected a list, got {}",)),
        ("backbones=[dyno]", ("backbones: 'dyno'", "does not list any backbones")),
        ("backbones=[{name: mae}, {name: mae}]", ("backbones: expected distinct names", "'mae'")),
        ("backbones=[{nam: mae}]", ("'backbones[0].nam'", "'backbone.name'")),
        ("nonsense", ("'nonsense'", "key=value")),
        ("train.epochs=2024-02-30", ("train.epochs", "number", "'2024-02-30'")),
        (f"train.steps={'9' * 5000}", ("train.steps: expected a valid integer",)),
    ],
)
def test_messages_about_bad_overrides(override: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        load_recipe(RECIPES / "base.yaml", [override])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "not valid YAML"),
        ("- 1\n- 2", "got a list"),
        ("seed: 1\nseed: 2", "duplicate key"),
        ("base: nowhere.yaml", "nowhere.yaml"),
        ("base: recipe.yaml", "recipe.yaml' inherits from itself"),
        (f"seed: {'9' * 5000}", "not valid YAML"),
        ("data: {source: [" + "[" * 3000, "nested too deeply"),
        ("data: " + "[" * 30 + "]" * 30, "nested at most 20 levels"),
        ("data: &again {source: *again}", "nested at most 20 levels"),
        (
            "\n".join(f"k{i}: &k{i} [{f'*k{i - 1},' * 10 if i else 'x,'}]" for i in range(10)),
            "at most 10000 values",
        ),
        ("seed: !!timestamp x", "is not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constructor"),
        ('base: "a\\0b"', "'a\\\\x00b' in"),
        ("base: [x]", "expected that of a recipe"),
        (f"{'y ' * 40_000}: 1", "..."),
    ],
)
def test_messages_about_bad_files(text: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=part):
        load_recipe(write(tmp_path, text))


def test_built_in_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_recipe(RECIPES / "mae.yaml")
    # A folder of the same name, such as one of weights.
    (tmp_path / "mae").mkdir()
    assert load_recipe("recipes/mae.yaml") == load_recipe("mae") == load_recipe("mae", {}) == shipped
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mae.yaml").write_text("seed: 7\n")
    assert load_recipe("recipes/mae.yaml").seed == 7
    # A name always means the built-in recipe; a file without suffix can be given as a path.
    (tmp_path / "dino").write_text("seed: 7\n")
    assert load_recipe("dino").seed == 0
    assert load_recipe("./dino").seed == load_recipe(tmp_path / "dino").seed == 7
    with pytest.raises(
        InputError, match=r"'dinov' does not exist; did you mean 'dino.*'\? .* all, base, blip"
    ):
        load_recipe("dinov")


@pytest.mark.parametrize("base", ["base.yaml", "base", "recipes/base.yaml", "dinov2"])
def test_a_recipe_anywhere_inherits_from_a_built_in_one(base: str, tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, f"base: {base}\n")).train.accumulate == 4


def test_a_base_next_to_the_recipe_precedes_the_built_in_one(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 7\n")
    assert load_recipe(write(tmp_path, "base: base.yaml\n")).seed == 7


def test_overrides_may_be_values() -> None:
    given = {"train.epochs": 3, "train": {"warmup_epochs": 0.5}, "data.source": Path("2024"), "output": "on"}
    recipe = load_recipe("dinov2", given)
    assert (recipe.train.epochs, recipe.train.warmup_epochs, recipe.train.accumulate) == (3, 0.5, 4)
    assert (recipe.data.source, recipe.output) == ("2024", "on")
    assert load_recipe(recipe, {"seed": 5, "backbone": {"depth": 2}}) == load_recipe(
        "dinov2", ["train.epochs=3", "train.warmup_epochs=.5", "data.source=2024", "output=on", "seed=5",
                   "backbone.depth=2"],
    )  # fmt: skip
    assert [each.name for each in load_recipe("all", {"backbones": ("dino", "mae")}).backbones] == [
        "dino",
        "mae",
    ]
    for unknown, message in (
        ({"epochs": 3}, "'epochs'; did you mean 'train.epochs'"),
        ({"train.epochz": 3}, "'train.epochz'"),
        ({"train": {"epochz": 3}}, "'train.epochz'"),
        # Not YAML text.
        ({"train.epochs": "3"}, "train.epochs: expected a valid number, got '3'"),
    ):
        with pytest.raises(InputError, match=message):
            load_recipe(recipe, unknown)


def test_the_hash_ignores_only_keys_that_may_change_on_resume() -> None:
    recipe = Recipe()
    moved = dataclasses.replace(
        recipe,
        output="elsewhere",
        train=dataclasses.replace(recipe.train, log_every=3, batch_size=1, steps=9),
    )
    assert recipe_hash(moved) == recipe_hash(recipe)
    assert differences(recipe, moved) == []
    train = TrainRecipe(warmup_epochs=2.0)
    other = dataclasses.replace(recipe, train=train, backbone=BackboneRecipe(name="mae"))
    assert recipe_hash(other) != recipe_hash(recipe)
    assert differences(recipe, other) == [
        "backbone.name: 'dinov2' -> 'mae'",
        "train.warmup_epochs: 1.0 -> 2.0",
    ]


def test_the_table_of_keys_in_the_documentation_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--keys"])
    table = capsys.readouterr().out
    assert "| `train.steps` | integer / null | `null` | " in table
    page = (RECIPES.parent / "docs/recipes.md").read_text()
    assert f"<!-- keys: begin -->\n{table}<!-- keys: end -->\n" in page


def test_the_schema_file_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert (RECIPES / "schema.json").read_text() == capsys.readouterr().out
    for path in RECIPES.glob("*.yaml"):
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n"), path
