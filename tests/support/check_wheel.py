"""Checks an installed wheel that has nothing beside it: what it holds, and that the README's code runs with it.

Started by ``.ci/run`` with the Python of an environment that holds only the wheel and its dependencies:

    python -I -W error tests/support/check_wheel.py
"""

import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

import selftrans_reg as st

ROOT = Path(__file__).resolve().parents[2]
NOT_CORE = ["accelerate", "diffusers", "matplotlib", "pytest", "scipy", "sklearn", "transformers"]


def check_contents() -> None:
    """The wheel holds the package, typed, and its metadata, nothing else; it is what was imported, and it is alone."""
    files = importlib.metadata.distribution("selftrans-reg").files or []
    installed = {str(path) for path in files if "__pycache__" not in path.parts}
    metadata = f"selftrans_reg-{st.__version__}.dist-info/"
    assert {path for path in installed if not path.startswith(("selftrans_reg/", metadata))} == set()
    assert installed >= {"selftrans_reg/py.typed", f"{metadata}licenses/LICENSE"}, installed
    assert Path(st.__file__).resolve().is_relative_to(Path(sys.prefix).resolve()), (
        "it is not the wheel that is imported"
    )
    assert [name for name in NOT_CORE if importlib.util.find_spec(name)] == [], (
        "the environment is not the wheel's alone"
    )


def check_run() -> None:
    """Both stages train, and the teacher comes back from its folder as it was."""
    sys.path.append(str(ROOT / "examples"))  # which the README's model comes from
    page, text = {}, (ROOT / "README.md").read_text()
    for code in re.findall(r"^(?:```python|<!-- setup)\n(.*?)^(?:```|-->)", text, re.M | re.S):
        exec(code, page)
    again = st.CFGFeatureTeacher.from_pretrained("teacher", model=page["SiT_B_2"])
    call = torch.randn(8, 4, 8, 8), torch.rand(8), torch.arange(8)
    assert torch.equal(again(*call), page["teacher"](*call)), "the teacher differs after save_pretrained"


if __name__ == "__main__":
    check_contents()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        check_run()
    print(f"check_wheel: selftrans-reg {st.__version__} works on its own with torch {torch.__version__}")
