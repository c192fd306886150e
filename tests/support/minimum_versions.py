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

# What old releases cannot do, and the suite can do without: words of a test's name, as pytest's -k takes them.
LEFT_OUT = {
    "fsdp": "FSDP2 does not train on a CPU",
    "wrappers.md": "FSDP2 again",
    "group_offload": "needs a GPU",
    "test_gradients_and_graphs": "compiles one graph more, once",
    "test_inside_a_segment_it_needs": "gets no gradient where compiled, and an error says so",
    "test_diffusers": "diffusers lacks some of the models",
}
TESTS = ["tests/package", "tests/test_docs.py", "--ignore=tests/package/test_waiting.py"]  # which needs PyTorch 2.10


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
    print(*oldest())
    for test, reason in LEFT_OUT.items():
        print(f"left out: {test} ({reason})")
    chosen = ["-k", f"not ({' or '.join(LEFT_OUT)})", *(more or TESTS)]
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *chosen]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
