"""Files and functions stay short enough to be read at once."""

import ast
from pathlib import Path

from helpers import ROOT

FOLDERS = ("mlm", "lion_kernels", "scripts", "tests")  # and files beside them
LONGEST_FUNCTION, LONGEST_KERNEL, LONGEST_FILE = 60, 90, 500  # lines
FILES_OF_THEIR_OWN_SIZE = {"models_lion.py"}  # all of LION in images, formats included


def sources() -> list[Path]:
    return [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]


def longest(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    is_kernel = any("triton.jit" in ast.unparse(word) for word in function.decorator_list)
    return LONGEST_KERNEL if is_kernel else LONGEST_FUNCTION


def test_functions_are_short():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
        and lines > longest(node)
    ]
    assert not long, "\n".join(long)


def test_files_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in sources()}
    long = {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}
    assert set(long) <= FILES_OF_THEIR_OWN_SIZE, long


def test_all_folders_are_looked_at():
    assert {"main.py", "pretrain.py", "chunks.py", "export.py", "report.py", "programs.py"} <= {
        path.name for path in sources()
    }
