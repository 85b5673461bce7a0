"""Calls of ops on a stub of a GPU: by Triton's JIT function, and again as planned; what the launcher was handed.

Run as a program; prints JSON.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from layercache.kernels import launching
from torch import Tensor
from triton.runtime.jit import JITFunction

from layercache import ops
from layercache.ops.dispatch import Kernels
from layercache.ops.plans import ignored
from layercache.tools.bench.cases import CASES
from support.launches import StubDriver

SHAPE = (2, 24, 64)


class Driver(StubDriver):
    """Notes launches, and how many of them the JIT function made."""

    def __init__(self) -> None:
        super().__init__("90")
        self.launches: list[Any] = []
        self.by_jit, self.stream = 0, 0
        self.launcher_cls = self._launcher
        run = JITFunction.run

        def counted(kernel: Any, *arguments: Any, **options: Any) -> Any:
            self.by_jit += 1
            return run(kernel, *arguments, **options)

        JITFunction.run = counted

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x, y, z, stream, function, packed, entered, enter, leave, *arguments):
            self.launches.append([source.fn.__name__, x, y, z, stream, plain(arguments)])

        return launch


class Pool:
    """In the place of torch.empty: the same memory for the same allocation of every call, so that calls compare."""

    def __init__(self) -> None:
        self.empty, self.tensors, self.taken = torch.empty, defaultdict(list), defaultdict(int)

    def __call__(self, shape: Any, *, dtype: torch.dtype, device: Any = None) -> Tensor:
        if device == torch.device("meta"):
            return self.empty(shape, dtype=dtype, device=device)
        key = tuple(shape), dtype
        self.taken[key] += 1
        while len(self.tensors[key]) < self.taken[key]:
            self.tensors[key].append(self.empty(shape, dtype=dtype))
        return self.tensors[key][self.taken[key] - 1]


def plain(value: Any) -> Any:
    """A value with its tensors as addresses, shapes and dtypes."""
    if isinstance(value, Tensor):
        return [value.data_ptr(), list(value.shape), list(value.stride()), str(value.dtype)]
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def seen(driver: Driver, pool: Pool, call: Callable[[], Any]) -> tuple[list[Any], int]:
    """Launches and result of a call, and how many of the launches the JIT function made."""
    pool.taken.clear()
    driver.launches, driver.by_jit = [], 0
    result = plain(call())
    return [driver.launches, result], driver.by_jit


def forms() -> dict[str, Callable[[int], Callable[[], Any]]]:
    """Per name a maker of calls, all laid out in the same way."""

    def of_case(case: Any) -> Callable[[int], Callable[[], Any]]:
        def make(seed: int) -> Callable[[], Any]:
            inputs = case.inputs(SHAPE, torch.bfloat16, torch.device("cpu"), seed)
            return torch.set_grad_enabled(case.gradient)(lambda: case.ours(inputs))

        return make

    def many(count: int, *shape: int) -> list[Tensor]:
        return [torch.zeros(shape or SHAPE, dtype=torch.bfloat16) for _ in range(count)]

    def slices() -> list[Tensor]:
        return list(many(1, 2, 32, 64)[0].split([24, 8], dim=1))

    def captured(seed: int) -> Callable[[], Any]:
        tensors = slices(), slices(), [*many(1), *many(1, 2, 8, 64)]
        return lambda: ops.capture(*tensors)

    def some_empty(seed: int) -> Callable[[], Any]:
        pairs = [*many(2), *many(2, 2, 0, 64)]
        return lambda: ops.pair_statistics(pairs[::2], pairs[1::2], per_sample=True) is None

    def nine(seed: int) -> Callable[[], Any]:
        a, b = many(9), many(9)
        return lambda: [ops.pair_statistics(a, b), ops.gram(a)] == []

    def odd(seed: int) -> Callable[[], Any]:
        (x,), r = many(1, 2 * 7 * 5 + 1), many(2, 2, 7, 5)
        return lambda: ops.linear_combination([x[1:].view(2, 7, 5)], [r], [0.5, -0.5])

    def stored(seed: int) -> Callable[[], Any]:
        tensors, flag = [many(2) for _ in range(3)], torch.zeros(1, dtype=torch.int32)
        return lambda: ops.store(*tensors, flag)

    def restored(seed: int) -> Callable[[], Any]:
        x, r, numbers = many(2), [many(2), many(2)], torch.ones(2)
        return lambda: ops.restore(x, r, numbers, x)

    def decided(seed: int) -> Callable[[], Any]:
        numbers, flag = [torch.zeros(1) for _ in range(3)], torch.zeros(1, dtype=torch.int32)
        return lambda: ops.decide(*numbers, flag, [1.0, 2.0], 4.0)

    own = (captured, some_empty, nine, odd, stored, restored, decided)
    return {case.name: of_case(case) for case in CASES} | {make.__name__: make for make in own}


def unusual(driver: Driver, pool: Pool) -> dict[str, int]:
    """Launches by the JIT function where it has to make them."""
    call = forms()["reuse"](0)
    knobs = triton.knobs

    def count() -> int:
        return seen(driver, pool, call)[1]

    count()
    found = {"usual": count()}
    before = knobs.runtime.launch_enter_hook
    knobs.runtime.launch_enter_hook = SimpleNamespace(calls=[print]) if hasattr(before, "calls") else print
    found["hook"] = count()
    knobs.runtime.launch_enter_hook = before
    knobs.compilation.instrumentation_mode = "probes"
    found["probes"] = count()
    knobs.compilation.instrumentation_mode = ""
    launching._KNOWN_TRITON = ((0, 0), (0, 1))
    launching.keeps_kernels.cache_clear()
    for kernels in Kernels.every:
        kernels._plans.clear()
    count()
    return found | {"unknown version": count()}


def main() -> None:
    driver, pool = Driver(), Pool()
    triton.runtime.driver.set_active(driver)
    Kernels.choose = lambda self, tensor: self.launch
    for kernels in Kernels.every:
        kernels.plans_on_cpu = True
    torch.empty = pool
    torch.empty_like = lambda model, **others: pool(model.shape, dtype=others.get("dtype", model.dtype))
    calls = {}
    for name, make in forms().items():
        first, second = make(0), make(1)
        seen(driver, pool, first)
        planned, by_jit = seen(driver, pool, second)
        with ignored():
            expected, launches = seen(driver, pool, second)
        difference = "" if planned == expected else str((planned, expected))
        calls[name] = {"by_jit": by_jit, "launches": launches, "difference": difference}
    restored = forms()["restored"](0)
    streams = []
    for driver.stream in (0, 0, 7):
        streams.append(seen(driver, pool, restored)[0][0][0][4])
    print(json.dumps({"calls": calls, "streams": streams[1:], "unusual": unusual(driver, pool)}))


if __name__ == "__main__":
    main()
