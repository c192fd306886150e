"""The package as a whole: what the repository holds, what is public, what an import costs."""

import ast
import builtins
import importlib
import importlib.metadata
import inspect
import pkgutil
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
PACKAGE = ROOT / "selftrans_reg"
MODULES = [importlib.import_module(f"selftrans_reg.{found.name}") for found in pkgutil.iter_modules([str(PACKAGE)])]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {"einops", "huggingface_hub", "safetensors", "torch"}
ERRORS = [value for value in vars(errors).values() if isinstance(value, type)]


def tracked_files() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_top_level_holds_only_what_belongs_there() -> None:
    top = {Path(path).parts[0] for path in tracked_files()}
    assert {name for name in top if not name.startswith(".")} == {
        *("LICENSE", "README.md", "docs", "examples", "pyproject.toml", "selftrans_reg", "tests"),
    }


@pytest.mark.parametrize("name", selftrans_reg.__all__)
def test_a_public_name_imports_and_is_documented(name: str) -> None:
    value = getattr(selftrans_reg, name)
    assert inspect.getdoc(value)
    methods = (
        [member for key, member in vars(value).items() if not key.startswith("_")] if inspect.isclass(value) else []
    )
    undocumented = [m.__name__ for m in methods if inspect.isroutine(m) and not inspect.getdoc(m)]
    assert undocumented == []


def test_what_the_package_exports_is_listed() -> None:
    """In ``__all__`` or, the exception classes, in ``selftrans_reg.errors``; nothing else is left in the namespace."""
    exported = {key: value for key, value in vars(selftrans_reg).items() if not key.startswith("_")}
    unlisted = {key for key, value in exported.items() if not inspect.ismodule(value)} - set(selftrans_reg.__all__)
    assert unlisted | {"SelfTransError"} == {error.__name__ for error in ERRORS}


def test_the_version_is_written_once() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert importlib.metadata.version("selftrans-reg") == selftrans_reg.__version__
    assert f"\n## {selftrans_reg.__version__} (" in (ROOT / "docs" / "changelog.md").read_text()
    code = [ROOT / path for path in tracked_files() if path.endswith((".py", ".toml"))]
    written = [path.name for path in code if re.search(rf'"{re.escape(selftrans_reg.__version__)}"', path.read_text())]
    assert written == ["__init__.py"]


def test_the_dependencies_are_the_four() -> None:
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in PROJECT["dependencies"]}
    assert declared == CORE


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_a_module_imports_only_the_dependencies(path: Path) -> None:
    """matplotlib may be imported late, inside the function that draws."""
    tree = ast.parse(path.read_text())
    late = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else []
        else:
            continue
        foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - CORE - {"selftrans_reg"}
        assert foreign <= ({"matplotlib"} if node in late else set()), f"{path.name}:{node.lineno}"


def test_importing_the_package_loads_none_of_the_extras() -> None:
    extras = {"accelerate", "diffusers", "matplotlib", "PIL", "scipy", "sklearn", "tensorboard", "transformers"}
    code = "import sys, selftrans_reg; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "selftrans_reg" in loaded
    assert extras.isdisjoint(loaded)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_ours_and_a_builtin(error: type) -> None:
    assert issubclass(error, errors.SelfTransError)
    assert error.__doc__
    if error is not errors.SelfTransError:
        builtin = [
            base
            for base in error.__mro__
            if base.__module__ == "builtins" and base not in (Exception, BaseException, object)
        ]
        assert builtin, f"{error.__name__} is no builtin: 'except ValueError' would miss it"
        assert all(hasattr(builtins, base.__name__) for base in builtin)


def test_every_error_of_the_package_is_in_its_module() -> None:
    classes = [value for module in MODULES for value in vars(module).values() if inspect.isclass(value)]
    ours = [c for c in classes if issubclass(c, Exception) and c.__module__.startswith("selftrans_reg")]
    public = [c for c in ours if not c.__name__.startswith("_")]
    assert [c.__name__ for c in public if c.__module__ != "selftrans_reg.errors"] == []


@pytest.mark.parametrize("error", [error for error in ERRORS if not error.__subclasses__()])
def test_every_error_can_happen(error: type) -> None:
    sources = [path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "errors.py"]
    assert any(re.search(rf"\b{error.__name__}\(", source) for source in sources)
