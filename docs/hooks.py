"""MkDocs hook: list every error message for bad input, read from the source, on the troubleshooting page."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "fasttrain"
MARKER = "<!-- messages -->"
# The heading of each group, by the beginning of the module's path.
GROUPS = {
    "recipe": "Recipes",
    "data/pack": "Packed sets",
    "data/": "Data sources and loading",
    "evaluation/": "Evaluation",
    "backbones weights projection video_encoder": "Backbones, weights and projections",
    "": "Training, devices and files",
}
# Unreadable frames are skipped or replaced, and named in the log.
ERRORS = ("InputError", "LocalInputError", "UnreadableFrameError", "ValueError")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARKER, message_lists()) if MARKER in markdown else markdown


def message_lists() -> str:
    """The messages of all modules as Markdown lists, one per group, with the variable parts as `‹name›`."""
    groups: dict[str, set[str]] = defaultdict(set)
    for path in sorted(SOURCE.rglob("*.py")):
        module = str(path.relative_to(SOURCE).with_suffix(""))
        heading = next(GROUPS[names] for names in GROUPS if any(map(module.startswith, names.split(" "))))
        groups[heading] |= set(messages(path))
    return "\n\n".join(
        f"### {heading}\n\n" + "\n".join(f"- ``{message}``" for message in sorted(groups[heading]))
        for heading in GROUPS.values()
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
    # The last name of an expression says what it is: `recipe.data.source` becomes ‹source›.
    names = re.findall(r"[a-z_]\w*", re.sub(r"'[^']*'", "", ast.unparse(part.value)), re.IGNORECASE)
    return f"‹{names[-1].strip('_') if names else '…'}›"
