"""One step of a small loop, with the library and written out without it, for the tests of what wraps a model."""

import re
from typing import NamedTuple

import plain
import torch
from common.sit import SiT
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st

LAYER, TEACHER_LAYER = 1, 2
GUIDANCE_SCALE, WEIGHT, NULL_CLASS = 3.0, 0.5, 10
_WRAPPER = re.compile(r"(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module)\.")


class Batch(NamedTuple):
    """Clean latents, what the model is called with, and the velocity that it should give."""

    latents: Tensor
    x_t: Tensor
    t: Tensor
    y: Tensor
    velocity: Tensor

    def rows(self, which: slice) -> "Batch":
        return Batch(*(tensor[which] for tensor in self))

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


def noisy_batch(t: list[float], seed: int = 0) -> Batch:
    """A batch at the given times, in SiT's convention: x_t = t x + (1 - t) noise; the window is t from 0.3 to 0.6."""
    b, times = batch(len(t), seed=seed), torch.tensor(t)
    share = times[:, None, None, None]
    return Batch(b["x"], share * b["x"] + (1 - share) * b["noise"], times, b["y"], b["x"] - b["noise"])


def toy(seed: int, device: torch.device | str = "cpu") -> ToyDiT:
    """A model that has a null class and drops no label: two runs of it are alike."""
    model = ToyDiT(depth=3, seed=seed).to(device)
    model.dropout = 0.0
    return model


def student(device: torch.device | str = "cpu") -> ToyDiT:
    return toy(1, device)


def small_sit(generator: torch.Generator, device: torch.device | str = "cpu") -> SiT:
    """SiT adds float32 positions to its patches, so under autocast its blocks add to a float32 stream; not the toy."""
    model = SiT(input_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=10, learn_sigma=False)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    model.y_embedder.dropout_prob = 0.0
    return model.to(device)


def new_teacher(model: nn.Module | None = None, **settings: object) -> st.CFGFeatureTeacher:
    usual = {"layer": f"blocks.{TEACHER_LAYER}", "guidance_scale": GUIDANCE_SCALE, "null": {"y": NULL_CLASS}}
    return st.build_teacher(toy(2) if model is None else model, None, **usual | {"hidden_size": 16} | settings)


def new_criterion(
    model: nn.Module, stage: int = 2, teacher: st.CFGFeatureTeacher | None = None, **settings: object
) -> st.SelfTransLoss:
    settings = {"layer": f"blocks.{LAYER}", "time": "sit", "hidden_size": 16, "hidden_features": 24} | settings
    if stage == 1:
        return st.SelfTransLoss.stage1(model, latent_channels=4, patch_size=2, **settings)
    return st.SelfTransLoss.stage2(model, teacher=teacher or new_teacher(), **settings)


def denoising(model: nn.Module, b: Batch) -> Tensor:
    """The loop's own loss, one value a sample: calls the model once."""
    return (model(b.x_t, b.t, b.y) - b.velocity).square().mean((1, 2, 3))


def total(model: nn.Module, criterion: nn.Module, b: Batch, **more: object) -> Tensor:
    """The loop's step up to the total loss."""
    return criterion(denoising(model, b), latents=b.latents, **more).total


def plain_tokens(model: ToyDiT, b: Batch, y: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """The tokens behind block ``layer`` and behind the last, without a hook or a call of the model."""
    t = torch.stack([torch.cos(3 * b.t), torch.sin(3 * b.t)], dim=1)
    c = model.t_embedder(t) + model.y_embedder(y)
    tokens = model.x_embedder(b.x_t).flatten(2).transpose(1, 2)
    seen = []
    for block in model.blocks:
        tokens = block(tokens, c)
        seen.append(tokens)
    return seen[layer], tokens


def plain_terms(
    model: ToyDiT,
    criterion: st.SelfTransLoss,
    teacher: ToyDiT | None,
    b: Batch,
    y: Tensor | None = None,
    *,
    layers: tuple[int, ...] = (LAYER,),
    target: str = "latents",
    distance: str = "mse",
    gating: str = "per-sample",
    window: tuple[float, float] | None = (0.4, 0.7),
) -> tuple[Tensor, Tensor]:
    """(denoising, alignment) written out: of stage 2 with the teacher's whole model, of stage 1 with None.

    ``y`` are the labels as the student sees them.
    """
    y, p, parts = b.y if y is None else y, dict(criterion.heads.named_parameters()), []
    inside = plain.inside(1 - b.t, window)
    for i, layer in enumerate(layers):
        tokens, last = plain_tokens(model, b, y, layer)
        if teacher is None:
            predicted = plain.predict(p, tokens, f"{i}.")
            goal = plain.patches(b.latents if target == "latents" else -b.velocity)
        else:
            predicted = plain.project(p, tokens, f"{i}.")
            with torch.no_grad():
                f_c, _ = plain_tokens(teacher, b, b.y, TEACHER_LAYER)
                f_u, _ = plain_tokens(teacher, b, torch.full_like(b.y, NULL_CLASS), TEACHER_LAYER)
            goal = f_u + GUIDANCE_SCALE * (f_c - f_u)
        found = plain.distance(predicted, goal, distance)
        parts.append((inside * found).mean() if gating == "per-sample" else inside.mean() * found.mean())
    denoising = (model.final_layer(last) - plain.patches(b.velocity)).square().mean()
    return denoising, torch.stack(parts).mean()


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient of the modules, zeros where there is none; wrappers' prefixes left out."""
    found = {}
    for index, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[f"{index}.{_WRAPPER.sub('', name)}"] = gradient.detach().clone()
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Every tensor equal to the wanted one, up to ``tolerance`` times its largest value or 1; not all of them zero."""
    assert found.keys() == wanted.keys()
    assert any(tensor.any() for tensor in wanted.values())
    errors = {name: (found[name] - tensor).abs().max() / (1 + tensor.abs().max()) for name, tensor in wanted.items()}
    wrong = {name: error.item() for name, error in errors.items() if not error <= tolerance}
    assert not wrong


def plain_gradients(b: Batch, stage: int = 2) -> dict[str, Tensor]:
    """The gradients of student and head on the whole batch in one process, from the formula written out."""
    model = student(b.t.device)
    criterion = new_criterion(model, stage)
    denoising, alignment = plain_terms(model, criterion, toy(2, b.t.device) if stage == 2 else None, b)
    (denoising + WEIGHT * alignment).backward()
    return gradients(model, criterion)
