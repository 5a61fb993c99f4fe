"""Which run folders a recipe may use, and their locks."""

import dataclasses
import os
from pathlib import Path

import pytest

from fasttrain.errors import InputError
from fasttrain.recipe import Recipe, recipe_from_dict, to_yaml
from fasttrain.run_folder import check_run_folder, lock_run_folder, newest_common


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """The recipe of a run that has begun in its folder."""
    recipe = recipe_from_dict({"output": str(tmp_path)})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    return recipe


def test_a_run_is_continued_with_its_own_recipe_only(recipe: Recipe, tmp_path: Path) -> None:
    assert check_run_folder(recipe) == recipe
    assert check_run_folder(dataclasses.replace(recipe, output=str(tmp_path / "new"))) is None
    with pytest.raises(InputError, match="resume=auto"):
        check_run_folder(dataclasses.replace(recipe, resume="never"))
    other = recipe_from_dict({"output": str(tmp_path), "optimizer": {"lr": 0.2}})
    with pytest.raises(InputError, match=r"a run of another recipe .*optimizer\.lr"):
        check_run_folder(other)


@pytest.mark.parametrize("content", [b"", bytes(300)])
def test_an_empty_recipe_is_called_so(content: bytes, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"recipe.yaml' is empty, as after a loss of power\. If this"):
        check_run_folder(recipe)


def test_backbones_without_a_common_checkpoint_are_refused() -> None:
    """The trained backbone would have to start again with the new one."""
    assert newest_common({"dino": [], "mae": []}, "run") == 0
    assert newest_common({"dino": [2, 4, 6], "mae": [2, 4]}, "run") == 4
    with pytest.raises(InputError, match=r"no checkpoint in common \(last steps: dino: 4, mae: none\)"):
        newest_common({"dino": [2, 4], "mae": []}, "run")


def test_a_run_that_another_one_has_continued_since_is_refused(tmp_path: Path) -> None:
    """The other run ended after this one had read the checkpoints and before it had the lock."""
    (tmp_path / "checkpoints").mkdir()
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_{step:08d}.pt").touch()
    with (
        pytest.raises(InputError, match=r"another run has written to .* Repeat the command"),
        lock_run_folder(tmp_path, [2], 2, keep=2),
    ):
        pass
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000002.pt", "step_00000004.pt"]
