"""Files and functions stay short enough to be read at once."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("dinov2", "prepatching_scripts", "benchmarks", "tests")
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# "path" or "path:function" and why it is longer.
EXCEPTIONS = {
    "dinov2/models/vision_transformer.py:__init__": "23 lines are the published constructor's keywords"
}


def test_files_and_functions_are_short():
    too_long = {}
    for path in FILES:
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            too_long[name] = lines
        for node in ast.walk(ast.parse(text)):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                too_long[f"{name}:{node.name}"] = lines
    assert too_long.keys() == EXCEPTIONS.keys(), too_long
