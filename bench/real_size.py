"""Seconds, memory and waits of whole transformers of real size on one GPU, with random weights: full and cached.

    python bench/real_size.py --model qwen --json bench/results/qwen.json
    python bench/real_size.py --tiny --device cpu            # the same code on a CPU, in half a minute

Qwen-Image's transformer (60 blocks, 20 billion parameters) and FLUX.1-dev's (19 and 38 blocks, 12 billion) at
1024x1024: 4096 image and 512 text tokens, 24 heads of 128, bf16. Weights are random and drawn on the device, so
pictures mean nothing: what is measured is time. The first turn of an entry begins with a generation that is not timed,
in which the blocks that run at every step and the waits of the host are counted; then one generation a round is timed,
of all entries in turn. Compiled blocks come after the first round of the others, CUDA graphs at the very end.

The file is written after every generation, and nothing is begun after ``--seconds``. Waits are what
``torch.cuda.set_sync_debug_mode`` reports; waits for an event are not among them. Where a capture into a CUDA graph
fails, torch may refuse to draw the next model's weights in the same process: one process per model is safest.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
)
from host_overhead import ALWAYS, NEVER, diffusers_hook
from torch import Tensor, nn

import layercache
from layercache._utils.compat import scheduler_sigmas
from layercache.methods.fbcache import DBCache, FBCache
from layercache.models.registry import count_blocks, fingerprint_of, spec_for
from layercache.schedule.memory_plan import stored_bytes
from layercache.schedule.schedule import Schedule, Velocity
from layercache.tools.report.machine import machine_info, write_json

# Steps at the beginning that do not count: all of them compute, and a forecast needs two.
WARM = 2
COMPILED = ", compiled"
# Seconds that must be left when the first compiled entry begins, at real size; and those kept for the graphs.
COMPILE_SECONDS, GRAPH_SECONDS = 45.0, 10.0
GRAPH_REPLAYS = 10


# --- models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Blocks and tokens of a model: as published, or tiny."""

    blocks: tuple[int, int]
    heads: int
    side: int
    text: int


REAL = {"qwen": Size((60, 0), 24, 64, 512), "flux": Size((19, 38), 24, 64, 512)}
TINY = {"qwen": Size((3, 0), 2, 8, 16), "flux": Size((2, 2), 2, 8, 16)}


class Loop(DiffusionPipeline):
    """The loop of a text-to-image pipeline without text encoder and decoder: one branch, Euler steps."""

    def __init__(self, transformer: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.arguments: dict[str, Any] = {}
        self.latents = torch.empty(0)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int, on_step: Callable[[int], Any] | None = None) -> Tensor:
        device = self.transformer.device
        sigmas = [1 - k / num_inference_steps for k in range(num_inference_steps)]
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        self.scheduler.set_begin_index(0)
        latents = self.latents
        for step, t in enumerate(self.scheduler.timesteps):
            if on_step is not None:
                on_step(step)
            latents = self.scheduler.step(self.velocity(latents, t), t, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(num_inference_steps)
        self.maybe_free_model_hooks()
        return latents

    def velocity(self, latents: Tensor, t: Tensor) -> Tensor:
        time = t.expand(1).to(latents.dtype) / 1000
        with self.transformer.cache_context("cond"):
            return self.transformer(hidden_states=latents, timestep=time, return_dict=False, **self.arguments)[0]


def build(model: str, size: Size, device: torch.device) -> Loop:
    """The model with random weights, behind the loop."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:  # weights are drawn where they stay: through the host this would take minutes
            transformer = (qwen if model == "qwen" else flux)(size)
    finally:
        torch.set_default_dtype(before)
    pipe = Loop(transformer.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0))

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    pipe.latents = new(1, size.side**2, 64)
    if model == "qwen":
        pipe.arguments = {"encoder_hidden_states": new(1, size.text, 3584), "img_shapes": [(1, size.side, size.side)]}
    else:
        grid = torch.arange(size.side, device=device, dtype=dtype)
        ids = torch.zeros(size.side**2, 3, device=device, dtype=dtype)
        ids[:, 1], ids[:, 2] = grid.repeat_interleave(size.side), grid.repeat(size.side)
        pipe.arguments = {
            "encoder_hidden_states": new(1, size.text, 4096),
            "pooled_projections": new(1, 768),
            "guidance": torch.full((1,), 3.5, device=device),
            "img_ids": ids,
            "txt_ids": torch.zeros(size.text, 3, device=device, dtype=dtype),
        }
    return pipe


def qwen(size: Size) -> nn.Module:
    return QwenImageTransformer2DModel(num_layers=size.blocks[0], num_attention_heads=size.heads)


def flux(size: Size) -> nn.Module:
    return FluxTransformer2DModel(
        num_layers=size.blocks[0],
        num_single_layers=size.blocks[1],
        num_attention_heads=size.heads,
        guidance_embeds=True,
    )


def block_lists(transformer: nn.Module) -> list[nn.ModuleList]:
    names = ("transformer_blocks", "single_transformer_blocks")
    return [getattr(transformer, name) for name in names if hasattr(transformer, name)]


# --- entries -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One way to generate.

    Attributes:
        enable: the context in which the pipeline generates so.
        schedule: what it follows, where that is known ahead.
        probes: blocks that run at a reused step.
        is_by_module: whether single modules are reused; the rest of every block is computed.
        is_compiled: whether the blocks are compiled.
    """

    enable: Callable[[Loop], AbstractContextManager[Any]]
    schedule: Callable[[Loop], Schedule] | None = None
    probes: int = 0
    is_by_module: bool = False
    is_compiled: bool = False


def computed_at(pattern: str, steps: int, step: int, part: int) -> bool:
    """Whether a part is computed: every second step, none behind the first, or all but the last, which reads them."""
    if step < WARM:
        return True
    return {"half": (step + part) % 2 == 0, "reusing": False, "computing": step < steps - 1}[pattern]


def anchors(pattern: str, steps: int, step: int, part: int) -> dict[int, float]:
    """Coefficients of a reused step: a line through the last two computed ones, or the mean of all where all store."""
    computed = [k for k in range(step) if computed_at(pattern, steps, k, part)]
    if pattern == "computing":
        return dict.fromkeys(computed, 1 / len(computed))
    older, last = computed[-2:]
    slope = (step - last) / (last - older)
    return {last: 1 + slope, older: -slope}


def schedule_of(pipe: Loop, steps: int, unit: str, pattern: str) -> Schedule:
    """A schedule of all blocks as one group, of thirds, or of whole steps."""
    blocks, parts = count_blocks(pipe.transformer), 3 if unit == "thirds" else 1
    groups = tuple((part * blocks // parts, (part + 1) * blocks // parts) for part in range(parts))
    pipe.scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    prints = fingerprint_of(pipe.transformer, scheduler_sigmas(pipe.scheduler) or (), ("cond",))
    rows: list[tuple[Any, ...]] = []
    velocities: list[Velocity | None] = []
    for step in range(steps):
        skips = unit == "whole step" and not computed_at(pattern, steps, step, 0)
        velocities.append(Velocity(anchors(pattern, steps, step, 0)) if skips else None)
        own = (
            None if computed_at(pattern, steps, step, part) else anchors(pattern, steps, step, part)
            for part in range(parts)
        )
        rows.append(({},) if skips else tuple(own))
    weights = tuple(float(hi - lo) for lo, hi in groups)
    return Schedule(prints, groups, tuple(rows), weights, {}, tuple(velocities) if unit == "whole step" else ())


def predicted_bytes(pipe: Loop, schedule: Schedule) -> int:
    """Memory that a schedule stores, known ahead from the sizes of the streams."""
    transformer = pipe.transformer
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    size = pipe.latents.element_size()
    image, text = pipe.latents.shape[1], pipe.arguments["encoder_hidden_states"].shape[1]
    latents = pipe.latents.numel() * size
    leaves = spec_for(transformer).text_leaves
    return stored_bytes(schedule, {"cond": (image * width * size, text * width * size)}, latents, leaves)


@contextmanager
def dbcache(pipe: Loop, steps: int, threshold: float, longest: int = -1) -> Iterator[None]:
    """cache-dit's DBCache with one block of every list computed at every step."""
    import cache_dit

    lists = block_lists(pipe.transformer)
    patterns = [cache_dit.ForwardPattern.Pattern_1] * len(lists)
    is_single = len(lists) == 1
    adapter = cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=lists[0] if is_single else lists,
        forward_pattern=patterns[0] if is_single else patterns,
        has_separate_cfg=False,
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=WARM,
        max_continuous_cached_steps=longest,
        enable_separate_cfg=False,
        num_inference_steps=steps,
    )
    cache_dit.enable_cache(adapter, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(adapter)


@contextmanager
def compiled(pipe: Loop, inner: Callable[[Loop], AbstractContextManager[Any]]) -> Iterator[Any]:
    """With its blocks compiled, one code for all of a class; on a CPU only traced, which runs the same code."""
    backend = "inductor" if pipe.latents.is_cuda else "aot_eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
            with inner(pipe) as cache:
                yield cache
        finally:
            for blocks in block_lists(pipe.transformer):
                for block in blocks:
                    block._compiled_call_impl = None


def full(pipe: Loop) -> AbstractContextManager[Any]:
    return nullcontext()


def scheduled(steps: int, unit: str, pattern: str, **options: Any) -> Entry:
    """An entry of ours by a schedule."""
    schedule = partial(schedule_of, steps=steps, unit=unit, pattern=pattern)
    return Entry(lambda pipe: layercache.enabled(pipe, schedule(pipe), **options), schedule)


def dynamic(method: Any) -> Entry:
    """An entry of ours that decides as it runs, on the first block."""
    return Entry(lambda pipe: layercache.enabled(pipe, method), probes=1)


def hooked(config: Any, **facts: Any) -> Entry:
    """An entry of diffusers' own hooks."""
    return Entry(lambda pipe: diffusers_hook(pipe, config), **facts)  # type: ignore[arg-type]


def with_compiled(entry: Entry) -> Entry:
    """The same with compiled blocks."""
    return Entry(lambda pipe: compiled(pipe, entry.enable), entry.schedule, is_compiled=True)


def entries(steps: int, lists: int) -> dict[str, Entry]:
    """All entries by name, the most valuable first; ``lists`` of blocks has the model."""
    from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig

    def cache_dit(threshold: float, longest: int = -1) -> Entry:
        return Entry(lambda pipe: dbcache(pipe, steps, threshold, longest), probes=lists)

    taylor = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=WARM, max_order=1)
    half = DBCache(threshold=ALWAYS, warmup=WARM, front=1, max_consecutive=1)
    found = {
        "full": Entry(full),
        "layercache, one group, half": scheduled(steps, "one group", "half"),
        "layercache, one group, always reusing": scheduled(steps, "one group", "reusing"),
        "layercache, one group, always computing": scheduled(steps, "one group", "computing"),
        "layercache, whole step, half": scheduled(steps, "whole step", "half"),
        "layercache, whole step, always reusing": scheduled(steps, "whole step", "reusing"),
        "layercache, FBCache, always reusing": dynamic(FBCache(threshold=ALWAYS, warmup=WARM)),
        "layercache, FBCache, always computing": dynamic(FBCache(threshold=NEVER, warmup=WARM)),
        "diffusers, FirstBlockCache, always reusing": hooked(FirstBlockCacheConfig(threshold=ALWAYS), probes=1),
        "diffusers, FirstBlockCache, always computing": hooked(FirstBlockCacheConfig(threshold=NEVER), probes=1),
        "layercache, DBCache, half": dynamic(half),
        "cache-dit, DBCache, half": cache_dit(ALWAYS, 1),
        "cache-dit, DBCache, always reusing": cache_dit(ALWAYS),
        "cache-dit, DBCache, always computing": cache_dit(NEVER),
        "layercache, thirds, half": scheduled(steps, "thirds", "half"),
        "layercache, thirds, always reusing": scheduled(steps, "thirds", "reusing"),
        "layercache, one group, half, compact": scheduled(steps, "one group", "half", storage="compact"),
        "diffusers, TaylorSeer, half": hooked(taylor, is_by_module=True),
    }
    if importlib.util.find_spec("cache_dit") is None:
        found = {name: entry for name, entry in found.items() if not name.startswith("cache-dit")}
    for name in ("full", "layercache, one group, half", "layercache, whole step, half"):
        found[name + COMPILED] = with_compiled(found[name])
    return found


# --- measuring ---------------------------------------------------------------------------------------------


@dataclass
class Marks:
    """Moments on the device and on the host."""

    on_gpu: bool
    events: list[Any] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def __call__(self, *_: Any) -> None:
        if self.on_gpu:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        self.host.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between following moments, on the device."""
        if not self.on_gpu:
            return self.issued()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.events, self.events[1:], strict=False)]

    def issued(self) -> list[float]:
        return [b - a for a, b in zip(self.host, self.host[1:], strict=False)]


@contextmanager
def counted_blocks(transformer: nn.Module, counts: list[int]) -> Iterator[None]:
    """Adds to the last of the counts whenever a block runs: a projection in its attention.

    Hooks take the place of blocks and of their attention, but not of what is in there.
    """

    def count(*_: Any) -> None:
        counts[-1] += 1

    hooks = [block.attn.to_q.register_forward_hook(count) for blocks in block_lists(transformer) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def count_run(pipe: Loop, steps: int, device: torch.device, is_compiled: bool) -> dict[str, Any]:
    """Counts of one generation that is not timed: per step the blocks that ran, and the waits of the host.

    Compiled blocks are not counted, as the hook would be compiled with them.
    """
    counts: list[int] = []
    waits: list[int] = []
    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def at_step(step: int) -> None:
            counts.append(0)
            waits.append(sum("synchroniz" in str(w.message) for w in caught))

        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with nullcontext() if is_compiled else counted_blocks(pipe.transformer, counts):
                latents = pipe(steps, at_step)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return {
        "blocks_run": None if is_compiled else counts[:-1],
        "host_waits": [b - a for a, b in zip(waits, waits[1:], strict=False)] if device.type == "cuda" else None,
        "finite": bool(torch.isfinite(latents).all()),
        "first_generation_seconds": time.monotonic() - begun,
    }


def timed(pipe: Loop, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step of one generation, on the device and of the host until it has issued it."""
    marks = Marks(device.type == "cuda")
    pipe(steps, marks)
    return {"device": marks.seconds(), "host": marks.issued()}


def blocks_share(pipe: Loop, steps: int, device: torch.device) -> float:
    """Share of a full run's time that passes between the first block's beginning and the last one's end."""
    marks, whole = Marks(device.type == "cuda"), Marks(device.type == "cuda")
    lists = [blocks for blocks in block_lists(pipe.transformer) if len(blocks)]
    hooks = [
        lists[0][0].register_forward_pre_hook(marks),
        lists[-1][-1].register_forward_hook(marks),
    ]
    try:
        pipe(steps, whole)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(marks.seconds()[::2][WARM:]) / sum(whole.seconds()[WARM:])


def graph_seconds(pipe: Loop, steps: int, at: int) -> dict[str, float]:
    """Seconds of the transformer's forward at a step, replayed as a CUDA graph that is captured as the loop gets there.

    Called again at the same step it would not be captured as it runs in the loop: the runtime computes a forward in
    full that nothing tells from an earlier one.
    """
    found: dict[str, float] = {}
    plain = type(pipe).velocity

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        if pipe.scheduler.step_index != at:
            return plain(pipe, latents, t)
        still, graph = latents.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = plain(pipe, still, t)
        graph.replay()
        first = result.clone()
        marks = Marks(True)
        marks()
        for _ in range(GRAPH_REPLAYS):
            graph.replay()
            marks()
        found["replayed"] = median(marks.seconds())
        return first

    pipe.velocity = velocity  # type: ignore[method-assign]
    try:
        pipe(steps)
    finally:
        del pipe.velocity
    return found


def failure_of(action: Callable[[], None]) -> str | None:
    """How an action failed, without the exception: that holds on to tensors."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    return None


class Measurement:
    """Entries of one model in turn, and what is written of them."""

    def __init__(self, args: argparse.Namespace, model: str, known: dict[str, Any]):
        self.args, self.model, self.known = args, model, known
        self.device, self.on_gpu = torch.device(args.device), args.device.startswith("cuda")
        self.size = (TINY if args.tiny else REAL)[model]
        self.every = sum(self.size.blocks)
        self.rows: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.facts: dict[str, Any] = {"blocks": self.every, "rows": self.rows, "failures": self.failures}
        known["models"][model] = self.facts
        lists = sum(count > 0 for count in self.size.blocks)
        self.entries = {
            name: entry
            for name, entry in entries(args.steps, lists).items()
            if (not args.entry or any(wanted in name for wanted in args.entry))
            and (args.compile or not entry.is_compiled)
        }

    @property
    def left(self) -> float:
        """Seconds in which something may begin."""
        return self.args.seconds - (time.monotonic() - self.args.start)

    def run(self) -> None:
        if not self.attempt("build", self.build):
            return
        self.attempt("blocks' share", self.measure_share)
        eager = [name for name, entry in self.entries.items() if not entry.is_compiled]
        slow = [name for name in self.entries if name not in eager]
        graphs = GRAPH_SECONDS if self.on_gpu else 0.0
        compiling = COMPILE_SECONDS if self.on_gpu and not self.args.tiny else 0.0
        self.take_turns(eager, 0.0)
        if self.left > compiling:
            self.take_turns(slow, graphs)
        for _ in range(1, self.args.rounds):
            self.take_turns([name for name in self.entries if name in self.rows], graphs)
        if self.on_gpu and self.left > 0:
            self.attempt("CUDA graphs", self.measure_graphs)
        self.facts["not_begun"] = [name for name in self.entries if name not in {**self.rows, **self.failures}]
        self.facts["finished"] = True
        self.write()

    def take_turns(self, names: list[str], kept: float) -> None:
        """One round of entries, as long as more seconds than the kept ones are left."""
        for name in names:
            if self.left > kept and name not in self.failures and self.attempt(name, partial(self.measure, name)):
                self.tell(name)

    def attempt(self, name: str, action: Callable[[], None]) -> bool:
        """Whether an action went well; one that fails must not lose the others."""
        begun, failure = time.monotonic(), failure_of(action)
        self.facts["last_seconds"] = time.monotonic() - begun
        if failure is not None:
            self.failures[name] = failure
            gc.collect()
            if self.on_gpu:
                # a capture that failed, or an error of the device, may show again here
                failure_of(torch.cuda.empty_cache)
        self.write()
        if failure is not None:
            print(f"failed: {self.model}: {name}: {failure}", flush=True)
        return failure is None

    def build(self) -> None:
        begun = time.monotonic()
        self.pipe = build(self.model, self.size, self.device)
        if self.on_gpu:
            torch.cuda.synchronize()
            self.facts["weights_bytes"] = torch.cuda.memory_allocated()
        self.facts["parameters"] = sum(p.numel() for p in self.pipe.transformer.parameters())
        self.facts["build_seconds"] = time.monotonic() - begun
        billions, seconds = self.facts["parameters"] / 1e9, self.facts["build_seconds"]
        print(f"{self.model}: {billions:.2f} G parameters, built in {seconds:.1f} s", flush=True)

    def measure_share(self) -> None:
        self.pipe(WARM)
        self.facts["blocks_share"] = blocks_share(self.pipe, self.args.steps, self.device)

    def measure(self, name: str) -> None:
        """A generation of an entry; at its first turn one that counts besides."""
        entry, before = self.entries[name], 0
        row: dict[str, Any] = self.rows.get(name, {"device": [], "host": []})
        if self.on_gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        with entry.enable(self.pipe) as cache:
            if name not in self.rows:
                row |= count_run(self.pipe, self.args.steps, self.device, entry.is_compiled)
                if hasattr(cache, "report"):
                    row |= self.report_of(cache, entry, name.endswith("compact"))
                if entry.is_compiled:
                    row["blocks_run"] = self.rows.get(name.removesuffix(COMPILED), {}).get("blocks_run")
            times = timed(self.pipe, self.args.steps, self.device)
        row["device"].append(times["device"])
        row["host"].append(times["host"])
        if self.on_gpu:
            row["peak_bytes"] = max(row.get("peak_bytes", 0), torch.cuda.max_memory_allocated() - before)
        self.rows[name] = row
        for known in self.rows:  # the full run's figures change with every round
            self.summarise(known)

    def report_of(self, cache: Any, entry: Entry, is_compact: bool) -> dict[str, Any]:
        """What the cache says of the counted generation, beside what was predicted of its memory."""
        report = cache.report()
        found = {key: getattr(report, key) for key in ("computed_cells", "cached_cells", "fallback_rows")}
        found |= {"cache_bytes": report.cache_bytes, "predicted_bytes": None}
        if entry.schedule is not None and not is_compact:
            found["predicted_bytes"] = predicted_bytes(self.pipe, entry.schedule(self.pipe))
        return found

    def tell(self, name: str) -> None:
        row = self.rows[name]
        kinds = ", ".join(f"{1e3 * seconds:.2f} {kind}" for kind, seconds in row["seconds_of"].items())
        gain = "" if row["speedup"] is None else f", {row['speedup']:.2f}x"
        allowed = "" if row["allowed"] is None else f" of {row['allowed']:.2f}x allowed"
        host, took = 1e3 * row["host_seconds"], self.facts["last_seconds"]
        print(f"measured: {self.model}: {name}: ms {kinds}; host {host:.2f}{gain}{allowed}, {took:.1f} s", flush=True)

    def kind_of(self, entry: Entry, ran: int) -> str:
        """What a step did at which so many blocks ran."""
        return "computed" if ran == self.every else "reused" if ran <= entry.probes else "partial"

    def summarise(self, name: str) -> None:
        """Medians per kind of step, and the speedup as a share of what the blocks that ran allow."""
        row, entry, steps = self.rows[name], self.entries[name], range(WARM, self.args.steps)
        own, host = ([median(times[step] for times in row[key]) for step in steps] for key in ("device", "host"))
        row["step_seconds"], row["host_seconds"] = mean(own), median(host)
        ran = row["blocks_run"]
        row["steps"] = None if ran is None else [self.kind_of(entry, count) for count in ran]
        kinds = ["all"] * len(own) if ran is None else row["steps"][WARM:]
        for key, values in (("seconds_of", own), ("host_seconds_of", host)):
            pairs = list(zip(kinds, values, strict=True))
            row[key] = {kind: median(v for k, v in pairs if k == kind) for kind in dict.fromkeys(kinds)}
        row |= dict.fromkeys(("used", "speedup", "allowed", "share_of_allowed"))
        whole = self.rows.get("full" + COMPILED * entry.is_compiled)
        if whole is None:
            return
        row["speedup"] = whole["step_seconds"] / row["step_seconds"]
        if self.on_gpu:
            row["peak_bytes_above_full"] = row["peak_bytes"] - whole["peak_bytes"]
        share = self.facts.get("blocks_share")
        if ran is None or entry.is_by_module or share is None or "full" not in self.rows:
            return
        row["used"] = sum(ran[WARM:]) / (self.every * len(steps))
        # compiled blocks are a smaller share of a shorter step: what is outside them is not compiled
        outside = (1 - share) * self.rows["full"]["step_seconds"] / whole["step_seconds"]
        row["allowed"] = 1 / max(1e-9, 1 - (1 - outside) * (1 - row["used"]))
        row["share_of_allowed"] = row["speedup"] / row["allowed"]

    def measure_graphs(self) -> None:
        """Forwards that compute and forwards that reuse, as CUDA graphs beside the same forward called."""
        graphs: dict[str, Any] = {}
        self.facts["graphs"] = graphs
        wanted = [
            ("layercache, one group, half", "reused", WARM + 1),
            ("layercache, whole step, half", "reused", WARM + 1),
            ("full", "computed", WARM),
            ("layercache, one group, half", "computed", WARM),
        ]
        for name, kind, step in wanted:
            what = f"{name}: {kind}"
            if name not in self.rows or self.left <= 0:
                graphs[what] = {"failure": "not begun: no time was left, or the entry was not measured"}
                continue
            failure = failure_of(partial(self.measure_graph, graphs, what, name, step))
            if failure is not None:
                graphs[what] = {"failure": failure}
            print(f"graph: {self.model}: {what}: {graphs[what]}", flush=True)
            self.write()

    def measure_graph(self, graphs: dict[str, Any], what: str, name: str, step: int) -> None:
        with self.entries[name].enable(self.pipe):
            self.pipe(self.args.steps)
            graphs[what] = graph_seconds(self.pipe, self.args.steps, step)

    def write(self) -> None:
        if self.args.json is not None:
            write_json(self.args.json, self.known)


def arguments() -> argparse.Namespace:
    """The command line, and the moment it was read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(REAL), help="may be repeated; both if left out")
    parser.add_argument("--entry", action="append", help="only entries whose name has this in it; may be repeated")
    parser.add_argument("--tiny", action="store_true", help="a few narrow blocks, to try it out")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out compiled blocks")
    parser.add_argument("--steps", type=int, default=8, help=f"of a generation; the first {WARM} do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="nothing is begun after these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.steps < WARM + 2:
        parser.error(f"--steps must be at least {WARM + 2}")
    args.start = time.monotonic()
    return args


def main() -> None:
    args = arguments()
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("start", "json")}
    known = {"kind": "real size", "machine": machine_info(), "settings": settings, "warm_steps": WARM, "models": {}}
    if args.json is not None:
        write_json(args.json, known)
    for model in args.model or list(REAL):
        if time.monotonic() - args.start < args.seconds:
            Measurement(args, model, known).run()
            gc.collect()
            if torch.cuda.is_available():
                failure_of(torch.cuda.empty_cache)


if __name__ == "__main__":
    main()
