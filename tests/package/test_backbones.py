"""Every backbone that people train, as a look-alike, through both stages; and what differs from loop to loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import peft
import plain
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from backbones import Backbone, Batch, assert_step_is_plain, plain_alignment
from lookalikes import LOOKALIKES
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg.modules import find_layer


def steady(seed: int) -> ToyDiT:
    """The null class stays in the table, and no label becomes it: two runs are alike."""
    model = ToyDiT(seed=seed).train()
    model.dropout = 0.0
    return model


STEADY = replace(LOOKALIKES["SiT"], build=steady)


def align(backbone: Backbone, model: nn.Module, criterion: st.SelfTransLoss, batch: Batch) -> st.LossTerms:
    terms: st.LossTerms = criterion(backbone.losses(model, batch), latents=batch.latents)
    return terms


# What PyTorch says of reentrant checkpointing without gradients, as fast-DiT's sampling does too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_step_equals_the_plain_formula(name: str, stage: int) -> None:
    assert_step_is_plain(LOOKALIKES[name], stage)


compiled = partial(torch.compile, backend="eager")


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one, for DDP."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


class TestTheCallUnderWrappers:
    WRAPPERS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
        "compile": compiled,
        "DDP": DistributedDataParallel,
        "compile(DDP)": lambda model: compiled(DistributedDataParallel(model)),
        "DDP(compile)": lambda model: DistributedDataParallel(compiled(model)),
        "checkpoint": checkpoint_wrapper,
        "accelerate": lambda model: Accelerator(cpu=True).prepare(model),
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


class TestAdapters:
    @staticmethod
    def build(adapted: int) -> peft.PeftModel:
        """A frozen model with an adapter in one block, which does something."""
        config = peft.LoraConfig(r=2, target_modules=[f"blocks.{adapted}.qkv"], init_lora_weights=False)
        with plain.global_seed(1):
            return peft.get_peft_model(STEADY.build(0), config)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_the_gradient_of_adapters_before_the_layer_is_the_plain_one(self, stage: int) -> None:
        """The layer's own weights have none."""
        adapted = replace(STEADY, build=lambda seed: STEADY.build(seed) if seed else self.build(0))
        assert_step_is_plain(adapted, stage)

    @pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, checkpoint_wrapper])
    def test_the_names_are_those_of_the_users_model_under_other_wrappers_too(
        self, wrap: Callable[[nn.Module], nn.Module]
    ) -> None:
        model = self.build(0)
        block = model.base_model.model.blocks[1]
        model.base_model.model.blocks[1] = checkpoint_wrapper(block)
        assert find_layer(wrap(model), "blocks.1.fc1") is block.fc1

    def test_adapters_behind_the_layer_are_not_reached(self) -> None:
        model = self.build(2)
        criterion = STEADY.stage1(model)
        with pytest.raises(st.errors.CaptureError, match=r"'blocks.1' carry no gradient(?s:.*)tap a later one"):
            align(STEADY, model, criterion, STEADY.batch())


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
