"""Calls of ops on a stand-in for a GPU: once by Triton, then repeated, then by Triton again; what the driver saw.

Run as a program in the environment of `fake_driver.child_environment`; prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import fake_driver  # noqa: E402


class Pool:
    """In the place of torch.empty: the same memory for the same allocation of every call, so that calls compare."""

    def __init__(self) -> None:
        self.empty, self.tensors, self.taken = torch.empty, defaultdict(list), defaultdict(int)

    def __call__(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: Any) -> Tensor:
        key = tuple(shape), dtype
        self.taken[key] += 1
        while len(self.tensors[key]) < self.taken[key]:
            self.tensors[key].append(self.empty(shape, dtype=dtype, device=device))
        return self.tensors[key][self.taken[key] - 1]


def addresses(result: Any) -> Any:
    """What a call returned, as addresses and shapes."""
    if isinstance(result, Tensor):
        return [result.data_ptr(), list(result.shape), list(result.stride()), str(result.dtype)]
    return [addresses(item) for item in result] if isinstance(result, (list, tuple)) else result


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def many(count: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [new(*(shape or (2, 24, 64)), dtype=dtype) for _ in range(count)]


def misaligned(*shape: int) -> Tensor:
    size = torch.Size(shape).numel()
    return new(size + 1)[1:].view(shape)


def slices() -> list[Tensor]:
    return list(new(2, 72, 64).split([64, 8], dim=1))


def forms() -> dict[str, Callable[[float], Callable[[], Any]]]:
    """Per name a maker of calls, all laid out alike, whose host numbers are the given one or made of it."""
    from layercache import ops

    flag = new(1, dtype=torch.int32)

    def in_place(c: float) -> Callable[[], Any]:
        x, r = new(2, 24, 64), new(2, 24, 64)
        return lambda: ops.linear_combination([x], [[r]], [c], [x])

    def accumulate(c: float) -> Callable[[], Any]:
        x, r = new(2, 24, 64), new(2, 24, 64)
        return lambda: ops.linear_map([[x, r]], [[x]], [[1.0, c]])

    def of_slices(c: float) -> Callable[[], Any]:
        x, r = slices(), [[new(2, 64, 64)], [new(2, 8, 64)]]
        return lambda: ops.linear_combination(x, r, [c])

    def captured_slices(c: float) -> Callable[[], Any]:
        out, before, kept = slices(), slices(), [new(2, 64, 64), new(2, 8, 64)]
        return lambda: ops.capture(out, before, kept, flag)

    def updated(c: float) -> Callable[[], Any]:
        out, before, kept = many(3)
        return lambda: ops.capture([out], [before], [kept], flag, [kept], per_sample=True)

    def on_device(c: float) -> Callable[[], Any]:
        (x,), r, numbers = many(1), many(2), new(2, dtype=torch.float32)
        return lambda: ops.linear_combination([x], [r], numbers)

    def factors(c: float) -> Callable[[], Any]:
        x, y = many(3), many(2)
        return lambda: ops.linear_map([x], [y], [[c, None, -c], [None, 2 * c, None]], [c + 1, c + 2])

    def taylor(c: float) -> Callable[[], Any]:
        x, d = new(2, 24, 64), many(3)
        return lambda: ops.taylor_update(x, d, [c, 2 * c])

    def nine_streams(c: float) -> Callable[[], Any]:
        a, b = many(9), many(9)
        return lambda: ops.pair_statistics(a, b)

    def ten_tensors(c: float) -> Callable[[], Any]:
        x = many(10)
        return lambda: ops.gram(x)

    def decided(c: float) -> Callable[[], Any]:
        numbers = [new(1, dtype=torch.float32) for _ in range(3)]
        return lambda: ops.decide(*numbers, flag, [c, 2 * c, 3 * c], 4 * c)

    def normed(c: float) -> Callable[[], Any]:
        x, r, previous, stream, result = many(5)
        scale, shift, weight, bias = new(2, 64), new(2, 1, 64), new(64), torch.nn.Parameter(new(64))
        options = {"previous": previous, "segments": [16], "eps": c / 2, "stream": stream, "result": result}
        with torch.no_grad():
            return torch.no_grad()(
                lambda: ops.modulate(
                    x, scale, shift, residuals=[r], coefficients=[c], weight=weight, bias=bias, **options
                )
            )

    def codes(c: float) -> Callable[[], Any]:
        x, code, scale = many(2), many(2, dtype=torch.uint8), [new(2, 24, dtype=torch.float32) for _ in range(2)]
        return lambda: ops.linear_combination(x, [[k] for k in code], [c], None, None, [[s] for s in scale])

    def captured_codes(c: float) -> Callable[[], Any]:
        out, before, code, scale = many(1), many(1), many(1, dtype=torch.uint8), [new(2, 24, dtype=torch.float32)]
        return lambda: ops.capture_compact(out, before, code, scale, flag)

    def gated(c: float) -> Callable[[], Any]:
        x, r, gate = many(1), many(2), new(2, 1, 64)
        return lambda: ops.linear_combination(x, [r], [c, -c], None, [gate])

    def stored(c: float) -> Callable[[], Any]:
        out, before, kept = many(2), many(2), many(2)
        return lambda: ops.store(out, before, kept, flag)

    def restored(c: float) -> Callable[[], Any]:
        x, r = many(2), [many(2) for _ in range(2)]
        return lambda: ops.restore(x, r, (c, -c), None)

    def odd(c: float) -> Callable[[], Any]:
        x, r, y = misaligned(2, 7, 5), new(2, 7, 5), new(2, 7, 5)
        return lambda: ops.linear_combination([x], [[r]], [c], [y])

    def guided(c: float) -> Callable[[], Any]:
        cond, uncond = many(2)
        return lambda: ops.combine_guidance(cond, uncond, c, True)

    def rows(c: float) -> Callable[[], Any]:
        a, b = many(2)
        return lambda: ops.row_statistics(a, b, True)

    def errors(c: float) -> Callable[[], Any]:
        target, terms = new(2, 24, 64), many(2)
        return lambda: ops.combination_error(target, terms, [[c, 1.0], [1.0, c]])

    def registered(c: float) -> Callable[[], Any]:
        out, before, kept = many(1), many(1), many(1)
        return lambda: torch.ops.layercache.capture(out, before, kept, flag)

    return {name: make for name, make in locals().items() if name not in ("ops", "flag")}


def from_cases() -> dict[str, Callable[[float], Callable[[], Any]]]:
    """Every form that is measured."""
    from layercache.tools.bench.cases import CASES

    def maker(case: Any) -> Callable[[float], Callable[[], Any]]:
        def make(c: float) -> Callable[[], Any]:
            own = case.inputs((2, 24, 64), torch.bfloat16, torch.device("cpu"), int(8 * c))
            return torch.set_grad_enabled(case.gradient)(lambda: case.ours(own))

        return make

    return {f"case {case.name}": maker(case) for case in CASES}


def seen(driver: Any, pool: Pool, call: Callable[[], Any]) -> tuple[list[Any], Any]:
    """Launches and result of a call."""
    pool.taken.clear()
    driver.forget()
    result = addresses(call())
    return driver.launches(), result


def refusals(driver: Any) -> dict[str, str]:
    """What becomes of calls that are not like the one that was made before: an error's text, or who made the call."""
    from torch.utils.flop_counter import FlopCounterMode

    from layercache import ops
    from layercache.errors import OpInputError
    from layercache.ops import combinations

    scale = new(2, 64)
    x, r, y, wide = new(2, 24, 64), new(2, 24, 64), new(2, 24, 64), new(2, 24, 128)

    def reuse(base: Tensor = x, term: Tensor = r, c: float = 0.5, result: Tensor = y) -> Any:
        return ops.linear_combination([base], [[term]], [c], [result])

    class Own(Tensor):
        pass

    def watched() -> Any:
        with FlopCounterMode(display=False):
            return reuse()

    def elsewhere() -> Any:
        kept = combinations.COMBINATION_KERNELS.kept
        driver.use(1)
        try:
            return reuse()
        finally:
            driver.use(0)
            assert combinations.COMBINATION_KERNELS.kept == kept

    def same_place() -> Any:
        (found,) = reuse(result=x)
        assert found is x
        view = x.view_as(x)
        (found,) = reuse(result=view)
        assert found is view
        return found

    def norm(eps: float) -> Any:
        return ops.modulate(x, scale, scale, eps=eps)

    calls: dict[str, Callable[[], Any]] = {
        "alike": reuse,
        "watched": watched,
        "another shape": lambda: reuse(new(1, 24, 64), new(1, 24, 64), 0.5, new(1, 24, 64)),
        "another dtype": lambda: reuse(x.float(), r.float(), 0.5, y.float()),
        "strided": lambda: reuse(base=wide[..., :64]),
        "misaligned": lambda: reuse(base=misaligned(2, 24, 64)),
        "in place": lambda: reuse(result=x),
        "wrong shape": lambda: reuse(term=new(2, 24, 32)),
        "wrong dtype": lambda: reuse(term=r.float()),
        "overlapping": lambda: reuse(
            base=wide.view(-1)[64:3136].view(2, 24, 64), result=wide.view(-1)[:3072].view(2, 24, 64)
        ),
        "into the residual": lambda: reuse(result=r),
        "not finite": lambda: reuse(c=float("nan")),
        "no number": lambda: reuse(c="half"),
        "gradient": lambda: reuse(base=new(2, 24, 64).requires_grad_()),
        "subclass": lambda: reuse(base=x.as_subclass(Own)),
        "another device is current": elsewhere,
        "a view of the base": same_place,
        "eps": lambda: (norm(1e-6), norm(1e-5), norm(-1e-6)),
    }
    with torch.no_grad():
        reuse()
    found = {}
    for name, call in calls.items():
        before = driver.runs
        try:
            call()
            found[name] = "repeated" if driver.runs == before else "Triton"
        except OpInputError as error:
            found[name] = str(error)
    return found


def main() -> None:
    pool = Pool()
    torch.empty = pool
    torch.empty_like = lambda model, **others: pool(model.shape, dtype=others.get("dtype", model.dtype), device=None)
    driver = fake_driver.stand_in()
    from layercache.ops import repeating
    from layercache.ops.dispatch import Kernels

    report: dict[str, Any] = {"refusals": refusals(driver), "stream": repeating.open_calls().stream(0)}
    found = report["calls"] = {}
    for name, make in {**forms(), **from_cases()}.items():
        first, second = make(0.25), make(0.75)
        seen(driver, pool, first)  # compiles, and tells the stand-in of parameters
        by_triton, expected = [], []
        own = [kernels.repeatable for kernels in Kernels.every]
        for repeatable in (True, False):
            for kernels, flag in zip(Kernels.every, own, strict=True):
                kernels.use(flag and repeatable)
            seen(driver, pool, first)
            before = driver.runs
            expected.append(seen(driver, pool, second))
            by_triton.append(driver.runs - before)
        for kernels, flag in zip(Kernels.every, own, strict=True):
            kernels.use(flag)
        found[name] = {
            "launches": len(expected[1][0]),
            "by_triton": by_triton,
            "same": expected[0] == expected[1],
            "parameters": [len(launch.parameters) for launch in expected[1][0]],
        }
        if expected[0] != expected[1]:
            found[name]["difference"] = str(expected)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
