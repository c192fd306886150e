"""A model's call by names: x_t and t, and the tensors that hold one row for each sample."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import plain
import pytest
import torch
from torch import Tensor, nn

from selftrans_reg import SettingError, ShapeError
from selftrans_reg.calls import Call, CallSpec, RowTensors, bracketed, join_rows, take_rows
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
        ({"shared": ["t", "x"]}, ["call=dict(shared=...) names 't'", "x_t or t", "never shared"]),
        ({"shared": ["masks['a']"]}, ["call=dict(shared=...) names 'masks'", "Nearest: 'mask'"]),
        ({"rows": {"y": "all"}}, ["call=dict(rows=...) takes an axis or 'list'; got 'all' for 'y'"]),
        ({"rows": {"y": True}}, ["got True for 'y'"]),
        ({"rows": {"x": 1}}, ["call=dict(rows=...) names 'x': x_t or t"]),
        ({"fixed": {"t": 1}}, ["call=dict(fixed=...) names 't': x_t or t, which differ by call"]),
    ],
)
def test_a_call_mapping_that_does_not_fit_is_refused(call: dict[str, Any], parts: list[str]) -> None:
    with plain.refused(SettingError, *parts):
        CallSpec(Positional(), call)


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
        (([X], T, Y), CallError, ["got a list", "Or make it of the list: call=dict(x=lambda call: torch.stack(...))"]),
        ((None, T, Y), CallError, ["should be x_t, a floating tensor (N, ...); got None"]),
        ((X, None, Y), CallError, ["'t' of Positional should be the time t", "got None", "call=dict(t=...)"]),
        ((X, True, Y), CallError, ["should be the time t; got True"]),
        ((X, torch.rand(2), Y), ShapeError, ["'t' of Positional has shape (2,)", "3 rows of x_t (3, 4, 8, 8)"]),
        (
            (X, torch.rand(2, 5), Y),
            ShapeError,
            ["has shape (2, 5)", "one for each of their tokens", "call=dict(t=...)"],
        ),
        ((X[:0], T[:0], Y), ShapeError, ["x_t (0, 4, 8, 8) has no rows: run the model on a batch of real samples"]),
        ((X.to("meta"), T, Y), ShapeError, ["x_t (3, 4, 8, 8) lies on the meta device, without values"]),
    ],
)
def test_a_call_that_cannot_be_read_is_refused(args: tuple[Any, ...], error: type[Exception], parts: list[str]) -> None:
    with plain.refused(error, *parts):
        CallSpec(Positional(), None).bind(args, {})


def test_a_missing_time_names_the_arguments_that_are_there() -> None:
    with plain.refused(
        CallError,
        "The call has no argument 'timestep' of Diffusers; it has 'hidden_states', 'cond'",
        "Say which holds t: call=dict(t=...)",
    ):
        CallSpec(Diffusers(), {"t": "timestep"}).bind((X, Y), {})


@pytest.mark.parametrize(
    ("signature", "t"),
    [
        ("x, t, y", "t"),
        ("x, r, t, y", "t"),
        ("hidden_states, encoder_hidden_states, timestep", "timestep"),
        ("x, sigma, onehot", "sigma"),
        ("x, y, time_input", "time_input"),
        ("sample, noise_labels, class_labels", "noise_labels"),
        ("x, t, timestep_cond", "t"),
        ("x, y, t, time", "y"),  # two have such a name
        ("x, lam, y", "lam"),  # none has
        ("t, x, y", "x"),  # the first is x_t whatever its name: the call will say that it is none
        ("x, *args, timesteps", "timesteps"),
    ],
)
def test_t_is_the_argument_with_a_name_of_the_fields_or_else_the_second(signature: str, t: str) -> None:
    model = nn.Module()
    model.forward = eval(f"lambda {signature}: None")
    assert CallSpec(model, None).t == t
    assert CallSpec(model, None, needs_t=False).t == (t if t not in ("y", "lam", "x") else None)


def test_the_call_tells_what_t_was_read_from() -> None:
    assert CallSpec(Positional(), None).bind((X, T, Y), {}).time_from == "argument 't' of Positional"
    spec = CallSpec(Positional(), {"t": lambda arguments: arguments["y"] / 3})
    assert spec.bind((X, T, Y), {}).time_from == "value of call=dict(t=...)"


@pytest.mark.parametrize("t", [torch.rand(3, 5), torch.rand(3, 5, 1)])
def test_a_time_may_be_one_value_a_token(t: Tensor) -> None:
    torch.testing.assert_close(CallSpec(Positional(), None).bind((X, t, Y), {}).t, t.reshape(3, 5))


def test_callables_make_x_t_and_t_of_the_arguments() -> None:
    spec = CallSpec(Positional(), {"x": lambda a: torch.stack(a["x"]), "t": lambda a: a["t"].amax(1)})
    times = torch.rand(3, 5)
    call = spec.bind((list(X), times, Y), {})
    torch.testing.assert_close(call.x_t, X)
    torch.testing.assert_close(call.t, times.amax(1))
    assert (spec.x, spec.t) == (None, None)
    held = RowTensors(call)
    assert held.paths == ["x", "t", "y"]
    rebuilt = held.rebuild([take_rows(rows, torch.tensor([2, 0])) for rows in held.tensors])
    assert [id(row) for row in rebuilt["x"]] == [id(call.arguments["x"][i]) for i in (2, 0)]
    with pytest.raises(
        CallError, match=r"callable call=dict\(x=...\) failed on the call's arguments 'x', 't', 'y': Type"
    ):
        spec.bind((None, times, Y), {})


def test_where_t_is_not_needed_a_call_without_any_will_do() -> None:
    class Timeless(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> None: ...

    with pytest.raises(CallError, match="'y' of Timeless should be the time t; got None"):
        CallSpec(Timeless(), None).bind((X, None), {})
    for model, args in (
        (Timeless(), (X, Y)),
        (Timeless(), (X,)),
        (Positional(), (X, None, Y)),
        (Positional(), (X, T[:2], Y)),
    ):
        call = CallSpec(model, None, needs_t=False).bind(args, {})
        assert call.times is None
        with pytest.raises(CallError, match="The model's call has no time t: "):
            _ = call.t


def test_the_settings_make_the_spec_again() -> None:
    call = {"x": "y", "t": "x", "shared": ["mask['a']"], "rows": {"t": 1}, "fixed": {"mask": None}}
    assert CallSpec(Positional(), call).config == call
    assert CallSpec(Positional(), CallSpec(Positional(), None).config).config == CallSpec(Positional(), None).config


def test_a_students_call_becomes_the_teachers_own() -> None:
    class Teacher(nn.Module):
        def forward(self, y: Tensor, sample: Tensor, sigma: Tensor) -> None: ...

    student, teacher = CallSpec(Positional(), None), CallSpec(Teacher(), {"x": "sample", "t": "sigma"})
    call = teacher.adopt(student.bind((X, T, Y), {}), student)
    assert {name: id(value) for name, value in call.arguments.items()} == {"sample": id(X), "sigma": id(T), "y": id(Y)}
    with plain.refused(
        CallError,
        "The student was called with 'mask', which Teacher.forward does not take; it takes 'y'",
        "must take the same conditions under the same names",
    ):
        teacher.adopt(student.bind((X, T, Y), {"mask": Y}), student)


Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass(frozen=True)
class Condition:
    text: Any
    scale: float = 2.0


def ragged(n: int) -> list[Tensor]:
    """Captions of different lengths."""
    return [torch.rand((5, 7, 8, 10)[i], 2) for i in range(n)]


class TestRows:
    def rows(self, shared: tuple[str, ...] = (), conditions: tuple[str, ...] = (), **arguments: Any) -> RowTensors:
        named = arguments.pop("rows", {})
        ways = {bracketed(path): way for path, way in (dict.fromkeys(shared, "shared") | named).items()}
        return RowTensors(Call({"x": X, "t": T, **arguments}, X, T, ways=ways), conditions=conditions)

    def test_tensors_with_n_rows_are_found_at_any_depth_with_their_paths(self) -> None:
        held = self.rows(cond={"text": torch.rand(3, 7), "more": [torch.rand(3), (Y, "n", None)]}, pair=Pair(Y, 2))
        assert held.paths == ["x", "t", "cond['text']", "cond['more'][0]", "cond['more'][1][0]", "pair[0]"]

    def test_what_is_shared_stays_as_it_is(self) -> None:
        pad, tables = torch.rand(1, 1, 8, 8), (torch.rand(5, 2),) * 3
        held = self.rows(
            position=torch.rand(64, 2), scale=torch.tensor(2.0), t=torch.tensor([0.5]), pad=pad, tables=tables
        )
        assert held.paths == ["x"]
        assert held.rebuild([X[:2]])["pad"] is pad

    def test_others_take_their_place_and_containers_keep_their_kind(self) -> None:
        class Attributes(dict):
            def __getattr__(self, name: str) -> Any:
                return self[name] if name in self else self.__getattribute__(name)

        held = self.rows(cond={"a": [Y, 5], "b": Pair(Y, "kept")}, size=(64, 64), c=Condition(Y), d=Attributes(text=Y))
        assert held.paths[2:] == ["cond['a'][0]", "cond['b'][0]", "c['text']", "d['text']"]
        rebuilt = held.rebuild([tensor[:2] for tensor in held.tensors])
        assert rebuilt["x"].shape == (2, 4, 8, 8)
        assert rebuilt["size"] == (64, 64)
        assert rebuilt["cond"]["a"][1] == 5
        assert isinstance(rebuilt["cond"]["b"], Pair)
        assert isinstance(rebuilt["c"], Condition)
        assert rebuilt["cond"]["b"].right == "kept"
        for found in (rebuilt["cond"]["b"].left, rebuilt["c"].text, rebuilt["d"].text):
            torch.testing.assert_close(found, Y[:2])

    def test_what_a_model_puts_into_an_output_argument_is_not_taken_for_rows(self) -> None:
        """Nor do two models get one buffer."""
        buffer: dict[str, Tensor] = {}
        held = self.rows(buffer=buffer)
        first = held.rebuild(held.tensors)
        first["buffer"]["h"] = Y
        assert buffer == held.rebuild(held.tensors)["buffer"] == {}

    @pytest.mark.parametrize("path", ["cond.text", "cond['text']", 'cond["text"]'])
    @pytest.mark.parametrize("kind", [dict, Condition])
    def test_shared_exempts_an_argument_or_what_lies_inside(self, path: str, kind: type) -> None:
        ids = torch.rand(3, 2)
        assert "img_ids" in self.rows(img_ids=ids).paths
        held = self.rows(("img_ids", path), img_ids=ids, cond=kind(text={"deep": [ids]}), y=Y, more=[Y])
        assert held.paths == ["x", "t", "y", "more[0]"]
        assert held.rebuild(held.tensors)["img_ids"] is ids
        assert self.rows(("more[1]",), more=[Y, ids]).paths == ["x", "t", "more[0]"]

    def test_a_nested_name_that_the_call_does_not_have_is_refused(self) -> None:
        for cond in ({"text": Y}, Condition(Y), [Y], Y):
            with pytest.raises(
                CallError, match=r"call= names \"cond\['texts'\]\", which this call does not have; it has"
            ):
                self.rows(("cond.texts",), cond=cond)
        assert self.rows(("cond.texts", "cond.more[0]"), cond=None).paths == ["x", "t"]
        assert self.rows(("cond.scale",), cond=Condition(Y)).paths == ["x", "t", "cond['text']"]

    @pytest.mark.parametrize("rows", [6, 9])
    def test_a_packed_or_doubled_tensor_is_refused(self, rows: int) -> None:
        with pytest.raises(CallError) as error:
            self.rows(cond={"text": torch.rand(rows, 7)})
        many = f"its first axis is {rows // 3} times the batch of 3, as in a doubled"
        for part in (f"cond['text']\" has shape ({rows}, 7): {many}", "shared=[\"cond['text']\"]"):
            assert part in str(error.value)
        assert self.rows(("cond",), cond={"text": torch.rand(rows, 7)}).paths == ["x", "t"]

    def test_a_tensor_with_the_samples_on_a_later_axis_is_asked_about(self) -> None:
        layers = torch.rand(4, 3, 7)
        with pytest.raises(
            CallError, match=r"'e' has shape \(4, 3, 7\): axis 1 looks like the batch of 3.*\n.*'e': axis"
        ):
            self.rows(e=layers)
        with pytest.raises(CallError, match=r"looks like the batch of 1"):
            RowTensors(Call({"x": X[:1], "e": layers[:, :1]}, X[:1], T[:1]))
        held = self.rows(e=layers, rows={"e": 1})
        index = torch.tensor([2, 0])
        rebuilt = held.rebuild([take_rows(rows, index) for rows in held.tensors])
        torch.testing.assert_close(rebuilt["e"], layers[:, index])
        nested = self.rows(e={"a": [layers]}, rows={"e": 1})
        assert nested.tensors[-1].shape == (3, 4, 7)
        with pytest.raises(
            CallError, match=r"'e' has shape \(4, 3, 7\), not 3 samples on axis 2, where they were said to be"
        ):
            self.rows(e=layers, rows={"e": 2})

    @pytest.mark.parametrize("n", [1, 3])
    def test_a_mapping_by_numbers_is_asked_about_whatever_its_length(self, n: int) -> None:
        call = {"x": X[:n], "t": T[:n]}
        for images in ({i: torch.rand(8, 2) for i in range(n)}, {0: torch.rand(8, 2)}, dict.fromkeys(range(n), X[:n])):
            with pytest.raises(CallError, match=f"'images' is a mapping by numbers of {len(images)} entries"):
                RowTensors(Call({**call, "images": images}, X[:n], T[:n]))
        held = RowTensors(Call({**call, "images": images}, X[:n], T[:n], ways={"images": "list"}))
        doubled = held.rebuild([join_rows([rows, rows]) for rows in held.tensors])["images"]
        assert list(doubled) == list(range(2 * n))
        assert doubled[n] is images[0]
        layers = {7: X[:n], 15: X[:n], 23: X[:n], 31: X[:n]}  # of rows
        assert len(RowTensors(Call({**call, "layers": layers}, X[:n], T[:n])).paths) == 6

    @pytest.mark.parametrize("entries", [["a", "b", "c"], ("a", "b", "c"), [1, 2, 3], [[Y[:1]], [], []]])
    def test_a_list_with_one_entry_a_sample_is_refused_unless_it_is_said_to_be_one(self, entries: Any) -> None:
        with plain.refused(
            CallError,
            f"'captions' is a {type(entries).__name__} of 3 entries",
            "rows can only be taken from tensors",
            "shared=['captions']",
            "rows={'captions': 'list'}",
        ):
            self.rows(captions=entries)
        assert self.rows(("captions",), captions=entries).paths == ["x", "t"]
        held = self.rows(captions=entries, rows={"captions": "list"})
        rebuilt = held.rebuild([take_rows(rows, slice(1, 3)) for rows in held.tensors])
        assert rebuilt["captions"] == entries[1:]

    def test_a_list_of_n_tensors_is_n_rows(self) -> None:
        captions = ragged(3)
        for entries in (captions, [Y, *captions[1:]]):  # one of them is as long as the batch
            held = self.rows(captions=entries)
            assert held.paths == ["x", "t", "captions"]
            doubled = held.rebuild([join_rows([rows, rows]) for rows in held.tensors])["captions"]
            assert [id(row) for row in doubled] == [id(row) for row in entries * 2]
        assert self.rows(captions=ragged(4)).paths == ["x", "t"]
        with pytest.raises(CallError, match="'captions' is a tuple of 3 entries, one for each sample"):
            self.rows(captions=tuple(captions))
        assert self.rows(captions=tuple(captions), conditions=("captions",)).paths == ["x", "t", "captions"]
        with pytest.raises(CallError, match="has 2 entries, not one for each of the 3 samples, as it was said to"):
            self.rows(captions=ragged(2), rows={"captions": "list"})

    def test_a_list_of_n_tensors_that_all_hold_n_rows_is_asked_about(self) -> None:
        both = [X, X, X]
        with pytest.raises(CallError, match="'e' is a list of 3 entries, one for each sample by the look of it"):
            self.rows(e=both)
        assert self.rows(e=both, rows={"e": "list"}).paths == ["x", "t", "e"]
        assert self.rows(e=both, rows={"e": 0}).paths == ["x", "t", "e[0]", "e[1]", "e[2]"]
        assert self.rows(e=[X, X]).paths == ["x", "t", "e[0]", "e[1]"]

    def test_what_one_call_has_told_holds_for_those_of_other_sizes(self) -> None:
        known: dict[str, Any] = {}

        def paths(n: int) -> list[str]:
            x, t = X.repeat(2, 1, 1, 1)[:n], T.repeat(2)[:n]
            arguments = {"x": x, "pad": torch.rand(1, 1, 8, 8), "position": torch.rand(4, 2), "layers": [x, x]}
            return RowTensors(Call({**arguments, "text": ragged(n)}, x, t), known).paths

        assert paths(3) == paths(1) == paths(4) == paths(2) == ["x", "layers[0]", "layers[1]", "text"]
        with pytest.raises(CallError, match=r"'x' has shape \(2, 4, 8, 8\), not 3 samples on axis 0"):
            RowTensors(Call({"x": X[:2]}, X, T), known)
