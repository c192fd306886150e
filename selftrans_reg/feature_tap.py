"""A tap used alone: the tokens of one layer or several."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .calls import by_name
from .errors import CaptureError, GradientError
from .names import find_layer, unwrap
from .taps import Recorder, layer_names
from .tokens import Select, Tokens, as_tokens, check_select, check_tokens


class FeatureTap:
    """The tokens of one layer, or of several, of a model that stays as it is.

    Captures every forward, whatever the mode. The tokens are part of the autograd graph. Used as a context manager it
    removes its hooks on leaving; :meth:`detach` does the same.

    Args:
        model: Any module, wrapped or not.
        layer: The dotted name as the unwrapped model prints it, such as ``"blocks.5"``; or several names.
        select: Which tensor of a tuple, dict or dataclass output: an index, a key, or a callable of the output.
        tokens: Which tokens along the second axis: a slice, or a callable from the selected tensor to (N, T, D), which
            gets the call's arguments by name too if it has a second parameter.

    Raises:
        LayerNotFoundError: If the model has no such layer; nearest names are listed.

    Example:
        >>> import torch, selftrans_reg as st
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8))
        >>> with st.FeatureTap(model, "0") as tap:
        ...     out = model(torch.zeros(2, 16, 4))
        ...     tap.pop().shape
        torch.Size([2, 16, 8])
    """

    def __init__(
        self, model: nn.Module, layer: str | Sequence[str], *, select: Select = None, tokens: Tokens = None
    ) -> None:
        check_select(select)
        check_tokens(tokens)
        self.layer = layer
        self.select = select
        self.tokens = tokens
        root = unwrap(model)
        self._model_name, self._signature = type(root).__name__, inspect.signature(root.forward)
        self._modules = {name: weakref.ref(find_layer(model, name)) for name in layer_names(layer)}
        self._recorder: Recorder | None = Recorder(
            model, layer_names(layer), training_only=False, on_open=lambda record: torch.is_grad_enabled()
        )

    def pop(self) -> Tensor | dict[str, Tensor]:
        """The tokens of the forward since the last pop; the tap is empty afterwards.

        Shape:
            returns: (N, T, D), or a dictionary of them by layer name if several layers were named

        Raises:
            CaptureError: If there was no forward, or several; or a layer did not run, or ran more than once; or the
                tap was detached, or is a copy of one.
            OutputError: If the layer's output holds several tensors and ``select`` was not given.
            GradientError: If activation checkpointing hides the gradient of a layer that trains.
        """
        if self._recorder is None:
            raise CaptureError(
                "This tap watches no model: it was detached, as on leaving its with block, or is a copy of one that "
                "does.\nPop before leaving the block; for another model make a new FeatureTap."
            )
        record = self._recorder.take()

        def arguments() -> dict[str, Any]:
            return by_name(self._signature, record.args, record.kwargs, self._model_name)

        found = {
            name: as_tokens(record.capture(name).output, self.select, self.tokens, layer=name, arguments=arguments)
            for name in self._modules
        }
        if record.note is True:  # the forward ran with gradients enabled
            for name, tokens in found.items():
                self._check_gradient(name, tokens)
        return found[self.layer] if isinstance(self.layer, str) else found

    def _check_gradient(self, name: str, tokens: Tensor) -> None:
        layer = self._modules[name]()
        if not tokens.requires_grad and layer is not None and any(p.requires_grad for p in layer.parameters()):
            raise GradientError(
                f"The tokens of layer {name!r} carry no gradient, although it trains and gradients were enabled.\n"
                "Reentrant activation checkpointing hides the gradient of what lies inside a checkpointed segment: use "
                "use_reentrant=False, or tap the very module that is checkpointed. For features alone call the model "
                "under torch.no_grad()."
            )

    def discard(self) -> None:
        """Forget what was captured."""
        if self._recorder is not None:
            self._recorder.discard()

    def detach(self) -> None:
        """Remove every hook."""
        if self._recorder is not None:
            self._recorder.detach()
        self._recorder = None

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
