"""As much of ComfyUI as the nodes hold on to: a guider's wrappers around a sampling and around its steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def sample_euler(model: Any, x: Any, sigmas: Any, extra_args: Any, callback: Any = None, disable: Any = None) -> Any:
    for here, there in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (x - model(x, here * x.new_ones(len(x)), **extra_args)) / here * (there - here)
    return x


def sample_heun(model: Any, x: Any, sigmas: Any, extra_args: Any, callback: Any = None, disable: Any = None) -> Any:
    raise AssertionError("not reached: it is refused")


class Guider:
    """A guider with one layer of wrappers; its network gives the velocity ``sin(3 x) - sigma x``."""

    def __init__(self, attached: Any):
        self.attached, self.model_options = attached, dict[str, Any]()
        self.model_patcher = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Identity()))
        self.calls, self.fails_at = 0, -1

    def denoised(self, x: Any, sigma: Any, model_options: Any = None, seed: Any = None) -> Any:
        self.calls += 1
        if self.calls == self.fails_at:
            raise InterruptedError
        return x - sigma[:, None, None] * (torch.sin(3 * x) - sigma[:, None, None] * x)

    def outer_sample(self, noise: Any, latent: Any, sampler: Any, sigmas: Any, *rest: Any) -> Any:
        options = {"model_options": self.model_options, "seed": 0}

        def step(x: Any, sigma: Any, model_options: Any, seed: Any) -> Any:
            return self.attached.predict(self.denoised, x, sigma, model_options, seed)

        return sampler.sampler_function(step, noise, sigmas, options)

    def sample(self, noise: Any, sigmas: Any, function: Any = sample_euler) -> Any:
        class Executor:
            class_obj = self

            def __call__(inner, *args: Any, **kwargs: Any) -> Any:
                return self.outer_sample(*args, **kwargs)

        sampler = SimpleNamespace(sampler_function=function, extra_options={})
        return self.attached.outer(Executor(), noise, None, sampler, sigmas)
