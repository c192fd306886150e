"""Every exception that the library raises on purpose, and every warning.

Each class is also the builtin that fits, so ``except ValueError`` keeps working; ``SelfTransError`` catches them all.
A message says what was wrong, what was found, and what to do.
"""


class SelfTransError(Exception):
    """Base class of every error that this library raises on purpose."""


class SettingError(SelfTransError, ValueError):
    """A setting that makes no sense: a weight, window, guidance scale, null condition, optimiser, name of a choice."""


class LayerNotFoundError(SelfTransError, LookupError):
    """A layer name that the model does not have."""


class CallError(SelfTransError, TypeError):
    """A call whose arguments give no x_t, t or rows, or a layer's output that gives no tokens by itself."""


class CaptureError(SelfTransError, RuntimeError):
    """What the hooks saw is not what the loss needs: no forward, several, a layer that did not run, no gradient."""


class ShapeError(SelfTransError, ValueError):
    """Tensors that do not fit each other: tokens and latent grid, features and head, number of samples, device."""


class TimeConventionError(SelfTransError, ValueError):
    """A time convention that contradicts the captured times or the captured x_t."""


class TeacherError(SelfTransError, RuntimeError):
    """The teacher is another than the run began with, was released, is the student, or gives random features."""


class PrunedModuleError(TeacherError, AttributeError):
    """A module of a truncated teacher was used although its first call never ran it.

    An AttributeError too, so that ``hasattr`` on every module of a model, as wrappers do it, goes on.
    """


class CheckpointError(SelfTransError, ValueError):
    """Saved weights, or a saved teacher, that are unreadable, unsafe, of another version, or do not fit the model."""


class NotFiniteError(SelfTransError, FloatingPointError):
    """NaN or inf in the student, the teacher or the head."""


class MissingDependencyError(SelfTransError, ImportError):
    """A package that only pictures need, and that is not installed."""


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
