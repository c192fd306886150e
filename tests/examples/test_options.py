"""Command lines of the examples: numbers out of range, mistakes in one line, and help without heavy imports."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from common.options import Parser, at_least, finite, positive, run_script, window, within

import selftrans_reg as st

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("kind", "fine", "wrong", "message"),
    [
        (at_least(2), {"2": 2}, ["1", "many"], "must be 2 or more"),
        (within(0, 1), {"0": 0, "0.5": 0.5, "1": 1}, ["-0.1", "1.1", "nan"], "must be from 0 to 1"),
        (positive, {"1e-9": 1e-9, "inf": float("inf")}, ["0", "nan"], "must be above 0"),
        (finite, {"-3": -3}, ["inf", "nan"], "must be finite"),
        (window, {"0.4,0.7": (0.4, 0.7), "all": "all"}, ["0.4", "0.7,0.4", "0,2", "nan,1"], "two noise fractions"),
    ],
)
def test_a_number_outside_is_refused_in_one_line(
    kind: Callable[[str], object], fine: dict[str, object], wrong: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    parser = Parser("What it does.")
    parser.add_argument("--x", type=kind)
    assert {text: parser.parse_args([f"--x={text}"]).x for text in fine} == fine
    for text in wrong:
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([f"--x={text}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
        assert message in line or text == "many"


def test_a_mistake_ends_in_one_line() -> None:
    def main() -> None:
        raise st.SettingError("No such file.\nFound: none.")

    with pytest.raises(SystemExit, match=r"error: No such file\. Found: none\.$"):
        run_script(main)
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        run_script(lambda: 1 / 0)


@pytest.mark.parametrize("script", ["quickstart.py", "sit_imagenet.py", "mmdit_coco.py"])
def test_help_shows_every_default_and_needs_nothing_heavy(script: str, tmp_path: Path) -> None:
    for name in ("torch", "diffusers", "sklearn", "selftrans_reg"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('heavy')")
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        check=True,
    )
    options = [line for line in done.stdout.splitlines() if line.startswith("  --")]
    assert len(options) > 8
    undescribed = [line.split()[0] for line in options if len(line.split("  ")[-1].split()) < 2]
    assert undescribed == []
    for default in ["(default: 0)", "default: ", "recipe"]:
        assert default in done.stdout
