"""Which time and which path a checkpoint's model was trained with: what the file says, or the caller."""

import argparse

from common.load_sit import SiTCheckpoint
from selftrans_reg.errors import SettingError


def time_of(run: argparse.Namespace, found: SiTCheckpoint) -> str:
    """The time convention that the model was trained in.

    Raises:
        SettingError: If nothing says it, or the file says another than the caller.
    """
    if found.time is None and run.time is None:
        raise SettingError(
            f"{run.checkpoint} does not say what its training called t, and its weights do not show it.\n"
            "Found: no settings of this repository's trainer.\n"
            "Pass --time repa if t = 1 was noise (REPA and its forks), or --time sit if it was data (SiT's own files)."
        )
    if None not in (found.time, run.time) and found.time != run.time:
        raise SettingError(
            f"{run.checkpoint} was written by this repository's trainer, in the convention {found.time!r}.\n"
            f"Found: --time {run.time}. Leave it out."
        )
    return found.time or run.time


def path_of(run: argparse.Namespace, found: SiTCheckpoint) -> str:
    """The path that the model was trained on.

    Raises:
        SettingError: If the file says another than the caller.
    """
    if None not in (found.path, run.path) and found.path != run.path:
        raise SettingError(
            f"{run.checkpoint} was trained on the {found.path} path.\nFound: --path {run.path}. Leave it out."
        )
    return found.path or run.path or "linear"
