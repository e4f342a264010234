"""What holds for every module of the library: documented, annotated, and silent unless it is a command."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("dinov2/**/*.py"), *ROOT.glob("prepatching_scripts/*.py")])
MODULES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in FILES}


def public_definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes, and the public methods of the latter."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


PUBLIC = [item for path, tree in MODULES.items() for item in public_definitions(tree.body, f"{path}:")]


def is_annotated(function: ast.FunctionDef) -> bool:
    """Whether all arguments but self, and the result, carry a type."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    typed = all(argument.annotation for argument in arguments if argument.arg not in ("self", "cls"))
    return typed and function.returns is not None


def test_everything_public_has_a_docstring():
    assert [path for path, tree in MODULES.items() if not ast.get_docstring(tree)] == []
    assert [name for name, node in PUBLIC if not ast.get_docstring(node)] == []


def test_public_functions_are_annotated():
    functions = {name: node for name, node in PUBLIC if isinstance(node, ast.FunctionDef)}
    assert [name for name, node in functions.items() if not is_annotated(node)] == []


def test_only_commands_print():
    printing = {
        path
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert [path for path in printing if '__name__ == "__main__"' not in (ROOT / path).read_text()] == []
