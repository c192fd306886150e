"""A model's call by names: x_t and t, and the tensors that hold one row for each sample."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selftrans_reg import SettingError, ShapeError
from selftrans_reg.calls import Call, CallSpec, RowTensors, bracketed
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


@pytest.mark.parametrize(
    ("model", "settings", "args", "kwargs"),
    [
        *((Positional, None, (X, T, Y)[:n], dict(list(zip("xty", (X, T, Y), strict=True))[n:])) for n in range(4)),
        (Positional, None, (X, T), {"y": Y, "mask": Y}),
        (Keywords, {"t": "sigma"}, (X,), {"sigma": T, "class_labels": Y}),  # one of the model's own kwargs
        (Diffusers, {"t": "timestep"}, (X, Y), {"timestep": T}),
        (Anything, {"x": "x", "t": "t"}, (), {"x": X, "t": T}),
    ],
)
def test_arguments_get_their_names_and_a_call_is_rebuilt_as_it_was(
    model: type[nn.Module], settings: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> None:
    spec = CallSpec(model(), settings)
    call = spec.bind(args, kwargs)
    assert call.x_t is X
    assert call.rows == 3
    torch.testing.assert_close(call.t, T)
    assert len(call.arguments) == len(args) + len(kwargs)
    rebuilt_args, rebuilt_kwargs = spec.arguments(call.arguments)
    seen = spec.bind(rebuilt_args, rebuilt_kwargs).arguments
    assert {name: id(value) for name, value in seen.items()} == {n: id(value) for n, value in call.arguments.items()}


@pytest.mark.parametrize("t", [0.25, torch.tensor(0.25), torch.full((3, 1), 0.25), torch.rand(3, 5, 1)])
def test_a_time_is_one_value_a_row_or_a_token(t: object) -> None:
    expected = t.reshape(3, 5) if isinstance(t, Tensor) and t.numel() == 15 else torch.full((3,), 0.25)
    torch.testing.assert_close(CallSpec(Positional(), None).bind((X, t, Y), {}).t, expected)


REFUSED: list[tuple[type[nn.Module], Any, Any, type[Exception], str]] = [
    (Positional, {"z": "x"}, None, SettingError, r"call= takes 'x', 't', 'shared'.*; got 'z'"),
    (Positional, {"shared": ["masks['a']"]}, None, SettingError, "(?s)names 'masks'.*Nearest: 'mask'"),
    (Positional, {"shared": ["t", "x"]}, None, SettingError, "names 't': x_t or t, which are never shared"),
    (Positional, {"rows": {"y": True}}, None, SettingError, "got True for 'y'"),
    (Positional, {"rows": {"x": 1}}, None, SettingError, "names 'x': x_t or t"),
    (Positional, {"fixed": {"t": 1}}, None, SettingError, "names 't': x_t or t, which differ by call"),
    (Diffusers, {"t": "timestep"}, (X, Y), CallError, r"no argument 'timestep' .*\nSay which holds t: call=dict"),
    (Positional, None, ([X], T, Y), CallError, "(?s)got a list.*Or make it of the list"),
    (Positional, None, (X, None, Y), CallError, r"'t' of Positional should be the time t; got None.\n.*dict\(t=...\)"),
    (Positional, None, (X, torch.rand(2), Y), ShapeError, r"'t' of Positional has shape \(2,\).* 3 rows of x_t \(3, 4"),
    (Positional, None, (X, torch.rand(2, 5), Y), ShapeError, r"(?s)has shape \(2, 5\).*one for each of their tokens"),
]


@pytest.mark.parametrize(("model", "settings", "args", "error", "part"), REFUSED)
def test_settings_or_a_call_that_cannot_be_read_are_refused(
    model: type[nn.Module], settings: Any, args: Any, error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part):
        CallSpec(model(), settings).bind(args, {})


@pytest.mark.parametrize(
    ("signature", "t"),
    [
        ("x, t, y", "t"),
        ("hidden_states, encoder_hidden_states, timestep", "timestep"),
        ("sample, noise_labels, class_labels", "noise_labels"),
        ("x, y, t, time", "y"),  # two have such a name
        ("x, lam, y", "lam"),  # none has
        ("t, x, y", "x"),  # the first is x_t whatever its name: the call will say that it is none
    ],
)
def test_t_is_the_argument_with_a_name_of_the_fields_or_else_the_second(signature: str, t: str) -> None:
    model = nn.Module()
    model.forward = eval(f"lambda {signature}: None")
    assert CallSpec(model, None).t == t
    assert CallSpec(model, None, needs_t=False).t == (t if t not in ("y", "lam", "x") else None)


def test_callables_make_x_t_and_t_of_the_arguments() -> None:
    spec = CallSpec(Positional(), {"x": lambda a: torch.stack(a["x"]), "t": lambda a: a["t"].amax(1)})
    times = torch.rand(3, 5)
    call = spec.bind((list(X), times, Y), {})
    torch.testing.assert_close((call.x_t, call.t), (X, times.amax(1)))
    assert (spec.x, spec.t, call.time_from) == (None, None, "value of call=dict(t=...)")
    held = RowTensors(call)
    assert held.paths == ["x", "t", "y"]
    rebuilt = held.rebuild([[rows[i] for i in (2, 0)] for rows in held.tensors])
    assert [id(row) for row in rebuilt["x"]] == [id(call.arguments["x"][i]) for i in (2, 0)]


class Timeless(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None) -> None: ...


@pytest.mark.parametrize(
    ("model", "args"), [(Timeless, (X, Y)), (Timeless, (X,)), (Positional, (X, None, Y)), (Positional, (X, T[:2], Y))]
)
def test_where_t_is_not_needed_a_call_without_any_will_do(model: type[nn.Module], args: tuple[Any, ...]) -> None:
    call = CallSpec(model(), None, needs_t=False).bind(args, {})
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
    with pytest.raises(CallError, match=r"with 'mask', which Teacher.forward does not take; it takes 'y'"):
        teacher.adopt(student.bind((X, T, Y), {"mask": Y}), student)


Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass(frozen=True)
class Condition:
    text: Any
    scale: float = 2.0


def ragged(n: int) -> list[Tensor]:
    """Captions of different lengths."""
    return [torch.rand(length, 2) for length in (5, 7, 8, 10)[:n]]


def rows_of(arguments: dict[str, Any], ways: dict[str, Any], conditions: Any = (), n: int = 3) -> RowTensors:
    ways = {bracketed(path): way for path, way in ways.items()}
    return RowTensors(Call({"x": X[:n], **arguments}, X[:n], T[:n], ways=ways), conditions=conditions)


IDS, LAYERS, PACKED, CAPTIONS = torch.rand(3, 2), torch.rand(4, 3, 7), torch.rand(9, 7), ragged(3)
LIST, SHARED = {"e": "list"}, {"e": "shared"}
ENTRIES = [["a", "b", "c"], ("a", "b", "c"), [1, 2, 3], [[Y[:1]], [], []]]


@pytest.mark.parametrize(
    ("arguments", "ways", "paths"),
    [
        ({"e": {"text": IDS, "more": [Y, (Y, "n", None)]}}, {}, ["e['text']", "e['more'][0]", "e['more'][1][0]"]),
        ({"e": Pair(Y, 2), "t": torch.rand(1), "pad": torch.rand(1, 1, 8, 8), "size": (64, 64)}, {}, ["e[0]"]),
        ({"places": torch.rand(64, 2), "scale": torch.tensor(2.0), "tables": (torch.rand(5, 2),) * 3}, {}, []),
        *(
            ({"ids": IDS, "e": kind({"deep": [IDS]}), "more": [Y, IDS]}, dict.fromkeys(shared, "shared"), ["more[0]"])
            for kind in (lambda text: {"text": text}, Condition)
            for shared in (("ids", path, "more[1]") for path in ("e.text", "e['text']", 'e["text"]'))
        ),
        ({"e": None}, {"e.texts": "shared", "e.more[0]": "shared"}, []),
        ({"e": Condition(Y)}, {"e.scale": "shared"}, ["e['text']"]),
        ({"e": {"text": PACKED}}, SHARED, []),
        ({"e": LAYERS}, {"e": 1}, ["e"]),
        ({"e": {"a": [LAYERS]}}, {"e": 1}, ["e['a'][0]"]),
        *(({"e": entries}, ways, paths) for entries in ENTRIES for ways, paths in ((SHARED, []), (LIST, ["e"]))),
        ({"e": CAPTIONS}, {}, ["e"]),
        ({"e": [Y, *CAPTIONS[1:]]}, {}, ["e"]),  # one of them is as long as the batch
        ({"e": ragged(4)}, {}, []),
        ({"e": [X, X, X]}, LIST, ["e"]),
        ({"e": [X, X, X]}, {"e": 0}, ["e[0]", "e[1]", "e[2]"]),
        ({"e": [X, X]}, {}, ["e[0]", "e[1]"]),
        ({"e": {7: X, 15: X, 23: X, 31: X}}, {}, ["e[7]", "e[15]", "e[23]", "e[31]"]),  # layers, each of rows
    ],
)
def test_rows_are_found_at_any_depth_and_the_rest_is_shared(arguments: Any, ways: Any, paths: list[str]) -> None:
    held = rows_of(arguments, ways)
    assert held.paths == ["x", *paths]
    assert all(len(rows) == 3 for rows in held.tensors)
    again = rows_of(held.rebuild(held.tensors), ways)
    assert (again.paths, list(again.whole)) == (held.paths, list(held.whole))


@pytest.mark.parametrize(
    ("arguments", "ways", "message"),
    [
        *(
            ({"e": e}, {"e.texts": "shared"}, r"call= names \"e\['texts'\]\", which this call does not have; it has")
            for e in ({"text": Y}, Condition(Y), [Y], Y)
        ),
        ({"e": {"text": PACKED}}, {}, r"e\['text'\]\" has shape \(9, 7\): its first axis is 3 times the batch of 3"),
        ({"e": LAYERS}, {}, r"'e' has shape \(4, 3, 7\): axis 1 looks like the batch of 3.*\n.*shared=\['e'\].*axis"),
        ({"e": LAYERS}, {"e": 2}, r"'e' has shape \(4, 3, 7\), not 3 samples on axis 2, where they were said to be"),
        *(
            ({"e": e}, {}, f"(?s)'e' is a {type(e).__name__} of 3 entries, .* from tensors.*'e': 'list'")
            for e in [*ENTRIES, tuple(CAPTIONS), [X, X, X]]
        ),
        ({"e": ragged(2)}, LIST, "has 2 entries, not one for each of the 3 samples, as it was said to"),
    ],
)
def test_what_may_be_rows_or_not_is_asked_about(arguments: Any, ways: Any, message: str) -> None:
    with pytest.raises(CallError, match=message):
        rows_of(arguments, ways)


@pytest.mark.parametrize("n", [1, 3])
def test_a_batch_of_one_is_asked_about_as_others_are(n: int) -> None:
    for images in ({i: torch.rand(8, 2) for i in range(n)}, {0: torch.rand(8, 2)}, dict.fromkeys(range(n), X[:n])):
        with pytest.raises(CallError, match=f"'e' is a mapping by numbers of {len(images)} entries"):
            rows_of({"e": images}, {}, n=n)
    held = rows_of({"e": images}, LIST, n=n)
    twice = held.rebuild([[*rows, *rows] for rows in held.tensors])["e"]
    assert list(twice) == list(range(2 * n))
    assert twice[n] is images[0]
    assert rows_of({"e": tuple(ragged(n))}, {}, ("e",), n=n).paths == ["x", "e"]  # where it is known to be a condition
    with pytest.raises(CallError, match=f"looks like the batch of {n}"):
        rows_of({"e": LAYERS[:, :n]}, {}, n=n)


def test_others_take_their_place_and_containers_keep_their_kind_and_are_nobody_elses() -> None:
    class Attributes(dict):
        def __getattr__(self, name: str) -> Any:
            return self[name] if name in self else self.__getattribute__(name)

    buffer: dict[str, Tensor] = {}  # into which a model puts its own: no rows, and one for each call
    e = {"a": [Y, 5], "b": Pair(Y, "kept"), "c": Condition(Y), "d": Attributes(text=Y), "e": LAYERS, "f": CAPTIONS}
    held = rows_of({"e": e, "buffer": buffer}, {"e['e']": 1})
    index = torch.tensor([2, 0])
    rebuilt = held.rebuild(
        [rows[index] if isinstance(rows, Tensor) else [rows[i] for i in index] for rows in held.tensors]
    )
    found = rebuilt["e"]
    assert [type(part) for part in found.values()] == [list, Pair, Condition, Attributes, Tensor, list]
    assert (found["a"][1], found["b"].right, rebuilt["x"].shape) == (5, "kept", (2, 4, 8, 8))
    for part in (found["a"][0], found["b"].left, found["c"].text, found["d"].text):
        torch.testing.assert_close(part, Y[index])
    torch.testing.assert_close(found["e"], LAYERS[:, index])
    assert [id(row) for row in found["f"]] == [id(CAPTIONS[2]), id(CAPTIONS[0])]
    rebuilt["buffer"]["h"] = Y
    assert buffer == held.rebuild(held.tensors)["buffer"] == {}


def test_what_one_call_has_told_holds_for_those_of_other_sizes() -> None:
    known: dict[str, Any] = {}

    def paths(n: int) -> list[str]:
        x, t = X.repeat(2, 1, 1, 1)[:n], T.repeat(2)[:n]
        arguments = {"x": x, "pad": torch.rand(1, 1, 8, 8), "position": torch.rand(4, 2), "layers": [x, x]}
        return RowTensors(Call({**arguments, "text": ragged(n)}, x, t), known).paths

    assert paths(3) == paths(1) == paths(4) == paths(2) == ["x", "layers[0]", "layers[1]", "text"]
    with pytest.raises(CallError, match=r"'x' has shape \(2, 4, 8, 8\), not 3 samples on axis 0"):
        RowTensors(Call({"x": X[:2]}, X, T), known)
