"""The examples use public names of the library only, so that a script can be copied out."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_scripts_import_public_names_only() -> None:
    scripts = [path.read_text() for path in (ROOT / "examples").rglob("*.py")]
    found = {
        line for text in scripts for line in re.findall(r"^ *((?:from|import) selftrans_reg\S*.*)", text, re.MULTILINE)
    }
    drawing = {line for line in found if line.startswith("from selftrans_reg.analysis.draw import ")}
    assert {line.removesuffix("  # New") for line in found - drawing} == {"import selftrans_reg as st"}
    documented = (ROOT / "docs" / "api.md").read_text()  # the drawing functions, which need matplotlib
    assert all(f"   {name}\n" in documented for line in drawing for name in line.split(" import ")[1].split(", "))
