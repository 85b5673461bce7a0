"""Plug-in of vLLM-Omni: the cache backend ``layercache``, for its own pipelines.

``Omni(model=..., cache_backend="layercache", cache_config={"schedule": "schedule.json"})``. The list of backends is
closed, so that the function that chooses one is wrapped, when vLLM-Omni imports it. What of vLLM-Omni is not as it is
known here gives one warning, and runs uncached.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from layercache._utils.imports import after_import
from layercache.tools.engines.log import warn_once

if TYPE_CHECKING:
    from layercache.tools.engines.plans import Plans
    from layercache.tools.engines.whole_steps import WholeStepRun

NAME = "layercache"
"""Of the cache backend."""

OPTION = "schedule"
"""In ``cache_config``: the path of a schedule, several, a folder of them, or a method such as ``Universal()``."""

TRIED = "0.30."
MOST_OF_A_TRIAL = 2
"""Steps of the runs that vLLM-Omni starts with, which need no warning."""
SELECTOR = "vllm_omni.diffusion.cache.selector"
RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"
CHOOSES = "get_cache_backend"
PREDICTS = ("predict_noise_maybe_with_cfg", "predict_noise_with_multi_branch_cfg")
STEPS = "scheduler_step_maybe_with_cfg"

_waiting: set[str] = set()


def register() -> None:
    """What vLLM-Omni calls in each of its processes, any number of times; imports nothing of it."""
    for name in (SELECTOR, RUNNER):
        if name not in _waiting:
            _waiting.add(name)
            after_import(name, _wrap_choice)


def _wrap_choice(module: ModuleType) -> None:
    """Lets a module's function that chooses a cache backend know ours; the runner may have imported it before."""
    original = getattr(module, CHOOSES, None)
    if original is None:
        if module.__name__ == SELECTOR:
            _warn(f"has no {SELECTOR}.{CHOOSES}, and does not know the cache backend {NAME!r} without it")
    elif not hasattr(original, "layercache"):
        setattr(module, CHOOSES, _with_ours(original))


def _with_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_cache_backend(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("cache_backend", "cache_config"), args, strict=False)) | kwargs
        if given.get("cache_backend") != NAME:
            return original(*args, **kwargs)
        return _new_backend(given.get("cache_config"))

    get_cache_backend.layercache = True  # type: ignore[attr-defined]
    return get_cache_backend


def _new_backend(config: Any) -> Any:
    """The backend; ``None``, no cache, where its base class is not there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        if not version("vllm-omni").startswith(TRIED):
            _warn(f"is version {version('vllm-omni')}, and the plug-in was tried with {TRIED}0 only")
    except PackageNotFoundError:
        pass
    try:
        return backend_class()(config)
    except (ImportError, AttributeError, TypeError) as error:
        _warn(f"has another base class of cache backends ({error}); it runs uncached")
        return None


def _warn(text: str) -> None:
    warn_once(f"this vLLM-Omni {text}")


@functools.cache
def backend_class() -> type:
    """`LayerCacheBackend`, a subclass of vLLM-Omni's ``CacheBackend``, which is imported for it."""
    from vllm_omni.diffusion.cache.base import CacheBackend

    class LayerCacheBackend(CacheBackend):
        """Runs an engine's pipeline by schedules of whole steps.

        Attributes:
            loops: what follows the pipeline's loop, once it is enabled.
        """

        loops: PipelineLoops | None = None

        def enable(self, pipeline: Any) -> None:
            """Follows a pipeline's predictions and sampler steps; a pipeline without these is left as it is."""
            from layercache.errors import LayerCacheError
            from layercache.tools.engines.plans import Plans

            try:
                given = _option(self.config)
                if not given:
                    raise LayerCacheError(f'cache_config={{"{OPTION}": "schedule.json"}} is missing')
                plans = Plans.read(given)
                if missing := _missing(pipeline):
                    raise LayerCacheError(missing)
            except (LayerCacheError, OSError, TypeError) as error:
                _warn(f"runs {type(pipeline).__name__} uncached: {error}")
                return
            self.loops = PipelineLoops(pipeline, plans)
            self.enabled = True

        def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
            """A new batch begins: nothing of the one before is used."""
            if self.loops is not None:
                self.loops.refresh()

    return LayerCacheBackend


def _option(config: Any) -> Any:
    return config.get(OPTION) if isinstance(config, Mapping) else getattr(config, OPTION, None)


def _missing(pipeline: Any) -> str:
    """What the cache needs and the pipeline has not; empty where there is all."""
    if not hasattr(pipeline, STEPS) or not any(hasattr(pipeline, name) for name in PREDICTS):
        return f"its loop does not go through {PREDICTS[0]} and {STEPS}"
    if getattr(pipeline, "transformer", None) is None or getattr(pipeline, "scheduler", None) is None:
        return "it has no transformer and scheduler"
    try:
        from vllm_omni.diffusion.distributed.parallel_state import get_pipeline_parallel_world_size

        parts = get_pipeline_parallel_world_size()
    except (ImportError, AssertionError, AttributeError):  # not initialised: one process
        parts = 1
    return "its ranks hold different layers (pipeline parallelism)" if parts > 1 else ""


class PipelineLoops:
    """Follows a pipeline's loop: at a skipped step it is given the last prediction, and its sampler the forecast.

    Both stand behind guidance, and behind what gathers it from the ranks of guidance parallelism: all ranks skip the
    same steps, and the prompts' branches need no names.

    Args:
        pipeline: of which two methods are replaced.
        plans: of which each run's noise levels choose one.
    """

    def __init__(self, pipeline: Any, plans: Plans):
        self.pipeline, self.plans = pipeline, plans
        self._run: WholeStepRun | None = None
        self._levels: Any = None  # the scheduler's timesteps: another object in every run
        self._newest = -1
        self._is_due = False  # a prediction was given and its step not taken
        for name in (*PREDICTS, STEPS):
            if (original := getattr(pipeline, name, None)) is not None:
                if isinstance(original, functools.partial):  # of an earlier backend
                    original = original.args[0]
                call = self.step if name == STEPS else self.predict
                setattr(pipeline, name, functools.partial(call, original))
        self._step_arguments = inspect.signature(getattr(pipeline, STEPS).args[0])

    def refresh(self) -> None:
        """The next prediction begins a run."""
        self._run, self._levels, self._is_due = None, None, False

    def predict(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the method that gives a step's prediction, of all guidance branches together."""
        run = self._followed()
        if run is None:
            return original(*args, **kwargs)
        self._is_due = True
        if run.skips(self._newest, _shapes((args, kwargs))):
            return run.placeholder
        prediction = original(*args, **kwargs)
        if hasattr(prediction, "new_empty"):
            run.placeholder = prediction
        else:
            self._leave("it predicts something else than one tensor")
        return prediction

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the method that takes the sampler's step."""
        from layercache.errors import CacheStateError, LayerCacheError

        run, is_due, self._is_due = self._run, self._is_due, False
        if run is None or not is_due:
            return original(*args, **kwargs)
        try:
            call = self._step_arguments.bind(*args, **kwargs)
            given = call.arguments
            if given.get("per_request_scheduler") is not None:
                raise CacheStateError("its request brings a sampler of its own")
            given["noise_pred"] = run.replaced(given["noise_pred"], given["latents"])
            args, kwargs = call.args, call.kwargs
        except (LayerCacheError, TypeError, KeyError, AttributeError) as error:
            self._leave(f"{STEPS} is not called as it is known here ({error})")
        if run.is_over:
            self._run = None
        return original(*args, **kwargs)

    def _followed(self) -> WholeStepRun | None:
        """The run that the prediction belongs to, whose step the scheduler says."""
        from layercache._utils.compat import scheduler_step

        scheduler = self.pipeline.scheduler
        levels, step = getattr(scheduler, "timesteps", ()), scheduler_step(scheduler)
        if self._is_due and self._run is not None:
            self._leave("its sampler takes other steps than those that follow its predictions")
        elif levels is not self._levels or step is None or step <= self._newest:
            self._run, self._levels = self._begin(scheduler, levels, step), levels
        self._newest = -1 if step is None else step
        return self._run

    def _begin(self, scheduler: Any, levels: Any, step: int | None) -> WholeStepRun | None:
        from layercache.errors import CacheStateError, LayerCacheError
        from layercache.tools.engines.whole_steps import WholeStepRun

        try:
            if step != 0:
                raise CacheStateError("its scheduler does not count its steps from 0")
            return WholeStepRun(self.plans.for_run(self.pipeline.transformer, scheduler))
        except LayerCacheError as error:
            if len(levels) > MOST_OF_A_TRIAL:
                self._leave(str(error))
            return None

    def _leave(self, reason: str) -> None:
        self._run, self._is_due = None, False
        _warn(f"computes a run of {type(self.pipeline).__name__} in full: {reason}")


def _shapes(value: Any) -> Any:
    """Shapes of the tensors among arguments."""
    if hasattr(value, "shape"):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, _shapes(one)) for key, one in value.items())
    return tuple(map(_shapes, value)) if isinstance(value, (list, tuple)) else None
