"""One sampling of ComfyUI and the steps in it: who is asked at the start, at every step, and at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from layercache.errors import MethodError
from layercache.planning.sampler import LinearSampler

from . import engine
from .engine import Sampling, StepCall
from .groups import Groups

ONE_EVALUATION = frozenset(
    f"sample_{name}"
    for name in (
        "euler",
        "euler_ancestral",
        "lms",
        "ddpm",
        "lcm",
        "ipndm",
        "ipndm_v",
        "deis",
        "dpmpp_2m",
        "dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
        "dpmpp_2m_sde_heun",
        "dpmpp_2m_sde_heun_gpu",
        "dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
        "res_multistep",
        "res_multistep_ancestral",
        "gradient_estimation",
        "er_sde",
        "sa_solver",
    )
)
"""Samplers that ask the model once at every noise level but the last, and for nothing else than the denoised latents.

Those of "cfg_pp" also ask for the denoised latents without guidance, which a step that is not computed does not have.
"""

LEVEL_TOLERANCE = 1e-3


class Run(Protocol):
    """The state of one sampling.

    Attributes:
        is_whole: whether the sampling ended by itself.
        groups: where blocks are replaced, their state.
    """

    is_whole: bool
    groups: Groups | None

    def options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The ``model_options`` of a step, with what it needs; those given stay as they are."""
        ...

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The denoised latents of a step, ``[B, ...]`` as ``x``.

        Args:
            x: latents.
            sigma: the noise level, ``[B]``.
            compute: gives what the model gives.
        """
        ...


class Attached:
    """What a node puts around the samplings of a model: a `Run` for each of them.

    Samplings may run at once, also of one guider: the state of each belongs to the thread that it runs in, and is
    handed down in the options of every step.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        """The same: clones of a model share it, as they share the model."""
        return self

    def begin(self, sampling: Sampling) -> Run | None:
        """The state of a new sampling, or ``None`` to leave it alone; raises the library's errors to refuse it."""
        raise NotImplementedError

    def end(self, run: Any) -> None:
        """Of a sampling that ended, or was interrupted (``run.is_whole`` is false)."""

    @property
    def _runs(self) -> list[Run | None]:
        """Those of this thread, the innermost last."""
        if not hasattr(self._threads, "runs"):
            self._threads.runs = []
        return self._threads.runs

    def outer(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of a whole sampling."""
        sampling = Sampling.of(executor, args, kwargs)
        run = None if sampling is None else self.begin(sampling)
        self._runs.append(run)
        try:
            result = executor(*args, **kwargs)
            if run is not None:
                run.is_whole = True
            return result
        finally:
            self._runs.pop()
            if run is not None:
                with self._lock:
                    self.end(run)

    def predict(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of a step."""
        run = self._runs[-1] if self._runs else None
        call = None if run is None else StepCall.of(args, kwargs)
        if run is None or call is None:
            return executor(*args, **kwargs)

        def compute() -> Any:
            own, named = call.holding(run, run.options(call.options))
            return executor(*own, **named)

        return run.predict(call.x, call.sigma, compute)

    def forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of a call of the network."""
        options = engine.forward_options(args, kwargs)
        groups = getattr(options.get(engine.KEY), "groups", None)
        if groups is None or not args or not isinstance(args[0], torch.Tensor):
            return executor(*args, **kwargs)
        forward = groups.begin(options, args[0])
        if forward is None:
            return executor(*args, **kwargs)
        own, named = engine.replaced(args, kwargs, options, {**options, engine.FORWARD: forward})
        is_whole = False
        try:
            result = executor(*own, **named)
            is_whole = True
            return result
        finally:
            groups.end(forward, is_whole)


class Steps:
    """Counts the steps of a sampling, so that no device is asked for a noise level.

    On a CPU, where that costs nothing, the noise levels are compared.

    Attributes:
        calls: of the model, so far.
        is_lost: whether they did not come as expected.
    """

    def __init__(self, sigmas: tuple[float, ...]):
        self.sigmas, self.calls, self.is_lost = sigmas, 0, False

    def next(self, sigma: torch.Tensor) -> int | None:
        """The step that a call is of; ``None`` where that is not known, from then on."""
        step, self.calls = self.calls, self.calls + 1
        if step >= len(self.sigmas) - 1:
            self.is_lost = True
        elif sigma.device.type == "cpu" and not is_close(float(sigma.flatten()[0]), self.sigmas[step]):
            self.is_lost = True
        return None if self.is_lost else step

    @property
    def are_complete(self) -> bool:
        return not self.is_lost and self.calls == len(self.sigmas) - 1


def is_close(sigma: float, other: float) -> bool:
    """Whether two noise levels are the same, within 1e-3, above 1 of their size."""
    return abs(sigma - other) <= LEVEL_TOLERANCE * max(1.0, other)


def check_sampler(sampling: Sampling) -> None:
    """Raises `MethodError` for samplers that do not ask the model once per step."""
    name = sampling.sampler_name
    if name not in ONE_EVALUATION:
        known = ", ".join(sorted(one.removeprefix("sample_") for one in ONE_EVALUATION))
        raise MethodError(
            f"the sampler {name.removeprefix('sample_')} does not ask the model once per step, or for more than the "
            f"denoised latents, so that no schedule of steps can be followed; choose one of {known}"
        )


def is_like(denoised: Any, x: torch.Tensor) -> bool:
    """Whether what the model gave are denoised latents."""
    if isinstance(denoised, torch.Tensor) and denoised.shape == x.shape:
        return True
    engine.changed_seam("no latents as the answer of predict_noise")
    return False


def as_levels(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A noise level per sample, ``[B]`` or ``[1]``, in the shape and number format to calculate with latents."""
    return sigma.to(x.dtype).reshape(sigma.shape[:1] + (1,) * (x.ndim - 1))


def linear_steps(sampling: Sampling) -> LinearSampler | None:
    """What a sampler's steps do to latents, from its answers to unit velocities.

    ``None`` where they are not linear, or add noise of their own.
    """
    steps = len(sampling.sigmas) - 1
    impulses = torch.eye(steps + 1)[:, None, :, None]
    found: list[torch.Tensor] = []

    class Impulses:
        inner_model = SimpleNamespace(inner_model=sampling.model)

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
            found.append(x)
            return x - as_levels(sigma, x) * impulses[len(found) - 1]

    options = {"model_options": {}, "seed": 0}
    arguments = {"extra_args": options, "callback": None, "disable": True, **sampling.sampler.extra_options}
    try:
        with torch.random.fork_rng(devices=[]):
            sigmas = torch.tensor(sampling.sigmas)
            last = sampling.sampler.sampler_function(Impulses(), impulses[steps], sigmas, **arguments)
    except Exception:  # a sampler may need anything of a real model
        return None
    response = torch.stack([*found, last]).double().numpy().reshape(len(found) + 1, -1)
    return LinearSampler._of_response(response) if response.shape == (steps + 1, steps + 1) else None
