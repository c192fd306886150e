"""Runs the package's tests with Python and every dependency at the oldest version that pyproject.toml allows.

    python tests/support/minimum_versions.py FOLDER [--python python3.10] [arguments of pytest]

The environment is made in FOLDER, or used again if it is there. It takes 6 GB: old releases of PyTorch come with CUDA.
"""

import argparse
import os
import subprocess
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TESTS = ["tests/package", "tests/test_docs.py"]
FSDP2 = "FSDP2 does not train on a CPU"
# What old releases cannot do, and the suite can do without.
LEFT_OUT = {
    "tests/package/test_borrowed.py::test_an_offloaded_teacher_stays_where_hooks_place_it[group_offload": "needs a GPU",
    "tests/package/test_checkpointing.py::test_compiled_inside_a_segment": "no gradient, as an error says",
    "tests/package/test_compile.py::test_gradients_and_graphs[cpu-per block": "one graph more is compiled, once",
    "tests/package/test_ddp.py::test_a_head_that_is_left_out_of_the_ranks_average_is_warned_of[FSDP2": FSDP2,
    "tests/package/test_fsdp.py": FSDP2,
    "tests/package/test_health_wrapped.py::test_on_two_ranks[healthy-FSDP2": FSDP2,
    "tests/package/test_health_wrapped.py::test_on_two_ranks[head left out-FSDP2": FSDP2,
    "tests/test_docs.py::test_the_code_of_a_page_runs[wrappers.md]": FSDP2,
    "tests/package/test_recipes.py::test_diffusers_models[BriaFibo": "diffusers lacks the model",
    "tests/package/test_recipes.py::test_diffusers_models[Kandinsky5": "diffusers lacks the model",
    "tests/package/test_typing.py": "PyTorch's own types are too coarse",
    "tests/package/test_waiting.py": "a pretend GPU needs a backend written in Python",
}


def oldest() -> list[str]:
    """Every requirement of the package, its examples and its tests, at its lower bound."""
    extras = PROJECT["optional-dependencies"]
    stated = [*PROJECT["dependencies"], *extras["examples"], *extras["plot"], *extras["test"]]
    return [line.replace(">=", "==") for line in stated if not line.startswith(PROJECT["name"])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="python" + PROJECT["requires-python"].removeprefix(">="))
    options, more = parser.parse_known_args()
    python = options.folder.resolve() / "bin/python"
    if not python.exists():
        subprocess.run([options.python, "-m", "venv", options.folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *oldest()], check=True)
    subprocess.run([python, "-V"], check=True)
    print(*oldest())
    left_out = []
    for test, reason in LEFT_OUT.items():
        print(f"left out ({reason}): {test}")
        left_out += ["--deselect" if "::" in test else "--ignore", test]
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *left_out, *(more or TESTS)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
