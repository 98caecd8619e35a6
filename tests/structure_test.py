"""Rooms stay small: lengths of files and functions, and no bare Any in a public signature."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "beit_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
FILE_LINES = 500
FUNCTION_LINES = 60
# A longer function says why right above its `def` (or its decorators).
REASON = "# Long because"


def functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lengths(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= FILE_LINES
    too_long = []
    for node in functions(ast.parse("\n".join(lines))):
        length = node.end_lineno - node.lineno + 1
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        above = first - 2
        while above > 0 and lines[above].lstrip().startswith("#"):
            above -= 1
        reason = any(REASON in line for line in lines[above + 1 : first - 1])
        if length > FUNCTION_LINES and not reason:
            too_long.append(f"{node.name}: {length} lines")
    assert not too_long, f"split, or say why above: {REASON} ... ({'; '.join(too_long)})"


def public_annotations(tree):
    """Annotations of public functions, methods and attributes, with the name they belong to."""

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                if (
                    node.name.startswith("_")
                    and node.name != "__init__"
                    and node.name != "__call__"
                ):
                    continue
                arguments = [
                    *node.args.posonlyargs,
                    *node.args.args,
                    *node.args.kwonlyargs,
                    node.args.vararg,
                    node.args.kwarg,
                ]
                for argument in arguments:
                    if argument is not None and argument.annotation is not None:
                        yield f"{prefix}{node.name}({argument.arg})", argument.annotation
                if node.returns is not None:
                    yield f"{prefix}{node.name}()", node.returns
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield f"{prefix}{node.target.id}", node.annotation

    yield from visit(tree.body, "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_bare_any_in_public_signatures(path):
    """`beit_jax/types.py` names what cannot be typed more closely, and alone may say Any."""
    if path == PACKAGE / "types.py":
        return
    found = [
        name
        for name, annotation in public_annotations(ast.parse(path.read_text()))
        if any(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(annotation))
    ]
    assert not found
