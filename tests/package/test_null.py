"""The null condition: what each kind of value puts in a condition's place, and in how many passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import plain
import pytest
import torch
from plain import TOLERANCE
from torch import Tensor, nn
from toys import ToyDiT, batch, teacher_of

from selftrans_reg.errors import SettingError

B = batch(6)
CALL = (B["x"], B["t"], B["y"])


@dataclasses.dataclass
class More:
    mask: Tensor | None


class Conditioned(ToyDiT):
    """Takes labels, and text as diffusers' models do: of any length, with a mask, places and more; or as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(5, 4)
        self.draw_weights(7)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, text: Any, mask: Any = None, places: Any = None, more: Any = None
    ) -> Tensor:
        if isinstance(text, list):
            pooled = torch.stack([self.text(one).mean(0) for one in text])
        else:
            weights = torch.ones(text.shape[:2]) if mask is None else mask.float()
            if places is not None:  # (L, 1), shared by all samples
                weights = weights * places[:, 0]
            pooled = (self.text(text) * weights[..., None]).sum(1) / text.shape[1]
        extra = more.mask if isinstance(more, More) else more["masks"][0] if isinstance(more, dict) else None
        if extra is not None:
            pooled = pooled * extra.float().mean(1, keepdim=True)
        return super().forward(x + pooled[:, :, None, None] * (2 if more is True else 1), t, y)


G = torch.Generator().manual_seed(9)
LONG, MASK, PLACES = torch.randn(6, 7, 5, generator=G), torch.rand(6, 7, generator=G) > 0.3, torch.rand(7, 1)
SHORT, SHORT_MASK, SHORT_PLACES = torch.randn(3, 5, generator=G), torch.tensor([True, False, True]), torch.rand(3, 1)
EMPTY, EMPTY_MASK, NO_TEXT = SHORT.expand(6, 3, 5), SHORT_MASK.expand(6, 3), torch.randn(7, 5, generator=G)
LISTED = [torch.randn(length, 5, generator=G) for length in (2, 7, 3, 3, 5, 1)]
SIX, TENS = {"text": torch.randn(6, 5, generator=G), "places": torch.rand(6, 1)}, torch.full((6,), 10)


@pytest.mark.parametrize(
    ("given", "null", "expected", "passes"),
    [
        *(({}, {"y": null}, {"y": TENS}, 1) for null in (10, torch.tensor(10), 10.0)),
        ({}, {"text": 0}, {"text": 0 * LONG}, 1),
        ({}, {"text": NO_TEXT.double()}, {"text": NO_TEXT.expand(6, 7, 5)}, 1),
        ({}, {"text": lambda call: call["text"] * call["t"][:, None, None]}, {"text": LONG * B["t"][:, None, None]}, 1),
        # A callable sees the whole batch though only some rows are run.
        ({}, {"text": lambda call: call["text"].mean(0).expand(6, 7, 5)}, {"text": LONG.mean(0).expand(6, 7, 5)}, 1),
        ({}, {"text": SHORT, "y": lambda call: (call["y"] + 1) % 10}, {"text": EMPTY, "y": (B["y"] + 1) % 10}, 2),
        ({"mask": MASK}, {"text": 0, "mask": None}, {"text": 0 * LONG, "mask": None}, 2),
        ({"mask": None}, {"text": SHORT, "mask": SHORT_MASK}, {"text": EMPTY, "mask": EMPTY_MASK}, 2),
        ({}, {"mask": MASK[0]}, {"mask": MASK[:1].expand(6, 7)}, 2),
        ({"mask": None}, {"text": 0, "mask": None}, {"text": 0 * LONG}, 1),
        ({"mask": MASK}, {"mask": lambda call: None}, {}, 2),
        ({"places": PLACES}, {"text": SHORT, "places": SHORT_PLACES}, {"text": EMPTY, "places": SHORT_PLACES}, 2),
        # Places that are as many as the samples are shared as the others were.
        ({"places": PLACES}, SIX, SIX | {"text": SIX["text"].expand(6, 6, 5)}, 2),
        ({"more": {"masks": [MASK]}}, {"more": {"masks": {0: MASK[0]}}}, {"more": {"masks": [MASK[:1]]}}, 1),
        ({"more": {"masks": [None]}}, {"more": {"masks": {0: MASK[0]}}}, {"more": {"masks": [MASK[:1]]}}, 2),
        ({"more": More(MASK)}, {"more": {"mask": SHORT_MASK}}, {"more": More(EMPTY_MASK)}, 2),
        ({"more": True}, {"more": False}, {"more": False}, 2),
        ({"text": LISTED}, {"text": SHORT}, {"text": [SHORT] * 6}, 1),
        ({"text": LISTED}, {"text": lambda a: [t[:1] for t in a["text"]]}, {"text": [t[:1] for t in LISTED]}, 1),
    ],
)
@pytest.mark.parametrize("rows", [None, [4, 1]])
def test_it_is_the_formula_of_two_calls(given: Any, null: Any, expected: Any, passes: int, rows: Any) -> None:
    model, calls = Conditioned().eval(), [{"y": B["y"], "text": LONG} | arguments for arguments in (given, expected)]
    with torch.no_grad():
        wanted = [plain.tapped(model, "blocks.2", *CALL[:2], **arguments)[1] for arguments in calls]
    teacher, batches = teacher_of(model, null=null), []
    teacher.model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    for _ in range(2):
        batches.clear()
        found = teacher.features(teacher.spec.bind(CALL[:2], calls[0]), rows and torch.tensor(rows))
        for side, f in zip(found, wanted, strict=True):
            torch.testing.assert_close(side, f[rows or slice(None)], **TOLERANCE)
    n = len(rows or TENS)
    assert batches == ([2 * n] if passes == 1 else [n, n])


@pytest.mark.parametrize(
    ("null", "part"),
    [
        *((null, f"null= maps argument names to the null condition.*; got {null!r}") for null in ({}, 1000)),
        ({"yy": 10}, r"names 'yy'(?s:.*)Nearest: 'y'.*\n.* takes a nested mapping: null={'cond': {'y': 1000}}"),
        ({"t": 0}, "names 't', which is x_t or t"),
        ({"y": [10]}, r"condition for 'y' must be a number, None, a tensor without batch axis.* got \[10\]"),
        ({"more": 0}, r"(?s)'more', but the call holds no tensor with 6 rows there.*takes a nested mapping: null={"),
        ({"more": {"nasks": 0}}, r"(?s)names \"more\['nasks'\]\", but .*Nearest: \"more\['masks'\]\[0\]\""),
        ({"places": 1}, "names 'places', but the call holds no tensor with 6 rows there"),
        ({"y": 2.5}, "condition for 'y' is 2.5, which the argument's torch.int64 cannot hold."),
        ({"y": lambda call: call["y"] / 2}, r"is a float32 tensor of shape \(6,\), which"),
        ({"y": TENS}, r"for 'y' has shape \(6,\); the argument is \(6,\), so without its batch axis it should be \(\)"),
        ({"text": lambda call: call["text"][:1]}, r"for 'text' returned \(1, 7, 5\).*\(6, 7, 5\)"),
        ({"text": lambda call: 0}, "for 'text' returned int"),
    ],
)
def test_a_null_condition_that_does_not_fit_is_refused(null: Any, part: str) -> None:
    with pytest.raises(SettingError, match=part):
        teacher_of(Conditioned(), null=null)(*CALL, LONG, None, None, {"masks": [MASK]})


@pytest.mark.parametrize("null", [10, -1])
@pytest.mark.parametrize("example", [None, CALL])
def test_an_index_outside_its_embedding_is_refused_before_it_is_looked_up(null: int, example: Any) -> None:
    model = ToyDiT(dropout=0.0)  # ten classes and no null row
    model.y_embedder.register_forward_hook(lambda module, args, output: pytest.fail("looked up"))
    message = f"Index {null} would reach embedding 'y_embedder', which has 10 rows (0 to 9)"
    with plain.refused(SettingError, message, f"The null condition: y = {null}", "built without label dropout"):
        teacher_of(model, null={"y": null}, example=example)(*CALL)


def test_a_buffer_of_the_teachers_own_model_is_read_from_the_checkpoint() -> None:
    first, model = Conditioned(), Conditioned()
    for owner, caption in ((first, SHORT), (model, -SHORT)):
        owner.register_buffer("caption", caption.clone())
    expected = plain.guided(first, "blocks.2", 3.0, (*CALL, LONG), (*CALL, EMPTY))
    teacher = teacher_of(model, first.state_dict(), null={"text": model.caption})
    torch.testing.assert_close(teacher(*CALL, LONG), expected, **TOLERANCE)
