"""The alignment losses. They see tensors, never a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import SettingError, ShapeError
from .heads import ProjectionHead, linear
from .modules import check_positive, device_of
from .tokens import check_grid, grid_of

Distance: TypeAlias = Literal["mse", "cosine", "smooth_l1"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)

# By the number of the latents' spatial axes: the pattern, and the letters of the pixels inside a patch.
_PATCHIFY = {
    1: ("n c (h p) -> n h (p c)", "p"),
    2: ("n c (h p) (w q) -> n (h w) (p q c)", "pq"),
    3: ("n c (f o) (h p) (w q) -> n (f h w) (o p q c)", "opq"),
}


def check_distance(distance: object) -> None:
    """Raise ``SettingError`` unless ``distance`` is known."""
    if distance not in DISTANCES:
        raise SettingError(f"distance must be one of {', '.join(DISTANCES)}; got {distance!r}.")


def feature_alignment(prediction: Tensor, target: Tensor, distance: Distance = "mse") -> Tensor:
    """How far each sample's projected tokens are from the target features.

    ``mse`` is the method's plain squared error, ``cosine`` is 1 − cos over the width, ``smooth_l1`` has its bend at 1.
    Computed in float32, also under autocast. The target is detached.

    Args:
        prediction: Projected student tokens.
        target: Features to match, such as a teacher's.
        distance: ``"mse"``, ``"cosine"`` or ``"smooth_l1"``.

    Shape:
        prediction, target: (N, T, D)
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
    check_distance(distance)
    if prediction.shape != target.shape or prediction.ndim != 3:
        raise ShapeError(
            f"Prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must both be (N, T, D) and alike."
        )
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = prediction.float(), target.detach().float()
        if distance == "cosine":
            return (1 - F.cosine_similarity(prediction, target, dim=-1)).mean(1)
        error = F.mse_loss if distance == "mse" else F.smooth_l1_loss
        return error(prediction, target, reduction="none").mean((1, 2))


def velocity_target(x_t: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The released code's stage-1 target ε − x, with ε = (x_t − α x) / σ recovered from x_t = α x + σ ε.

    Args:
        x_t: (N, C, H, W), the noisy latents.
        latents: (N, C, H, W), the clean ones.
        alpha: (N,), α of each sample.
        sigma: (N,), σ of each sample; where x_t has no noise ε cannot be recovered, so σ is kept above 1e-4.

    Shape:
        returns: (N, C, H, W), float32
    """
    x_t, latents = x_t.float(), latents.float()
    shape = (-1, *[1] * (latents.ndim - 1))
    noise = (x_t - alpha.reshape(shape) * latents) / sigma.clamp(min=1e-4).reshape(shape)
    return noise - latents


class VAEAlignmentLoss(nn.Module):
    """Stage 1: the distance between a shallow layer's tokens, through a head, and the VAE's clean latents.

    ``Linear(LayerNorm(ProjectionHead(tokens)))`` predicts each token's patch of the latents. The LayerNorm has no
    affine; the final Linear gives p·p·C values, in the order (row, column, channel), which is compared with the
    patchified target. No backbone's own channel order matters, since the Linear is learned.

    Args:
        hidden_size: D, the width of the tapped layer's tokens.
        latent_channels: C, the channels of the VAE's latents (4 for the usual SD-VAE).
        patch_size: Latent pixels per token along each axis (2 for SiT-XL/2): an int for square patches of (N, C, H, W)
            latents, or one number for each spatial axis, one to three of them.
        channel_axis: Which axis of the latents is C. All others but the batch are the grid's, in order: 1 for
            (N, C, H, W), 2 for videos (N, F, C, H, W), and 2 with ``patch_size=(1,)`` for latents packed to one row a
            token, (N, T, C), as Flux gets them.
        hidden_features: The inner width of the head.
        distance: ``"mse"``, ``"cosine"`` or ``"smooth_l1"``.
        generator: Source of the initial weights, as in :class:`ProjectionHead`.
        device: Where the weights lie.

    Shape:
        tokens: (N, T, D), T = H * W / patch_size**2, row by row
        latents: (N, C, H, W), scaled as the model sees them; or (N, C, L), (N, C, F, H, W); C where ``channel_axis``
            says
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
        check_positive("latent_channels", latent_channels)
        check_positive("channel_axis", channel_axis)
        check_distance(distance)
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if not isinstance(patch, Sequence) or len(patch) not in _PATCHIFY:
            raise SettingError(f"patch_size must be an int, or one for each of 1 to 3 axes; got {patch_size!r}.")
        for size in patch:
            check_positive("patch_size", size)
        if channel_axis > len(patch) + 1:
            raise SettingError(
                f"channel_axis={channel_axis} is no axis of latents with {len(patch)} spatial axes: they have "
                f"{len(patch) + 2} axes, counted from 0, the batch."
            )
        self.latent_channels = latent_channels
        self.patch_size = tuple(patch)
        self.channel_axis = channel_axis
        self.distance: Distance = distance
        generator = generator or torch.Generator().manual_seed(0)
        self.head = ProjectionHead(hidden_size, hidden_size, hidden_features, generator=generator, device=device)
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = linear(hidden_size, math.prod(patch) * latent_channels, generator, device)

    @property
    def in_features(self) -> int:
        """D, the width of the tokens."""
        return self.head.in_features

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """The distance for each sample; see the class."""
        return feature_alignment(self.predict(tokens), self.patchify(latents, tokens), self.distance)

    def predict(self, tokens: Tensor) -> Tensor:
        """The patch of the latents that each token predicts: (N, T, D) -> (N, T, p·p·C)."""
        result: Tensor = self.linear(self.norm(self.head(tokens)))
        return result

    def patchify(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """The latents' patches, (N, C, H, W) -> (N, T, p·p·C), one for each of ``tokens``, row by row.

        Raises:
            ShapeError: If latents and tokens do not fit.
        """
        self.check_fit(latents, tokens)
        pattern, letters = _PATCHIFY[len(self.patch_size)]
        latents = latents.movedim(self.channel_axis, 1)
        return rearrange(latents, pattern, **dict(zip(letters, self.patch_size, strict=True)))

    def check_fit(self, latents: Tensor, tokens: Tensor) -> None:
        """Raise ``ShapeError`` unless there is one token for each patch of the latents."""
        axis = self.channel_axis
        if latents.ndim <= axis or latents.shape[axis] != self.latent_channels:
            raise ShapeError(
                f"Latents of shape {tuple(latents.shape)} do not have, on axis {axis}, the {self.latent_channels} "
                "channels that the loss was built for.\n"
                "Pass the VAE's latents as the model sees them, or build the loss with their latent_channels and "
                "channel_axis: (N, C, H, W) has its channels on axis 1."
            )
        check_grid(tokens, grid_of(latents, self.patch_size, axis))
        if len(latents) != len(tokens):
            raise ShapeError(f"{len(latents)} latents for the tokens of {len(tokens)} samples: pass the same batch.")


def distance_of(head: nn.Module, tokens: Tensor, target: Tensor, distance: Distance) -> Tensor:
    """(n,), the distance of each row's tokens, through ``head``, to the latents or to the teacher's features.

    Raises:
        ShapeError: If the features do not fit what the head gives.
    """
    if isinstance(head, VAEAlignmentLoss):
        distances: Tensor = head(tokens, target)
        return distances
    prediction = head(tokens)
    if prediction.shape != target.shape:
        raise ShapeError(
            f"The teacher gives features {tuple(target.shape)}, the student's head {tuple(prediction.shape)}: both "
            "must have the same samples, tokens and width.\n"
            "Check that both are tapped at the image's tokens (tokens=), at the same resolution and patch size, "
            "and that the head was built for this teacher's layer."
        )
    return feature_alignment(prediction, target, distance)


def zero_of(heads: nn.ModuleList) -> Tensor:
    """An exact 0 that depends on every parameter: without it DDP waits for gradients that never come."""
    return torch.stack([_on_no_rows(head) for head in heads]).sum()


def _on_no_rows(head: nn.Module) -> Tensor:
    device = device_of(head)
    if isinstance(head, VAEAlignmentLoss):
        one_patch = torch.zeros(0, head.latent_channels, *head.patch_size, device=device).movedim(1, head.channel_axis)
        distances: Tensor = head(torch.zeros(0, 1, head.head.in_features, device=device), one_patch)
        return distances.sum()
    assert isinstance(head, ProjectionHead)
    projected: Tensor = head(torch.zeros(0, 1, head.in_features, device=device))
    return projected.float().sum()
