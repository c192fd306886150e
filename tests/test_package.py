"""The package as a whole: what is public, what it imports, what it is made of, and where that is written down."""

import ast
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import selftrans_reg
from selftrans_reg import errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "selftrans_reg").rglob("*.py"))
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
CORE = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in DEPENDENCIES}
ERRORS = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("name", selftrans_reg.__all__)
def test_a_public_name_and_its_methods_are_documented(name: str) -> None:
    value = getattr(selftrans_reg, name)
    methods = {key: member for key, member in vars(value).items() if not key.startswith("_")}
    named = {name: value} | {key: member for key, member in methods.items() if inspect.isroutine(member)}
    assert [key for key, member in named.items() if not inspect.getdoc(member)] == []


def test_what_the_package_exports_is_listed() -> None:
    """In ``__all__`` or, the exception classes, in ``selftrans_reg.errors``; nothing else is left in the namespace."""
    exported = {key for key, value in vars(selftrans_reg).items() if key[0] != "_" and not inspect.ismodule(value)}
    assert exported == {*selftrans_reg.__all__} | {error.__name__ for error in ERRORS}


def test_the_version_is_written_once() -> None:
    version = selftrans_reg.__version__
    assert importlib.metadata.version("selftrans-reg") == version
    assert f"\n## {version} (" in (ROOT / "docs/changelog.md").read_text()
    files = subprocess.run(["git", "ls-files", "*.py", "*.toml"], cwd=ROOT, check=True, capture_output=True, text=True)
    code = [ROOT / path for path in files.stdout.splitlines()]
    assert [path.name for path in code if f'"{version}"' in path.read_text()] == ["__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_module_imports_only_the_dependencies(path: Path) -> None:
    """A function that draws may import matplotlib; a type checker alone sees typing_extensions, which torch needs."""
    excused: dict[ast.AST, str] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            excused |= dict.fromkeys(ast.walk(node), "matplotlib")
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            excused |= dict.fromkeys(ast.walk(node), "typing_extensions")
        elif isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - CORE - {"selftrans_reg"}
            assert foreign <= {excused.get(node)}, f"{path.name}:{node.lineno}"  # whose parents were walked before


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_ours_a_builtin_too_and_raised(error: type) -> None:
    assert issubclass(error, errors.SelfTransError)
    assert error.__doc__
    if error is not errors.SelfTransError:
        assert {base for base in error.__mro__ if base.__module__ == "builtins"} > {Exception, BaseException, object}
    if not error.__subclasses__():
        assert any(re.search(rf"\b{error.__name__}\(", path.read_text()) for path in SOURCES if path.stem != "errors")


def test_every_public_exception_is_in_the_module_of_errors() -> None:
    bases = "|".join([*(error.__name__ for error in ERRORS), r"\w*Error", r"\w*Exception", r"\w*Warning"])
    found = {path.stem for path in SOURCES if re.search(rf"^class [^_]\w*\(.*\b({bases})\b", path.read_text(), re.M)}
    assert found == {"errors"}


def test_joined_strings_keep_the_space_between_them() -> None:
    """Where a message goes on in the next line's string, one of the two brings the space."""
    for path in SOURCES:
        assert re.findall(r"(?<!\\n)(?<=\S)\"\n\s*f?\"(?=[\w('{]).*", path.read_text()) == [], path.name


def test_the_page_of_the_architecture_has_every_room_and_each_imports_only_what_stands_above_it() -> None:
    """So there are no circles; in its own row, what stands before it. A folder is one room."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    order = [name for row in rows for name in re.findall(r"`(\w+)/?`", row)]
    rooms = [path.relative_to(ROOT / "selftrans_reg").parts[0].removesuffix(".py") for path in SOURCES]
    assert sorted(order) == sorted({*rooms} - {"__init__"})
    for room, path in zip(rooms, SOURCES, strict=True):
        dots = r"\.\." if room == "analysis" else r"\."
        imported = re.findall(rf"^(?:    )?from {dots}(\w+) import", path.read_text(), re.MULTILINE)
        above = order if room == "__init__" else order[: order.index(room)]
        assert {*imported} <= {*above}, path.name


SCRIPT = """\
import torch
import selftrans_reg as st

model, latents = torch.nn.Linear(4, 4), torch.zeros(2, 4, 8, 8)
teacher = st.build_teacher(model, None, layer="blocks.2", guidance_scale=3.0, null={"y": 10})
criterion = st.SelfTransLoss.stage2(model, layer="blocks.1", teacher=teacher, time="sit")
terms = criterion(torch.zeros(()), latents=latents, step=3)
terms.total.backward()
value: float = terms.alignment.item()
features: torch.Tensor = teacher(latents)
print(terms.alignement)
criterion(torch.zeros(()), latent=latents)
st.SelfTransLoss.stage1(model, layer="a", time="sit", latent_channels=4, patch_size=2, wieght=0.5)
"""
TYPOS = {"11": "alignement", "12": "latent", "13": "wieght"}
CHECKERS = {
    "mypy": ["--no-color-output", "--cache-dir", str(ROOT / ".mypy_cache")],
    "basedpyright": ["--pythonpath", sys.executable],  # pyright with its own Node.js: pyright fetches one
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_for_a_type_checker_a_call_gives_loss_terms_and_typos_are_errors(checker: str, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(SCRIPT)
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)]}  # pyright's own rules
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", checker, *CHECKERS[checker], "user.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    found = dict(re.findall(r"user\.py:(\d+)\b.* error: (.*)", done.stdout))
    assert found.keys() == TYPOS.keys(), done.stdout + done.stderr
    assert all(f'"{typo}"' in found[line] for line, typo in TYPOS.items())
