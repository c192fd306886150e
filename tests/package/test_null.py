"""The null condition: what each kind of value puts in a condition's place, and in how many passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import plain
import pytest
import torch
from plain import TOLERANCE
from torch import Tensor, nn
from toys import ToyDiT, batch

import selftrans_reg as st
from selftrans_reg.errors import SettingError

B = batch(6)
CALL = (B["x"], B["t"], B["y"])


def teacher_of(model: nn.Module, **settings: Any) -> st.CFGFeatureTeacher:
    return st.build_teacher(model, None, **{"layer": "blocks.2", "guidance_scale": 3.0, "null": {"y": 10}} | settings)


class Conditioned(ToyDiT):
    """Takes what a text model takes: an embedding, and a nested mapping with another one."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(5, 16)
        nn.init.normal_(self.text.weight, generator=torch.Generator().manual_seed(3))
        nn.init.zeros_(self.text.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor, more: dict[str, Any] | None = None) -> Tensor:
        bias = self.text(text).mean(1)
        if more is not None:
            bias = bias + more["pooled"][0]
        return super().forward(x + bias[:, :4, None, None], t, y)


G = torch.Generator().manual_seed(5)
TEXT, POOLED = torch.randn(6, 3, 5, generator=G), torch.randn(6, 16, generator=G)
NO_TEXT, NO_POOLED = torch.randn(3, 5, generator=G), torch.randn(16, generator=G)


class TestNull:
    @pytest.mark.parametrize(
        ("null", "text", "y"),
        [
            ({"y": 10}, TEXT, torch.full((6,), 10)),
            ({"y": torch.tensor(10)}, TEXT, torch.full((6,), 10)),
            ({"y": 10.0}, TEXT, torch.full((6,), 10)),
            ({"text": 0}, torch.zeros_like(TEXT), B["y"]),
            ({"text": NO_TEXT}, NO_TEXT.expand(6, 3, 5), B["y"]),
            ({"text": NO_TEXT.double()}, NO_TEXT.expand(6, 3, 5), B["y"]),
            ({"text": lambda call: call["text"] * call["t"][:, None, None]}, TEXT * B["t"][:, None, None], B["y"]),
            ({"text": NO_TEXT, "y": lambda call: (call["y"] + 1) % 10}, NO_TEXT.expand(6, 3, 5), (B["y"] + 1) % 10),
        ],
    )
    def test_each_kind_of_null_condition_is_what_the_second_half_sees(
        self, null: dict[str, Any], text: Tensor, y: Tensor
    ) -> None:
        model = Conditioned()
        args, null_args = (*CALL, TEXT), (B["x"], B["t"], y, text)
        expected = plain.guided(model, "blocks.2", 3.0, args, null_args)
        torch.testing.assert_close(teacher_of(model, null=null)(*args), expected, **TOLERANCE)

    def test_a_callable_sees_the_whole_batch_though_only_some_rows_are_run(self) -> None:
        model, args = Conditioned(), (*CALL, TEXT)
        null = {"text": lambda call: call["text"].mean(0).expand(6, 3, 5)}
        expected = plain.guided(model, "blocks.2", 3.0, args, (*CALL, TEXT.mean(0).expand(6, 3, 5)))
        teacher, rows = teacher_of(model, null=null), torch.tensor([1, 4])
        found = teacher.guide(*teacher.features(teacher.spec.bind(args, {}), rows))
        torch.testing.assert_close(found, expected[rows], **TOLERANCE)

    def test_a_nested_argument_takes_a_nested_mapping(self) -> None:
        model, more = Conditioned(), {"pooled": [POOLED], "size": (64, 64)}
        args = (*CALL, TEXT, more)
        null_args = (*CALL, torch.zeros_like(TEXT), {"pooled": [NO_POOLED.expand(6, 16)]})
        expected = plain.guided(model, "blocks.2", 3.0, args, null_args)
        teacher = teacher_of(model, null={"text": 0, "more": {"pooled": {0: NO_POOLED}}})
        torch.testing.assert_close(teacher(*args), expected, **TOLERANCE)

    def test_a_flat_null_condition_for_a_nested_argument_is_told_how_to_nest(self) -> None:
        with pytest.raises(SettingError) as error:
            teacher_of(Conditioned(), null={"more": 0})(*CALL, TEXT, {"pooled": [POOLED], "size": (64, 64)})
        for part in ("names 'more', but the call holds no tensor with 6 rows there", "takes a nested mapping: null={"):
            assert part in str(error.value)

    @pytest.mark.parametrize("null", [None, {}, "y", 1000])
    def test_no_null_condition_is_refused(self, null: Any) -> None:
        with pytest.raises(SettingError) as error:
            teacher_of(ToyDiT(), null=null)
        assert f"null= maps argument names to the null condition, such as null={{'y': 1000}}; got {null!r}." in str(
            error.value
        )

    @pytest.mark.parametrize(
        ("null", "parts"),
        [
            ({"labels": 10}, ["null= names 'labels', which ToyDiT.forward does not take", "It takes 'x', 't', 'y'"]),
            ({"yy": 10}, ["names 'yy'", "Nearest: 'y'", "takes a nested mapping: null={'cond': {'y': 1000}}"]),
            ({"t": 0}, ["null= names 't', which is x_t or t, not a condition"]),
            ({"y": [10]}, ["null condition for 'y' must be a number, None, a tensor without batch axis", "got [10]"]),
            ({"y": {}}, ["null condition for 'y' must be a number", "got {}"]),
        ],
    )
    def test_a_misnamed_or_meaningless_null_condition_is_refused_at_once(
        self, null: dict[str, Any], parts: list[str]
    ) -> None:
        with pytest.raises(SettingError) as error:
            teacher_of(ToyDiT(), null=null)
        for part in parts:
            assert part in str(error.value)

    @pytest.mark.parametrize(
        ("null", "more", "parts"),
        [
            (
                {"more": 0},
                None,
                ["names 'more', but the call holds no tensor with 6 rows there", "'x', 't', 'y', 'text'"],
            ),
            (
                {"more": {"poolde": 0}},
                {"pooled": [POOLED]},
                ["names \"more['poolde']\", but the call holds no tensor", "Nearest: \"more['pooled'][0]\""],
            ),
            ({"y": 2.5}, None, ["condition for 'y' is 2.5, which the argument's torch.int64 cannot hold."]),
            ({"y": "none"}, None, ["for 'y' is 'none', which the argument's torch.int64 cannot hold."]),
            ({"y": torch.tensor(2.5)}, None, ["is a float32 tensor of shape (6,), which the argument's torch.int64"]),
            ({"y": lambda call: call["y"] / 2}, None, ["is a float32 tensor of shape (6,), which the argument's"]),
            ({"y": torch.full((6,), 10)}, None, ["for 'y' has shape (6,); the argument is (6,), so without its batch"]),
            ({"text": torch.zeros(1, 3, 5)}, None, ["for 'text' has shape (1, 3, 5)", "it should be (3, 5)"]),
            ({"text": torch.zeros(5)}, None, ["for 'text' has shape (5,)", "it should be (3, 5)"]),
            (
                {"text": lambda call: call["text"][:1]},
                None,
                ["for 'text' returned (1, 3, 5)", "(6, 3, 5)"],
            ),
            ({"text": lambda call: 0}, None, ["for 'text' returned int; it gets the call's arguments by name"]),
        ],
    )
    def test_a_null_condition_that_does_not_fit_the_call_is_refused(
        self, null: dict[str, Any], more: Any, parts: list[str]
    ) -> None:
        with pytest.raises(SettingError) as error:
            teacher_of(Conditioned(), null=null)(*CALL, TEXT, more)
        for part in parts:
            assert part in str(error.value)

    @pytest.mark.parametrize(("null", "found"), [(10, 10), (1000, 1000), (-1, -1)])
    @pytest.mark.parametrize("when", ["first call", "example"])
    def test_an_index_outside_its_embedding_is_refused_before_it_is_looked_up(
        self, null: int, found: int, when: str
    ) -> None:
        model = ToyDiT(dropout=0.0)  # ten classes and no null row
        looked_up: list[int] = []
        model.y_embedder.register_forward_hook(lambda module, args, output: looked_up.append(1))
        with pytest.raises(SettingError) as error:
            teacher_of(model, null={"y": null}, example=CALL if when == "example" else None)(*CALL)
        for part in (
            f"Index {found} would reach embedding 'y_embedder', which has 10 rows (0 to 9)",
            f"The null condition: y = {null}",
            "A model built without label dropout has no null row",
        ):
            assert part in str(error.value)
        assert looked_up == []

    def test_tensor_nulls_count_by_value_and_shape(self) -> None:
        prints = [
            teacher_of(Conditioned(), null={"text": null}).fingerprint
            for null in (torch.zeros(3, 5), torch.zeros(5, 3), torch.ones(3, 5), torch.zeros(3, 5))
        ]
        assert torch.equal(prints[0], prints[3])
        assert len({tuple(p.tolist()) for p in prints}) == 3


class Masked(ToyDiT):
    """Takes text as diffusers' models do: of any length, with a mask or without; places for it; a list of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(5, 4)
        self.draw_weights(7)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor | list[Tensor],
        mask: Tensor | None = None,
        places: Tensor | None = None,
        more: Any = None,
        guided: bool = True,
    ) -> Tensor:
        if isinstance(text, list):
            pooled = torch.stack([self.text(one).mean(0) for one in text])
        else:
            weights = torch.ones(text.shape[:2]) if mask is None else mask.float()
            if places is not None:  # (L, 1), shared by all samples
                weights = weights * places[:, 0]
            pooled = (self.text(text) * weights[..., None]).sum(1) / text.shape[1]
        if more is not None:
            extra = more.mask if dataclasses.is_dataclass(more) else more["mask"]
            pooled = pooled if extra is None else pooled * extra.float().mean(1, keepdim=True)
        return super().forward(
            x + pooled[:, :, None, None] * (2 if guided else 1), t, torch.zeros(len(x), dtype=torch.long)
        )


@dataclasses.dataclass
class More:
    mask: Tensor | None


H = torch.Generator().manual_seed(9)
LONG, MASK, PLACES = (
    torch.randn(6, 7, 5, generator=H),
    torch.rand(6, 7, generator=H) > 0.3,
    torch.rand(7, 1, generator=H),
)
SHORT, SHORT_MASK, SHORT_PLACES = torch.randn(3, 5, generator=H), torch.tensor([True, False, True]), torch.rand(3, 1)
EMPTY, EMPTY_MASK = SHORT.expand(6, 3, 5), SHORT_MASK.expand(6, 3)
LISTED = [torch.randn(length, 5, generator=H) for length in (2, 7, 3, 3, 5, 1)]


class TestACallOfItsOwn:
    """The null condition has its own length, mask and places: beside the formula from two calls of the model."""

    @pytest.mark.parametrize(
        ("given", "null", "expected", "passes"),
        [
            ({"text": LONG}, {"text": SHORT}, {"text": EMPTY}, 2),
            ({"text": LONG, "mask": MASK}, {"text": SHORT, "mask": SHORT_MASK}, {"text": EMPTY, "mask": EMPTY_MASK}, 2),
            ({"text": LONG, "mask": MASK}, {"text": 0, "mask": None}, {"text": 0 * LONG, "mask": None}, 2),
            ({"text": LONG, "mask": None}, {"text": SHORT, "mask": SHORT_MASK}, {"text": EMPTY, "mask": EMPTY_MASK}, 2),
            ({"text": LONG}, {"mask": MASK[0]}, {"text": LONG, "mask": MASK[:1].expand(6, 7)}, 2),
            ({"text": LONG, "mask": None}, {"text": 0, "mask": None}, {"text": 0 * LONG}, 1),
            ({"text": LONG, "mask": MASK}, {"text": 0}, {"text": 0 * LONG, "mask": MASK}, 1),
            ({"text": LONG}, {"text": lambda call: call["text"][:, :2] * 0.5}, {"text": 0.5 * LONG[:, :2]}, 2),
            ({"text": LONG, "mask": MASK}, {"mask": lambda call: None}, {"text": LONG}, 2),
            (
                {"text": LONG, "places": PLACES},
                {"text": SHORT, "places": SHORT_PLACES},
                {"text": EMPTY, "places": SHORT_PLACES},
                2,
            ),
            ({"text": LONG, "more": {"mask": MASK}}, {"more": {"mask": None}}, {"text": LONG}, 2),
            (
                {"text": LONG, "more": {"mask": None}},
                {"more": {"mask": MASK[0]}},
                {"text": LONG, "more": {"mask": MASK[:1]}},
                2,
            ),
            (
                {"text": LONG, "more": More(MASK)},
                {"more": {"mask": SHORT_MASK}},
                {"text": LONG, "more": More(EMPTY_MASK)},
                2,
            ),
            ({"text": LONG, "guided": True}, {"guided": False}, {"text": LONG, "guided": False}, 2),
            ({"text": LISTED}, {"text": SHORT}, {"text": [SHORT] * 6}, 1),
            (
                {"text": LISTED},
                {"text": lambda call: [t[:1] for t in call["text"]]},
                {"text": [t[:1] for t in LISTED]},
                1,
            ),
        ],
    )
    @pytest.mark.parametrize("rows", [None, [4, 1]])
    def test_it_is_the_formula_of_two_calls(
        self, given: dict[str, Any], null: dict[str, Any], expected: dict[str, Any], passes: int, rows: list[int] | None
    ) -> None:
        model = Masked().eval()
        given, expected = {"text": LONG} | given, {"text": LONG} | expected
        with torch.no_grad():
            wanted = [plain.tapped(model, "blocks.2", *CALL[:2], **arguments)[1] for arguments in (given, expected)]
        teacher = teacher_of(model, null=null)
        chosen = None if rows is None else torch.tensor(rows)
        batches: list[int] = []
        teacher.model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
        for _ in range(2):
            batches.clear()
            found = teacher.features(teacher.spec.bind(CALL[:2], given), chosen)
            for side, f in zip(found, wanted, strict=True):
                torch.testing.assert_close(side, f if rows is None else f[rows], **TOLERANCE)
        n = 6 if rows is None else 2
        assert batches == ([2 * n] if passes == 1 else [n, n])

    def test_the_report_sees_it_too(self) -> None:
        b = batch(16)
        data = [{"latents": b["x"], "text": LONG[:1].expand(16, 7, 5), "labels": b["y"] % 2}]
        report = st.layer_report(Masked(), data, time="sit", null={"text": SHORT}, noise_fractions=[0.5], k=2)
        assert all(0 < row.contrast < 10 for row in report.rows)

    @pytest.mark.parametrize(
        "null", [{"more": {"mist": SHORT_MASK}}, {"more": {"mask": 0}}, {"mask": 1}, {"places": 1}]
    )
    def test_a_name_or_a_number_that_stands_for_nothing_is_refused(self, null: dict[str, Any]) -> None:
        with pytest.raises(SettingError, match="but the call holds no tensor with 6 rows there"):
            teacher_of(Masked(), null=null)(*CALL[:2], LONG, None, None, {"mask": None})

    def test_a_buffer_of_the_teachers_own_model_is_read_from_the_checkpoint(self) -> None:
        class Learned(Masked):
            def __init__(self, seed: int = 0) -> None:
                super().__init__()
                self.register_buffer("caption", torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)))

        first, model = Learned(1), Learned(2)
        caption = first.caption.clone()
        state = first.state_dict()
        teacher = st.build_teacher(model, state, layer="blocks.2", guidance_scale=3.0, null={"text": model.caption})
        expected = plain.guided(first, "blocks.2", 3.0, (*CALL[:2], LONG), (*CALL[:2], caption.expand(6, 3, 5)))
        torch.testing.assert_close(teacher(*CALL[:2], LONG), expected, **TOLERANCE)
