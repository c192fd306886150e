"""The toy, called in the ways that loops have: arguments, rows, times, layouts, threads; beside the plain formula."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import loops
import pytest
import torch
from loops import assert_same, gradients, new_criterion, noisy_batch, plain_gradients, student, total
from torch import Tensor, nn
from toys import ToyBlock, ToyDiT

import selftrans_reg as st
from selftrans_reg.errors import CaptureError

B = noisy_batch([0.35, 0.5, 0.1, 0.9])


class Variant(ToyDiT):
    """The toy, which computes the same and is called in another way: :meth:`call` gives what a loop would pass."""

    settings: ClassVar[Mapping[str, Any]] = {}  # of criterion and teacher alike
    criterion_settings: ClassVar[Mapping[str, Any]] = {}
    null: ClassVar[Mapping[str, Any]] = {"y": 10}

    def __init__(self, seed: int) -> None:
        super().__init__(depth=3, seed=seed)
        self.dropout = 0.0

    def call(self, b: loops.Batch) -> Tensor:
        return self(b.x_t, b.t, b.y)


class TwoTimes(Variant):
    """MeanFlow's: r comes before t."""

    def forward(self, x: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)

    def call(self, b: loops.Batch) -> Tensor:
        return self(b.x_t, torch.full_like(b.t, 0.5), b.t, b.y)


class Lists(Variant):
    """Z-Image's: x_t and captions are lists by sample, and t counts the other way."""

    settings: ClassVar = {
        # Each x is (4, 8, 8), in a batch of 4: it has to be said which is the sample's axis.
        "call": {"x": lambda a: torch.stack(a["x"]), "t": lambda a: 1 - a["noise"], "rows": {"x": "list"}}
    }
    null: ClassVar = {"y": torch.tensor([10])}

    def forward(self, x: list[Tensor], noise: Tensor, y: list[Tensor]) -> list[Tensor]:
        return list(super().forward(torch.stack(x), 1 - noise, torch.stack([label[0] for label in y])))

    def call(self, b: loops.Batch) -> Tensor:
        captions = [label.expand(1 + i) for i, label in enumerate(b.y)]
        return torch.stack(self(list(b.x_t), 1 - b.t, captions))


class ChannelsLast(Variant):
    """Swin's: maps (N, H, W, D) between the blocks."""

    class Block(ToyBlock):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return super().forward(x.flatten(1, 2), c).unflatten(1, (4, 4))

    def through_blocks(self, tokens: Tensor, c: Tensor) -> Tensor:
        return super().through_blocks(tokens.unflatten(1, (4, 4)), c).flatten(1, 2)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        for block in self.blocks:
            block.__class__ = ChannelsLast.Block


class TrainsInEval(Variant):
    """sd-scripts': the loop never calls ``train()``."""

    criterion_settings: ClassVar = {"eval_mode": True}

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.eval()


class Packed(Variant):
    """PixArt's ``data_info``: one argument that holds rows, some on a later axis, and what all samples share."""

    settings: ClassVar = {"call": {"shared": ["info.table", 'info["more"][1]'], "rows": {"info['more'][0]": 1}}}
    null: ClassVar = {"info": {"label": 10}}

    @dataclass
    class Info:
        label: Tensor
        table: Tensor
        more: list[Tensor]

    def forward(self, x: Tensor, t: Tensor, info: Info) -> Tensor:
        assert len(info.table) == len(info.more[1]) == 4
        assert ((info.more[0] == info.label) | (info.label == 10)).all()
        return super().forward(x, t, info.label)

    def call(self, b: loops.Batch) -> Tensor:
        return self(b.x_t, b.t, Packed.Info(b.y, torch.rand(4, 2), [b.y.repeat(3, 1), torch.rand(4)]))


class Padded(Variant):
    """Cosmos': a mask (1, 1, H, W) that the model repeats for every sample."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, padding_mask: Tensor) -> Tensor:
        return super().forward(x * padding_mask.repeat(len(x), 1, 1, 1), t, y)

    def call(self, b: loops.Batch) -> Tensor:
        return self(b.x_t, b.t, b.y, torch.ones(1, 1, 8, 8))


VARIANTS = [Padded, TwoTimes, Lists, ChannelsLast, TrainsInEval, Packed]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_way_of_calling_gives_the_gradients_of_the_formula(variant: type[Variant], stage: int) -> None:
    model = variant(1)
    teacher = st.build_teacher(
        variant(2), None, layer="blocks.2", guidance_scale=3.0, null=variant.null, **variant.settings
    )
    criterion = new_criterion(model, stage, teacher, **variant.settings, **variant.criterion_settings)
    for b in (B.rows(slice(0, 1)), B, B.rows(slice(0, 3)), B.rows(slice(0, 1))):
        model.zero_grad()
        criterion.zero_grad()
        denoising = (model.call(b) - b.velocity).square().mean((1, 2, 3))
        criterion(denoising, latents=b.latents).total.backward()
        assert_same(gradients(model, criterion), plain_gradients(b, stage))


def test_stage_1_without_a_window_needs_no_time() -> None:
    class Timeless(Variant):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, torch.full((len(x),), 0.5), y)

    found = []
    for model, times in ((Timeless(1), ()), (Variant(1), (torch.full((4,), 0.5),))):
        criterion = new_criterion(model, 1, window=None, check_interval=None if times else 1)
        terms = criterion((model(B.x_t, *times, B.y) - B.velocity).square().mean(), latents=B.latents)
        terms.total.backward()
        found.append(gradients(model, criterion))
        assert terms.in_window == 1
    assert_same(*found)


def in_threads(*functions: Callable[[], None]) -> None:
    """Run them at once, and raise what one of them raised."""
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("gradients_too", [False, True])
def test_threads_share_a_teacher_and_sample_from_the_model(gradients_too: bool) -> None:
    teacher, expected, done = loops.new_teacher(), plain_gradients(B), threading.Event()
    teacher(B.x_t, B.t, B.y)  # the first call truncates it
    sampled = student()

    def train(model: nn.Module, steps: int) -> None:
        criterion = new_criterion(model, teacher=teacher, check_interval=None, health_interval=None)
        tap = st.FeatureTap(model, "blocks.0")
        try:
            for _ in range(steps):
                model.zero_grad()
                criterion.zero_grad()
                total(model, criterion, B).backward()
                tap.pop()
                assert_same(gradients(model, criterion), expected)
        finally:
            done.set()

    def sample() -> None:
        while not done.is_set():
            with torch.set_grad_enabled(gradients_too):
                sampled(B.x_t[:2], B.t[:2], B.y[:2])

    in_threads(lambda: train(sampled, 20), lambda: train(student(), 20), sample)


def test_a_forward_of_another_thread_is_named() -> None:
    model = student()
    criterion = new_criterion(model)
    in_threads(lambda: model(B.x_t, B.t, B.y).sum())
    with pytest.raises(CaptureError, match="no forward of the model to work on: the last one ran in another thread"):
        criterion(torch.zeros(()), latents=B.latents)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
class TestWhatCannotBeWatched:
    @pytest.mark.parametrize("stage", [1, 2])
    def test_a_function_transform(self, stage: int) -> None:
        model = student()
        criterion = new_criterion(model, stage, forward="last")
        tap = st.FeatureTap(model, "blocks.0")
        output, _ = torch.func.jvp(lambda x: model(x, B.t, B.y), (B.x_t,), (torch.ones_like(B.x_t),))
        for call in (lambda: criterion(output.square().mean(), latents=B.latents), tap.pop):
            with pytest.raises(
                CaptureError, match=r"carry no gradient(?s:.*)inside a function transform \(torch.func.jvp"
            ):
                call()
        torch.func.jvp(lambda x: model(x, B.t, B.y), (B.x_t,), (torch.ones_like(B.x_t),))
        total(model, criterion, B).backward()  # as the message advises
        assert_same(gradients(model, criterion), plain_gradients(B, stage))

    def test_torch_jit_trace_leaves_nothing_behind(self) -> None:
        model = student()
        criterion = new_criterion(model)
        torch.jit.trace(model, (B.x_t, B.t, B.y))
        total(model, criterion, B).backward()
        assert_same(gradients(model, criterion), plain_gradients(B))

    def test_replicas_of_data_parallel(self) -> None:
        model = student()
        criterion = new_criterion(model)
        replica = model._replicate_for_data_parallel()
        replica._modules = model._modules
        replica(B.x_t, B.t, B.y)
        with pytest.raises(CaptureError, match=r"it ran as replicas of nn\.DataParallel(?s:.*)use DDP"):
            criterion(torch.zeros(()), latents=B.latents)
