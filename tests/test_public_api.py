"""What `import fasttrain` offers: types, docstrings, and torch.hub."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import write_run

import fasttrain

ROOT = Path(__file__).resolve().parents[1]
# A user's module, which mypy checks.
USER = """
from pathlib import Path
from typing import Any

from typing_extensions import assert_type

import fasttrain
from fasttrain import (
    Backbone, InputError, Projection, Recipe, TrainingResult, VideoEncoder, load_backbone, load_recipe,
    load_video_encoder,
)

recipe: Recipe = load_recipe("dinov2", {"train.epochs": 3})
assert_type(recipe.train.epochs, float)
trained = fasttrain.train(recipe, source=Path("videos"), output="runs/mine", train={"epochs": 3})
assert_type(trained, TrainingResult)
assert_type(trained.encoder, VideoEncoder)
assert_type(trained.results["dinov2"], dict[str, Any])
assert_type(load_backbone("dino"), Backbone)
try:
    encoder = load_video_encoder("runs/mine", "cuda")
except InputError as error:
    print(error)
assert_type(encoder.projection, Projection)
assert_type(encoder.grid(224, 224), tuple[int, int])
"""
# The types of these packages are not needed, and reading them takes long.
CONFIG = """
[mypy]
strict = True
[mypy-fasttrain.*]
follow_imports = silent
[mypy-torch.*,numpy.*,timm.*,triton.*,huggingface_hub.*,rich.*,matplotlib.*,PIL.*,torchvision.*]
follow_imports = skip
"""


def test_a_users_module_passes_strict_type_checks(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", fasttrain.__all__)
def test_public_names_are_documented(name: str) -> None:
    value = getattr(fasttrain, name)
    assert name in dir(fasttrain)
    # Every entry of the page must have a docstring, which `make docs` checks.
    assert f"::: fasttrain.{name}\n" in (ROOT / "docs/api.md").read_text()
    assert inspect.getdoc(value)
    members = vars(value).items() if inspect.isclass(value) else ()
    for member, content in members:
        if not member.startswith("_") and (inspect.isroutine(content) or isinstance(content, property)):
            assert inspect.getdoc(content), f"{name}.{member}"


def test_torch_hub_loads_an_encoder_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    program = f"""
import sys, importlib.util
sys.path = [path for path in sys.path if path != {str(ROOT)!r}]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.modules["fasttrain_kernels"] = None
assert importlib.util.find_spec("fasttrain") is None
import torch
encoder = torch.hub.load({str(ROOT)!r}, "video_encoder", "run", source="local")
print(tuple(encoder(torch.zeros(1, 2, 3, 64, 64)).shape))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "(1, 2, 16, 32)\n", done.stderr
