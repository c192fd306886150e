"""The examples use public names of the library only, so that a script can be copied out."""

import ast
import re
from pathlib import Path

import pytest

import selftrans_reg

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Everything of the library that a module imports, as dotted names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "selftrans_reg"} - {"selftrans_reg"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_a_script_imports_public_names_only(script: Path) -> None:
    documented = (ROOT / "docs" / "api.md").read_text()  # the drawing functions, which need matplotlib
    modules = re.findall("currentmodule:: (.*)\n", documented)
    listed = {f"{module}.{name}" for module in modules for name in re.findall(r"^ {3}(\w+)$", documented, re.MULTILINE)}
    private = {
        name
        for name in imported(ast.parse(script.read_text())) - listed
        if not hasattr(selftrans_reg, name.removeprefix("selftrans_reg."))
    }
    assert private == set()
