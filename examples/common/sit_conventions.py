"""Which time and which path a checkpoint's model was trained with: what the file says, or the caller."""

import argparse

from common.loading import Checkpoint


def time_of(run: argparse.Namespace, found: Checkpoint) -> str:
    """The time convention that the model was trained in."""
    return found.conventions(said_time=run.time, said_path=run.path).time


def path_of(run: argparse.Namespace, found: Checkpoint) -> str:
    """The path that the model was trained on."""
    return found.conventions(said_time=run.time, said_path=run.path).path
