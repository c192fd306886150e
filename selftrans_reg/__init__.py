"""Self-Transcendence as a plug-in regularizer for diffusion transformers.

``SelfTransLoss`` watches a model through hooks while a training loop calls it, and adds one term to the loop's loss. In
stage 1 it aligns a layer with the clean latents, in stage 2 with the classifier-free-guided features of a teacher from
``build_teacher``. Its pieces are usable alone: ``FeatureTap``, ``ProjectionHead``, ``VAEAlignmentLoss``,
``feature_alignment``, ``TimeConvention``. ``recipe`` has the published settings, ``layer_report`` measures which layers
to take, and ``load_weights`` and ``strip`` read and write weights whatever wraps a model.

``docs/architecture.md`` says which file does what, and how a batch goes through them.

Reference: Sun et al., 2026, https://arxiv.org/abs/2601.07773
"""

from .analysis.inspection import layer_report
from .analysis.report import LayerReport
from .artefacts import strip
from .checkpoints import read_checkpoint
from .criterion import LossTerms, SelfTransLoss
from .errors import *  # noqa: F403  # the exceptions and the warning are public too
from .errors import SelfTransError
from .heads import ProjectionHead, VAEAlignmentLoss, feature_alignment
from .modules import share_frozen
from .plateau import Plateau
from .recipes import Recipe, recipe
from .taps import FeatureTap
from .teacher import CFGFeatureTeacher, build_teacher
from .time import TimeConvention
from .weights import load_weights

__version__ = "0.1.0"

__all__ = [
    "CFGFeatureTeacher",
    "FeatureTap",
    "LayerReport",
    "LossTerms",
    "Plateau",
    "ProjectionHead",
    "Recipe",
    "SelfTransError",
    "SelfTransLoss",
    "TimeConvention",
    "VAEAlignmentLoss",
    "build_teacher",
    "feature_alignment",
    "layer_report",
    "load_weights",
    "read_checkpoint",
    "recipe",
    "share_frozen",
    "strip",
]
