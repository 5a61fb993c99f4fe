"""Who may import whom: the rules of the README's architecture map."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each module of the training path may import from the project. Errors may be raised anywhere.
ALLOWED = {
    "recipe": {"errors"},
    "distributed": {"errors"},
    "checkpoint": {"errors", "files"},
    "errors": set(),
    "optimizer": {"cuda_graph", "errors", "recipe"},
    "files": {"errors"},
    "loggers": {"files"},
    "projection": {"errors", "files", "weights"},
    "objective": {"projection", "recipe"},
    "cuda_graph": set(),
    "profiling": {"files"},
    "encoder_runtime": {"backbones", "errors", "recipe"},
    # No data: benchmarks drive it with frames that are on the device already.
    "backbone_trainer": {
        "backbones",
        "checkpoint",
        "cuda_graph",
        "distributed",
        "encoder_runtime",
        "errors",
        "loggers",
        "objective",
        "optimizer",
        "profiling",
        "projection",
        "recipe",
        "video_encoder",
    },
    "trainer": {
        "backbones",
        "checkpoint",
        "data",
        "distributed",
        "errors",
        "files",
        "loggers",
        "optimizer",
        "profiling",
        "projection",
        "recipe",
        "backbone_trainer",
    },
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; relative imports start with a dot."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", ALLOWED)
def test_training_path(name: str) -> None:
    own = {
        module.split(".")[1]
        for module in imports(ROOT / "fasttrain" / f"{name}.py")
        if module.startswith("fasttrain.")
    }
    assert own - {"errors"} <= ALLOWED[name]


def test_kernels_need_torch_and_triton_only() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for path in modules("kernels"):
        for module in imports(path):
            assert module.startswith(".") or module.split(".")[0] in allowed, f"{path.name}: {module}"


def test_objective_is_the_only_caller_of_the_kernels() -> None:
    callers = {
        path.name for path in modules("fasttrain") if any("fasttrain_kernels" in m for m in imports(path))
    }
    assert callers == {"objective.py"}


def test_pipeline_is_the_only_user_of_dali() -> None:
    users = {path.name for path in modules("fasttrain") if any(m.startswith("nvidia") for m in imports(path))}
    assert users == {"dali.py"}


def test_distributed_is_the_only_user_of_torch_distributed() -> None:
    users = {
        path.name
        for path in modules("fasttrain")
        if any(m.startswith(("torch.distributed", "torch.nn.parallel")) for m in imports(path))
        or "torch.distributed." in path.read_text()
    }
    assert users == {"distributed.py"}


def test_nothing_imports_benchmarks_tests_or_recipes() -> None:
    for folder in ("fasttrain", "kernels"):
        for path in modules(folder):
            roots = {module.split(".")[0] for module in imports(path)}
            assert not roots & {"benchmarks", "tests", "recipes"}, path


def test_data_and_evaluation_stay_out_of_the_trainer() -> None:
    for folder in ("fasttrain/data", "fasttrain/evaluation"):
        for path in modules(folder):
            assert not any(m.startswith("fasttrain.trainer") for m in imports(path)), path


def test_an_evaluation_needs_no_dali() -> None:
    """A machine may lack it, and its import takes a second."""
    program = (
        "import sys; sys.modules['nvidia'] = sys.modules['nvidia.dali'] = None; "
        "import fasttrain.evaluation.command"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
