"""Every code block of the README and of docs/ runs, and what the pages point to exists.

- A page's blocks fenced as ``python`` run from top to bottom in one namespace, with warnings as errors, the global seed
  set to 0 and an empty working directory. Blocks fenced as ``pycon`` are doctests in the same namespace, where ``...``
  stands for anything. Other fences do not run; one that is not in ``NOT_RUN`` fails, and so does an indented block.
- What a reader has and the test has not is made in an HTML comment that begins with ``<!-- setup``. It runs where it
  stands, and may import what ``tests/`` and ``examples/`` hold.
"""

import doctest
import re
import sys
import textwrap
import traceback
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from markdown_it import MarkdownIt

import selftrans_reg
from selftrans_reg import errors

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {"bash", "bibtex", "diff", "text", "{eval-rst}", "{figure}", "{image}", "{math}", "{note}", "{toctree}"}
SETUP = re.compile(r"<!--[ ]*setup[ ]*\n(.*?)-->", re.DOTALL)


class Block(NamedTuple):
    """A piece of a page: ``kind`` is the fence's language, or ``setup``; ``line`` is that of its first line of code."""

    kind: str
    line: int
    code: str


def blocks_of(text: str) -> list[Block]:
    blocks = []
    for token in MarkdownIt("commonmark").parse(text):
        first = token.map[0] + 1 if token.map else 0
        if token.type in ("fence", "code_block"):
            kind = (token.info.split() or ["unnamed"])[0] if token.type == "fence" else "indented"
            blocks.append(Block(kind, first + 1, token.content))
        elif token.type == "html_block" and (found := SETUP.match(token.content.lstrip())):
            blocks.append(Block("setup", first + 1, textwrap.dedent(found[1])))
    return blocks


def run_page(page: Path, text: str) -> None:
    """Run a page's blocks in order, in a module of their own; a traceback names the page and its line."""
    module = types.ModuleType(f"page_{re.sub(r'[^a-z0-9]', '_', page.stem.lower())}")
    sys.modules[module.__name__] = module  # where pickle and inspect look for what a page defines
    try:
        for block in blocks_of(text):
            if block.kind in {"python", "setup"}:
                code = "\n" * (block.line - 1) + block.code
                exec(compile(code, str(page), "exec", dont_inherit=True), module.__dict__)
            elif block.kind == "pycon":
                run_doctest(page, block, module.__dict__)
    finally:
        del sys.modules[module.__name__]


def run_doctest(page: Path, block: Block, namespace: dict[str, object]) -> None:
    test = doctest.DocTestParser().get_doctest(block.code, {}, page.name, str(page), block.line - 1)
    assert test.examples, f"{page.name}:{block.line}: a pycon block without a >>> prompt runs nothing"
    test.globs = namespace  # the constructor would copy it, and later blocks would not see this one's names
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    failed, _ = runner.run(test, out=report.append, clear_globs=False)
    assert not failed, "".join(report)


@pytest.mark.parametrize("page", [p for p in PAGES if "```py" in p.read_text()], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run_page(page, page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs_or_need_not_and_fits_its_column(page: Path) -> None:
    """79 columns are what a page shows without scrolling: what is cut off is often the marker of a new line."""
    for block in blocks_of(page.read_text()):
        assert block.kind in NOT_RUN | {"python", "pycon", "setup"}, f"{page.name}:{block.line}: {block.kind}"
        prompts = {"python": "", "pycon": (">>>", "...")}.get(block.kind, ())  # of what is written, not what is printed
        wide = [line for line in block.code.splitlines() if line.startswith(prompts) and len(line) > 79]
        assert wide == [], f"{page.name}:{block.line}"


def test_the_readme_fits_two_screens_and_runs_with_a_model_a_transport_and_a_loader() -> None:
    text = (ROOT / "README.md").read_text()
    names: dict[str, object] = {}
    for block in blocks_of(text):
        if block.kind == "setup":
            exec(block.code, names)
    assert names.keys() - {"torch", "SiT", "Transport", "__builtins__"} == {"SiT_B_2", "transport", "loader"}
    assert len(SETUP.sub("", text).splitlines()) <= 107


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_exists(page: Path) -> None:
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    local = {link for link in re.findall(r"\]\(([\w/.-]+\.\w+)", prose) if not (page.parent / link).exists()}
    ours = set(re.findall(r"(?<![\w/.-])(?:docs|examples|selftrans_reg|tests)/[\w/-]+\.(?:md|png|py|sh|txt)\b", text))
    assert local | {path for path in ours if not (ROOT / path).exists()} == set(), page.name


def test_the_reference_has_every_public_name_and_the_page_of_errors_every_error() -> None:
    listed = (ROOT / "docs/api.md").read_text().split()
    assert [name for name in selftrans_reg.__all__ if name not in [*listed, "SelfTransError"]] == []
    causes = (ROOT / "docs/errors.md").read_text()
    raised = [name for name, value in vars(errors).items() if isinstance(value, type) and name != "SelfTransError"]
    assert [name for name in raised if f"`{name}`" not in causes] == []


PAGE = """
<!-- setup
hidden, seen = 20, []
-->

1. In a list:

   ```python
   visible = hidden + 1
   ```

```pycon
>>> visible
{shown}
>>> later = visible
```

```python
seen.append(later)
{last}
```

```py
```

    indented
"""


@pytest.mark.parametrize(
    ("shown", "last", "error", "match"),
    [
        (21, "raise KeyError(seen)", KeyError, r"^\[21\]$"),  # all before it ran, in order
        (22, "", AssertionError, r"(?s)Expected:\s+22\s+Got:\s+21"),
        (21, "import warnings; warnings.warn('stale', stacklevel=1)", UserWarning, "stale"),
    ],
)
def test_a_page_runs_in_order_and_fails_where_it_should(shown: int, last: str, error: Any, match: str) -> None:
    text = PAGE.format(shown=shown, last=last)
    assert [block.kind for block in blocks_of(text)] == ["setup", "python", "pycon", "python", "py", "indented"]
    with pytest.raises(error, match=match) as caught:
        run_page(Path("page.md"), text)
    frame = traceback.extract_tb(caught.tb)[-1]
    assert error is AssertionError or (frame.filename, text.splitlines()[frame.lineno - 1]) == ("page.md", last)
