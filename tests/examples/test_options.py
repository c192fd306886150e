"""Command lines of the examples: numbers out of range, and mistakes in one line."""

from collections.abc import Callable

import pytest
from common.options import Parser, at_least, finite, positive, run_script, window, within

import selftrans_reg as st


@pytest.mark.parametrize(
    ("kind", "fine", "wrong"),
    [
        (at_least(2), {"2": 2}, {"1": "must be 2 or more", "many": "invalid"}),
        (within(0, 1), {"0": 0, "0.5": 0.5, "1": 1}, dict.fromkeys(["-0.1", "1.1", "nan"], "must be from 0 to 1")),
        (positive, {"1e-9": 1e-9, "inf": float("inf")}, dict.fromkeys(["0", "nan"], "must be above 0")),
        (finite, {"-3": -3}, dict.fromkeys(["inf", "nan"], "must be finite")),
        (window, {"0.4,0.7": (0.4, 0.7), "all": "all"}, {"0.4": "invalid"}),
        (window, {}, dict.fromkeys(["0.7,0.4", "0,2", "nan,1"], "two noise fractions")),
    ],
)
def test_a_number_outside_is_refused_in_one_line(
    kind: Callable[[str], object], fine: dict[str, object], wrong: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser("What it does.")
    parser.add_argument("--x", type=kind)
    assert {text: parser.parse_args([f"--x={text}"]).x for text in fine} == fine
    for text, message in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([f"--x={text}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert text in line


def test_a_mistake_ends_in_one_line() -> None:
    def main() -> None:
        raise st.SettingError("No such file.\nFound: none.")

    with pytest.raises(SystemExit, match=r"error: No such file\. Found: none\.$"):
        run_script(main)
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        run_script(lambda: 1 / 0)
