"""A SiT from a checkpoint: see `common.loading`."""

from common.loading import Checkpoint as SiTCheckpoint
from common.loading import sit_from_checkpoint
from common.run_folder import checkpoints_of, newest_checkpoint

__all__ = ["SiTCheckpoint", "checkpoints_of", "newest_checkpoint", "sit_from_checkpoint"]
