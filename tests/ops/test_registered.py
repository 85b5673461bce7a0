"""``torch.ops.layercache.*`` called directly: arguments that do not fit are refused before memory is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from layercache import ops
from layercache.errors import OpInputError
from support.guarded_memory import Memory

REGISTERED = torch.ops.layercache
SHAPE = (2, 5, 16)


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or SHAPE).to(dtype)


def one(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(1, dtype=dtype)


FLAG = one(torch.int32)


def codes() -> Tensor:
    return torch.zeros(SHAPE, dtype=torch.uint8)


def arguments() -> dict[str, list[Any]]:
    """Of every registered op, in every form, one call that is right."""
    pair = [new(), new(2, 3, 16)]
    scales = [new(2, 5)]
    lists = [[t.clone() for t in pair] for _ in range(4)]
    norm = [new(2, 16), new(2, 16), [new(), new()], [0.5, 0.25], None, new(), [4, 9], 1e-6, new(16), new(16), []]
    return {
        "capture": [*lists[:3], FLAG.clone()],
        "capture_statistics": [*lists[:3], FLAG.clone(), lists[3], True],
        "capture_compact": [[new()], [new()], [codes()], scales, FLAG.clone()],
        "pair_statistics": [*lists[:2], True],
        "combination_error": [new(), [new(), new()], [1.0, 0.5, 0.0, 1.0]],
        "gram": [[new(), new(), new()]],
        "align": [new() for _ in range(6)],
        "linear_combination": [pair, [new(), new(), *lists[1][1:], *lists[2][1:]], [0.5, 0.25], None, [], []],
        "linear_combination-gates": [[new()], [new()], [], one(), [new(2, 16)], []],
        "linear_combination-codes": [[new()], [codes()], [0.5], None, [], scales],
        "linear_combination_out": [[new()], [new()], [new()], [0.5], None, [], []],
        "linear_map": [
            [pair[0], new(), pair[1], new(2, 3, 16)],
            lists[0],
            2,
            [0.5, 0.0],
            [True, False],
            [2.0],
            None,
            [],
        ],
        "linear_map-codes": [[new(), codes()], [new()], 1, [0.5, 1.0], [True, True], [], None, [None, *scales]],
        "linear_map-device": [[new(), new()], [new()], 1, [], [], [], new(1, 2), []],
        "router_lerp": [new(), new(), one(), new(2, 16), new()],
        "router_lerp_backward": [new(), new(), new(), one(), new(2, 16)],
        "modulate": [new(), new(), new(), *norm],
        "combine_guidance": [new(), new(), 4.0, True],
        "row_statistics": [new(), new(), True],
        "decide": [one(), one(), one(), FLAG.clone(), [1.0, 0.5], 0.1],
    }


def call(form: str, given: Sequence[Any]) -> Any:
    return getattr(REGISTERED, form.partition("-")[0])(*given)


# What is done to one tensor; those of a number alone have no shorter or strided form.
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda t: t[..., : t.shape[-1] // 2].contiguous() if t.numel() > 1 else t.new_empty(0),
    "fewer rows": lambda t: t[:1].contiguous() if t.dim() > 1 else t.new_empty(0),
    "longer": lambda t: torch.cat([t, t], -1),
    "of another dtype": lambda t: t.to(torch.int64),
    "float64": lambda t: t.double(),
    "without memory": lambda t: t.to("meta"),
    "strided": lambda t: torch.cat([t, t], -1)[..., ::2] if t.numel() > 1 else t.new_empty(0),
    "sparse": lambda t: t.to_sparse(),
}


STILL_RIGHT = {
    ("linear_map-device", "fewer rows", "6"),
    ("modulate", "fewer rows", "3"),  # vectors of one entry serve the whole batch
    ("modulate", "fewer rows", "4"),
    ("router_lerp", "longer", "2"),  # one number per entry of the batch
    ("router_lerp_backward", "longer", "3"),
}
# Lists that may be longer or shorter: tensors of any number, optional gates, whole sets of coefficients.
ANY_LENGTH = {
    ("gram", 0),
    ("decide", 4),
    ("linear_combination-gates", 4),
    ("combination_error", 1),
    ("linear_map", 5),
    ("modulate", 9),
}


def changed(given: list[Any], change: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, list[Any]]]:
    """The arguments with one tensor after the other changed."""
    for k, argument in enumerate(given):
        if isinstance(argument, Tensor):
            yield str(k), [*given[:k], change(argument), *given[k + 1 :]]
        elif isinstance(argument, list):
            for j, entry in enumerate(argument):
                if isinstance(entry, Tensor):
                    yield f"{k}[{j}]", [*given[:k], [*argument[:j], change(entry), *argument[j + 1 :]], *given[k + 1 :]]


@pytest.mark.parametrize("form", arguments())
def test_the_right_call_runs(form: str) -> None:
    call(form, arguments()[form])


@pytest.mark.parametrize("form", arguments())
@pytest.mark.parametrize("wrong", WRONG)
def test_a_tensor_that_does_not_fit_is_refused(form: str, wrong: str) -> None:
    given = arguments()[form]
    for place, others in changed(given, WRONG[wrong]):
        if (form, wrong, place) in STILL_RIGHT:
            continue
        with pytest.raises(OpInputError):
            call(form, others)


@pytest.mark.parametrize("form", arguments())
def test_a_list_of_another_length_is_refused(form: str) -> None:
    given = arguments()[form]
    for k, argument in enumerate(given):
        if not isinstance(argument, list) or not argument or (form, k) in ANY_LENGTH:
            continue
        for others in (argument[:-1], [*argument, argument[-1]]):
            with pytest.raises(OpInputError):
                call(form, [*given[:k], others, *given[k + 1 :]])


@pytest.mark.parametrize("form", arguments())
def test_a_number_that_is_not_finite_is_refused(form: str) -> None:
    given = arguments()[form]
    for k, argument in enumerate(given):
        for bad in (float("nan"), float("inf"), 1e300):
            if isinstance(argument, list) and argument and isinstance(argument[0], float):
                others = [*given[:k], [bad, *argument[1:]], *given[k + 1 :]]
            elif isinstance(argument, float) and not (form == "modulate" and bad == 1e300):
                others = [*given[:k], bad, *given[k + 1 :]]
            else:
                continue
            with pytest.raises(OpInputError):
                call(form, others)


def test_nothing_is_written_before_a_refusal() -> None:
    memory = Memory(0)
    short = memory.tensor((1, 1, 16), torch.float32)
    for refused in (
        lambda: REGISTERED.capture([new(1, 64, 16)], [new(1, 64, 16)], [short], None),
        lambda: REGISTERED.linear_combination_out([short], [new(1, 64, 16)], [new(1, 64, 16)], [0.5], None, [], []),
        lambda: REGISTERED.linear_map([new(1, 64, 16)], [short], 1, [1.0], [True], [], None, []),
    ):
        with pytest.raises(OpInputError):
            refused()
    memory.check()
    assert short.isnan().all()


def test_calls_without_a_tensor_are_refused() -> None:
    for refused in (
        lambda: REGISTERED.gram([]),
        lambda: REGISTERED.pair_statistics([], [], False),
        lambda: REGISTERED.capture([], [], [], None),
        lambda: REGISTERED.linear_combination([], [], [], None, [], []),
        lambda: REGISTERED.linear_map([], [], 0, [], [], [], None, []),
    ):
        with pytest.raises(OpInputError):
            refused()


class TestMemory:
    """What is written shares no memory with anything else, but for what an op allows."""

    def test_an_expanded_output(self) -> None:
        x, wide = new(2, 4, 16), torch.zeros(2, 1, 16).expand(2, 4, 16)
        overlapping = torch.zeros(40).as_strided((1, 4, 16), (16, 8, 1))
        for refused in (
            lambda: ops.linear_combination([x], [[new(2, 4, 16)]], [0.5], [wide]),
            lambda: ops.linear_map([[x]], [[wide]], [[1.0]]),
            lambda: ops.linear_map([[x[:1]]], [[overlapping]], [[1.0]]),
        ):
            with pytest.raises(OpInputError, match="memory of its own"):
                refused()

    def test_an_output_that_is_read(self) -> None:
        row = torch.randn(200)
        x, moved = row[:80].view(1, 5, 16), row[8:88].view(1, 5, 16)
        v, one_scale = row[100:116].view(1, 16), row[:5].view(1, 5)
        flat, coded = row[:80], torch.zeros(1, 5, 16, dtype=torch.uint8)
        for refused in (
            lambda: ops.linear_combination([x], [[new(1, 5, 16)]], [0.5], [moved]),
            lambda: ops.linear_combination([new(1, 5, 16)], [[coded]], [0.5], [x], scales=[[one_scale]]),
            lambda: ops.linear_combination([new(1, 5, 16)], [[new(1, 5, 16)]], flat[:1], [x]),
            lambda: ops.linear_map([[x]], [[moved]], [[1.0]]),
            lambda: ops.linear_map([[new(1, 5, 16), coded]], [[x]], [[1.0, 1.0]], scales=[[None, one_scale]]),
            lambda: ops.linear_map([[new(1, 5, 16)]], [[x]], flat[:1].view(1, 1)),
            lambda: ops.capture([new(1, 5, 16)], [new(1, 5, 16)], [x], flat[:1].view(torch.int32)),
            lambda: ops.modulate(new(1, 5, 16), v, v, weight=flat[:16], result=x),
            lambda: ops.modulate(new(1, 5, 16), v, v, previous=x, stream=moved),
            lambda: ops.modulate(new(1, 5, 16), v, v, previous=x, stream=x),
            lambda: ops.modulate(new(1, 5, 16), v, v, previous=x, result=moved),
            lambda: ops.decide(one(), one(), flat[:1], flat[:1].view(torch.int32), [1.0], 0.5),
        ):
            with pytest.raises(OpInputError, match="memory"):
                refused()

    def test_in_place_where_it_is_allowed(self) -> None:
        x, r, v = new(1, 5, 16), new(1, 5, 16), new(1, 16)
        expected = ops.linear_combination([x], [[r]], [0.5])[0], ops.modulate(x, v, v)[0]
        place, previous = x.clone(), new(1, 5, 16)
        ops.linear_combination([place], [[r]], [0.5], [place])
        ops.modulate(x, v, v, previous=previous, result=previous)
        assert torch.equal(place, expected[0]) and torch.equal(previous, expected[1])
        REGISTERED.linear_combination_out([x], [x], [r], [0.5], None, [], [])
        assert torch.equal(x, expected[0])
