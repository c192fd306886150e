"""Command-line options of the examples: a number out of range is named by argparse."""

import argparse
from collections.abc import Callable

import pytest
from common.options import at_least, positive, within


def test_a_number_below_the_least_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=at_least(2))
    assert parser.parse_args(["--steps=2"]).steps == 2
    for text, message in [("1", "must be 2 or more; got 1"), ("many", "invalid number value: 'many'")]:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--steps={text}"])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "fine", "wrong"),
    [
        (within(0, 1), ["0", "0.5", "1"], {"-0.1": "from 0 to 1; got -0.1", "1.1": "got 1.1", "nan": "got nan"}),
        (positive, ["1e-9", "inf"], {"0": "must be above 0; got 0", "-1": "got -1", "nan": "got nan"}),
    ],
)
def test_a_number_outside_is_refused(
    kind: Callable[[str], float], fine: list[str], wrong: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", type=kind)
    assert [parser.parse_args([f"--x={text}"]).x for text in fine] == [float(text) for text in fine]
    for text, message in {**wrong, "many": "value: 'many'"}.items():
        with pytest.raises(SystemExit):
            parser.parse_args([f"--x={text}"])
        assert message in capsys.readouterr().err
