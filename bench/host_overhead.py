"""Time the host spends on caching, per forward of the transformer: ours, diffusers' hooks and cache-dit.

    python bench/host_overhead.py --json bench/results/host-overhead.json

Every block is a stand-in that adds a constant, so that what is left is the pipeline, the transformer's own head, and
the cache. Steps that compute everything are compared with the same steps without a cache (a schedule stores what it
computes there, and reuses every fourth step, which does not count); steps that reuse everything with a transformer that
has no blocks at all. Runs of all entries alternate; the figures are medians over the steps of all rounds, in
microseconds per forward. cache-dit takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from types import MethodType
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import layercache
from layercache._utils.compat import scheduler_sigmas
from layercache.demo.model import TRANSFORMER_CONFIG, ClassEncoder
from layercache.demo.pipeline import DemoPipeline
from layercache.methods.fbcache import FBCache
from layercache.models.registry import count_blocks, fingerprint_of
from layercache.schedule.schedule import Schedule
from layercache.tools.report.machine import machine_info, write_json

BLOCKS, STEPS, WARM = 24, 24, 4
PERIOD = 4  # of the schedule that stores residuals: the fourth step reads those of the three before, as planned ones do
ALWAYS, NEVER = 1e9, 1e-9  # thresholds


def stand_in(self: nn.Module, hidden_states: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    return encoder_hidden_states, hidden_states + 0.1


def make_pipeline(blocks: int) -> DemoPipeline:
    config = {**TRANSFORMER_CONFIG, "num_layers": max(1, blocks)}
    transformer = QwenImageTransformer2DModel(**config)
    if not blocks:
        transformer.transformer_blocks = nn.ModuleList()
    for block in transformer.transformer_blocks:
        block.forward = MethodType(stand_in, block)
    pipe = DemoPipeline(transformer, ClassEncoder(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def step_seconds(pipe: DemoPipeline, reuses: bool) -> list[float]:
    """Of one generation, without its first steps, and where steps that compute are asked for without the others."""
    times = [time.perf_counter()]

    def note(pipe: Any, step: int, timestep: Any, values: dict) -> dict:
        times.append(time.perf_counter())
        return values

    generator = torch.Generator().manual_seed(0)
    pipe(["cat"], num_inference_steps=STEPS, generator=generator, output_type="latent", callback_on_step_end=note)
    return [times[k + 1] - times[k] for k in range(WARM, STEPS) if reuses or not is_read(k)]


def is_read(step: int) -> bool:
    """Whether the schedule of computed steps reuses this one, with all residuals since the last."""
    return step % PERIOD == PERIOD - 1


def schedule_of(pipe: DemoPipeline, reuses: bool, parts: int) -> Schedule:
    """Computes and stores all groups, but for the steps that read what was stored; or reuses step 0 from there on."""
    count = count_blocks(pipe.transformer)
    groups = tuple((part * count // parts, (part + 1) * count // parts) for part in range(parts))
    if reuses:
        cells = tuple((None,) * parts if step == 0 else ({0: 1.0},) * parts for step in range(STEPS))
    else:
        mean = [dict.fromkeys(range(step - PERIOD + 1, step), 1 / (PERIOD - 1)) for step in range(STEPS)]
        cells = tuple((mean[step] if is_read(step) else None,) * parts for step in range(STEPS))
    prints = fingerprint_of(pipe.transformer, scheduler_sigmas(pipe.scheduler) or (), ("cond", "uncond"))
    return Schedule(prints, groups, cells, (1.0,) * parts)


@contextmanager
def diffusers_hook(pipe: DemoPipeline, config: Any) -> Iterator[None]:
    pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


@contextmanager
def cache_dit(pipe: DemoPipeline, threshold: float) -> Iterator[None]:
    import cache_dit

    adapter = cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=pipe.transformer.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_1,
        has_separate_cfg=True,
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=1,
        enable_separate_cfg=True,
        num_inference_steps=STEPS,
    )
    cache_dit.enable_cache(adapter, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(adapter)


def entries() -> dict[str, Callable[[DemoPipeline, bool], Any]]:
    """By name: a context in which every step of a pipeline computes, or reuses (second argument)."""
    from diffusers.hooks import FirstBlockCacheConfig

    found: dict[str, Callable[[DemoPipeline, bool], Any]] = {
        "layercache, all blocks as one group": lambda pipe, reuses: layercache.enabled(
            pipe, schedule_of(pipe, reuses, 1)
        ),
        "layercache, thirds": lambda pipe, reuses: layercache.enabled(pipe, schedule_of(pipe, reuses, 3)),
        "layercache, FBCache": lambda pipe, reuses: layercache.enabled(
            pipe, FBCache(threshold=ALWAYS if reuses else NEVER)
        ),
        "diffusers, FirstBlockCache": lambda pipe, reuses: diffusers_hook(
            pipe, FirstBlockCacheConfig(threshold=ALWAYS if reuses else NEVER)
        ),
    }
    if importlib.util.find_spec("cache_dit") is not None:
        found["cache-dit, DBCache"] = lambda pipe, reuses: cache_dit(pipe, ALWAYS if reuses else NEVER)
    return found


def measure(rounds: int) -> list[dict[str, Any]]:
    whole, empty = make_pipeline(BLOCKS), make_pipeline(0)
    step_seconds(whole, False)
    step_seconds(empty, True)
    kinds = entries()
    seconds: dict[tuple[str, bool], list[float]] = {(name, r): [] for name in kinds for r in (False, True)}
    plain: dict[bool, list[float]] = {False: [], True: []}
    for _ in tqdm(range(rounds), desc="rounds"):
        for reuses, pipe in ((False, whole), (True, empty)):
            plain[reuses] += step_seconds(pipe, reuses)
        for (name, reuses), own in seconds.items():
            with torch.no_grad(), kinds[name](whole, reuses) or nullcontext():
                own += step_seconds(whole, reuses)
    base = {reuses: median(values) for reuses, values in plain.items()}
    return [
        {
            "cache": name,
            "compute_us": 1e6 * (median(seconds[name, False]) - base[False]) / 2,
            "cached_us": 1e6 * (median(seconds[name, True]) - base[True]) / 2,
        }
        for name in kinds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    rows = measure(args.rounds)
    table = Table(title=f"{BLOCKS} blocks, microseconds of caching per forward", title_justify="left")
    for heading in ("cache", "computing step", "reusing step"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in rows:
        table.add_row(row["cache"], f"{row['compute_us']:.0f}", f"{row['cached_us']:.0f}")
    Console().print(table)
    if args.json:
        command = f"python bench/host_overhead.py --rounds {args.rounds} --json {args.json}"
        write_json(args.json, {"command": command, "machine": machine_info(), "blocks": BLOCKS, "rows": rows})


if __name__ == "__main__":
    main()
