"""Types of command-line options."""

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from ``least`` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more; got {text}")
        return int(text)

    return number


def within(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from ``low`` to ``high``."""

    def number(text: str) -> float:
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}; got {text}")
        return float(text)

    return number


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
    return float(text)
