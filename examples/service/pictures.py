"""One pipeline, its schedules, and the thread that runs one generation after the other.

Settings are environment variables: LAYERCACHE_MODEL (a folder or an id of the Hub; the bundled model without),
LAYERCACHE_DEVICE, LAYERCACHE_CALL (JSON: further arguments of every call, such as guidance), LAYERCACHE_FRONTS (files
of `layercache search`, with commas), LAYERCACHE_STEPS and LAYERCACHE_BUDGETS (of schedules made at the start).
"""

from __future__ import annotations

import io
import itertools
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Histogram

import layercache
from layercache.methods import Universal
from layercache.metrics import prometheus


class Cancelled(Exception):
    """Nobody waits for the picture any more."""


@dataclass
class Job:
    """A picture to generate; `is_left` ends it between two steps."""

    name: str
    prompt: str
    seed: int
    schedule: layercache.Schedule
    is_left: threading.Event = field(default_factory=threading.Event)

    def between_steps(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.is_left.is_set():
            raise Cancelled
        return tensors


@dataclass(frozen=True)
class Picture:
    """A PNG file, the seconds on the device, and the share of the blocks' time that was computed."""

    png: bytes
    seconds: float
    used: float


def load_pipeline() -> Any:
    model, device = os.environ.get("LAYERCACHE_MODEL"), os.environ.get("LAYERCACHE_DEVICE")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model is None:
        from layercache.demo.pipeline import load_demo_pipeline

        pipe: Any = load_demo_pipeline(device)
    else:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(prompt: str, seed: int, steps: int) -> dict[str, Any]:
    own = json.loads(os.environ.get("LAYERCACHE_CALL", "{}"))
    return {**own, "prompt": prompt, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}


def load_schedules(pipe: Any) -> dict[str, layercache.Schedule]:
    """By name: those of the fronts, one for every number of steps and budget, and one that computes everything."""
    found: dict[str, layercache.Schedule] = {}
    for path in filter(None, os.environ.get("LAYERCACHE_FRONTS", "").split(",")):
        for point in layercache.Front.load(path).points:
            found[f"front-{point.schedule.num_steps}-{point.used:.3f}"] = point.schedule
    all_steps = [int(steps) for steps in os.environ.get("LAYERCACHE_STEPS", "30").split(",") if steps]
    budgets = [float(budget) for budget in os.environ.get("LAYERCACHE_BUDGETS", "0.7,0.5,0.35").split(",") if budget]
    for steps, budget in itertools.product(all_steps, budgets):
        made = universal(pipe, steps, budget)
        found[f"universal-{steps}-{made.used:.3f}"] = made
    if not found:
        raise SystemExit("there are no schedules: set LAYERCACHE_FRONTS, or LAYERCACHE_STEPS and LAYERCACHE_BUDGETS")
    for one in list(found.values()):
        everything = ((None,) * len(one.groups),) * one.num_steps
        found[f"full-{one.num_steps}"] = replace(one, cells=everything, branch_cells={}, velocities=(), made_by={})
    return found


def universal(pipe: Any, steps: int, budget: float) -> layercache.Schedule:
    """Made of other models' full runs; the first step of a run says at which noise levels."""

    def one_step(*_: Any) -> dict[str, Any]:
        raise Cancelled

    prompt = "a lighthouse in a storm" if "LAYERCACHE_MODEL" in os.environ else "cat"
    with layercache.enabled(pipe, Universal(budget=budget)) as cache, suppress(Cancelled):
        pipe(**call_arguments(prompt, 0, steps), callback_on_step_end=one_step)
    return cache.schedule


class Device:
    """Generates one picture at a time, each by its own schedule, over one transformer."""

    def __init__(self, registry: CollectorRegistry):
        self.pipe = load_pipeline()
        self.schedules = load_schedules(self.pipe)
        self.cache = layercache.enable(self.pipe, next(iter(self.schedules.values())))  # requests bring their own
        prometheus(self.cache, registry)
        self.measured = Histogram("service_generation_seconds", "Seconds on the device.", registry=registry)
        self.usual_seconds = 1.0

    def generate(self, job: Job) -> Picture:
        """Raises `Cancelled` where the job was left, and the library's error where a residual was NaN."""
        if job.is_left.is_set():
            raise Cancelled
        start = time.perf_counter()
        call = call_arguments(job.prompt, job.seed, job.schedule.num_steps)
        with self.cache.request(job.name, self.pipe.scheduler, job.schedule):
            try:
                image = self.pipe(**call, callback_on_step_end=job.between_steps).images[0]
                used = self.cache.requests.report(job.name).used
            finally:
                self.cache.forget(job.name)
        seconds = time.perf_counter() - start
        self.measured.observe(seconds)
        self.usual_seconds += (seconds - self.usual_seconds) / 8
        file = io.BytesIO()
        image.save(file, "png")
        return Picture(file.getvalue(), seconds, used)

    def close(self) -> None:
        layercache.disable(self.pipe)
