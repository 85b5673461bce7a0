"""Variants of the kernels, timed on one NVIDIA GPU: tile sizes, warps, cache hints, one launch instead of two.

    python bench/gpu_sweep.py --seconds 150 --json bench/results/sweep.json
    python bench/gpu_sweep.py --kernels build/parent/kernels      another commit's kernels, from `git archive`
    python bench/gpu_sweep.py --tiny                              without a GPU, in half a minute

A variant is a copy of kernels/ with some text replaced, imported as a package of its own, so that none of them has to
stay in the package. Rows of the JSON hold milliseconds, the share of a plain copy of as many bytes, the speedup over
the kernels as they are, and whether the results are the same; they are written after every case.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
CURRENT, PARENT, COPY = "current", "parent", "copy"
SWEEPS = ("parent", "rows", "tiles", "ticket", "warps", "hints")
ROUNDS = 5
# Bytes that all sets of tensors have together at least, so that none is still in the L2 when its turn comes.
COLD_BYTES = 512 * 2**20
# Calls of a burst, and seconds that one may take: to issue, or the GPU to run, whichever is longer.
MOST_CALLS, BURST_SECONDS = 50, 6e-3
# Faster than the clock of any GPU, so that it sleeps at least as long as it is asked to.
CYCLES_PER_SECOND = 2.1e9
# Norm-wise, of sums that are added up in another order, and of outputs that are rounded after such a sum: a few bf16
# numbers differ by a step then, about 1e-5 in all. A single wrong one of 12 million makes 3e-4.
TOLERANCE, ROUNDED = 2e-5, 1e-4
# At tiny sizes: a shape of three programs, one of them not full; the variants that are run, one of each kind, and
# their cases; and how many jobs are given to other processes.
TINY = (1, 6, 896)
TINY_VARIANTS = (PARENT, "GROUPS 256, MAX_PROGRAMS 512", "last program finalises", "loads evict first, stores .cs")
TINY_CASES = ("capture and change", "reuse", "pair statistics")
TINY_JOBS = 3

Kernels = Callable[[str], ModuleType]
Result = tuple[Sequence[Tensor], Sequence[Tensor]]


# --- variants ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replacement:
    """Text of a file of kernels/, all occurrences of it, and what stands there instead."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Variant:
    """Kernels that differ from the current ones.

    Attributes:
        sweep: it belongs to.
        cases: names of those it is measured on; all of them if empty.
        replacements: in a copy of the current kernels.
        added: further files of the copy.
        instead: by case, the function of an added file that is called, as ``file:function``.
        folder: copied instead of the current kernels.
    """

    name: str
    sweep: str
    cases: tuple[str, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    added: dict[str, str] = field(default_factory=dict)
    instead: dict[str, str] = field(default_factory=dict)
    folder: Path = KERNELS

    def covers(self, case: str) -> bool:
        return not self.cases or case in self.cases

    @property
    def package(self) -> str:
        return "gpu_sweep_" + "".join(c if c.isalnum() else "_" for c in self.name).lower()


TILED = ("capture", "capture and change", "reuse", "JVP reuse", "eight terms", "pair statistics")
STREAMED = TILED[:-1]
# Cases whose programs leave partial sums: no others have a bound.
SUMMED = ("capture and change", "pair statistics", "modulate and change")

# Pair statistics of one contiguous pair in one launch: the program that comes last folds what all of them found. The
# order of additions is another than in statistics.py, and the same in every run.
TICKET = '''
from __future__ import annotations

import torch

from .deferred import jit
from .tiles import GROUPS, MAX_PROGRAMS, OPTIONS, new_partials, program_count, vector_width

_counters = {}


@jit(do_not_specialize=["groups"])
def _pair_ticket_kernel(
    a_ptr, b_ptr, partials_ptr, out_ptr, counter_ptr, groups, VEC: tl.constexpr, R: tl.constexpr, MOST: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    lane = tl.arange(0, VEC)[None, :]
    zero = tl.zeros([R], tl.float32)
    d_1, a_1, b_1, d_2, a_2, b_2, ab, peak = zero, zero, zero, zero, zero, zero, zero, zero
    for start in range(pid * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        off = group[:, None] * VEC + lane
        a = tl.load(a_ptr + off, mask=live, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + off, mask=live, other=0.0).to(tl.float32)
        d = a - b
        d_1 += tl.sum(tl.abs(d), 1)
        a_1 += tl.sum(tl.abs(a), 1)
        b_1 += tl.sum(tl.abs(b), 1)
        d_2 += tl.sum(d * d, 1)
        a_2 += tl.sum(a * a, 1)
        b_2 += tl.sum(b * b, 1)
        ab += tl.sum(a * b, 1)
        peak = tl.maximum(peak, tl.max(tl.abs(d), 1))
    total = tl.sum(d_1, 0)
    slot = partials_ptr + pid
    tl.store(slot, total)
    tl.store(slot + MOST, tl.sum(a_1, 0))
    tl.store(slot + 2 * MOST, tl.sum(b_1, 0))
    tl.store(slot + 3 * MOST, tl.sum(d_2, 0))
    tl.store(slot + 4 * MOST, tl.sum(a_2, 0))
    tl.store(slot + 5 * MOST, tl.sum(b_2, 0))
    tl.store(slot + 6 * MOST, tl.sum(ab, 0))
    tl.store(slot + 7 * MOST, tl.where(total == total, tl.max(peak, 0), total))
    # what this program stored is released with its ticket; the last ticket acquires what all others released
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if ticket == programs - 1:
        column = tl.arange(0, MOST)
        for k in tl.static_range(8):
            partial = tl.load(
                partials_ptr + k * MOST + column, mask=column < programs, other=0.0, cache_modifier=".cg"
            )
            folded = tl.sum(partial, 0)
            if k == 7:
                folded = tl.where(folded == folded, tl.max(partial, 0), folded)
            tl.store(out_ptr + k, folded)
        tl.store(counter_ptr, 0)


def pair_statistics(a, b):
    """fp32 [1, 8] of one contiguous pair."""
    width = vector_width((), (a, b))
    groups = a.numel() // width
    if a.device not in _counters:
        _counters[a.device] = torch.zeros(1, dtype=torch.int32, device=a.device)
    partials = new_partials(8, a.device)
    out = torch.empty((1, 8), dtype=torch.float32, device=a.device)
    _pair_ticket_kernel[(program_count(groups, GROUPS),)](
        a, b, partials, out, _counters[a.device], groups, VEC=width, R=GROUPS, MOST=MAX_PROGRAMS, **OPTIONS
    )
    return out
'''


def constant(name: str) -> int:
    """A constant of tiles.py as it is now."""
    found = re.search(rf"^{name} = (\d+)$", (KERNELS / "tiles.py").read_text(), re.MULTILINE)
    if found is None:
        raise LookupError(f"text not found: tiles.py: {name} = a number")
    return int(found[1])


NOW = {name: constant(name) for name in ("GROUPS", "MAX_PROGRAMS")}


def constants(
    groups: int = NOW["GROUPS"], programs: int = NOW["MAX_PROGRAMS"], warps: int = 4
) -> tuple[Replacement, ...]:
    """Replacements in tiles.py that change what is not as it is now."""
    found = []
    for name, value in (("GROUPS", groups), ("MAX_PROGRAMS", programs)):
        if value != NOW[name]:
            found.append(Replacement("tiles.py", f"\n{name} = {NOW[name]}\n", f"\n{name} = {value}\n"))
    if warps != 4:
        found.append(Replacement("tiles.py", '"num_warps": 4', f'"num_warps": {warps}'))
    return tuple(found)


def tile_variants() -> Iterator[Variant]:
    """Groups per tile, and bound of programs that sum up, one at a time and together."""
    others = [groups for groups in (128, 256, 512) if groups != NOW["GROUPS"]]
    for groups in others:
        yield Variant(f"GROUPS {groups}", "tiles", TILED, constants(groups))
    for programs in (512, 1024, 2048):
        if programs != NOW["MAX_PROGRAMS"]:
            yield Variant(f"MAX_PROGRAMS {programs}", "tiles", SUMMED, constants(programs=programs))
            for groups in others:
                name = f"GROUPS {groups}, MAX_PROGRAMS {programs}"
                yield Variant(name, "tiles", SUMMED[:2], constants(groups, programs))


def warp_variants() -> Iterator[Variant]:
    """Warps per program, and together with a tile of as many bytes per thread as now."""
    now = NOW["GROUPS"]
    for warps, groups in ((2, now), (8, now), (2, now // 2), (8, 2 * now)):
        name = f"{warps} warps" + (f", GROUPS {groups}" if groups != now else "")
        yield Variant(name, "warps", TILED, constants(groups, warps=warps))


# Accesses to whole tensors in capture.py and combine.py, without the bracket that ends them.
FIRST = ', eviction_policy="evict_first"'
UNHINTED_LOADS = {
    "capture.py": "tl.load(out_ptr + o_off, mask=live, other=0.0",
    "combine.py": "tl.load(x_ptr + off, mask=live, other=0.0",
}
HINTED_LOADS = (
    f"tl.load(in_ptr + i_off, mask=live, other=0.0{FIRST}",
    f"tl.load(previous_ptr + off, mask=live, other=0.0{FIRST}",
)
STORES = {
    "capture.py": "tl.store(residual_ptr + off, stored, mask=live",
    "combine.py": "tl.store(y_ptr + off, y.to(y_ptr.dtype.element_ty), mask=live",
}


def hinted(
    loads: str | None = None, hinted_loads: str | None = None, stores: str | None = None
) -> tuple[Replacement, ...]:
    """Hints of loads that have none, of those that have one, and of stores; None leaves them as they are."""
    found = []
    if loads is not None:
        found += [Replacement(file, f"{text})", f"{text}{loads})") for file, text in UNHINTED_LOADS.items()]
    if hinted_loads is not None:
        found += [
            Replacement("capture.py", f"{text})", f"{text.removesuffix(FIRST)}{hinted_loads})") for text in HINTED_LOADS
        ]
    if stores is not None:
        found += [Replacement(file, f"{text})", f"{text}{stores})") for file, text in STORES.items()]
    return tuple(found)


def hint_variants() -> Iterator[Variant]:
    """Eviction policies and cache modifiers; a load may have only one of the two."""
    cg, cs = ', cache_modifier=".cg"', ', cache_modifier=".cs"'
    captures = ("capture", "capture and change")
    yield Variant("loads without hints", "hints", captures, hinted(hinted_loads=""))
    yield Variant("loads evict first", "hints", STREAMED, hinted(loads=FIRST))
    yield Variant("loads .cg", "hints", STREAMED, hinted(loads=cg, hinted_loads=cg))
    yield Variant("stores evict first", "hints", STREAMED, hinted(stores=FIRST))
    yield Variant("stores .cs", "hints", STREAMED, hinted(stores=cs))
    yield Variant("loads evict first, stores .cs", "hints", STREAMED, hinted(loads=FIRST, stores=cs))


ROWED = ("modulate", "reuse and modulate", "codes and modulate")


def row_variants() -> Iterator[Variant]:
    """Kernels for rows without one thing each that makes them shorter, and with more or less of a row in a thread."""
    every = (*ROWED, "modulate and change", "guidance and norm", "row statistics", "compact capture")
    words = "pointer.dtype.element_ty == tl.bfloat16 and VEC > 1"
    yield Variant(
        "a row per thread", "rows", ROWED, (Replacement("modulate.py", "pairs = not count", "pairs = False"),)
    )
    yield Variant("bf16 one by one", "rows", every, (Replacement("rows.py", words, "False"),))
    root = Replacement("modulate.py", "return y, tl.rsqrt(", "return y, 1.0 / tl.sqrt_rn(")
    yield Variant("1 / sqrt", "rows", (*ROWED, "modulate and change"), (root,))
    held = Replacement("guidance.py", "[outline(cond)])", "[outline(cond)], held=48)")
    yield Variant("48 numbers per thread", "rows", ("guidance", "guidance and norm"), (held,))


def variants(parent: Path | None = None) -> list[Variant]:
    """All of them in the order of SWEEPS, the current kernels first."""
    ticket = Variant(
        "last program finalises",
        "ticket",
        ("pair statistics",),
        added={"ticket.py": TICKET},
        instead={"pair statistics": "ticket:pair_statistics"},
    )
    older = [] if parent is None else [Variant(PARENT, "parent", folder=parent)]
    first = Variant(CURRENT, "parent")
    return [first, *older, *row_variants(), *tile_variants(), ticket, *warp_variants(), *hint_variants()]


def write_package(variant: Variant, folder: Path) -> None:
    """The variant's kernels as files.

    Raises:
        LookupError: a text that is to be replaced does not occur.
    """
    shutil.copytree(variant.folder, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for change in variant.replacements:
        path = folder / change.file
        source = path.read_text() if path.is_file() else ""
        if change.old not in source:
            raise LookupError(f"text not found: {change.file}: {change.old.strip()}")
        path.write_text(source.replace(change.old, change.new))
    for name, text in variant.added.items():
        (folder / name).write_text(text)


def load(package: str, folder: Path) -> Kernels:
    """Modules of a folder of kernels, as a package of that name."""
    spec = importlib.util.spec_from_loader(package, loader=None, is_package=True)
    assert spec is not None and spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(folder))
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]
    sys.modules[package] = importlib.util.module_from_spec(spec)
    importlib.invalidate_caches()
    return lambda module: importlib.import_module(f"{package}.{module}")


# --- cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensors:
    """What one call of a case reads (``x``, row, older codes) and writes (``y``, codes, scales)."""

    x: list[Tensor]
    y: list[Tensor]
    row: Tensor
    older_codes: list[Tensor]
    codes: list[Tensor]
    scales: Tensor


@dataclass(frozen=True)
class Case:
    """A call of a launcher.

    Attributes:
        reads, writes: tensors of the shape.
        run: makes the call; what it wrote, and sums.
        codes: tensors of one byte per element, read and written.
        tolerance: norm-wise, of what it wrote; 0 asks for the same bits.
    """

    name: str
    reads: int
    writes: int
    run: Callable[[Kernels, Tensors], Result]
    codes: tuple[int, int] = (0, 0)
    tolerance: float = 0.0

    def bytes(self, shape: Sequence[int]) -> int:
        return (2 * (self.reads + self.writes) + sum(self.codes)) * shape[0] * shape[1] * shape[2]

    def tensors(self, shape: Sequence[int], device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)

        def new(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(torch.bfloat16)

        def new_codes() -> Tensor:
            return torch.randint(0, 120, tuple(shape), generator=generator, device=device, dtype=torch.uint8)

        return Tensors(
            x=[new(*shape) for _ in range(self.reads)],
            y=[new(*shape) for _ in range(self.writes)],
            row=new(1, 1, shape[2]),
            older_codes=[new_codes() for _ in range(self.codes[0])],
            codes=[new_codes() for _ in range(self.codes[1])],
            scales=torch.full((shape[0] * shape[1],), 0.0078125, device=device),
        )


def _capture(kernels: Kernels, t: Tensors) -> Result:
    kernels("capture").capture_triton(t.x[:1], t.x[1:2], t.y)
    return t.y, []


def _capture_change(kernels: Kernels, t: Tensors) -> Result:
    return t.y, [kernels("capture").capture_triton(t.x[:1], t.x[1:2], t.y, None, t.x[2:])]


def _capture_norms(kernels: Kernels, t: Tensors) -> Result:
    return t.y, [kernels("capture").capture_triton(t.x[:1], t.x[1:2], t.y, None, None, True)]


def _reuse(*coefficients: float) -> Callable[[Kernels, Tensors], Result]:
    def run(kernels: Kernels, t: Tensors) -> Result:
        return kernels("combine").linear_combination_triton(t.x[:1], [t.x[1:]], list(coefficients), t.y), []

    return run


def _taylor_update(kernels: Kernels, t: Tensors) -> Result:
    matrix = [[1.0, None, None], [0.5, -0.5, None], [0.25, -0.25, -0.5]]
    kernels("combine").linear_map_triton([t.x], [t.y], matrix, factors=[1.0, 1.0, 1.0])
    return t.y, []


def _compact_reuse(kernels: Kernels, t: Tensors) -> Result:
    scales = [[t.scales]]
    return kernels("combine").linear_combination_triton(t.x, [t.older_codes], [1.0], t.y, scales=scales), []


def _compact_capture(kernels: Kernels, t: Tensors) -> Result:
    kernels("compact").capture_compact_triton(t.x[:1], t.x[1:], t.codes, [t.scales])
    return [*t.codes, t.scales], []


def _pair(kernels: Kernels, t: Tensors) -> Result:
    return [], [kernels("statistics").pair_statistics_triton(t.x[:1], t.x[1:])]


def _errors(kernels: Kernels, t: Tensors) -> Result:
    sets = [[1.0 + k, *(-float(k) * (j == k) for j in range(1, 10))] for k in range(10)]
    return [], [kernels("statistics").combination_error_triton(t.x[0], t.x[1:], sets)]


def _error(kernels: Kernels, t: Tensors) -> Result:
    return [], [kernels("statistics").combination_error_triton(t.x[0], t.x[1:], [[1.0, -0.5, 0.25, -0.125]])]


def _gram(kernels: Kernels, t: Tensors) -> Result:
    return [], [kernels("moments").gram_triton(t.x)]


def _align(kernels: Kernels, t: Tensors) -> Result:
    return [kernels("moments").align_triton(t.x[0], t.x[1], t.x[2:4], t.x[4:])], []


def _modulate(kernels: Kernels, t: Tensors) -> Result:
    return [kernels("modulate").modulate_triton(t.x[0], t.row, t.row, result=t.y[0])[0]], []


def _modulate_change(kernels: Kernels, t: Tensors) -> Result:
    z, sums = kernels("modulate").modulate_triton(t.x[0], t.row, t.row, previous=t.x[1], result=t.y[0])
    return [z], [sums]


def _reuse_modulate(kernels: Kernels, t: Tensors) -> Result:
    z, _ = kernels("modulate").modulate_triton(t.x[0], t.row, t.row, t.x[1:], [1.0], result=t.y[0], stream=t.y[1])
    return [z, t.y[1]], []


def _codes_modulate(kernels: Kernels, t: Tensors) -> Result:
    codes = {"scales": [t.scales], "result": t.y[0]}
    return [kernels("modulate").modulate_triton(t.x[0], t.row, t.row, t.older_codes, [1.0], **codes)[0]], []


def _guidance(rescale: bool) -> Callable[[Kernels, Tensors], Result]:
    def run(kernels: Kernels, t: Tensors) -> Result:
        return [kernels("guidance").guidance_triton(t.x[0], t.x[1], 4.0, rescale)], []

    return run


def _rows(kernels: Kernels, t: Tensors) -> Result:
    return [], [kernels("decisions").row_statistics_triton(t.x[0], t.x[1])]


EIGHT = (1.0, -0.5, 0.25, -0.125, 0.5, -0.25, 0.125, -0.0625)
CASES = (
    Case("capture", 2, 1, _capture),
    Case("capture and change", 3, 1, _capture_change),
    Case("reuse", 2, 1, _reuse(1.0)),
    Case("JVP reuse", 3, 1, _reuse(1.5, -0.5)),
    Case("eight terms", 9, 1, _reuse(*EIGHT)),
    Case("pair statistics", 2, 0, _pair),
    Case("modulate and change", 2, 1, _modulate_change, tolerance=ROUNDED),
    Case("modulate", 1, 1, _modulate, tolerance=ROUNDED),
    Case("reuse and modulate", 2, 2, _reuse_modulate, tolerance=ROUNDED),
    Case("codes and modulate", 1, 1, _codes_modulate, codes=(1, 0), tolerance=ROUNDED),
    Case("guidance", 2, 1, _guidance(False)),
    Case("guidance and norm", 2, 1, _guidance(True), tolerance=ROUNDED),
    Case("row statistics", 2, 0, _rows),
    Case("compact capture", 2, 0, _compact_capture, codes=(0, 1)),
    Case("compact reuse", 1, 1, _compact_reuse, codes=(1, 0)),
    Case("capture and norms", 2, 1, _capture_norms),
    Case("Taylor update", 3, 3, _taylor_update),
    Case("Gram of four", 4, 0, _gram),
    Case("Gram of eight", 8, 0, _gram),
    Case("error of four terms", 5, 0, _error),
    Case("errors of ten", 11, 0, _errors),
    Case("align", 6, 0, _align, tolerance=ROUNDED),
)


def run_of(variant: Variant, kernels: Kernels, case: Case) -> Callable[[Tensors], Result]:
    """A call of the case with the variant's kernels."""
    if case.name not in variant.instead:
        return lambda t: case.run(kernels, t)
    module, _, function = variant.instead[case.name].partition(":")
    return lambda t: ([], [getattr(kernels(module), function)(t.x[0], t.x[1])])


def fresh_result(run: Callable[[Tensors], Result], t: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Copies of what a call finds; what it leaves unwritten cannot look right by accident."""
    for written in t.y:
        written.fill_(float("nan"))
    for written in t.codes:
        written.fill_(255)
    outputs, sums = run(t)
    return [o.clone() for o in outputs], [s.clone() for s in sums]


def compared(found: Result, known: Result, tolerance: float = 0.0) -> dict[str, Any]:
    """How results differ: outputs by their bits or, with a tolerance, like sums by the norm-wise error, both of which
    say ``right``."""
    outputs = all(map(torch.equal, found[0], known[0]))
    errors = [[distance(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(found, known, strict=True)]
    return {
        "outputs_equal": outputs if known[0] else None,
        "sums_equal": all(map(torch.equal, found[1], known[1])) if known[1] else None,
        "outputs_error": max(errors[0], default=0.0),
        "sums_error": max(errors[1], default=0.0),
        "right": (outputs or (tolerance > 0 and all(e <= tolerance for e in errors[0])))
        and all(e <= TOLERANCE for e in errors[1]),
    }


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative to that of the second."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


# --- time --------------------------------------------------------------------------------------------------


class GpuClock:
    """Events around a burst that is issued while the GPU sleeps, so that no gap of the host is timed."""

    def calls(self, call: Callable[[int], Any]) -> tuple[int, float]:
        """How many calls make a burst, and the seconds that it takes to issue them."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for index in range(3):
            call(index)
        issued = (time.perf_counter() - begin) / 3
        torch.cuda.synchronize()
        total = (time.perf_counter() - begin) / 3
        count = max(5, min(MOST_CALLS, int(BURST_SECONDS / max(total, 1e-6))))
        return count, count * issued

    def burst(self, call: Callable[[int], Any], count: int, issue: float) -> tuple[float, bool]:
        """Seconds per call, and whether the GPU slept until all of them were issued."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(int((1.5 * issue + 3e-4) * CYCLES_PER_SECOND))
        start.record()
        for index in range(count):
            call(index)
        held = not start.query()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count / 1e3, held


class HostClock:
    """A clock for runs without a GPU: the host's, of a single call."""

    def calls(self, call: Callable[[int], Any]) -> tuple[int, float]:
        return 1, 0.0

    def burst(self, call: Callable[[int], Any], count: int, issue: float) -> tuple[float, bool]:
        begin = time.perf_counter()
        call(0)
        return time.perf_counter() - begin, True


@dataclass
class Times:
    """Seconds per call of one variant in every round."""

    count: int
    issue: float
    seconds: list[float] = field(default_factory=list)
    held: bool = True

    def to_json(self, size: int) -> dict[str, Any]:
        return {
            "ms": 1e3 * median(self.seconds),
            "low_ms": 1e3 * min(self.seconds),
            "high_ms": 1e3 * max(self.seconds),
            "gigabytes_per_second": size / median(self.seconds) / 1e9,
            "calls": self.count,
            "held": self.held,
        }


def measure(calls: dict[str, Callable[[int], Any]], clock: GpuClock | HostClock, rounds: int) -> dict[str, Times]:
    """Times of variants in turn; whoever was not issued in time is measured once more with a longer sleep."""
    times = {name: Times(*clock.calls(call)) for name, call in calls.items()}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                own = times[name]
                seconds, held = clock.burst(call, own.count, own.issue)
                if not held:
                    own.issue = min(2 * own.issue + 1e-3, 2e-2)
                    seconds, held = clock.burst(call, own.count, own.issue)
                own.seconds.append(seconds)
                own.held &= held
    finally:
        gc.enable()
    return times


def in_turn(run: Callable[[Tensors], Any], sets: Sequence[Tensors]) -> Callable[[int], None]:
    """Calls with one set after the other; results live until their set's next turn, else all share their memory."""
    kept: list[Any] = [None] * len(sets)
    at = 0

    def call(index: int) -> None:
        nonlocal at
        at = (at + 1) % len(sets)
        kept[at] = None
        kept[at] = run(sets[at])

    return call


def copies(size: int, sets: int, device: torch.device) -> Callable[[int], None]:
    """Plain copies that move ``size`` bytes each, half in and half out."""
    pairs = [[torch.zeros(max(1, size // 8), device=device) for _ in range(2)] for _ in range(sets)]
    at = 0

    def call(index: int) -> None:
        nonlocal at
        at = (at + 1) % sets
        pairs[at][0].copy_(pairs[at][1])

    return call


# --- the sweep ---------------------------------------------------------------------------------------------


class ContextLost(RuntimeError):
    """The GPU answers nothing any more; only a new process can use it."""


@dataclass
class Sweep:
    """All variants in their places, what is known of them, and what is written."""

    options: argparse.Namespace
    work: Path
    device: torch.device
    deadline: float
    variants: list[Variant]
    clock: GpuClock | HostClock
    kernels: dict[str, Kernels] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    case_failures: dict[tuple[str, str], str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def folder(self, variant: Variant) -> Path:
        return self.work / variant.package

    def job_file(self, variant: Variant, case: Case, suffix: str) -> Path:
        return self.work / f"{variant.package}.{case.name.replace(' ', '_')}.{suffix}"

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def cases(self, sweep: str) -> list[Case]:
        """Cases of a sweep, which some of its variants are measured on."""
        chosen = [c for c in CASES if not self.options.cases or c.name in self.options.cases]
        return [case for case in chosen if sweep == "parent" or len(self.members(sweep, case)) > 1]

    def members(self, sweep: str, case: Case) -> list[Variant]:
        """The current kernels, and the variants of a sweep that are measured on the case."""
        others = [v for v in self.variants[1:] if v.sweep == sweep and v.covers(case.name)]
        if self.options.tiny:
            others = [v for v in others if v.name in TINY_VARIANTS and case.name in TINY_CASES]
        return [self.variants[0], *others]

    def jobs(self) -> list[tuple[Variant, Case]]:
        """What has to be compiled, the most important first."""
        found: dict[tuple[str, str], tuple[Variant, Case]] = {}
        for sweep in self.options.sweeps:
            for case in self.cases(sweep):
                for variant in self.members(sweep, case):
                    if variant.name not in self.failures:
                        found.setdefault((variant.name, case.name), (variant, case))
        jobs = list(found.values())
        return jobs[-TINY_JOBS:] if self.options.tiny else jobs

    def write_packages(self) -> None:
        for variant in self.variants:
            try:
                write_package(variant, self.folder(variant))
            except (LookupError, OSError) as error:
                self.failures[variant.name] = str(error)
                # so that no other process takes the copy for the variant
                shutil.rmtree(self.folder(variant), ignore_errors=True)

    def load_packages(self) -> None:
        """Imports all modules of every variant, and has Triton see its kernels."""
        for variant in self.variants:
            if variant.name in self.failures:
                continue
            try:
                if not self.folder(variant).is_dir():
                    raise FileNotFoundError("it could not be written")
                kernels = load(variant.package, self.folder(variant))
                for path in sorted(self.folder(variant).glob("*.py")):
                    kernels(path.stem)
                kernels("deferred").use_triton()
            except Exception as error:
                self.failures[variant.name] = brief(error)
            else:
                self.kernels[variant.name] = kernels

    def write(self) -> None:
        if self.options.json is None:
            return
        from layercache.tools.report.machine import write_json

        known = {
            v.name: {
                "sweep": v.sweep,
                "replacements": [asdict(r) for r in v.replacements],
                "instead": v.instead,
                "failure": self.failures.get(v.name),
            }
            for v in self.variants
        }
        seconds = time.monotonic() - self.begun
        write_json(self.options.json, {**self.facts, "seconds": seconds, "variants": known, "rows": self.rows})

    def measure_all(self) -> None:
        """Every case of every sweep, until there is no time left."""
        for shape in self.options.shape:
            for sweep in self.options.sweeps:
                begun, first = time.monotonic(), len(self.rows)
                for case in self.cases(sweep):
                    if self.is_late():
                        self.facts.setdefault("left_out", []).append(f"{sweep}: {case.name}: {shape}")
                        continue
                    try:
                        self.rows += self.measure_case(sweep, case, shape)
                    finally:
                        self.write()
                show(sweep, shape, self.rows[first:], time.monotonic() - begun)

    def measure_case(self, sweep: str, case: Case, shape: Sequence[int]) -> list[dict[str, Any]]:
        """A row for each variant: what it took, or why it failed."""
        size = case.bytes(shape)
        count = max(2, -(-COLD_BYTES // size)) if self.device.type == "cuda" else 2
        blank = {"sweep": sweep, "case": case.name, "shape": list(shape), "bytes": size}
        try:
            sets = [case.tensors(shape, self.device, seed) for seed in range(count)]
            calls, rows = self.checked(sweep, case, sets)
            if CURRENT in calls:
                times = measure({**calls, COPY: copies(size, count, self.device)}, self.clock, self.options.rounds)
                rows = merged(rows, times, size)
        except Exception as error:
            self.look_at(error)
            rows = [{"variant": CURRENT, "failure": brief(error)}]
        return [{**blank, **row} for row in rows]

    def checked(self, sweep: str, case: Case, sets: Sequence[Tensors]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Calls of the variants that work, and for every variant whether its result is right, or its failure."""
        calls, rows = {}, []
        known: Result | None = None
        for variant in self.members(sweep, case):
            failure = self.failures.get(variant.name) or self.case_failures.get((variant.name, case.name))
            if failure is None:
                try:
                    run = run_of(variant, self.kernels[variant.name], case)
                    found = fresh_result(run, sets[0])
                    known = found if known is None else known
                    rows.append({"variant": variant.name, **compared(found, known, case.tolerance)})
                    calls[variant.name] = in_turn(run, sets)
                    continue
                except Exception as error:
                    self.look_at(error)
                    failure = brief(error)
            rows.append({"variant": variant.name, "failure": failure})
            if variant.name == CURRENT:
                break
        return calls, rows

    def look_at(self, error: Exception) -> None:
        """Goes on after an error that the GPU survived.

        Raises:
            ContextLost: it did not.
        """
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                raise ContextLost(brief(error)) from error


def merged(rows: list[dict[str, Any]], times: dict[str, Times], size: int) -> list[dict[str, Any]]:
    """Rows with the figures of those that were timed, and one of the copy."""
    now, copy = median(times[CURRENT].seconds), median(times[COPY].seconds)
    found = []
    for row in [*rows, {"variant": COPY}]:
        if (own := times.get(row["variant"])) is not None:
            seconds = median(own.seconds)
            row = {**row, **own.to_json(size), "share_of_copy": copy / seconds, "speedup": now / seconds}
        found.append(row)
    return found


def brief(error: BaseException) -> str:
    """One line of an error, the one that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[-2:])}"[:400]


def show(sweep: str, shape: Sequence[int], rows: list[dict[str, Any]], seconds: float) -> None:
    """Prints a table of what was measured."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{sweep}, {'x'.join(map(str, shape))}, {seconds:.1f} s", title_justify="left", box=None)
    for heading in ("case", "variant"):
        table.add_column(heading, no_wrap=heading == "case")
    for heading in ("us", "low", "high", "of copy", "speedup", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if "ms" not in row:
            table.add_row(row["case"], f"{row['variant']}: {row.get('failure', 'not measured')}")
            continue
        table.add_row(
            *(row["case"], row["variant"]),
            *(f"{1e3 * row[key]:.2f}" for key in ("ms", "low_ms", "high_ms")),
            f"{100 * row['share_of_copy']:.1f} %",
            f"{row['speedup']:.3f}" + ("" if row["held"] else " host"),
            verdict(row),
        )
    Console(width=120, color_system=None).print(table)


def verdict(row: dict[str, Any]) -> str:
    """Whether a result is that of the current kernels, in a word or two."""
    if "right" not in row or row["variant"] == CURRENT:
        return ""
    if not row["right"]:
        return f"NO {max(row['outputs_error'], row['sums_error']):.0e}"
    differs = row["outputs_equal"] is False or row["sums_equal"] is False
    return f"{max(row['outputs_error'], row['sums_error']):.0e}" if differs else "bits"


# --- compiling ahead ---------------------------------------------------------------------------------------


def compile_ahead(sweep: Sweep, seconds: float) -> None:
    """Has processes call every job once, so that Triton finds it compiled on the disk; notes which ones failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    children = []
    for number in range(sweep.options.jobs):
        command = [sys.executable, str(Path(__file__).resolve()), *sweep.options.arguments]
        command += ["--child", str(number), "--work", str(sweep.work)]
        log = (sweep.work / f"child-{number}.log").open("w")
        children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(child.poll() is None for child in children):
        time.sleep(0.1)
    codes = [child.poll() for child in children]
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
    done = note_failures(sweep, codes)
    sweep.facts["compiled_ahead"] = {"jobs": len(sweep.jobs()), "done": done, "exit": codes}
    for number, code in enumerate(codes):
        if code:
            lines = (sweep.work / f"child-{number}.log").read_text().splitlines()
            print(f"compiling process {number} ended with {code}: {' | '.join(lines[-3:])}", flush=True)


def note_failures(sweep: Sweep, codes: Sequence[int | None]) -> int:
    """Reads what the processes found out; a job in whose midst one died is not tried again. How many were done."""
    done = 0
    for variant, case in sweep.jobs():
        claim, result = (sweep.job_file(variant, case, suffix) for suffix in ("claim", "result"))
        if result.is_file():
            done += 1
            if failure := result.read_text():
                sweep.case_failures[variant.name, case.name] = failure
        elif claim.is_file() and codes[int(claim.read_text() or 0)]:
            sweep.case_failures[variant.name, case.name] = "the process that compiled it died"
    return done


def compile_share(sweep: Sweep, number: int) -> int:
    """What one of the processes does: jobs that no other has claimed."""
    shape = sweep.options.shape[0]
    for variant, case in sweep.jobs():
        try:
            with sweep.job_file(variant, case, "claim").open("x") as claim:
                claim.write(str(number))
        except FileExistsError:
            continue
        failure, lost = "", False
        try:
            tensors = case.tensors(shape, sweep.device, 0)
            run_of(variant, sweep.kernels[variant.name], case)(tensors)
            if sweep.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            failure = brief(error)
            try:
                sweep.look_at(error)
            except ContextLost:
                lost = True
        write_whole(sweep.job_file(variant, case, "result"), failure)
        if lost:
            return 1
    return 0


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    temporary.replace(path)


# --- the program -------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=parse_shape, action="append", help="batch x rows x channels; 1x4096x3072")
    parser.add_argument("--json", type=Path, help="where results are written after every case")
    parser.add_argument("--kernels", type=Path, help="another copy of kernels/, measured as the variant 'parent'")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--seconds", type=float, default=180.0, help="after these nothing is begun")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile ahead; 0: none")
    parser.add_argument("--tiny", action="store_true", help="a tiny size without a GPU")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    options.sweeps = [name for name in SWEEPS if name in options.sweeps]
    options.shape = [TINY] if options.tiny else options.shape or [(1, 4096, 3072)]
    if options.tiny:
        options.jobs, options.rounds = min(options.jobs, 1), 1
    return options


def parse_shape(text: str) -> tuple[int, int, int]:
    batch, rows, channels = map(int, text.split("x"))
    return batch, rows, channels


PROBE = """
import torch, triton, triton.language as tl

@triton.jit
def probe(x_ptr, count, R: tl.constexpr):
    for start in range(tl.program_id(0), count, R):
        tl.store(x_ptr + start + tl.arange(0, R), tl.sum(tl.load(x_ptr + start + tl.arange(0, R)), 0))

x = torch.ones(8)
probe[(1,)](x, 8, R=4)
assert x.eq(4).all(), x
"""


def interpreter_fault(work: Path) -> str:
    """Why Triton's interpreter does not work here; empty where it does."""
    path = work / "probe.py"
    path.write_text(PROBE)
    spec = importlib.util.spec_from_file_location("gpu_sweep_probe", path)
    assert spec is not None and spec.loader is not None
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:
        return brief(error)
    return ""


def describe(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What was measured on what."""
    import triton

    found: dict[str, Any] = {
        "tiny": options.tiny,
        "dtype": "bfloat16",
        "rounds": options.rounds,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": None if options.kernels is None else os.path.relpath(options.kernels, ROOT),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found["copy_of_1_gb_gigabytes_per_second"] = copy_rate(device)
    return found


def copy_rate(device: torch.device) -> float:
    """Of a copy of 1 GB, both ways counted: about 3000 on an H100, else the run is not to be trusted."""
    size = 2**30
    times = measure({COPY: copies(2 * size, 1, device)}, GpuClock(), 3)[COPY]
    return 2 * size / median(times.seconds) / 1e9


def set_up(options: argparse.Namespace, work: Path) -> Sweep:
    """A sweep with its packages loaded."""
    if options.tiny:
        # read by Triton when it is imported
        os.environ["TRITON_INTERPRET"] = "1"
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    elif not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --tiny does without")
    device = torch.device("cpu" if options.tiny else "cuda")
    clock = HostClock() if options.tiny else GpuClock()
    sweep = Sweep(options, work, device, time.monotonic() + options.seconds, variants(options.kernels), clock)
    if options.child is None:
        sweep.write_packages()
    sweep.load_packages()
    return sweep


def run(options: argparse.Namespace, work: Path) -> int:
    """Everything; the exit status."""
    sweep = set_up(options, work)
    if options.child is not None:
        return compile_share(sweep, options.child)
    for name, failure in sweep.failures.items():
        print(f"{name}: {failure}", flush=True)
    sweep.facts |= describe(options, sweep.device)
    sweep.write()
    if options.tiny and (fault := interpreter_fault(work)):
        print(f"{len(sweep.kernels)} variants are loaded, none is run: the interpreter fails with {fault}")
        return int(bool(sweep.failures))
    if options.jobs:
        begun = time.monotonic()
        compile_ahead(sweep, min(options.seconds / 2, 120.0))
        sweep.facts["compile_seconds"] = time.monotonic() - begun
        print(f"compiled ahead in {time.monotonic() - begun:.1f} s: {sweep.facts['compiled_ahead']}", flush=True)
    try:
        sweep.measure_all()
    except ContextLost as error:
        sweep.facts["aborted"] = str(error)
        print(f"the GPU is lost: {error}", flush=True)
    sweep.write()
    bad = [row for row in sweep.rows if row.get("failure") or row.get("right") is False]
    print(f"{len(sweep.rows)} rows, {len(bad)} failed or differ, left out: {sweep.facts.get('left_out', [])}")
    return int("aborted" in sweep.facts or (options.tiny and bool(bad or sweep.failures)))


def main(arguments: Sequence[str] | None = None) -> int:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    options = parse(arguments)
    # a kernel that hangs ends the process; what was measured is on the disk
    faulthandler.dump_traceback_later(options.seconds + 60, exit=True)
    work = options.work or Path(tempfile.mkdtemp(prefix="gpu-sweep-"))
    try:
        return run(options, work)
    finally:
        faulthandler.cancel_dump_traceback_later()
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
