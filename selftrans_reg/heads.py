"""The heads, and how far what they give is from what it is aligned with. They see tensors, never a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import SettingError, ShapeError
from .modules import check_one_of, check_positive
from .tokens import check_grid, grid_of

Distance: TypeAlias = Literal["mse", "cosine", "smooth_l1"]

# By the number of the latents' spatial axes: the pattern, and the letters of the pixels inside a patch.
_PATCHIFY = {
    1: ("n c (h p) -> n h (p c)", "p"),
    2: ("n c (h p) (w q) -> n (h w) (p q c)", "pq"),
    3: ("n c (f o) (h p) (w q) -> n (f h w) (o p q c)", "opq"),
}


def feature_alignment(
    prediction: Tensor, target: Tensor, distance: Distance = "mse", weights: Tensor | None = None
) -> Tensor:
    """How far each sample's projected tokens are from the target features.

    ``mse`` is the method's plain squared error, ``cosine`` is 1 − cos over the width, ``smooth_l1`` has its bend at 1.
    Computed in float32, also under autocast. The target is detached.

    Args:
        prediction: Projected student tokens.
        target: Features to match, such as a teacher's.
        distance: ``"mse"``, ``"cosine"`` or ``"smooth_l1"``.
        weights: What each token counts, 1 for all by default; the mean stays over all tokens.

    Shape:
        prediction, target: (N, T, D)
        weights: (N, T)
        returns: (N,), float32, the mean over tokens and, but for the cosine, over the width

    Raises:
        ShapeError: If the shapes differ or are not (N, T, D).
        SettingError: If the distance is unknown.

    Reference: Sun et al., 2026, https://arxiv.org/abs/2601.07773

    Example:
        >>> import torch, selftrans_reg as st
        >>> st.feature_alignment(torch.zeros(2, 16, 8), torch.ones(2, 16, 8))
        tensor([1., 1.])
    """
    check_one_of("distance", distance, get_args(Distance))
    if prediction.shape != target.shape or prediction.ndim != 3:
        raise ShapeError(
            f"Prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must both be (N, T, D) and alike.\n"
            "If they are a student's and a teacher's, tap both at the image's tokens (tokens=), at one resolution and "
            "patch size, and build the head for this teacher's layer."
        )
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = prediction.float(), target.detach().float()
        if target.is_inference():  # as latents made under torch.inference_mode(): autograd cannot save them
            target = target.clone()
        if distance == "cosine":
            error = 1 - F.cosine_similarity(prediction, target, dim=-1)
        else:
            pointwise = F.mse_loss if distance == "mse" else F.smooth_l1_loss
            error = pointwise(prediction, target, reduction="none").mean(2)
        return (error if weights is None else error * weights).mean(1)


class ProjectionHead(nn.Sequential):
    """Linear(D → hidden) SiLU Linear(hidden → hidden) SiLU Linear(hidden → out).

    The head of Self-Transcendence, which is REPA's. Weights are Xavier-uniform and biases 0, as every Linear of the
    backbone; they are drawn from ``generator`` and never advance the global random number generator. The parameters'
    names ``{0,2,4}.{weight,bias}`` are those of the released projectors.

    Args:
        in_features: D, the width of the student's tokens.
        out_features: The width of what they are compared with.
        hidden_features: The width in between.
        generator: Source of the initial weights, on the CPU; by default one with seed 0, in every process alike.
        device: Where the weights lie.
        distance: What :meth:`distance` compares by: ``"mse"``, ``"cosine"`` or ``"smooth_l1"``.

    Shape:
        tokens: (N, T, in_features), of any floating dtype: cast to that of the weights
        returns: (N, T, out_features)

    Raises:
        ShapeError: If the tokens' width is not ``in_features``, or :meth:`distance` is given features of another shape.
        SettingError: If a width is not a positive integer, or the distance unknown.

    Reference: Sun et al., 2026, https://arxiv.org/abs/2601.07773; Yu et al., 2025, https://arxiv.org/abs/2410.06940

    Example:
        >>> import torch, selftrans_reg as st
        >>> head = st.ProjectionHead(384, 768, hidden_features=2048)
        >>> head(torch.zeros(2, 256, 384)).shape
        torch.Size([2, 256, 768])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int = 2048,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        distance: Distance = "mse",
    ) -> None:
        check_one_of("distance", distance, get_args(Distance))
        widths = {"in_features": in_features, "out_features": out_features, "hidden_features": hidden_features}
        for name, width in widths.items():
            check_positive(name, width)
        generator = generator or torch.Generator(device="cpu").manual_seed(0)
        super().__init__(
            linear(in_features, hidden_features, generator, device),
            nn.SiLU(),
            linear(hidden_features, hidden_features, generator, device),
            nn.SiLU(),
            linear(hidden_features, out_features, generator, device),
        )
        self.in_features, self.out_features, self.hidden_features = widths.values()
        self.kind: Distance = distance

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens; see the class."""
        if tokens.shape[-1] != self.in_features:
            raise ShapeError(
                f"The head reads tokens of width {self.in_features}, but got {tuple(tokens.shape)}.\n"
                f"Build it with hidden_size={tokens.shape[-1]}, or tap the layer that it was built for."
            )
        projected: Tensor = super().forward(tokens.to(next(self.parameters()).dtype))  # type: ignore[no-untyped-call]
        return projected

    def distance(self, tokens: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """(n,), the :func:`feature_alignment` of each row's projected tokens with a teacher's features."""
        return feature_alignment(self(tokens), target, self.kind, weights)

    def zero(self) -> Tensor:
        """As :func:`zero_of` has it."""
        projected: Tensor = self(torch.zeros(0, 1, self.in_features, device=next(self.parameters()).device))
        return projected.sum()

    def check_fit(self, tokens: Tensor, latents: Tensor) -> None:
        """Raise ``ShapeError`` if so many tokens, as of text, cannot be patches: these divide a sample's values."""
        if latents[0].numel() % tokens.shape[1]:
            raise ShapeError(
                f"The layer gave {tokens.shape[1]} tokens, which cannot be the patches of x_t {tuple(latents.shape)}.\n"
                "Pick the image's stream instead of the text's (select=), or leave out class, time or text tokens "
                "(tokens=). To align all of them on purpose, pass tokens=slice(None)."
            )


class VAEAlignmentLoss(nn.Module):
    """Stage 1: the distance between a shallow layer's tokens, through a head, and the VAE's clean latents.

    ``Linear(LayerNorm(ProjectionHead(tokens)))`` predicts each token's patch of the latents. The LayerNorm has no
    affine; the final Linear gives p·p·C values, in the order (row, column, channel), which is compared with the
    patchified target. No backbone's own channel order matters, since the Linear is learned.

    Args:
        hidden_size: D, the width of the tapped layer's tokens.
        latent_channels: C, the channels of the VAE's latents (4 for the usual SD-VAE).
        patch_size: Latent pixels per token along each axis (2 for SiT-XL/2): an int for square patches of (N, C, H, W)
            latents, or one number for each of one to three spatial axes.
        channel_axis: Which axis of the latents is C: 1 for (N, C, H, W), 2 for videos (N, F, C, H, W), and 2 with
            ``patch_size=(1,)`` for latents packed to one row a token, (N, T, C), as Flux gets them.
        hidden_features: The inner width of the head.
        distance: ``"mse"``, ``"cosine"`` or ``"smooth_l1"``.
        generator: Source of the initial weights, as in :class:`ProjectionHead`.
        device: Where the weights lie.

    Shape:
        tokens: (N, T, D), T = H * W / patch_size**2, row by row
        latents: (N, C, H, W), scaled as the model sees them; or (N, C, L), (N, C, F, H, W); C on ``channel_axis``
        returns: (N,), float32, one value a sample, the mean over tokens and values

    Raises:
        ShapeError: If the latents' channels or axes, or the tokens' count or width, do not fit.
        SettingError: If a size or the distance makes no sense.

    Reference: Sun et al., 2026, https://arxiv.org/abs/2601.07773

    Example:
        >>> import torch, selftrans_reg as st
        >>> loss = st.VAEAlignmentLoss(hidden_size=384, latent_channels=4, patch_size=2)
        >>> loss(torch.zeros(2, 256, 384), torch.zeros(2, 4, 32, 32)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        hidden_size: int,
        latent_channels: int,
        patch_size: int | Sequence[int],
        *,
        channel_axis: int = 1,
        hidden_features: int = 2048,
        distance: Distance = "mse",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if not isinstance(patch, Sequence) or len(patch) not in _PATCHIFY:
            raise SettingError(f"patch_size must be an int, or one for each of 1 to 3 axes; got {patch_size!r}.")
        sizes = ("latent_channels", latent_channels), ("channel_axis", channel_axis)
        for name, size in (*sizes, *(("patch_size", size) for size in patch)):
            check_positive(name, size)
        if channel_axis > len(patch) + 1:
            raise SettingError(
                f"channel_axis={channel_axis} is no axis of latents with {len(patch)} spatial axes; 0 is the batch."
            )
        self.latent_channels = latent_channels
        self.patch_size = tuple(patch)
        self.channel_axis = channel_axis
        self.in_features = hidden_size
        generator = generator or torch.Generator(device="cpu").manual_seed(0)
        self.head = ProjectionHead(
            hidden_size, hidden_size, hidden_features, generator=generator, device=device, distance=distance
        )
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = linear(hidden_size, math.prod(patch) * latent_channels, generator, device)

    def forward(self, tokens: Tensor, latents: Tensor, weights: Tensor | None = None) -> Tensor:
        """The distance for each sample; see the class, and :func:`feature_alignment` for ``weights``."""
        return feature_alignment(self.predict(tokens), self.patchify(latents, tokens), self.head.kind, weights)

    def distance(self, tokens: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """(n,), the distance of each row's tokens from its latents."""
        distances: Tensor = self(tokens, target, weights)
        return distances

    def zero(self) -> Tensor:
        """As :func:`zero_of` has it."""
        device = next(self.parameters()).device
        patch = torch.zeros(0, self.latent_channels, *self.patch_size, device=device).movedim(1, self.channel_axis)
        return self.distance(torch.zeros(0, 1, self.in_features, device=device), patch).sum()

    def predict(self, tokens: Tensor) -> Tensor:
        """The patch of the latents that each token predicts: (N, T, D) -> (N, T, p·p·C)."""
        predicted: Tensor = self.linear(self.norm(self.head(tokens)))
        return predicted

    def patchify(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """The latents' patches, (N, C, H, W) -> (N, T, p·p·C), one for each of ``tokens``, row by row."""
        self.check_fit(tokens, latents)
        pattern, letters = _PATCHIFY[len(self.patch_size)]
        latents = latents.movedim(self.channel_axis, 1)
        return rearrange(latents, pattern, **dict(zip(letters, self.patch_size, strict=True)))

    def check_fit(self, tokens: Tensor, latents: Tensor) -> None:
        """Raise ``ShapeError`` unless there is one token for each patch of the latents."""
        axis = self.channel_axis
        if latents.ndim <= axis or latents.shape[axis] != self.latent_channels:
            raise ShapeError(
                f"Latents of shape {tuple(latents.shape)} do not have, on axis {axis}, the {self.latent_channels} "
                "channels that the loss was built for.\n"
                "Pass the VAE's latents as the model sees them, or their latent_channels= and channel_axis=."
            )
        check_grid(tokens, grid_of(latents, self.patch_size, axis))
        if len(latents) != len(tokens):
            raise ShapeError(f"{len(latents)} latents for the tokens of {len(tokens)} samples: pass the same batch.")


def linear(
    in_features: int, out_features: int, generator: torch.Generator, device: torch.device | str | None
) -> nn.Linear:
    """A Linear with Xavier-uniform weights and zero bias, made without the global random number generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, in_features, out_features, device="cpu")  # type: ignore[no-untyped-call]
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer.to(device)


Head: TypeAlias = ProjectionHead | VAEAlignmentLoss


def zero_of(heads: Iterable[Head]) -> Tensor:
    """An exact 0, float32, that depends on every parameter: without it DDP waits for gradients that never come."""
    return torch.stack([head.zero().float() for head in heads]).sum()
