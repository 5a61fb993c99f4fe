"""MkDocs hook for two parts of pages: the list of messages for bad input, and the table of reliability."""

import ast
import builtins
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "fasttrain"
MARKER = "<!-- messages -->"
RELIABILITY = "<!-- reliability -->"
# The heading of each group, by the beginning of the module's path.
GROUPS = {
    "recipe": "Recipes",
    "data/pack": "Packed sets",
    "data/": "Data sources and loading",
    "evaluation/ encoder_options tools/embed": "Evaluation and features",
    "backbones families layouts configuration weights projection video": "Backbones and projections",
    "": "Training, devices and files",
}
# UnreadableFrameError is included because its message appears in the log, although it does not end a run.
ERRORS = (
    "InputError",
    "LocalInputError",
    "OtherRankError",
    "LostContactError",
    "UnreadableFrameError",
    "ValueError",
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    for marker, content in ((MARKER, message_lists), (RELIABILITY, reliability_table)):
        if marker in markdown:
            markdown = markdown.replace(marker, content())
    return markdown


def reliability_table() -> str:
    """The parts of the reliability harness with their figures, as a Markdown table."""
    result = json.loads((SOURCE.parent / "benchmarks/results/reliability.json").read_text())
    lines = ["| part | what is tried | trials | broken promises | minutes |", "|---|---|---|---|---|"]
    for name, part in result["parts"].items():
        source = (SOURCE.parent / f"tests/reliability/{name}.py").read_text()
        what = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].replace("\n", " ")
        minutes = f"{part['seconds'] / 60:.1f}"
        lines.append(f"| `{name}` | {what} | {part['trials']} | {len(part['failures'])} | {minutes} |")
    environment = result["environment"]
    machine = f"{environment['cpu']['cores']} cores of an {environment['cpu']['model']}"
    note = f"From `benchmarks/results/reliability.json`: {machine}, {environment['date'][:10]}."
    return "\n".join([*lines, "", note])


def message_lists() -> str:
    """The messages of all modules as Markdown lists, one per group, with the variable parts as `‹name›`."""
    groups: dict[str, set[str]] = defaultdict(set)
    for path in sorted(SOURCE.rglob("*.py")):
        module = str(path.relative_to(SOURCE).with_suffix(""))
        heading = next(GROUPS[names] for names in GROUPS if any(map(module.startswith, names.split(" "))))
        groups[heading] |= set(messages(path))
    return "\n\n".join(
        f"### {heading}\n\n" + "\n".join(map(_item, sorted(groups[heading]))) for heading in GROUPS.values()
    )


def messages(path: Path) -> Iterator[str]:
    """The literal messages that a module raises for bad input."""
    tree = ast.parse(path.read_text())
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        message = node.exc.args[0]
        parts = message.values if isinstance(message, ast.JoinedStr) else [message]
        if getattr(node.exc.func, "id", None) in ERRORS and isinstance(message, ast.JoinedStr | ast.Constant):
            yield "".join(_text(part, constants) for part in parts)


def _text(part: ast.expr, constants: dict[str, Any]) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    if isinstance(part.value, ast.Name) and part.value.id in constants:
        return str(constants[part.value.id])
    return f"‹{_placeholder(part.value).strip('_').lower()}›"


def _item(message: str) -> str:
    """Format a message as a list item. A space keeps a backtick apart from the delimiters of the code."""
    padding = " " if message.startswith("`") or message.endswith("`") else ""
    return f"- ``{padding}{message}{padding}``"


def _placeholder(expression: ast.expr) -> str:
    """Return the last name in an expression, such as `source` for `recipe.data.source`, or an ellipsis."""
    names = re.findall(r"[a-zA-Z_]\w*", re.sub(r"'[^']*'", "", ast.unparse(expression)))
    ignored = {*dir(builtins), *dir(str)}  # functions and methods that format the value
    return next((name for name in reversed(names) if name not in ignored), "…")
