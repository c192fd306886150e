"""An MMDiT from a checkpoint: see `common.loading`."""

from common.loading import Checkpoint as MMDiTCheckpoint
from common.loading import mmdit_from_checkpoint

__all__ = ["MMDiTCheckpoint", "mmdit_from_checkpoint"]
