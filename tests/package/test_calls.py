"""A model's call by names: x_t and t, and the tensors that hold one row for each sample."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selftrans_reg import SettingError, ShapeError
from selftrans_reg.calls import Call, CallSpec, RowTensors
from selftrans_reg.errors import CallError


class Positional(nn.Module):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, mask: Tensor | None = None) -> None: ...


class Diffusers(nn.Module):
    def forward(self, hidden_states: Tensor, cond: Tensor | None = None, timestep: Tensor | None = None) -> None: ...


class Keywords(nn.Module):
    def forward(self, x: Tensor, **kwargs: Any) -> None: ...


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None: ...


X, T, Y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.arange(3)


def test_positional_and_keyword_arguments_get_their_names() -> None:
    spec = CallSpec(Positional(), None)
    for call in (spec.bind((X, T, Y), {}), spec.bind((X,), {"y": Y, "t": T}), spec.bind((), {"y": Y, "t": T, "x": X})):
        assert set(call.arguments) == {"x", "t", "y"}
        assert call.x_t is X
        assert call.rows == 3
        torch.testing.assert_close(call.t, T)


def test_call_says_where_x_t_and_t_are() -> None:
    spec = CallSpec(Diffusers(), {"t": "timestep"})
    call = spec.bind((X,), {"timestep": T, "cond": Y})
    assert (spec.x, spec.t) == ("hidden_states", "timestep")
    assert call.x_t is X
    torch.testing.assert_close(call.t, T)


def test_an_argument_may_be_one_of_the_models_own_kwargs() -> None:
    spec = CallSpec(Keywords(), {"t": "sigma"})
    call = spec.bind((X,), {"sigma": T, "class_labels": Y})
    assert set(call.arguments) == {"x", "sigma", "class_labels"}
    assert spec.arguments(call.arguments) == ((X,), {"sigma": T, "class_labels": Y})


@pytest.mark.parametrize("args", [(X, T, Y), (X, T)])
@pytest.mark.parametrize("kwargs", [{}, {"mask": Y}])
def test_a_call_is_rebuilt_as_it_was(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    spec = CallSpec(Positional(), None)
    if len(args) < 3:
        kwargs = {"y": Y, **kwargs}
    rebuilt_args, rebuilt_kwargs = spec.arguments(spec.bind(args, kwargs).arguments)
    seen = spec.bind(rebuilt_args, rebuilt_kwargs).arguments
    assert all(seen[name] is value for name, value in spec.bind(args, kwargs).arguments.items())


@pytest.mark.parametrize("t", [0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.full((3, 1), 0.25)])
def test_a_time_is_one_value_a_row(t: object) -> None:
    call = CallSpec(Positional(), None).bind((X, t, Y), {})
    torch.testing.assert_close(call.t, torch.full((3,), 0.25))


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        ({"z": "x"}, ["call= takes 'x', 't', 'shared'", "; got 'z'"]),
        (
            {"x": "noisy"},
            ["call=dict(x=...) names 'noisy'", "Positional.forward does not take", "'x', 't', 'y', 'mask'"],
        ),
        ({"t": "tt"}, ["call=dict(t=...) names 'tt'", "Nearest: 't'"]),
        ({"shared": ["img_ids"]}, ["call=dict(shared=...) names 'img_ids'"]),
        ({"shared": "masks"}, ["names 'masks'", "Nearest: 'mask'"]),
        ({"x": "t"}, ["cannot both be the argument 't'"]),
        ({"shared": ["t", "x"]}, ["call=dict(shared=...) names 't', 'x'", "x_t or t", "never shared"]),
    ],
)
def test_a_call_mapping_that_does_not_fit_is_refused(call: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(SettingError) as error:
        CallSpec(Positional(), call)
    for part in parts:
        assert part in str(error.value)


def test_a_signature_without_names_is_refused_with_both_ways_out() -> None:
    with pytest.raises(CallError) as error:
        CallSpec(Anything(), None)
    for part in (
        "Anything.forward(self, ",
        "x_t and t cannot be told",
        "the module that names them",
        "call=dict(x=...",
    ):
        assert part.replace("self, ", "") in str(error.value)
    assert CallSpec(Anything(), {"x": "x", "t": "t"}).bind((), {"x": X, "t": T}).x_t is X


@pytest.mark.parametrize(
    ("args", "error", "parts"),
    [
        ((X, T), CallError, ["Positional.forward(x", "does not take this call", "missing a required argument: 'y'"]),
        ((Y, T, Y), CallError, ["'x' of Positional should be x_t", "int64 tensor of shape (3,)", "call=dict(x=...)"]),
        ((None, T, Y), CallError, ["should be x_t, a floating tensor (N, ...); got None"]),
        ((X, None, Y), CallError, ["'t' of Positional should be the time t", "got None", "call=dict(t=...)"]),
        ((X, True, Y), CallError, ["should be the time t; got True"]),
        ((X, torch.rand(2), Y), ShapeError, ["'t' of Positional has shape (2,)", "3 rows of 'x' (3, 4, 8, 8)"]),
        ((X, torch.rand(3, 5), Y), ShapeError, ["has shape (3, 5)", "a scalar or one value", "call=dict(t=...)"]),
    ],
)
def test_a_call_that_cannot_be_read_is_refused(args: tuple[Any, ...], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        CallSpec(Positional(), None).bind(args, {})
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_time_names_the_arguments_that_are_there() -> None:
    with pytest.raises(CallError) as error:
        CallSpec(Diffusers(), {"t": "timestep"}).bind((X, Y), {})
    assert "has no argument 'timestep'; it has 'hidden_states', 'cond'" in str(error.value)
    assert "Say which holds t: call=dict(t=...)" in str(error.value)


def test_a_students_call_becomes_the_teachers_own() -> None:
    class Teacher(nn.Module):
        def forward(self, y: Tensor, sample: Tensor, sigma: Tensor) -> None: ...

    student, teacher = CallSpec(Positional(), None), CallSpec(Teacher(), {"x": "sample", "t": "sigma"})
    call = teacher.adopt(student.bind((X, T, Y), {}), student)
    assert {name: id(value) for name, value in call.arguments.items()} == {"sample": id(X), "sigma": id(T), "y": id(Y)}
    with pytest.raises(CallError) as error:
        teacher.adopt(student.bind((X, T, Y), {"mask": Y}), student)
    assert "The student was called with 'mask', which Teacher.forward does not take; it takes 'y'" in str(error.value)
    assert "must take the same conditions under the same names" in str(error.value)


Pair = namedtuple("Pair", "left right")


class TestRows:
    def rows(self, shared: tuple[str, ...] = (), **arguments: Any) -> RowTensors:
        return RowTensors(Call({"x": X, "t": T, **arguments}, X, T, frozenset(shared)))

    def test_tensors_with_n_rows_are_found_at_any_depth_with_their_paths(self) -> None:
        held = self.rows(cond={"text": torch.rand(3, 7), "more": [torch.rand(3), (Y, "n", None)]}, pair=Pair(Y, 2))
        assert held.paths == ["x", "t", "cond['text']", "cond['more'][0]", "cond['more'][1][0]", "pair[0]"]

    def test_what_is_shared_stays_as_it_is(self) -> None:
        held = self.rows(position=torch.rand(64, 2), scale=torch.tensor(2.0), t=torch.tensor([0.5]))
        assert held.paths == ["x"]

    def test_others_take_their_place_and_containers_keep_their_kind(self) -> None:
        held = self.rows(cond={"a": [Y, 5], "b": Pair(Y, "kept")}, size=(64, 64))
        rebuilt = held.rebuild([tensor[:2] for tensor in held.tensors])
        assert rebuilt["x"].shape == (2, 4, 8, 8)
        assert rebuilt["size"] == (64, 64)
        assert rebuilt["cond"]["a"][1] == 5
        assert isinstance(rebuilt["cond"]["b"], Pair)
        torch.testing.assert_close(rebuilt["cond"]["b"].left, Y[:2])
        assert rebuilt["cond"]["b"].right == "kept"

    def test_dataclasses_and_mappings_of_other_kinds_keep_their_kind(self) -> None:
        @dataclasses.dataclass(frozen=True)
        class Condition:
            text: torch.Tensor
            scale: float

        class Attributes(dict):
            __getattr__ = dict.__getitem__

        held = self.rows(cond=Condition(Y, 2.0), more=Attributes(text=Y))
        assert held.paths[-2:] == ["cond['text']", "more['text']"]
        rebuilt = held.rebuild([tensor[:2] for tensor in held.tensors])
        assert isinstance(rebuilt["cond"], Condition)
        assert rebuilt["cond"].scale == 2.0
        torch.testing.assert_close(rebuilt["cond"].text, Y[:2])
        torch.testing.assert_close(rebuilt["more"].text, Y[:2])
        assert len(held.rebuild(held.tensors)["cond"].text) == len(Y)

    def test_shared_exempts_what_only_looks_like_rows(self) -> None:
        ids = torch.rand(3, 2)
        assert "img_ids" in self.rows(img_ids=ids).paths
        held = self.rows(("img_ids", "both"), img_ids=ids, both={"deep": [ids]}, y=Y)
        assert held.paths == ["x", "t", "y"]
        assert held.rebuild(held.tensors)["img_ids"] is ids

    @pytest.mark.parametrize("rows", [6, 9])
    def test_a_packed_or_doubled_tensor_is_refused(self, rows: int) -> None:
        with pytest.raises(CallError) as error:
            self.rows(cond={"text": torch.rand(rows, 7)})
        for part in (f"cond['text']\" has shape ({rows}, 7)", f"{rows // 3} times the batch of 3", "shared=['cond']"):
            assert part in str(error.value)
        assert self.rows(("cond",), cond={"text": torch.rand(rows, 7)}).paths == ["x", "t"]

    @pytest.mark.parametrize(
        "entries", [["a", "b", "c"], ("a", "b", "c"), [torch.rand(7, 2), torch.rand(5, 2), torch.rand(4, 2)]]
    )
    def test_a_list_with_one_entry_a_sample_is_refused(self, entries: list[Any] | tuple[str, ...]) -> None:
        with pytest.raises(CallError) as error:
            self.rows(captions=entries)
        for part in (
            f"'captions' is a {type(entries).__name__} of 3 entries",
            "rows can only be taken from tensors",
            "shared=['captions']",
        ):
            assert part in str(error.value)
        assert self.rows(("captions",), captions=entries).paths == ["x", "t"]
        assert self.rows(size=(256, 256, 8), tables=(torch.rand(5, 2),) * 3).paths == ["x", "t"]
