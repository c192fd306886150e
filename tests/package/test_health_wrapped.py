"""Health under what wraps a model: no false alarm, and the same fault is named."""

import warnings

import pytest
import torch
from loops import denoising, new_criterion, student
from ranks import on_ranks
from sharded import mine, shard, shard_whole
from torch.distributed.fsdp import MixedPrecisionPolicy

from selftrans_reg.errors import HealthWarning

TIMES = [0.35, 0.45, 0.55, 0.9, 0.32, 0.5, 0.8, 0.95]
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def wrapped_run(rank: int, wrapper: str, left_out: bool) -> tuple[list[str], list[str]]:
    """The warnings of 40 steps on this rank, and what was measured."""
    model = student()
    shard(model)
    criterion = new_criterion(model, health_interval=5)
    shard_whole(criterion, mp_policy=BF16 if "bfloat16" in wrapper else MixedPrecisionPolicy())
    parameters = [*model.parameters(), *([] if left_out else criterion.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    b = mine(rank, TIMES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HealthWarning)
        for _ in range(40):
            terms = criterion(denoising(model, b), latents=b.latents)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
    return [w.message.kind for w in caught if isinstance(w.message, HealthWarning)], sorted(criterion.measures)


@pytest.mark.parametrize("wrapper", ["FSDP2", "FSDP2 with a head in bfloat16"])
@pytest.mark.parametrize("left_out", [False, True], ids=["healthy", "head left out"])
def test_on_two_ranks(wrapper: str, left_out: bool) -> None:
    for said, measured in on_ranks(wrapped_run, wrapper, left_out):
        assert said == ["head_not_trained"] * left_out
        assert measured == ["contrast", "gradient_cosine", "gradient_ratio", "student_norm", "target_norm"]
