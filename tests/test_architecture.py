"""Rules for imports among modules (see docs/architecture.md), and of the tests."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import OPTIONAL

ROOT = Path(__file__).resolve().parents[1]
# A module or package may import only from itself and from later entries.
ORDER = (
    "tools",
    "__main__",
    "fitting",
    "fitter",
    "training",
    "trainer",
    "summary",
    "evaluation",
    "backbone_trainer",
    "encoder_options",
    "video_encoder",
    "encoder_runtime",
    "backbones",
    "families",
    "weighting",
    "objective",
    "closed_form",
    "moments",
    "projection",
    "positions",
    "weights",
    "layouts",
    "configuration",
    "optimizer",
    "cuda_graph",
    "run_folder",
    "checkpoint",
    "data",
    "trackers",
    "loggers",
    "profiling",
    "options",
    "recipe",
    "stopping",
    "distributed",
    "launcher",
    "files",
    "normalization",
    "errors",
)
# Packages that a single module may import, with the file name of that module.
ONLY_USER = {
    "fasttrain_kernels": "objective.py",
    "nvidia": "dali.py",
    "torch.distributed": "distributed.py",
    "torch.nn.parallel": "distributed.py",
}


def imports(path: Path) -> set[str]:
    """Return the dotted path of every imported name; paths of relative imports begin with a dot."""
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in imports_of(node)}


def imports_of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return set()


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_order_lists_every_module() -> None:
    names = {path.name.removesuffix(".py") for path in (ROOT / "fasttrain").iterdir()}
    assert names - {"__init__", "__pycache__", "py.typed"} == set(ORDER)


@pytest.mark.parametrize("path", modules("fasttrain"), ids=lambda path: path.stem)
def test_modules_import_only_later_modules(path: Path) -> None:
    name = path.relative_to(ROOT / "fasttrain").parts[0].removesuffix(".py")
    if name != "__init__":
        own = {module.split(".")[1] for module in imports(path) if module.startswith("fasttrain.")}
        assert own <= {name, *ORDER[ORDER.index(name) :]}


def test_recipe_and_distributed_import_only_leaves() -> None:
    for name in ("recipe", "distributed"):
        own = {module for module in imports(ROOT / f"fasttrain/{name}.py") if module.startswith("fasttrain.")}
        assert {module.split(".")[1] for module in own} <= {"errors", "launcher"}


def test_kernels_import_only_torch_and_triton() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for path in (ROOT / "kernels").glob("*.py"):
        for module in imports(path):
            assert module.startswith(".") or module.split(".")[0] in allowed, f"{path.name}: {module}"


@pytest.mark.parametrize("package", ONLY_USER)
def test_a_package_is_imported_by_one_module(package: str) -> None:
    users = {
        path.name
        for path in modules("fasttrain")
        if any(f"{module}.".startswith(f"{package}.") for module in imports(path))
    }
    assert users == {ONLY_USER[package]}


def test_nothing_imports_benchmarks_tests_or_recipes() -> None:
    for path in modules("fasttrain") + modules("kernels"):
        roots = {module.split(".")[0] for module in imports(path)}
        assert not roots & {"benchmarks", "tests", "recipes"}, path


def test_test_files_that_need_optional_packages_are_skipped_without_them() -> None:
    """Elsewhere, `make gpu-check` fails while the tests are collected."""
    always = {"PIL", "filelock", "fsspec", "huggingface_hub", "hypothesis", "numpy", "pytest"}
    always |= {"safetensors", "timm", "torch", "torchvision", "triton", "yaml", *sys.stdlib_module_names}
    own = {"benchmarks", "fasttrain", "fasttrain_kernels", "tests"}
    own |= {path.stem for path in modules("tests")} | {"reliability"}
    for path in modules("tests"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                roots = {name.split(".")[0] for name in imports_of(node)}
                assert roots <= always | own | set(OPTIONAL), path
