"""Seconds, memory and waits of whole transformers of real size on one GPU, with random weights: full and cached.

    python bench/real_size.py --model qwen --json bench/results/qwen.json
    python bench/real_size.py --tiny --device cpu            # the same code on a CPU, in half a minute

Qwen-Image's transformer (60 blocks, 20 billion parameters) and FLUX.1's (19 and 38 blocks, 12 billion) at 1024x1024:
4096 image and 512 text tokens, 24 heads of 128, bf16. Weights are random and drawn on the device, so pictures mean
nothing: what is measured is time. Every entry generates once to warm up, while blocks, reused steps and waits of the
host are counted, then in turn with the others; the file is written after every generation, and nothing is begun after
``--seconds``.
"""

from __future__ import annotations

import argparse
import gc
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
from layercache.compat import scheduler_sigmas
from layercache.methods.fbcache import FBCache
from layercache.models import count_blocks, fingerprint_of
from layercache.report import machine_info, write_json
from layercache.schedule import Schedule, Velocity

# Steps at the beginning that do not count: caches have nothing to reuse there.
WARM = 4
COMPILED = ", compiled"
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


def scheduled(pipe: Loop, steps: int, kind: str, storage: str = "same") -> AbstractContextManager[Any]:
    """A schedule that computes half: every second step as a whole or in thirds by turns, or its velocity alone."""
    blocks = count_blocks(pipe.transformer)
    parts = 3 if kind == "thirds" else 1
    groups = tuple((part * blocks // parts, (part + 1) * blocks // parts) for part in range(parts))

    def is_computed(step: int, part: int) -> bool:
        return step < WARM or (step + part) % 2 == 0

    def anchors(step: int, part: int) -> dict[int, float]:
        """A forecast along the line through the last two computed steps."""
        last, older = [k for k in range(step) if is_computed(k, part)][-1:-3:-1]
        slope = (step - last) / (last - older)
        return {last: 1 + slope, older: -slope}

    pipe.scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    prints = fingerprint_of(pipe.transformer, scheduler_sigmas(pipe.scheduler) or (), ("cond",))
    rows: list[tuple[Any, ...]] = []
    velocities: list[Velocity | None] = []
    for step in range(steps):
        skips = kind == "velocity" and not is_computed(step, 0)
        velocities.append(Velocity(anchors(step, 0)) if skips else None)
        rows.append(({},) if skips else tuple(None if is_computed(step, p) else anchors(step, p) for p in range(parts)))
    own = tuple(velocities) if kind == "velocity" else ()
    weights = tuple(float(hi - lo) for lo, hi in groups)
    return layercache.enabled(pipe, Schedule(prints, groups, tuple(rows), weights, {}, own), storage=storage)


@contextmanager
def dbcache(pipe: Loop, steps: int, threshold: float, longest: int = -1) -> Iterator[None]:
    """cache-dit's DBCache with one block computed at every step."""
    import cache_dit

    double = len(block_lists(pipe.transformer)) == 2
    patterns = [cache_dit.ForwardPattern.Pattern_1] * (2 if double else 1)
    lists = block_lists(pipe.transformer)
    adapter = cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=lists if double else lists[0],
        forward_pattern=patterns if double else patterns[0],
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
    """With its blocks compiled, one code for all of a class; on a CPU only traced, which rehearses as much."""
    backend = "inductor" if pipe.latents.is_cuda else "aot_eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        try:
            with inner(pipe) as cache:
                yield cache
        finally:
            for blocks in block_lists(pipe.transformer):
                for block in blocks:
                    block._compiled_call_impl = None


def entries(steps: int) -> dict[str, Callable[[Loop], AbstractContextManager[Any]]]:
    """By name a context in which the pipeline generates, the most valuable first."""
    from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig

    def full(pipe: Loop) -> AbstractContextManager[Any]:
        return nullcontext()

    def ours(kind: str, **options: Any) -> Callable[[Loop], AbstractContextManager[Any]]:
        return lambda pipe: scheduled(pipe, steps, kind, **options)

    def first_block(threshold: float) -> Callable[[Loop], AbstractContextManager[Any]]:
        return lambda pipe: layercache.enabled(pipe, FBCache(threshold=threshold, warmup=WARM))

    def hook(config: Any) -> Callable[[Loop], AbstractContextManager[Any]]:
        return lambda pipe: diffusers_hook(pipe, config)  # type: ignore[arg-type]

    found = {
        "full": full,
        "layercache, one group, half": ours("group"),
        "layercache, velocity, half": ours("velocity"),
        "layercache, FBCache, always reusing": first_block(ALWAYS),
        "layercache, FBCache, always computing": first_block(NEVER),
        "diffusers, FirstBlockCache, always reusing": hook(FirstBlockCacheConfig(threshold=ALWAYS)),
        "diffusers, FirstBlockCache, always computing": hook(FirstBlockCacheConfig(threshold=NEVER)),
        "cache-dit, DBCache, half": lambda pipe: dbcache(pipe, steps, ALWAYS, 1),
        "cache-dit, DBCache, always computing": lambda pipe: dbcache(pipe, steps, NEVER),
        "layercache, thirds, half": ours("thirds"),
        "layercache, one group, half, compact": ours("group", storage="compact"),
        "diffusers, TaylorSeer, half": hook(
            TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=WARM, max_order=1)
        ),
        f"full{COMPILED}": lambda pipe: compiled(pipe, full),
        f"layercache, one group, half{COMPILED}": lambda pipe: compiled(pipe, ours("group")),
    }
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
    """Adds to the last of the counts whenever a block runs: its attention, as hooks take the place of a block."""

    def count(*_: Any) -> None:
        counts[-1] += 1

    hooks = [block.attn.register_forward_hook(count) for blocks in block_lists(transformer) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def warm_up(pipe: Loop, steps: int, device: torch.device, is_compiled: bool) -> dict[str, Any]:
    """Counts of one generation: blocks that ran at every step, and waits of the host.

    Compiled blocks are not counted, as the hook would be compiled with them.
    """
    counts: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with nullcontext() if is_compiled else counted_blocks(pipe.transformer, counts):
                latents = pipe(steps, lambda step: counts.append(0))
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(w.message) for w in caught)
    finite = bool(torch.isfinite(latents).all())
    return {"blocks_run": counts[:-1], "host_waits": waits, "finite": finite}


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
    """Seconds of the transformer's forward at a step, called and replayed as a CUDA graph."""
    found: dict[str, float] = {}
    plain = type(pipe).velocity

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        if pipe.scheduler.step_index != at:
            return plain(pipe, latents, t)
        still = latents.clone()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            result = plain(pipe, still, t)
        torch.cuda.current_stream().wait_stream(stream)
        graph.replay()
        marks = Marks(True)
        for _ in range(GRAPH_REPLAYS + 1):
            marks()
            graph.replay()
        found["replayed"] = median(marks.seconds())
        return result

    pipe.velocity = velocity  # type: ignore[method-assign]
    try:
        pipe(steps)
    finally:
        del pipe.velocity
    return found


class Measurement:
    """Entries of one model in turn, and what is written of them."""

    def __init__(self, args: argparse.Namespace, model: str, known: dict[str, Any]):
        self.args, self.model, self.known = args, model, known
        self.device = torch.device(args.device)
        self.rows: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {"rows": self.rows, "failures": {}}
        known["models"][model] = self.facts
        self.entries = {
            name: enable
            for name, enable in entries(args.steps).items()
            if (not args.entry or any(wanted in name for wanted in args.entry))
            and (args.compile or not name.endswith(COMPILED))
        }

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self.args.start > self.args.seconds

    def run(self) -> None:
        size = (TINY if self.args.tiny else REAL)[self.model]
        begun = time.monotonic()
        pipe = build(self.model, size, self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.facts["weights_bytes"] = torch.cuda.memory_allocated()
        self.facts["parameters"] = sum(p.numel() for p in pipe.transformer.parameters())
        self.facts["build_seconds"] = time.monotonic() - begun
        billions, seconds = self.facts["parameters"] / 1e9, self.facts["build_seconds"]
        print(f"{self.model}: {billions:.2f} G parameters, built in {seconds:.1f} s", flush=True)
        self.attempt("blocks' share", partial(self.measure_share, pipe))
        # compiled ones come last: compilation takes longer than everything else
        eager = [name for name in self.entries if not name.endswith(COMPILED)]
        for names in (eager, [name for name in self.entries if name not in eager]):
            for name in [*names] * self.args.rounds:
                if not self.is_late and name not in self.facts["failures"]:
                    self.attempt(name, partial(self.measure_entry, pipe, name))
        if self.device.type == "cuda" and not self.is_late:
            self.attempt("CUDA graphs", partial(self.measure_graphs, pipe))
        self.facts["not_begun"] = [name for name in self.entries if name not in self.rows]
        self.write()

    def attempt(self, name: str, action: Callable[[], None]) -> None:
        """One entry must not lose the others."""
        try:
            action()
        except Exception as error:
            self.facts["failures"][name] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"failed: {name}: {self.facts['failures'][name]}", flush=True)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.write()

    def measure_share(self, pipe: Loop) -> None:
        pipe(WARM)
        self.facts["blocks_share"] = blocks_share(pipe, self.args.steps, self.device)

    def measure_entry(self, pipe: Loop, name: str) -> None:
        """A generation; at its first turn one to warm up besides."""
        begun, on_gpu = time.monotonic(), self.device.type == "cuda"
        if on_gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        with self.entries[name](pipe) as cache:
            first = name not in self.rows
            row: dict[str, Any] = {"device": [], "host": []} if first else self.rows[name]
            if first:
                is_compiled = name.endswith(COMPILED)
                row |= warm_up(pipe, self.args.steps, self.device, is_compiled)
                if is_compiled:
                    row["blocks_run"] = self.rows[name.removesuffix(COMPILED)]["blocks_run"]
            # a generation that begins warm also where the first one compiled
            times = timed(pipe, self.args.steps, self.device)
            row["device"].append(times["device"])
            row["host"].append(times["host"])
            if hasattr(cache, "report"):
                row["cache_bytes"] = getattr(cache.report(), "cache_bytes", None)
        if on_gpu:
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        self.rows[name] = row
        self.summarise(name)
        self.tell(name, time.monotonic() - begun)

    def tell(self, name: str, seconds: float) -> None:
        row = self.rows[name]
        step, host = 1e3 * row["step_seconds"], 1e3 * row["host_seconds"]
        allowed = "" if row["allowed"] is None else f" of {row['allowed']:.2f}x allowed"
        line = f"{step:.2f} ms a step, host {host:.2f} ms, {row['speedup']:.2f}x{allowed}, {seconds:.1f} s"
        print(f"measured: {self.model}: {name}: {line}", flush=True)

    def summarise(self, name: str) -> None:
        """Medians per kind of step, and the speedup as a share of what the blocks that ran allow."""
        row = self.rows[name]
        steps = range(WARM, self.args.steps)
        every = sum(len(blocks) for blocks in block_lists_of(self.model, self.args.tiny))
        own = {step: median(times[step] for times in row["device"]) for step in steps}
        kinds: dict[str, list[float]] = {"computing": [], "partial": [], "reusing": []}
        for step in steps:
            ran = row["blocks_run"][step]
            # a first-block cache runs one block of every list at a step that it reuses
            kinds["computing" if ran == every else "reusing" if ran <= 2 else "partial"].append(own[step])
        row["seconds_of"] = {kind: median(values) for kind, values in kinds.items() if values}
        row["step_seconds"] = mean(own.values())
        row["host_seconds"] = median(times[step] for times in row["host"] for step in steps)
        row["used"] = sum(row["blocks_run"][WARM:]) / (every * len(steps))
        share = self.facts.get("blocks_share", 1.0)
        row["allowed"] = 1 / max(1e-9, 1 - share * (1 - row["used"]))
        full = self.rows.get(f"full{COMPILED}" if name.endswith(COMPILED) else "full", row)
        row["speedup"] = full["step_seconds"] / row["step_seconds"]
        row["share_of_allowed"] = row["speedup"] / row["allowed"]
        if "TaylorSeer" in name:
            # its blocks always run, but not the modules in them
            row |= {"used": None, "allowed": None, "share_of_allowed": None}

    def measure_graphs(self, pipe: Loop) -> None:
        """A full forward, and reusing ones, as CUDA graphs beside the same forward called."""
        graphs = self.facts["graphs"] = {}
        reusing = WARM + 1
        wanted = {"full": "full", "layercache, one group, half": "reusing", "layercache, velocity, half": "reusing"}
        for name, kind in wanted.items():
            if name not in self.rows or self.is_late:
                continue
            try:
                with self.entries[name](pipe):
                    pipe(self.args.steps)
                    graphs[f"{name}: {kind}"] = graph_seconds(pipe, self.args.steps, reusing)
            except Exception as error:
                graphs[f"{name}: {kind}"] = {"failure": f"{type(error).__name__}: {str(error)[:300]}"}
            print(f"graph: {name}: {graphs[f'{name}: {kind}']}", flush=True)
            self.write()

    def write(self) -> None:
        if self.args.json is not None:
            write_json(self.args.json, self.known)


def block_lists_of(model: str, tiny: bool) -> list[range]:
    size = (TINY if tiny else REAL)[model]
    return [range(count) for count in size.blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(REAL), help="may be repeated; both if left out")
    parser.add_argument("--entry", action="append", help="only entries whose name has this in it; may be repeated")
    parser.add_argument("--tiny", action="store_true", help="a few narrow blocks, to rehearse")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out compiled blocks")
    parser.add_argument("--steps", type=int, default=10, help=f"of a generation; the first {WARM} do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="nothing is begun after these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    args.start = time.monotonic()
    settings = {key: str(value) for key, value in vars(args).items() if key != "start"}
    known = {"kind": "real size", "machine": machine_info(), "settings": settings, "warm_steps": WARM, "models": {}}
    for model in args.model or list(REAL):
        if time.monotonic() - args.start < args.seconds:
            Measurement(args, model, known).run()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
