"""Ops on random sizes, dtypes and layouts against their eager references, in memory that shows writes out of bounds.

`make sanitize` runs the same under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layercache import ops
from layercache.ops import combinations, modulation, native, residuals, routers, statistics
from support.guarded_memory import Memory

pytestmark = pytest.mark.skipif(native._cpu is None, reason="the extension is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = (1, 2, 3, 7, 16, 31, 64, 127, 260, 1031)


class Random:
    """Arguments of one call; ``written`` are those that the op may write."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.memory = Memory(self.pick.choice((0, 1, 3)))
        self.shape = self.pick.choice((1, 1, 2, 3)), self.pick.choice((0, 1, 2, 5, 9)), self.pick.choice(CHANNELS)
        self.dtype = self.pick.choice(DTYPES)
        self.streams = self.pick.choice((1, 1, 2))
        torch.manual_seed(seed)

    def some(self, most: int, least: int = 1) -> int:
        return self.pick.randint(least, most)

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.pick.random() < 0.5 else None

    def number(self) -> float:
        return self.pick.choice((0.0, 1.0, -1.0, 0.5, self.pick.gauss(0, 1)))

    def dense(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        size = shape or self.shape
        return self.memory.tensor(size, dtype or self.dtype, torch.randn(size))

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense, or a slice along rows or channels, or one entry for the whole batch."""
        batch, rows, channels = self.shape
        layout = self.pick.choice(("dense", "rows", "channels", "expanded"))
        if layout == "rows":
            return self.dense(batch, rows + 2, channels, dtype=dtype)[:, 1 : 1 + rows]
        if layout == "channels":
            return self.dense(batch, rows, channels + 3, dtype=dtype)[..., 1 : 1 + channels]
        return (
            self.dense(1, rows, channels, dtype=dtype).expand(self.shape)
            if layout == "expanded"
            else self.dense(dtype=dtype)
        )

    def vector(self) -> Tensor:
        batch, _, channels = self.shape
        return self.pick.choice((self.dense(batch, channels), self.dense(batch, 2, channels)[:, :1]))

    def codes(self) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 255, self.shape, dtype=torch.uint8)
        codes[codes & 127 == 127] = 0  # NaN
        scales = torch.ones(self.shape[:2]) * 2.0 ** self.pick.randint(-3, 3)
        return codes, scales


Call = tuple[Callable[..., Any], Callable[..., Any], list[Any]]  # the op, its reference, arguments of both


def capture(r: Random) -> Call:
    stored = r.pick.choice((r.dtype, torch.float32))
    written = [r.dense(dtype=stored) for _ in range(r.streams)]
    previous = r.maybe(lambda: r.pick.choice(([r.dense(dtype=stored) for _ in written], list(written))))
    flag = r.maybe(lambda: torch.zeros(1, dtype=torch.int32))
    given = [[r.read() for _ in written], [r.read() for _ in written], written, flag, previous]
    return ops.capture, residuals.CAPTURE_KERNELS.reference, [*given, r.some(1, 0) == 1, r.some(1, 0) == 1]


def capture_compact(r: Random) -> Call:
    codes = [torch.zeros(r.shape, dtype=torch.uint8) for _ in range(r.streams)]
    scales = [torch.zeros(r.shape[:2]) for _ in codes]
    given = [[r.read() for _ in codes], [r.read() for _ in codes], codes, scales, torch.zeros(1, dtype=torch.int32)]
    return ops.capture_compact, residuals.COMPACT_KERNELS.reference, given


def linear_combination(r: Random) -> Call:
    bases, terms = [r.read() for _ in range(r.streams)], r.some(8)
    coded = r.pick.random() < 0.25
    pairs = [[r.codes() for _ in range(terms)] for _ in bases]
    dense = [[r.dense(dtype=r.dtype) for _ in range(terms)] for _ in bases]
    scales = [[s for _, s in stream] for stream in pairs] if coded else None
    results = r.maybe(lambda: [r.dense() for _ in bases])
    gates = r.maybe(lambda: [r.vector() for _ in bases])
    numbers = [r.number() for _ in range(terms)]
    coefficients = r.pick.choice((numbers, torch.tensor(numbers)))
    given = [
        bases,
        [[c for c, _ in stream] for stream in pairs] if coded else dense,
        coefficients,
        results,
        gates,
        scales,
    ]
    return ops.linear_combination, combinations.COMBINATION_KERNELS.reference, given


def linear_map(r: Random) -> Call:
    count, results = r.some(9), r.some(6)
    dtypes = [r.pick.choice((r.dtype, torch.float32)) for _ in range(count)]
    inputs = [[r.read(dtype) for dtype in dtypes] for _ in range(r.streams)]
    outputs = [[r.dense() for _ in range(results)] for _ in inputs]
    if dtypes[0] == r.dtype and r.pick.random() < 0.5:  # in place
        for stream, written in zip(inputs, outputs, strict=True):
            stream[0] = written[-1]
    rows = [[r.maybe(r.number) for _ in range(count)] for _ in range(results)]
    return (
        ops.linear_map,
        combinations.MAP_KERNELS.reference,
        [inputs, outputs, rows, r.maybe(lambda: [r.number() for _ in rows])],
    )


def pair_statistics(r: Random) -> Call:
    pairs = [[r.read() for _ in range(r.streams)] for _ in range(2)]
    return ops.pair_statistics, statistics.PAIR_KERNELS.reference, [*pairs, r.some(1, 0) == 1]


def combination_error(r: Random) -> Call:
    terms = [r.dense() for _ in range(r.some(10))]
    rows = [[r.number() for _ in terms] for _ in range(r.some(30))]
    return ops.combination_error, statistics.ERROR_KERNELS.reference, [r.dense(), terms, rows]


def gram(r: Random) -> Call:
    return ops.gram, statistics.GRAM_KERNELS.reference, [[r.dense() for _ in range(r.some(12))]]


def align(r: Random) -> Call:
    x, y, *others = (r.dense() for _ in range(6))
    return ops.align, statistics.ALIGN_KERNELS.reference, [x, y, others[:2], others[2:]]


def router_lerp(r: Random) -> Call:
    beta = torch.rand(r.pick.choice((1, r.shape[0])))
    given = [r.read(), r.read(), beta, r.maybe(r.vector), r.maybe(r.read)]
    return ops.router_lerp, routers.FORWARD_KERNELS.reference, given


def modulate(r: Random) -> Call:
    channels, residual = r.shape[2], [r.dense() for _ in range(r.some(8, 0))]
    bounds = sorted(r.pick.sample(range(1, channels), min(channels - 1, r.some(3, 0))))
    result, previous = r.maybe(r.dense), r.maybe(r.dense)
    if result is not None and r.pick.random() < 0.5:
        previous = result
    affine = r.maybe(lambda: r.dense(channels)), r.maybe(lambda: r.dense(channels))
    given = [
        r.read(),
        r.vector(),
        r.vector(),
        residual,
        [r.number() for _ in residual],
        previous,
        bounds,
        1e-5,
        *affine,
    ]

    def call(x: Tensor, scale: Tensor, shift: Tensor, *others: Any) -> Any:
        names = "residuals coefficients previous segments eps weight bias result stream".split()
        return ops.modulate(x, scale, shift, **dict(zip(names, others, strict=True)))

    return call, modulation.MODULATE_KERNELS.reference, [*given, result, r.maybe(r.dense)]


def combine_guidance(r: Random) -> Call:
    given = [r.read(), r.read(), r.number() * 4, r.some(1, 0) == 1]
    return ops.combine_guidance, modulation.GUIDANCE_KERNELS.reference, given


def row_statistics(r: Random) -> Call:
    r.shape = r.shape[0], max(r.shape[1], 1), max(r.shape[2], 7)
    return ops.row_statistics, modulation.ROW_KERNELS.reference, [r.read(), r.read(), r.some(1, 0) == 1]


FORMS = (capture, capture_compact, linear_combination, linear_map, pair_statistics, combination_error, gram, align)
FORMS += (router_lerp, modulate, combine_guidance, row_statistics)


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors_of(part)] if isinstance(value, (list, tuple)) else []


def copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """The arguments in memory of their own; a tensor that stands twice stands twice there too."""
    if isinstance(value, Tensor):
        return copies.setdefault(id(value), value.clone())
    return [copied(part, copies) for part in value] if isinstance(value, list) else value


def assert_alike(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not found.dtype.is_floating_point:
        assert torch.equal(found, expected)
        return
    f, e = found.double(), expected.double()
    size = float(e[e.isfinite()].abs().max()) if e.isfinite().any() else 1.0
    step = torch.finfo(found.dtype).eps
    torch.testing.assert_close(f, e, rtol=2 * step, atol=max(2e-5, step / 8) * max(size, 1.0), equal_nan=True)


def check(form: Callable[[Random], Call], seed: int) -> None:
    given = Random(seed)
    op, reference, arguments = form(given)
    others = copied(arguments, {})
    found, expected = op(*arguments), reference(*others)
    for pair in zip(tensors_of([found, *arguments]), tensors_of([expected, *others]), strict=True):
        assert_alike(*pair)
    given.memory.check()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_random_calls(form: Callable[[Random], Call]) -> None:
    for seed in range(25):
        check(form, seed)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_many_random_calls(form: Callable[[Random], Call]) -> None:
    for seed in range(1000, 1600):
        check(form, seed)


def test_tensors_between_two_places_are_refused() -> None:
    for dtype in DTYPES:
        memory = bytearray(64 * dtype.itemsize + 1)
        x = torch.frombuffer(memory, dtype=dtype, offset=1, count=64).view(1, 4, 16)
        with pytest.raises(ops.OpInputError, match="multiple of its element size"):
            ops.gram([x])
