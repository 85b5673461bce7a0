"""Timing: variants in turn, medians over rounds, inputs that are in no cache, and the machine's own limit."""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layercache.tools.bench.case import Case, Inputs
from layercache.tools.bench.clocks import Calls, Clock, clock_of

# Norm-wise error that counts as right: half a step of the storage dtype; of fp32, what its sums are good to.
TOLERANCE = {
    torch.float32: 2e-5,
    **{dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)},
}
# Bytes that all sets of inputs together have at least, so that none is still in the last cache when its turn comes.
COLD_BYTES = {"cpu": 256 * 2**20, "cuda": 512 * 2**20}
MAX_SETS = 128
# Rounds that are measured also where a case takes longer than it may.
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, and the quantiles that bound the middle 60 %."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        if len(seconds) < 2:
            return cls(seconds[0], seconds[0], seconds[0])
        fifths = quantiles(seconds, n=5, method="inclusive")
        return cls(median(seconds), fifths[0], fifths[3])


@dataclass(frozen=True)
class Row:
    """One case, measured.

    Attributes:
        bytes: that must be moved.
        seconds: by variant: ours, eager, compiled (if measured) and copy, a plain copy of as many bytes.
        error: of ours against eager in float64, norm-wise; ``right`` says whether that is within tolerance.
        operators: that ours and eager PyTorch call.
        launches: of kernels by ours and eager, counted by the profiler (GPU).
        host_seconds: to issue a call of ours and of eager without waiting (GPU).
    """

    case: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int
    seconds: dict[str, Timing]
    error: float
    right: bool
    operators: dict[str, int]
    launches: dict[str, int] = field(default_factory=dict)
    host_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.seconds["ours"].median / 1e9

    @property
    def share_of_limit(self) -> float:
        """How close ours is to a plain copy of as many bytes."""
        return self.seconds["copy"].median / self.seconds["ours"].median

    def speedup(self, over: str) -> float | None:
        """Of ours over another variant; none is claimed for a wrong result."""
        if over not in self.seconds or not self.right:
            return None
        return self.seconds[over].median / self.seconds["ours"].median

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "gigabytes_per_second": self.gigabytes_per_second,
            "share_of_limit": self.share_of_limit,
            "speedup_over_eager": self.speedup("eager"),
            "speedup_over_compiled": self.speedup("compiled"),
        }


class _Operators(TorchDispatchMode):
    """Counts operators that make or change tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _count_operators(run: Callable[[Inputs], Any], inputs: Inputs) -> int:
    with _Operators() as operators:
        run(inputs)
    return operators.count


def count_launches(case: Case, shape: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
    """Kernels, copies and fills that a call of ours and of eager puts on the GPU.

    To be called when nothing is timed any more: the profiler makes every later launch of a process slower.
    """
    inputs = case.inputs(shape, dtype, torch.device("cuda"))
    with torch.set_grad_enabled(case.gradient):
        return {"ours": _launches(case.ours, inputs), "eager": _launches(case.eager, inputs)}


def _launches(run: Callable[[Inputs], Any], inputs: Inputs) -> int:
    run(inputs)  # the first call may compile
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(inputs)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def measure(
    case: Case,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int = 7,
    compiled: bool = True,
    clock: Clock | None = None,
    limit: float = math.inf,
) -> Row:
    """Measures a case.

    Args:
        shape: [batch, rows, channels] of its tensors.
        rounds: times that each variant is measured, in turn.
        compiled: also measure torch.compile of the eager spelling.
        clock: the device's own, if none is given.
        limit: seconds of timing after which no round beyond the third is begun.
    """
    keep_memory()
    clock = clock or clock_of(device)
    size = case.bytes(shape, dtype)
    sets = max(2, min(MAX_SETS, -(-COLD_BYTES[device.type] // max(size, 1))))
    inputs = [case.inputs(shape, dtype, device, seed) for seed in range(sets)]
    copies = _copies(size, sets, device)
    with torch.set_grad_enabled(case.gradient):
        error = case.error(inputs[0])
        spellings = {"ours": case.ours, "eager": case.eager}
        operators = {name: _count_operators(run, inputs[0]) for name, run in spellings.items()}
        variants: dict[str, Calls] = {
            "ours": _calls(case.ours, inputs),
            "eager": _calls(case.eager, inputs),
            "copy": iter(_Cycle([functools.partial(target.copy_, source) for target, source in copies])),
        }
        if compiled:
            variants |= _compiled(case, inputs)
        times, repeats = in_turn(variants, rounds, clock, limit)
        host = {}
        if device.type == "cuda":
            host = {name: clock.host_seconds(calls, repeats[name]) for name, calls in variants.items()}
    return Row(
        case=case.name,
        op=case.op,
        shape=tuple(shape),
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        bytes=size,
        seconds={name: Timing.of(values) for name, values in times.items()},
        error=error,
        right=error <= TOLERANCE[dtype],
        operators=operators,
        host_seconds=host,
    )


def keep_memory() -> None:
    """Tells glibc to keep freed memory, so that no variant is timed while the kernel clears pages for it."""
    trim, top_pad, mmap = -1, -2, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    for option, value in ((mmap, 1 << 30), (trim, (1 << 31) - 1), (top_pad, 64 << 20)):
        mallopt(option, value)


def _compiled(case: Case, inputs: Sequence[Inputs]) -> dict[str, Calls]:
    """The variant of torch.compile; none, with a warning, where it does not work."""
    torch._dynamo.reset()
    run = case.compile()
    try:
        run(inputs[0])
    except Exception as error:  # no C++ compiler, an operator that it cannot take, ...
        warnings.warn(f"torch.compile of {case.name!r} is left out: {error}", stacklevel=2)
        return {}
    return {"compiled": _calls(run, inputs)}


class _Cycle:
    """An endless round through a few things."""

    def __init__(self, things: Sequence[Any]):
        self.things = deque(things)

    def __iter__(self) -> _Cycle:
        return self

    def __next__(self) -> Any:
        self.things.rotate(-1)
        return self.things[0]


def _calls(run: Callable[[Inputs], Any], inputs: Sequence[Inputs]) -> Calls:
    """On a GPU results live until their inputs' next turn, else all go to the same memory, which its cache holds."""
    kept: list[Any] = [None] * len(inputs)

    def call(index: int) -> None:
        kept[index] = None
        kept[index] = run(inputs[index])

    if inputs[0].gate.is_cuda:
        return iter(_Cycle([functools.partial(call, index) for index in range(len(inputs))]))
    return iter(_Cycle([lambda own=own: run(own) for own in inputs]))


def _copies(size: int, sets: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Pairs of which a copy moves ``size`` bytes, half in and half out."""
    elements = max(1, size // 8)
    return [(torch.empty(elements, device=device), torch.randn(elements, device=device)) for _ in range(sets)]


def in_turn(
    variants: dict[str, Calls], rounds: int, clock: Clock, limit: float = math.inf
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per call of every variant in every round, and calls per measurement.

    After ``limit`` seconds no round beyond the third is begun.
    """
    for calls in variants.values():
        # the first calls compile, allocate and fault in memory
        for _ in range(3):
            next(calls)()
    begin = clock.now()
    repeats = {name: clock.repeats(calls) for name, calls in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds):
        if round_ >= LEAST_ROUNDS and clock.now() - begin > limit:
            break
        for name, calls in variants.items():
            times[name].append(clock.seconds(calls, repeats[name]))
    return times, repeats
