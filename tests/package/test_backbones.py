"""Every backbone that people train, as a look-alike, through both stages; and what differs from loop to loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import plain
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from backbones import GUIDANCE_SCALE, Backbone, Batch, assert_step_is_plain, plain_alignment
from diffusers.utils import BaseOutput
from lookalikes import LOOKALIKES
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from toys import ToyBlock, ToyDiT

import selftrans_reg as st
from selftrans_reg.modules import find_layer

SIT, MDT = LOOKALIKES["SiT"], LOOKALIKES["MDT"]
# Nothing is drawn inside: two runs are alike.
STEADY = replace(SIT, build=lambda seed: without_dropout(ToyDiT(seed=seed)).train())


def without_dropout(model: ToyDiT) -> ToyDiT:
    """The null class stays in the table, and no label becomes it."""
    model.dropout = 0.0
    return model


def align(backbone: Backbone, model: nn.Module, criterion: st.SelfTransLoss, batch: Batch) -> st.LossTerms:
    terms: st.LossTerms = criterion(backbone.losses(model, batch), latents=batch.latents)
    return terms


# What PyTorch says of reentrant checkpointing without gradients, as fast-DiT's sampling does too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_step_equals_the_plain_formula(name: str, stage: int) -> None:
    assert_step_is_plain(LOOKALIKES[name], stage)


@pytest.mark.parametrize("name", ["SiT", "MDT"])
def test_validation_gives_the_denoising_term_alone(name: str) -> None:
    backbone = LOOKALIKES[name]
    model, batch = backbone.build(0), backbone.batch()
    criterion = backbone.stage1(model).eval()
    model.eval()
    with torch.no_grad():
        loss = backbone.losses(model, batch)
    terms = criterion(loss)
    assert torch.equal(terms.total, loss.mean())
    assert [terms.alignment.item(), terms.weight.item(), terms.in_window.item()] == [0.0, 0.0, 0.0]


compiled = partial(torch.compile, backend="eager")


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one, for DDP."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestTheCallUnderWrappers:
    WRAPPERS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
        "plain": lambda model: model,
        "compile": compiled,
        "DDP": DistributedDataParallel,
        "compile(DDP)": lambda model: compiled(DistributedDataParallel(model)),
        "DDP(compile)": lambda model: DistributedDataParallel(compiled(model)),
        "checkpoint": checkpoint_wrapper,
    }

    @pytest.mark.usefixtures("group")
    @pytest.mark.parametrize("positional", [0, 2, 3])
    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_is_recovered_by_position_and_by_name(self, wrapper: str, positional: int) -> None:
        backbone = replace(STEADY, positional=positional)
        model, batch = backbone.build(0), backbone.batch()
        expected = align(backbone, model, backbone.stage1(model), batch)
        wrapped = self.WRAPPERS[wrapper](backbone.build(0))
        found = align(backbone, wrapped, backbone.stage1(wrapped), batch)
        torch.testing.assert_close(found, expected)
        assert found.alignment > 0

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    @pytest.mark.parametrize("prepared_first", [True, False])
    def test_is_recovered_behind_the_forward_that_accelerate_puts_in_place(
        self, precision: str, prepared_first: bool
    ) -> None:
        model, batch = STEADY.build(0), STEADY.batch()
        expected = align(STEADY, model, STEADY.stage1(model), batch)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        try:
            prepared = STEADY.build(0)
            criterion = None if prepared_first else STEADY.stage1(prepared)
            prepared = accelerator.prepare(prepared)
            found = align(STEADY, prepared, criterion or STEADY.stage1(prepared), batch)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == "no" else {"rtol": 0.03, "atol": 0.0}
        torch.testing.assert_close(found, expected, **tolerance)
        assert precision == "no" or not torch.equal(found.alignment, expected.alignment)


class TestSeveral:
    def test_layers_of_one_criterion_are_averaged(self) -> None:
        model, batch, layers = STEADY.build(0), STEADY.batch(), ["blocks.0", "blocks.2"]
        reference = copy.deepcopy(model)
        criterion = STEADY.stage1(model, layer=layers)
        terms = align(STEADY, model, criterion, batch)
        terms.total.backward()
        p = plain.leaves(criterion)
        alignments = [
            plain_alignment(STEADY, None, p, STEADY.plain_losses(reference, batch, layer)[1], batch, f"heads.{i}.")
            for i, layer in enumerate(layers)
        ]
        torch.testing.assert_close(terms.alignment, torch.stack(alignments).mean().detach(), **plain.TOLERANCE)
        (STEADY.losses(reference, batch).mean() + 0.5 * torch.stack(alignments).mean()).backward()
        plain.assert_same_gradients(model, reference)
        plain.assert_same_gradients(criterion, p)

    def test_criteria_on_one_model_do_not_see_each_other(self) -> None:
        def attach(model: nn.Module) -> list[st.SelfTransLoss]:
            teacher = STEADY.make_teacher(STEADY.build(1))
            return [STEADY.stage1(model), STEADY.stage1(model, layer="blocks.3"), STEADY.stage2(model, teacher)]

        batch, together = STEADY.batch(), STEADY.build(0)
        criteria = attach(together)
        loss = STEADY.losses(together, batch)
        found = [criterion(loss, latents=batch.latents) for criterion in criteria]
        for index, terms in enumerate(found):
            alone = STEADY.build(0)
            criterion = attach(alone)[index]
            torch.testing.assert_close(terms, align(STEADY, alone, criterion, batch))
        assert len({terms.alignment.item() for terms in found}) == 3


class LoraLinear(nn.Module):
    """A frozen Linear with a trainable adapter beside it, as PEFT puts in its place."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class LoraModel(nn.Module):
    """PEFT's tuner: the user's model is its child ``model``."""

    __module__ = "peft.tuners.lora.model"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class PeftModel(nn.Module):
    """PEFT's outer model: the tuner is its child ``base_model``."""

    __module__ = "peft.peft_model"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = LoraModel(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class TestAdapters:
    @staticmethod
    def build(adapted: int) -> PeftModel:
        """A frozen model with an adapter in one block."""
        model = STEADY.build(0).requires_grad_(False)
        with plain.global_seed(1):
            model.blocks[adapted].qkv = LoraLinear(model.blocks[adapted].qkv)
        return PeftModel(model)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_the_gradient_of_adapters_before_the_layer_is_the_plain_one(self, stage: int) -> None:
        model, teacher, batch = self.build(0), STEADY.build(1), STEADY.batch()
        reference, reference_teacher = copy.deepcopy(model), copy.deepcopy(teacher)
        criterion = STEADY.stage1(model) if stage == 1 else STEADY.stage2(model, STEADY.make_teacher(teacher))
        terms = align(STEADY, model, criterion, batch)
        terms.total.backward()
        p = plain.leaves(criterion)
        losses, tokens = STEADY.plain_losses(reference, batch, "base_model.model.blocks.1")
        alignment = plain_alignment(STEADY, None if stage == 1 else reference_teacher, p, tokens, batch)
        (losses.mean() + 0.5 * alignment).backward()
        torch.testing.assert_close(terms.alignment, alignment.detach(), **plain.TOLERANCE)
        plain.assert_same_gradients(model, reference)
        reached = {name for name, q in model.named_parameters() if q.grad is not None and q.grad.any()}
        assert reached == {f"base_model.model.blocks.0.qkv.lora_{which}.weight" for which in "AB"}

    @pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, checkpoint_wrapper])
    def test_the_names_are_those_of_the_users_model_under_other_wrappers_too(
        self, wrap: Callable[[nn.Module], nn.Module]
    ) -> None:
        model = self.build(0)
        block = model.base_model.model.blocks[1]
        model.base_model.model.blocks[1] = checkpoint_wrapper(block)
        assert find_layer(wrap(model), "blocks.1.fc1") is block.fc1
        assert find_layer(PeftModel(wrap(model.base_model.model)), "blocks.1.fc1") is block.fc1

    def test_adapters_behind_the_layer_are_not_reached(self) -> None:
        model = self.build(2)
        criterion = STEADY.stage1(model)
        with pytest.raises(st.errors.CaptureError, match=r"'blocks.1' carry no gradient(?s:.*)tap a later one"):
            align(STEADY, model, criterion, STEADY.batch())

    def test_an_adapted_teacher_is_truncated(self) -> None:
        model = self.build(0)
        whole = copy.deepcopy(model.base_model.model)
        teacher, arguments = STEADY.make_teacher(model), STEADY.batch().arguments
        for _ in range(2):
            torch.testing.assert_close(
                teacher(**arguments), STEADY.plain_guided(whole, arguments), rtol=1e-4, atol=1e-4
            )
        assert not list(model.base_model.model.blocks[3].parameters())


@dataclass
class Streams:
    """What a block of somebody's model may return."""

    image: Tensor
    text: Tensor


class Sample(BaseOutput):
    """The base class of the outputs of diffusers."""

    sample: Tensor
    text: Tensor


class Structured(ToyDiT):
    """Its blocks' tokens come in a structure."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        class Block(ToyBlock):
            def forward(self, x: Tensor, c: Tensor) -> Any:
                return pack(super().forward(unpack(x), c))

        super().__init__(block=Block)
        self.pack, self.unpack = pack, unpack

    def through_blocks(self, tokens: Tensor, c: Tensor) -> Tensor:
        return self.unpack(super().through_blocks(self.pack(tokens), c))


STRUCTURES: Mapping[str, tuple[Any, Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "a tuple of one": (None, lambda h: (h,), lambda out: out[0]),
    "nothing and the image": (None, lambda h: (None, h), lambda out: out[1]),
    "text and image": (1, lambda h: (h[:, :3], h), lambda out: out[1]),
    "image and text": (0, lambda h: (h, h[:, :3]), lambda out: out[0]),
    "a list, from its end": (-1, lambda h: [h[:, :3], h], lambda out: out[1]),
    "a dictionary": ("image", lambda h: {"text": h[:, :3], "image": h}, lambda out: out["image"]),
    "a dictionary of one": (None, lambda h: {"image": h}, lambda out: out["image"]),
    "a dataclass": ("image", lambda h: Streams(h, h[:, :3]), lambda out: out.image),
    "an output of diffusers": ("sample", lambda h: Sample(sample=h, text=h[:, :3]), lambda out: out.sample),
    "nested": (lambda out: out["streams"][1], lambda h: {"streams": (h[:, :3], h)}, lambda out: out["streams"][1]),
}
"""By name: ``select``, from tokens to what the block returns, and back."""


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_image_is_selected_from_what_a_block_returns(structure: str) -> None:
    select, pack, unpack = STRUCTURES[structure]
    simple, structured, batch = STEADY.build(0), without_dropout(Structured(pack, unpack)), STEADY.batch()
    structured.load_state_dict(simple.state_dict())
    teacher, structured_teacher = STEADY.build(1), without_dropout(Structured(pack, unpack))
    structured_teacher.load_state_dict(teacher.state_dict())
    expected = align(STEADY, simple, STEADY.stage2(simple, STEADY.make_teacher(teacher)), batch)
    made = STEADY.make_teacher(structured_teacher, select=select)
    found = align(STEADY, structured, STEADY.stage2(structured, made, select=select), batch)
    torch.testing.assert_close(found, expected)
    assert found.alignment > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_resolution_and_batch_size_may_change_from_step_to_step(stage: int) -> None:
    model, teacher = STEADY.build(0), STEADY.build(1)
    reference, reference_teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    criterion = STEADY.stage1(model) if stage == 1 else STEADY.stage2(model, STEADY.make_teacher(teacher))
    p = plain.leaves(criterion)
    for n, height, width in [(8, 8, 8), (5, 16, 16), (12, 8, 8), (6, 12, 4)]:
        backbone = replace(STEADY, shape=(4, height, width))
        batch = backbone.batch(n)
        terms = align(backbone, model, criterion, batch)
        _, tokens = backbone.plain_losses(reference, batch, "blocks.1")
        alignment = plain_alignment(backbone, None if stage == 1 else reference_teacher, p, tokens, batch)
        assert tokens.shape[:2] == (n, height * width // 4)
        torch.testing.assert_close(terms.alignment, alignment.detach(), **plain.TOLERANCE)
        assert terms.alignment > 0


class TestNullConditions:
    """Those of the look-alikes and of diffusers are a class index, zeros, and empty prompts with vectors and masks."""

    def test_a_callable_sees_the_whole_call(self) -> None:
        """A negative condition of each sample's own."""
        model, arguments = STEADY.build(1), STEADY.batch().arguments
        seen = []

        def other_class(call: Mapping[str, Any]) -> Tensor:
            seen.append(sorted(call))
            return (call["y"] + 1) % 10

        reference = copy.deepcopy(model).eval()
        teacher = STEADY.make_teacher(model, null={"y": other_class})
        with torch.no_grad():
            f_c = STEADY.plain_tokens(reference, STEADY.teacher, arguments)
            f_u = STEADY.plain_tokens(reference, STEADY.teacher, arguments | {"y": (arguments["y"] + 1) % 10})
        torch.testing.assert_close(teacher(**arguments), f_u + GUIDANCE_SCALE * (f_c - f_u), rtol=1e-4, atol=1e-4)
        assert seen == [["t", "x", "y"]]

    def test_a_nested_argument_takes_a_nested_null_condition(self) -> None:
        class Nested(ToyDiT):
            def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
                label, scales = cond["label"], cond["scales"]
                return super().forward(x * scales[0][:, None, None, None], t, label)

        model, given = without_dropout(Nested(seed=1)), STEADY.batch().arguments
        reference = copy.deepcopy(model).eval()

        def call(label: Tensor, scale: Tensor) -> dict[str, Any]:
            return {"x": given["x"], "t": given["t"], "cond": {"label": label, "scales": (scale, "of x_t")}}

        arguments = call(given["y"], torch.linspace(1, 2, 8))
        teacher = STEADY.make_teacher(model, null={"cond": {"label": 10}})
        with torch.no_grad():
            f_c, f_u = (
                STEADY.plain_tokens(reference, STEADY.teacher, call(label, torch.linspace(1, 2, 8)))
                for label in (given["y"], torch.full((8,), 10))
            )
        torch.testing.assert_close(teacher(**arguments), f_u + GUIDANCE_SCALE * (f_c - f_u), rtol=1e-4, atol=1e-4)

    def test_a_learned_null_vector_is_that_of_the_checkpoint(self) -> None:
        """PixArt's is a buffer of the model: the teacher's own, which moves and is saved with it."""
        backbone = LOOKALIKES["PixArt"]
        model = backbone.build(1)
        model.y_embedder.y_embedding.mul_(2.0)
        reference, arguments = copy.deepcopy(model), backbone.batch().arguments
        null = {"y": model.y_embedder.y_embedding[None], "mask": torch.ones(5)}
        teacher = backbone.make_teacher(model, null=null)
        expected = replace(backbone, null=null).plain_guided(reference, arguments)
        torch.testing.assert_close(teacher(**arguments), expected, rtol=1e-4, atol=1e-4)
