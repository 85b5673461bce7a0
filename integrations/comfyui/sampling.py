"""One sampling of ComfyUI and the steps in it: who is asked at the start, at every step, and at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from layercache.errors import MethodError
from layercache.planning.sampler import LinearSampler

from .engine import Sampling, held, holding

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
    """The state of one sampling."""

    is_whole: bool

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

    Samplings may run at once; the state of each is in the options that its own guider holds for its length.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def begin(self, sampling: Sampling) -> Run | None:
        """The state of a new sampling, or ``None`` to leave it alone; raises the library's errors to refuse it."""
        raise NotImplementedError

    def end(self, run: Any) -> None:
        """Of a sampling that ended, or was interrupted (``run.is_whole`` is false)."""

    def outer(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of a whole sampling."""
        sampling = Sampling.of(executor, args, kwargs)
        run = None if sampling is None else self.begin(sampling)
        if run is None:
            return executor(*args, **kwargs)
        guider = executor.class_obj
        before = guider.model_options
        guider.model_options = holding(before, run)
        try:
            result = executor(*args, **kwargs)
            run.is_whole = True
            return result
        finally:
            guider.model_options = before
            with self._lock:
                self.end(run)

    def predict(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of a step."""
        run = held(args, kwargs)
        if run is None or not isinstance(args[0], torch.Tensor) or not isinstance(args[1], torch.Tensor):
            return executor(*args, **kwargs)
        return run.predict(args[0], args[1], lambda: executor(*args, **kwargs))


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


def as_levels(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A noise level per sample, ``[B]``, in the shape and number format to calculate with latents."""
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
