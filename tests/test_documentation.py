"""README and docs: commands parse, named files and options exist, and Python snippets run."""

import argparse
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from synthetic import make_scene, write_run, write_videos

from fasttrain.options import COMMANDS, new_parser
from fasttrain.recipe import is_name, keys_table, load_recipe
from fasttrain.tools.synthetic import write_scene

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
KEYS = set(re.findall(r"^\| `([\w.]+)`", keys_table(), re.MULTILINE))
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
# Options of other programs: torchrun, pip and SLURM.
FOREIGN_OPTIONS = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--help", "--no-deps"}
FOREIGN_OPTIONS |= {"--signal", "--disable-status"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> Iterator[str]:
    """Yield the code blocks of a page in one language, except Python blocks marked `<!-- not run -->`."""
    for marker, body in re.findall(
        rf"(<!-- not run -->\n+)?^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    ):
        if not (language == "python" and marker):
            yield body


def inline_code(page: Path) -> set[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", prose))


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every shell command on a page, in code blocks and in running text."""
    for block in blocks(page, "bash"):
        without_comments = re.sub(r"(^|\s)#.*", "", block.replace("\\\n", " "), flags=re.MULTILINE)
        for line in re.split(r"\n|&&|[>|;]", without_comments):
            yield shlex.split(line)
    for code in inline_code(page):
        if code.startswith(("fasttrain ", "python -m ", "torchrun ", "make ")):
            yield shlex.split(re.split(r"&&|[>|;]", code)[0])


@cache
def parser_of(command: str) -> argparse.ArgumentParser:
    return new_parser(command)


@cache
def known_options() -> set[str]:
    """Return all options of the commands and benchmarks, and `FOREIGN_OPTIONS`."""
    sources = [*(ROOT / "fasttrain").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    own = {option for path in sources for option in re.findall(r'"(--[a-z][\w-]*)"', path.read_text())}
    return own | FOREIGN_OPTIONS


def fasttrain_arguments(words: list[str]) -> list[str] | None:
    """Return the arguments of a fasttrain command, started by name, python -m, torchrun or srun, or None."""
    if words[0] == "fasttrain":
        return words[1:]
    if words[0] in ("python", "torchrun", "srun") and "-m" in words:
        rest = [word for word in words[words.index("-m") + 1 :] if word != "--"]
        return rest[1:] if rest[0] == "fasttrain" else None
    return None


@every_page
def test_commands_exist_and_parse(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in filter(None, commands(page)):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), words
        elif (arguments := fasttrain_arguments(words)) is not None:
            check_fasttrain(arguments)


def check_fasttrain(words: list[str]) -> None:
    """Check that arguments parse, and that the recipe keys and recipe files in them exist."""
    if (
        not words
        or words == ["RECIPE"]
        or words[0].startswith("COMMAND")
        or words in (["--help"], ["--version"])
    ):
        return
    command = words.pop(0) if words[0] in COMMANDS else "train"
    if not words:
        return  # Only the name of the command.
    if "--help" in words or "--keys" in words or words[:1] == ["..."]:
        return
    parser = parser_of(command)
    try:
        # Running text may name an evaluation without its required options.
        if command == "eval" and len(words) == 1:
            words += ["--root", "ROOT", "--run", "RUN"]
        parse = parser.parse_args if command == "eval" else parser.parse_intermixed_args
        arguments = parse(words)
    except SystemExit:
        pytest.fail(f"fasttrain {command} {shlex.join(words)} does not parse")
    if command in ("train", "demo"):
        overrides = [word for word in arguments.overrides if word not in ("...", "[key=value", "...]")]
        for override in overrides:
            assert override.split("=")[0] in KEYS, f"{override}: not a recipe key"
        recipe = arguments.recipe
        if recipe.startswith("recipes/") or (is_name(recipe) and not recipe.isupper()):
            # Omit placeholders, such as data.source=PATH.
            concrete = [word for word in overrides if not re.search(r"=[A-Z_]+$", word)]
            load_recipe(recipe, concrete)


def test_the_command_in_the_batch_script_parses() -> None:
    script = (ROOT / "examples/slurm.sbatch").read_text()
    (line,) = re.findall(r"^srun .*", script.replace("\\\n", " "), re.MULTILINE)
    arguments = fasttrain_arguments(shlex.split(line))
    assert arguments is not None
    check_fasttrain(arguments)


@every_page
def test_options_and_keys_named_in_text_exist(page: Path) -> None:
    for code in inline_code(page):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in known_options(), code
        if match := re.fullmatch(r"([a-z_]+)(\.[a-z_]+)(=.*)?", code):
            section, key, _ = match.groups()
            if section in SECTIONS and key not in (".py", ".yaml", ".json", ".pt", ".safetensors"):
                assert section + key in KEYS, code


@every_page
def test_files_and_links_exist(page: Path) -> None:
    folders = "|".join(("fasttrain", "kernels", "recipes", "benchmarks", "tests", "docs", "examples"))
    for code in inline_code(page):
        if result := re.fullmatch(r"benchmarks/results/(\w+)-(?:cpu|cuda)\.json", code):
            # Not every benchmark has run on every kind of device.
            assert (ROOT / f"benchmarks/{result[1]}.py").is_file(), code
        elif re.fullmatch(rf"(?:{folders})/[\w./-]*", code):
            assert (ROOT / code).exists(), code
        elif re.fullmatch(r"(?:fasttrain|fasttrain_kernels)(?:\.\w+)+", code) and "safetensors" not in code:
            assert resolves(code), code
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), target


def resolves(dotted: str) -> bool:
    """Return whether a dotted name is a module or an attribute of one."""
    names = dotted.split(".")
    for count in range(len(names), 0, -1):
        try:
            value = importlib.import_module(".".join(names[:count]))
        except ModuleNotFoundError:
            continue
        for name in names[count:]:
            if not hasattr(value, name):
                return False
            value = getattr(value, name)
        return True
    return False


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(blocks(page, "python"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the snippets of a page in order, in a folder with the files that they use."""
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/dinov2")
    write_videos(tmp_path / "videos")
    write_scene(make_scene(0), tmp_path / "clip.mp4")
    recipe = tmp_path / "recipes/dinov2.yaml"
    recipe.parent.mkdir()
    monkeypatch.setattr("fasttrain.recipe.RECIPES", recipe.parent)
    # Small enough for a test, with the name of a recipe that the snippets use.
    recipe.write_text(
        "backbone: {name: dinov2, patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}\n"
        "data: {image_size: 64}\n"
        "train: {steps: 1, batch_size: 2, precision: fp32, tensorboard: false}\n"
        "device: cpu\n"
    )
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, f"{page.name}", "exec"), namespace)


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
