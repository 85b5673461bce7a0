"""Full and cached runs of one pipeline, one after the other, watched step by step."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

import layercache
from layercache.errors import BudgetError, LayerCacheError, MethodError
from layercache.methods import Universal
from layercache.tools.cli.options import CallOptions
from layercache.tools.cli.pipelines import (
    DEMO_GUIDANCE,
    call_arguments,
    gives_video,
    is_demo,
    parameters_of,
    refused_arguments,
)

if TYPE_CHECKING:
    from layercache.planning.front import Front, Point
    from layercache.schedule.schedule import Schedule
from layercache.schedule.schedule import call_arguments as arguments_of_plan

STEPS = 30
BUDGET = 0.5
WARM_UP_STEPS = 4
MOST_FULL_RUNS = 8
ELSE = "take 'layercache generate --compare'"


class Cancelled(Exception):
    """A run was cancelled between two steps."""


@dataclass(frozen=True)
class Wanted:
    """What to generate; ``guidance`` is ``None`` for the pipeline's own default."""

    prompt: str
    seed: int = 0
    steps: int = STEPS
    guidance: float | None = None
    budget: float = BUDGET

    @property
    def picture(self) -> tuple[Any, ...]:
        """What the full picture depends on."""
        return self.prompt, self.seed, self.steps, self.guidance


@dataclass(frozen=True)
class Run:
    """A run that is under way, or has ended.

    Attributes:
        steps: of the steps so far, the share of the layer groups that was computed.
        picture: ``[H, W, 3]`` in 0..1; ``None`` until it is there.
        seconds: of the whole call, from prompt to picture.
        used: share of the block time that was computed.
    """

    steps: tuple[float, ...] = ()
    picture: np.ndarray | None = None
    seconds: float = 0.0
    used: float = 1.0


@dataclass(frozen=True)
class Moment:
    """Both runs as they are at a moment; the cached one comes first."""

    wanted: Wanted
    cached: Run = Run()
    full: Run = Run()

    @property
    def is_complete(self) -> bool:
        return self.cached.picture is not None and self.full.picture is not None

    @property
    def psnr(self) -> float:
        """Of the cached picture against the full one, in dB; ``inf`` where they are equal."""
        assert self.cached.picture is not None and self.full.picture is not None
        error = float(np.mean((self.cached.picture - self.full.picture) ** 2))
        return -10 * math.log10(error) if error else math.inf


class SideBySide:
    """Generates with and without the cache, one generation at a time whoever asks.

    Args:
        pipe: a diffusers pipeline that makes pictures from prompts.
        front: of `layercache.search`, from which schedules are taken; without one they are made from other models' full
            runs (`layercache.methods.Universal`).
        call: further arguments of every call; its guidance is that which the page begins with.

    Raises:
        LayerCacheError: the pipeline takes no prompt or gives no pictures, or the front was made for another model.
    """

    def __init__(self, pipe: Any, front: Front | None = None, call: CallOptions | None = None):
        self.pipe, self.front, self.call = pipe, front, call or CallOptions()
        accepted = parameters_of(pipe)
        if "prompt" not in accepted:
            raise LayerCacheError(f"{type(pipe).__name__} takes no prompt, which the page asks for")
        if gives_video(pipe):
            raise LayerCacheError(f"{type(pipe).__name__} gives videos, and the page shows pictures; {ELSE}")
        call_arguments(pipe, self.call)  # refused now, not at the first picture
        self.guidance = _guidance_of(pipe, self.call)
        self.tells_steps = "callback_on_step_end" in accepted
        if front is not None:
            if not front.points:
                raise BudgetError("the front is empty; search for schedules first (layercache search)")
            with layercache.enabled(pipe, front.points[0].schedule):
                pass  # it fits the model
        self._device = threading.Lock()
        self._full: OrderedDict[tuple[Any, ...], Run] = OrderedDict()
        self._schedules: dict[tuple[float, int], Schedule] = {}
        self._under_way: dict[threading.Thread, threading.Event] = {}

    @property
    def budgets(self) -> tuple[float, float]:
        """The least and the largest share that may be asked for."""
        return (0.1, 0.95) if self.front is None else (self.front.points[0].used, self.front.points[-1].used)

    @property
    def fixed_steps(self) -> int | None:
        """The number of steps that the front was searched for."""
        return None if self.front is None else self.front.points[0].schedule.num_steps

    def point_for(self, budget: float) -> Point | None:
        """The schedule of the front whose share computed is nearest, with what it gave."""
        if self.front is None:
            return None
        return min(self.front.points, key=lambda point: abs(point.used - budget))

    def warm_up(self) -> None:
        """A few steps beforehand: the first run of a process also pays for kernels being built and memory found.

        Raises:
            LayerCacheError: the pipeline gives no pictures, or nothing can be cached without a front.
        """
        wanted = Wanted("cat" if is_demo(self.pipe) else "a lighthouse in a storm", steps=WARM_UP_STEPS)
        with self._device:
            try:
                self._generate(wanted, self._universal(wanted), threading.Event(), _hear_nothing)
            except MethodError as error:
                if self.front is None:
                    raise LayerCacheError(
                        f"without a front nothing is known to cache this model by ({error}); make one with 'layercache "
                        "search' and give it with --front"
                    ) from error
                self._generate(wanted, None, threading.Event(), _hear_nothing)

    def run(self, wanted: Wanted) -> Iterator[Moment]:
        """What happens, moment by moment; a generator that is closed cancels the run before its next step.

        Raises:
            LayerCacheError: the pipeline refuses its arguments, or a picture is not usable.
        """
        events: SimpleQueue[Moment | Exception | None] = SimpleQueue()
        stop = threading.Event()
        # a thread of its own: gradients, inference mode and the cache's place in the forward belong to a thread
        thread = threading.Thread(target=self._work, args=(wanted, events, stop), daemon=True)
        self._under_way[thread] = stop
        thread.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            stop.set()

    def close(self) -> None:
        """Cancels what is under way, and waits until it has ended."""
        for thread, stop in list(self._under_way.items()):
            stop.set()
            thread.join()

    def _work(self, wanted: Wanted, events: SimpleQueue[Any], stop: threading.Event) -> None:
        try:
            with self._device, suppress(Cancelled):
                moment = Moment(wanted)
                schedule = self._schedule_for(wanted)
                cached = self._generate(wanted, schedule, stop, lambda run: events.put(replace(moment, cached=run)))
                moment = replace(moment, cached=cached)
                events.put(moment)
                full = self._full.get(wanted.picture)
                if full is None:
                    full = self._generate(wanted, None, stop, lambda run: events.put(replace(moment, full=run)))
                    self._full[wanted.picture] = full
                    if len(self._full) > MOST_FULL_RUNS:
                        self._full.popitem(last=False)
                events.put(replace(moment, full=full))
        except Exception as error:  # raised where the events are read
            events.put(error)
        finally:
            self._under_way.pop(threading.current_thread(), None)
            events.put(None)

    def _schedule_for(self, wanted: Wanted) -> Schedule:
        point, key = self.point_for(wanted.budget), (wanted.budget, wanted.steps)
        if point is not None:
            return point.schedule
        if key not in self._schedules:
            self._schedules[key] = self._universal(wanted)
        return self._schedules[key]

    def _universal(self, wanted: Wanted) -> Schedule:
        """From other models' full runs, ahead of the run as schedules are; a step of it says the noise levels."""
        with refused_arguments(), layercache.enabled(self.pipe, Universal(budget=wanted.budget)) as cache:
            call = self._call(wanted)
            if self.tells_steps:
                call["callback_on_step_end"] = _cancel
            with suppress(Cancelled):
                self.pipe(**call)
            return cache.schedule

    def _call(self, wanted: Wanted) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        import torch

        return {
            "prompt": wanted.prompt,
            "num_inference_steps": wanted.steps,
            "generator": torch.Generator("cpu").manual_seed(wanted.seed),
            "output_type": "np",
            **call_arguments(self.pipe, replace(self.call, guidance_scale=wanted.guidance)),
        }

    def _generate(
        self, wanted: Wanted, plan: Schedule | None, stop: threading.Event, say: Callable[[Run], None]
    ) -> Run:
        """A run by a schedule, or in full; ``say`` hears of it behind every step."""
        if stop.is_set():
            raise Cancelled
        call = {**self._call(wanted), **arguments_of_plan(plan)}
        with refused_arguments(), nullcontext() if plan is None else layercache.enabled(self.pipe, plan) as cache:
            watched = _Watched(cache, stop, say)
            if self.tells_steps:
                call["callback_on_step_end"] = watched
            start = time.perf_counter()
            result = self.pipe(**call)
            seconds = time.perf_counter() - start
            if cache is not None:
                cache.check()
        pictures = getattr(result, "images", None)
        if pictures is None:
            raise LayerCacheError(f"{type(self.pipe).__name__} gives no pictures; {ELSE}")
        return Run(tuple(watched.steps), pictures[0], seconds, 1.0 if cache is None else cache.report().used)


def _hear_nothing(run: Run) -> None:
    pass


def _cancel(*_: Any) -> dict[str, Any]:
    raise Cancelled


class _Watched:
    """A ``callback_on_step_end`` that notes what was computed, and ends a run that is cancelled."""

    def __init__(self, cache: Any, stop: threading.Event, say: Callable[[Run], None]):
        self.cache, self.stop, self.say = cache, stop, say
        self.steps: list[float] = []
        self._computed = self._reused = 0

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.stop.is_set():
            raise Cancelled
        self.steps.append(self._share())
        self.say(Run(tuple(self.steps)))
        return tensors

    def _share(self) -> float:
        """Of the layer groups, what the last step computed."""
        if self.cache is None:
            return 1.0
        so_far = sum(self.cache.computed), sum(self.cache.cached)  # a report would wait for the device
        computed, reused = so_far[0] - self._computed, so_far[1] - self._reused
        self._computed, self._reused = so_far
        return computed / (computed + reused) if computed + reused else 1.0


def _guidance_of(pipe: Any, call: CallOptions) -> float | None:
    """The guidance scale that the call says, or the pipeline has by default; ``None`` where it has none."""
    accepted = parameters_of(pipe)
    if call.guidance_scale is not None or not {"true_cfg_scale", "guidance_scale"} & set(accepted):
        return call.guidance_scale
    if is_demo(pipe):
        return DEMO_GUIDANCE
    named = call_arguments(pipe, replace(call, guidance_scale=1.0))  # of two scales, the one that guidance is here
    name = "true_cfg_scale" if "true_cfg_scale" in named else "guidance_scale"
    default = accepted[name].default
    return float(default) if isinstance(default, int | float) else None
