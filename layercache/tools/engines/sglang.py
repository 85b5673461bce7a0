"""Plug-in of SGLang diffusion: its entry point registers hooks in every worker, where a plan is given.

The environment variable ``LAYERCACHE_SGLANG_PLAN`` holds the path of a schedule, of several or of a folder of them, or
a method such as ``FBCache(threshold=0.1)``; without it nothing is imported and nothing changes. What of SGLang is not
as it is known here gives one warning, and runs uncached.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from layercache.tools.engines.log import warn_once

if TYPE_CHECKING:
    from layercache.tools.engines.plans import Plans
    from layercache.tools.engines.whole_steps import WholeStepRun

VARIABLE = "LAYERCACHE_SGLANG_PLAN"
OPTION = "layercache"
"""In a request's ``diffusers_kwargs``: ``false`` computes it in full."""

_PIPELINES = "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline"
_STAGES = "sglang.multimodal_gen.runtime.pipelines_core.stages"
EXECUTES = f"{_PIPELINES}.DiffusersExecutionStage.forward"
PREDICTS = f"{_STAGES}.denoising.DenoisingStage._predict_noise_with_cfg"

_log = logging.getLogger("layercache")
_registries: list[Any] = []


def register() -> None:
    """What SGLang calls in each of its processes; hooks its diffusers backend and its own pipelines."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return
    try:
        from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

        add, around = HookRegistry.register, HookType.AROUND
    except (ImportError, AttributeError) as error:
        warn_once(f"this SGLang takes no hooks as they are known here ({error}); it runs uncached")
        return
    if any(known is HookRegistry for known in _registries):
        return
    _registries.append(HookRegistry)
    add(EXECUTES, DiffusersBackend(text).execute, around)
    add(PREDICTS, OwnPipelines(text).predict, around)


class _Planned:
    """What hooks share: the plans, read when one is needed first, and arguments of the methods they surround."""

    def __init__(self, text: str):
        self._text = text

    @functools.cached_property
    def plans(self) -> Plans | None:
        """``None`` where the text names none, of which there is one warning."""
        from layercache.errors import LayerCacheError
        from layercache.tools.engines.plans import Plans

        try:
            return Plans.read(self._text)
        except (LayerCacheError, OSError) as error:
            warn_once(f"{VARIABLE} gives no plan, everything runs uncached: {error}")
            return None


def _arguments(original: Callable[..., Any], args: Any, kwargs: Any, *names: str) -> Mapping[str, Any] | None:
    """Arguments of a call by name; ``None`` where the method is not as it is known here, with one warning."""
    try:
        found = _signature(original).bind(*args, **kwargs).arguments
        return {name: found[name] for name in ("self", *names)}
    except (TypeError, KeyError, ValueError) as error:
        warn_once(
            f"SGLang's {getattr(original, '__qualname__', original)} is not called as it is known here ({error}); it "
            "runs uncached"
        )
        return None


@functools.lru_cache(maxsize=16)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


class DiffusersBackend(_Planned):
    """Hooks of the diffusers backend: `layercache.enable` on its pipelines, and another plan where a request needs it.

    A request that the plan does not fit (other noise levels, say) is computed in full.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._enabled: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # plans, by pipeline
        self._reported: set[int] = set()

    def execute(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the stage that calls the pipeline for a request."""
        from layercache.errors import LayerCacheError

        call = _arguments(original, args, kwargs, "batch", "server_args")
        if call is None:
            return original(*args, **kwargs)
        batch, pipe = call["batch"], getattr(call["self"], "diffusers_pipe", None)
        if pipe is None:
            warn_once("the stage of SGLang's diffusers backend does not say its pipeline; it runs uncached")
            return original(*args, **kwargs)
        plan = self._plan_of(batch, call["server_args"])
        if not self._switch(pipe, plan):
            return original(*args, **kwargs)
        drawn = _generator_states(batch)
        try:
            output = original(*args, **kwargs)
        except LayerCacheError as error:
            warn_once(f"a request is computed in full: {error}")
            self._switch(pipe, None)
            for generator, state in drawn:
                generator.set_state(state)
            return original(*args, **kwargs)
        self._report(pipe, plan)
        return output

    def _plan_of(self, batch: Any, server_args: Any) -> Any:
        """The plan of a request; ``None`` for a run in full."""
        from layercache.errors import LayerCacheError

        wanted = _takes_option(batch)
        if self.plans is None or not wanted:
            return None
        if getattr(server_args, "cache_dit_config", None):
            warn_once("the server's --cache-dit-config goes before; nothing is cached by layercache")
            return None
        try:
            return self.plans.for_steps(getattr(batch, "num_inference_steps", None))
        except LayerCacheError as error:
            if not getattr(batch, "is_warmup", False):
                warn_once(f"{error}; it is computed in full")
            return None

    def _switch(self, pipe: Any, plan: Any) -> bool:
        """Enables a plan on a pipeline in place of the one before; whether one is enabled then."""
        import layercache
        from layercache.errors import LayerCacheError

        before = self._enabled.get(pipe)
        if before is not plan:
            if before is not None:
                layercache.disable(pipe)
            self._enabled[pipe] = None
            if plan is not None:
                try:
                    layercache.enable(pipe, plan)
                    self._enabled[pipe] = plan
                except (LayerCacheError, ImportError, AttributeError) as error:
                    warn_once(f"{type(pipe).__name__} runs uncached (diffusers {_diffusers_version()}): {error}")
        return self._enabled.get(pipe) is not None

    def _report(self, pipe: Any, plan: Any) -> None:
        """Writes, after the first request of a plan, what was computed and reused."""
        import layercache

        if id(plan) not in self._reported:
            self._reported.add(id(plan))
            _log.info("layercache: %s", layercache.cache_of(pipe).report())


def _diffusers_version() -> str:
    import diffusers

    return str(diffusers.__version__)


def _takes_option(batch: Any) -> bool:
    """Takes our option out of what a request gives the pipeline; whether it wants the cache."""
    extra = getattr(batch, "extra", None)
    given = extra.get("diffusers_kwargs") if isinstance(extra, Mapping) else None
    if not isinstance(given, Mapping) or OPTION not in given:
        return True
    value = given[OPTION]
    batch.extra = {**batch.extra, "diffusers_kwargs": {name: one for name, one in given.items() if name != OPTION}}
    if not isinstance(value, bool):
        warn_once(f"a request's option {OPTION!r} is true or false, not {value!r}; it is taken for true")
    return value is not False


def _generator_states(batch: Any) -> list[tuple[Any, Any]]:
    """Random generators that a request brings, with their present states."""
    given = getattr(batch, "generator", None)
    generators: Any = given if isinstance(given, (list, tuple)) else [given]
    return [(one, one.get_state()) for one in generators if hasattr(one, "get_state")]


class OwnPipelines(_Planned):
    """The hook of SGLang's own pipelines: skips whole steps, at the velocity behind guidance."""

    def __init__(self, text: str):
        super().__init__(text)
        self._runs: weakref.WeakKeyDictionary[Any, tuple[Any, int, WholeStepRun | None]] = weakref.WeakKeyDictionary()

    def predict(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the method of a denoising stage that gives a step's velocity, of all guidance branches together."""
        names = ("current_model", "batch", "timestep_index", "latents")
        call = None if self.plans is None else _arguments(original, args, kwargs, *names)
        run = None if call is None else self._run_of(call)
        if call is None or run is None:
            return original(*args, **kwargs)
        from layercache.errors import LayerCacheError

        latents: Any = call["latents"]
        velocity: Any = run.placeholder
        is_skipped = run.skips(call["timestep_index"], (latents.shape, latents.dtype, latents.device))
        if not is_skipped:
            velocity = original(*args, **kwargs)
            if not hasattr(velocity, "new_empty"):
                self._leave(call, f"{type(call['self']).__name__} has several outputs")
                return velocity
            run.placeholder = velocity.new_empty(0)
        try:
            velocity = run.replaced(velocity, latents)
        except LayerCacheError as error:
            self._leave(call, str(error))
            return original(*args, **kwargs) if is_skipped else velocity
        if run.is_over:
            self._runs[call["self"]] = weakref.ref(call["batch"]), call["timestep_index"], None
        return velocity

    def _run_of(self, call: Mapping[str, Any]) -> WholeStepRun | None:
        """The run that a step belongs to: that of its request, or a new one at the first step."""
        stage, batch, step = call["self"], call["batch"], call["timestep_index"]
        known, newest, run = self._runs.get(stage, (None, -1, None))
        if known is not None and known() is batch and step >= newest:
            if step == newest and run is not None:
                self._leave(call, f"{type(stage).__name__} asks for several velocities a step")
                return None
            self._runs[stage] = known, step, run
            return run
        run = self._begin(stage, call) if step == 0 else None
        self._runs[stage] = weakref.ref(batch), step, run
        return run

    def _begin(self, stage: Any, call: Mapping[str, Any]) -> WholeStepRun | None:
        from layercache.errors import LayerCacheError
        from layercache.tools.engines.whole_steps import WholeStepRun

        batch, plans = call["batch"], self.plans
        if getattr(batch, "is_warmup", False) or plans is None:
            return None
        others = (getattr(batch, name, False) for name in ("enable_teacache", "enable_spectrum"))
        if getattr(stage, "_cache_dit_enabled", False) or any(others):
            warn_once("a request that uses another cache of SGLang's is not cached by layercache")
            return None
        try:
            return WholeStepRun(plans.for_run(call["current_model"], getattr(batch, "scheduler", None)))
        except LayerCacheError as error:
            warn_once(f"a request is computed in full: {error}")
            return None

    def _leave(self, call: Mapping[str, Any], reason: str) -> None:
        warn_once(f"a request is computed in full: {reason}")
        self._runs[call["self"]] = weakref.ref(call["batch"]), call["timestep_index"], None
