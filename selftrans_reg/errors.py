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
    """The teacher fails, gives random features, is another than the run began with, was released, or is the student."""


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
    """What a criterion warns of while it trains: a run that looks wrong. Each kind comes once.

    The text begins with the kind, so that one kind can be silenced:
    ``warnings.filterwarnings("ignore", "same_weights", HealthWarning)``.

    Attributes:
        kind: ``"head_not_trained"``, ``"no_gradient"``, ``"loss_scale"``, ``"alignment_not_falling"``,
            ``"exploding_features"``, ``"no_contrast"``, ``"same_weights"``, ``"empty_window"``, ``"eval_mode"``,
            ``"step_went_back"`` or ``"time_not_checked"``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.kind = message.partition(":")[0]
