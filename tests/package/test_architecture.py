"""``docs/architecture.md`` is the map of the package as it is."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
ORDER = [name for row in ROWS for name in re.findall(r"`(\w+)/?`", row)]


def rooms() -> dict[str, str]:
    """The source of every room by its name; a folder is one."""
    files = sorted((ROOT / "selftrans_reg").rglob("*.py"))
    found: dict[str, str] = {}
    for file in files:
        name = file.relative_to(ROOT / "selftrans_reg").parts[0].removesuffix(".py")
        found[name] = found.get(name, "") + file.read_text()
    del found["__init__"]
    return found


def test_it_has_every_room() -> None:
    assert sorted(ORDER) == sorted(rooms())


def test_a_room_imports_only_what_stands_above_it() -> None:
    """So there are no circles; in its own row, what stands before it."""
    for name, source in rooms().items():
        dots = r"\.\." if name == "analysis" else r"\."
        for imported in re.findall(rf"^(?:    )?from {dots}(\w+) import", source, re.MULTILINE):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"
