"""Command-line options of the examples: a number out of range is named by argparse."""

import argparse

import pytest
from common.options import at_least


def test_a_number_below_the_least_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=at_least(2))
    assert parser.parse_args(["--steps=2"]).steps == 2
    for text, message in [("1", "must be 2 or more; got 1"), ("many", "invalid number value: 'many'")]:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--steps={text}"])
        assert message in capsys.readouterr().err
