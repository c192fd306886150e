"""Self-Transcendence as a plug-in regularizer for diffusion transformers.

Taps on the layers of a model that stays as it is, a projection head, the VAE-latent alignment loss, a teacher of
classifier-free-guided features, and one loss object that combines them in an existing training loop.

Reference: Sun et al., 2026, https://arxiv.org/abs/2601.07773
"""

from .analysis.inspection import layer_report
from .analysis.report import LayerReport
from .artefacts import strip
from .checkpoints import read_checkpoint
from .criterion import LossTerms, SelfTransLoss
from .errors import CallError as CallError
from .errors import CaptureError as CaptureError
from .errors import CheckpointError as CheckpointError
from .errors import HealthWarning as HealthWarning
from .errors import LayerNotFoundError as LayerNotFoundError
from .errors import MissingDependencyError as MissingDependencyError
from .errors import NotFiniteError as NotFiniteError
from .errors import PrunedModuleError as PrunedModuleError
from .errors import SelfTransError
from .errors import SettingError as SettingError
from .errors import ShapeError as ShapeError
from .errors import TeacherError as TeacherError
from .errors import TimeConventionError as TimeConventionError
from .heads import ProjectionHead, VAEAlignmentLoss, feature_alignment
from .plateau import Plateau
from .recipes import Recipe, recipe
from .taps import FeatureTap
from .teacher import CFGFeatureTeacher, build_teacher, share_frozen
from .time import TimeConvention
from .weights import load_weights

__version__ = "0.1.0"

# The exception classes are public too; they are listed in selftrans_reg.errors.
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
