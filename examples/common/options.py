"""Command lines of the examples: parsers, types of options, and mistakes that end in one line.

Nothing here imports torch: a script reads its options before anything that takes seconds to import.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Mistake(ValueError):  # noqa: N818  # the user's, not the program's
    """What is wrong with how a script was called, what was found, and what to do."""


class Parser(argparse.ArgumentParser):
    """Shows every default, keeps the layout of the description, and says in one line what is wrong."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        """End with a line on stderr."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if (
            action.default is None
            or action.default is False
            or action.default == []
            or "default" in (action.help or "")
        ):
            return action.help  # nothing is the default, or the text says it
        return super()._get_help_string(action) if action.help else "default: %(default)s"


def run_script(main: Callable[[], object]) -> None:
    """Call ``main``; a mistake of the user's, the library's errors among them, ends in one line instead of a traceback.

    Raises:
        SystemExit: With code 1, after such a mistake.
    """
    try:
        main()
    except Mistake as error:
        _end(error)
    except Exception as error:
        library = sys.modules.get("selftrans_reg")  # an error of its own is raised only where it was imported
        if library is None or not isinstance(error, library.SelfTransError):
            raise
        _end(error)


def _end(error: Exception) -> NoReturn:
    sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")


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


def finite(text: str) -> float:
    """An argparse type: a number that is neither infinite nor NaN."""
    if not abs(float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be finite; got {text}")
    return float(text)


def window(text: str) -> tuple[float, float] | str:
    """An argparse type: two noise fractions with a comma between, or "all"."""
    if text == "all":
        return text
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two noise fractions, as 0.4,0.7, or all; got {text}") from None
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"must be two noise fractions within 0 and 1, the lower first; got {text}")
    return low, high
