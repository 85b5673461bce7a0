"""As much of SGLang diffusion and of vLLM-Omni as the plug-ins hold on to, written as packages that can be imported.

The loops are the bundled pipeline's, in the pieces that the engines have them in.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from layercache.demo.model import CHANNELS, IMAGE_SIZE, pack_patches
from support import tiny

SGLANG = {
    "sglang/multimodal_gen/runtime/platforms/plugins.py": """
import enum, functools, importlib, logging
class HookType(enum.Enum):
    AROUND = "around"
class HookRegistry:
    hooks = []
    @classmethod
    def register(cls, target, hook, hook_type):
        cls.hooks.append((target, hook))
    @classmethod
    def apply_hooks(cls):
        for target, hook in cls.hooks:
            try:
                module, owner, name = target.rsplit(".", 2)
                owner = getattr(importlib.import_module(module), owner)
                original = getattr(owner, name)
            except Exception:
                logging.getLogger(__name__).exception("Failed to apply hooks to %s", target)
                continue
            def around(*args, hook=hook, original=original, **kwargs):
                return hook(original, *args, **kwargs)
            setattr(owner, name, functools.wraps(original)(around))
""",
    "sglang/multimodal_gen/runtime/pipelines/diffusers_pipeline.py": """
class DiffusersExecutionStage:
    def __init__(self, pipe):
        self.diffusers_pipe = pipe
    def forward(self, batch, server_args):
        batch.output = self.diffusers_pipe(**batch.extra["diffusers_kwargs"]).images
        return batch
""",
    "sglang/multimodal_gen/runtime/pipelines_core/stages/denoising.py": """
class DenoisingStage:
    def __init__(self, loop):
        self.loop = loop
    def forward(self, batch):
        latents = self.loop.start(batch.scheduler, batch.num_inference_steps)
        for step, t in enumerate(batch.scheduler.timesteps):
            velocity = self._predict_noise_with_cfg(
                current_model=self.loop.transformer, timestep=t, batch=batch, timestep_index=step, latents=latents
            )
            latents = batch.scheduler.step(
                model_output=velocity, timestep=t, sample=latents, return_dict=False)[0]
        return latents
    def _predict_noise_with_cfg(self, current_model, timestep, batch, timestep_index, latents):
        return self.loop.guided(latents, timestep)
""",
}
OMNI = {
    "vllm_omni/diffusion/cache/base.py": """
class CacheBackend:
    def __init__(self, config):
        self.config, self.enabled = config, False
    def is_enabled(self):
        return self.enabled
""",
    "vllm_omni/diffusion/cache/selector.py": """
def get_cache_backend(cache_backend, cache_config):
    if cache_backend is None or cache_backend == "none":
        return None
    raise ValueError(f"Unsupported cache backend: {cache_backend}")
""",
    "vllm_omni/diffusion/worker/diffusion_model_runner.py": """
from vllm_omni.diffusion.cache.selector import get_cache_backend
class Runner:
    def __init__(self, pipeline, cache_backend, cache_config):
        self.pipeline = pipeline
        self.cache_backend = get_cache_backend(cache_backend, cache_config)
        if self.cache_backend is not None:
            self.cache_backend.enable(self.pipeline)
    def execute(self, steps):
        if self.cache_backend is not None and self.cache_backend.is_enabled():
            self.cache_backend.refresh(self.pipeline, steps)
        return self.pipeline.forward(steps)
""",
}


@contextmanager
def installed(files: Mapping[str, str], folder: Path, **renamed: str):
    """Within, these packages can be imported, with names that were given others."""
    for path, text in files.items():
        for before, after in renamed.items():
            text = text.replace(before, after)
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        for parent in target.relative_to(folder).parents:
            if parent.name:
                (folder / parent / "__init__.py").touch()
    package = next(iter(files)).partition("/")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
                del sys.modules[name]


def tiny_pipeline():
    return tiny.tiny_pipeline(layers=2)


class Loop:
    """The bundled pipeline's loop, in pieces; counts the transformer's calls."""

    def __init__(self) -> None:
        self.pipe = tiny_pipeline()
        self.transformer, self.scheduler = self.pipe.transformer, self.pipe.scheduler
        self.calls = 0
        self.transformer.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def start(self, scheduler, steps: int, seed: int = 0) -> torch.Tensor:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
        scheduler.set_begin_index(0)
        noise = [torch.randn(1, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, generator=one) for one in tiny.generators(2, seed)]
        return pack_patches(torch.cat(noise))

    @torch.no_grad()
    def guided(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor(self.pipe.class_ids(tiny.PROMPTS))
        branches = [self.pipe.class_encoder(one) for one in (ids, torch.full_like(ids, tiny.NULL_CLASS))]
        inputs = {"timestep": t.expand(2) / 1000, "img_shapes": [(1, 8, 8)] * 2, "return_dict": False}
        cond, uncond = (
            self.transformer(hidden_states=latents, encoder_hidden_states=one, **inputs)[0] for one in branches
        )
        return uncond + 4.0 * (cond - uncond)


class OmniPipeline(Loop):
    """A pipeline as vLLM-Omni's, with the two methods of its mixin for guidance."""

    def predict_noise_maybe_with_cfg(self, do_true_cfg, true_cfg_scale, positive_kwargs, negative_kwargs=None):
        return self.guided(**positive_kwargs)

    def scheduler_step_maybe_with_cfg(self, noise_pred, t, latents, do_true_cfg, per_request_scheduler=None):
        return self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

    def forward(self, steps):
        latents = self.start(self.scheduler, steps)
        for t in self.scheduler.timesteps:
            noise_pred = self.predict_noise_maybe_with_cfg(True, 4.0, {"latents": latents, "t": t})
            latents = self.scheduler_step_maybe_with_cfg(noise_pred, t, latents, True)
        return latents


class Request(SimpleNamespace):
    """What SGLang calls a batch."""


def request(steps: int, scheduler=None, **options) -> Request:
    """A request as SGLang's stages get it."""
    call = {"prompt": tiny.PROMPTS, "num_inference_steps": steps, "output_type": "latent"}
    call |= {"generator": tiny.generators(2)} | options
    return Request(
        num_inference_steps=steps,
        scheduler=scheduler,
        generator=call["generator"],
        extra={"diffusers_kwargs": call},
        output=None,
    )
