"""Every exception that the library raises on purpose, and every warning.

Each class is also the builtin that fits, so ``except ValueError`` keeps working; ``SelfTransError`` catches them all.
A message says what was wrong, what was found, and what to do.
"""


class SelfTransError(Exception):
    """Base class of every error that this library raises on purpose."""


class SettingError(SelfTransError, ValueError):
    """A setting that makes no sense: a weight, window, guidance scale, name of a choice."""


class LayerNotFoundError(SelfTransError, LookupError):
    """A layer name that the model does not have."""


class RecipeNotFoundError(SelfTransError, LookupError):
    """A recipe name that is not known."""


class CaptureError(SelfTransError, RuntimeError):
    """What the hooks saw is not what the call needs: no forward, several, or a layer that did not run."""


class GradientError(SelfTransError, RuntimeError):
    """The captured features carry no gradient back to the student."""


class OutputError(SelfTransError, TypeError):
    """A layer's output that is not one tensor of tokens, and no ``select`` or ``tokens`` to say which part is."""


class ShapeError(SelfTransError, ValueError):
    """Shapes that do not fit: tokens and latent grid, features and teacher, width and head."""


class CallError(SelfTransError, TypeError):
    """The arguments of a call that cannot be matched to names, rows, x_t or t."""


class TimeConventionError(SelfTransError, ValueError):
    """A time convention that contradicts the captured times or the captured x_t."""


class NullConditionError(SelfTransError, ValueError):
    """A null condition that is missing, misnamed, of the wrong shape, or outside its embedding."""


class PrunedModuleError(SelfTransError, RuntimeError, AttributeError):
    """A module of a truncated teacher was used although its first call never ran it.

    An AttributeError too, so that ``hasattr`` on every module of a model, as wrappers do it, goes on.
    """


class TeacherError(SelfTransError, RuntimeError):
    """The teacher is another than the run began with, was released, is the student, or gives random features."""


class PlacementError(SelfTransError, RuntimeError):
    """Model, head and teacher are not on one device."""


class MissingDependencyError(SelfTransError, ImportError):
    """A package that only pictures need, and that is not installed."""


class CheckpointError(SelfTransError, ValueError):
    """A checkpoint that is unreadable, unsafe, or does not fit the model."""


class ArtefactError(SelfTransError, ValueError):
    """A saved teacher or criterion that is broken, unsafe, or of an unknown version."""


class OptimizerError(SelfTransError, ValueError):
    """Parameters of the criterion that the optimiser does not hold."""


class NotFiniteError(SelfTransError, FloatingPointError):
    """NaN or inf in the student, the teacher or the head."""


class MeasurementError(SelfTransError, RuntimeError):
    """What ``stop_when`` needs to measure cannot be measured."""


class HealthWarning(SelfTransError, UserWarning):  # noqa: N818  # called as Python calls its own warnings
    """Base class of what a criterion warns of while it trains: a run that looks wrong. Each kind comes once."""


class HeadNotTrainedWarning(HealthWarning):
    """The head stays as it is while the tapped layer moves: the optimiser does not hold it."""


class NoGradientWarning(HealthWarning):
    """The alignment's gradient does not reach the tapped layer, or is 0 there."""


class AlignmentNotFallingWarning(HealthWarning):
    """The alignment is no lower than at the beginning."""


class ExplodingFeaturesWarning(HealthWarning):
    """The tapped layer's tokens have grown as they do in no run that goes well."""


class NoContrastWarning(HealthWarning):
    """The condition changes nothing in the teacher's features, so there is nothing to guide with."""


class SameWeightsWarning(HealthWarning):
    """The student begins with the teacher's weights."""


class EmptyWindowWarning(HealthWarning):
    """No sample has been inside the window for many calls."""


class EvalModeWarning(HealthWarning):
    """The model trains, and the criterion is in eval mode: there is no alignment."""


class StepWentBackWarning(HealthWarning):
    """The step is smaller than one before, as of a count that begins anew with each epoch."""
