"""Plans: which calls follow the plan of an earlier one, and that they launch what Triton's JIT function would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from layercache import ops
from layercache.errors import OpInputError
from layercache.ops import dispatch, plans
from layercache.ops.combinations import COMBINATION_KERNELS
from layercache.ops.modulation import MODULATE_KERNELS

TESTS = Path(__file__).resolve().parents[1]


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


class Own(Tensor):
    pass


X, R, Y, WIDE = new(2, 24, 64), new(2, 24, 64), new(2, 24, 64), new(2, 24, 128)


def reuse(base: Any = X, term: Any = R, number: Any = 0.5, result: Any = Y) -> Any:
    return ops.linear_combination([base], [[term]], [number], [result])


@pytest.fixture
def again(monkeypatch):
    """What `Kernels.again` answered, of calls after one `reuse()`: whether they followed a plan."""
    monkeypatch.setattr(COMBINATION_KERNELS, "_plans", {})
    reuse()
    found: list[bool] = []
    ask = dispatch.Kernels.again

    def asked(self, *arguments):
        answer = ask(self, *arguments)
        found.append(answer is not NotImplemented)
        return answer

    monkeypatch.setattr(dispatch.Kernels, "again", asked)
    return found


@pytest.mark.parametrize(
    "call",
    [
        reuse,
        lambda: reuse(new(2, 24, 64), new(2, 24, 64), 0.5, new(2, 24, 64)),
        lambda: ops.linear_combination((X,), ((R,),), (0.5,), (Y,)),
    ],
)
def test_a_call_alike_is_not_checked_again(again, call):
    call()
    assert again == [True]


def watched():
    with FlopCounterMode(display=False):
        reuse()


def without_plans():
    with plans.ignored():
        reuse()


@pytest.mark.parametrize(
    "call",
    [
        watched,
        without_plans,
        lambda: reuse(new(1, 24, 64), new(1, 24, 64), 0.5, new(1, 24, 64)),
        lambda: reuse(X.double(), R.double(), 0.5, Y.double()),
        lambda: reuse(base=WIDE[..., :64]),
        lambda: reuse(base=new(1 + X.numel())[1:].view(X.shape)),
        lambda: reuse(result=X),
        lambda: reuse(number=0.25),
        lambda: reuse(base=X.as_subclass(Own)),
    ],
    ids="mode ignored shape dtype strides address in-place number subclass".split(),
)
def test_another_call_is_checked(again, call):
    call()
    assert not again[0]  # the registered op, which modes and subclasses see, asks a second time


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"term": new(2, 24, 32)}, r"residuals\[0\]\[0\] is of shape \(2, 24, 32\)"),
        ({"result": R}, r"results\[0\] is in the same memory as one of residuals"),
        ({"base": WIDE.view(-1)[64:3136].view(X.shape), "result": WIDE.view(-1)[:3072].view(X.shape)}, "same memory"),
        ({"number": float("nan")}, "coefficients is"),
        ({"number": "half"}, "coefficients is"),
        ({"base": new(2, 24, 64).requires_grad_()}, "a tensor requires grad"),
        ({"base": X.to("meta")}, "expected on meta"),
    ],
)
def test_bad_input_is_refused_as_before(again, changed, message):
    for _ in range(2):
        with pytest.raises(OpInputError, match=message):
            reuse(**changed)
    assert again == [False] * 2


def test_in_place_is_planned_by_which_tensors_share_memory(again):
    reuse(result=X)
    assert reuse(result=X)[0] is X
    with pytest.raises(OpInputError, match="same memory"):  # shifted by a row
        reuse(base=WIDE.view(-1)[:3072].view(X.shape), result=WIDE.view(-1)[64:3136].view(X.shape))
    reuse(result=X.view_as(X))  # another object in the same place
    assert again == [False, True, False, False]


def test_a_plan_is_for_its_own_gpu(monkeypatch):
    plan = plans.Plan(print, [X])
    assert plan.is_current()
    plan._device = 1
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert plan.is_current() is (current == 1)


def test_a_number_that_a_check_looks_at_is_checked(monkeypatch):
    monkeypatch.setattr(MODULATE_KERNELS, "_plans", {})
    scale = new(2, 64)
    for _ in range(2):
        ops.modulate(X, scale, scale, eps=1e-6)
        for eps in (-1e-6, float("inf"), 0.0):
            with pytest.raises(OpInputError, match="eps"):
                ops.modulate(X, scale, scale, eps=eps)


def test_plans_do_not_grow_without_bound(monkeypatch, again):
    monkeypatch.setattr(dispatch, "MOST_PLANS", 4)
    for number in range(10):
        reuse(number=float(number))
    assert len(COMBINATION_KERNELS._plans) <= 4


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "support.planned_calls"],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_case_follows_its_plan(report):
    """All but combination_error, whose launches depend on its numbers."""
    assert len(report["calls"]) > 35
    assert {name for name, call in report["calls"].items() if call["by_jit"]} == {"errors of ten spans"}


def test_kept_kernels_get_what_the_jit_function_gives_them(report):
    """Kernel, grid, stream and every argument, and what the call returns."""
    assert {name: call["difference"] for name, call in report["calls"].items() if call["difference"]} == {}


def test_the_jit_function_launches_where_hooks_or_probes_ask_for_it(report):
    assert report["unusual"] == {"usual": 0, "hook": 1, "probes": 1, "unknown version": 1}
    assert report["streams"] == [0, 7]
