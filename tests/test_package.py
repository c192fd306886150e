"""The package as a whole: what the repository holds, what is public, what an import costs."""

import ast
import importlib.metadata
import inspect
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
    code = [ROOT / path for path in tracked_files() if path.endswith((".py", ".toml"))]
    assert [path.name for path in code if f'"{version}"' in path.read_text()] == ["__init__.py"]


def test_the_dependencies_are_the_four() -> None:
    assert {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in PROJECT["dependencies"]} == CORE


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


def test_importing_the_package_loads_none_of_the_extras() -> None:
    extras = {"accelerate", "diffusers", "matplotlib", "PIL", "scipy", "sklearn", "tensorboard", "transformers"}
    code = "import sys, selftrans_reg; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "selftrans_reg" in loaded
    assert extras.isdisjoint(loaded)


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
