"""`DemoPipeline`: the bundled model behind an ordinary diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from layercache.demo.model import (
    CHANNELS,
    CLASS_NAMES,
    IMAGE_SIZE,
    NULL_CLASS,
    PATCH_SIZE,
    ClassEncoder,
    pack_patches,
    unpack_patches,
)
from layercache.demo.weights import find_weights


@dataclass
class DemoPipelineOutput(BaseOutput):
    """``images``: PIL pictures, a NumPy array ``[B, H, W, 3]`` or a tensor ``[B, 3, H, W]`` in 0..1."""

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor


class DemoPipeline(DiffusionPipeline):
    """Class-conditional flow matching in pixel space, with classifier-free guidance in two calls.

    It sets ``cache_context("cond")`` and ``cache_context("uncond")`` as the Qwen-Image pipeline
    does, so every cache written for diffusers can be tried on it.
    """

    model_cpu_offload_seq = "class_encoder->transformer"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        class_encoder: ClassEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, class_encoder=class_encoder, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def class_ids(self, prompt: str | int | Sequence[str | int]) -> list[int]:
        """Class numbers of names or numbers; unknown ones are refused with the list of known names."""
        prompts = [prompt] if isinstance(prompt, str | int) else list(prompt)
        ids = []
        for item in prompts:
            if isinstance(item, str) and item in CLASS_NAMES:
                ids.append(CLASS_NAMES.index(item))
            elif isinstance(item, int) and 0 <= item <= NULL_CLASS:
                ids.append(item)
            else:
                raise ValueError(f"prompt {item!r} is not one of {', '.join(CLASS_NAMES)} or 0..{NULL_CLASS}")
        return ids

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | Sequence[str | int] = "cat",
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        height: int = IMAGE_SIZE,
        width: int = IMAGE_SIZE,
        sigmas: Sequence[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DemoPipelineOutput | tuple[Any, ...]:
        """Draws one picture per class name (or number) in ``prompt``.

        Args:
            prompt: class name or number, or a list of them (the batch).
            num_inference_steps: sampler steps.
            guidance_scale: classifier-free guidance; at 1 or below the unconditional call is left out.
            height, width: pixels, multiples of the patch size (the model was trained at 32x32).
            sigmas: noise levels to use instead of the evenly spaced ones (before the scheduler's shift).
            generator: one generator, or one per picture: picture k then depends on generator k alone.
            latents: starting noise ``[B, (H/4)*(W/4), 48]`` instead of a drawn one.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"`` (packed tokens).
        """
        if height % PATCH_SIZE or width % PATCH_SIZE:
            raise ValueError(f"height and width must be multiples of {PATCH_SIZE}, got {height}x{width}")
        device, dtype = self._execution_device, self.transformer.dtype
        ids = torch.tensor(self.class_ids(prompt), device=device)
        batch = len(ids)
        cond = self.class_encoder(ids).to(dtype)
        uncond = self.class_encoder(torch.full_like(ids, NULL_CLASS)).to(dtype) if guidance_scale > 1 else None

        if latents is None:
            noise = randn_tensor((batch, CHANNELS, height, width), generator=generator, device=device, dtype=dtype)
            latents = pack_patches(noise)
        latents = latents.to(device, dtype)
        img_shapes = [(1, height // PATCH_SIZE, width // PATCH_SIZE)] * batch

        if sigmas is None and isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps).tolist()
        if sigmas is None:  # the sampler's own
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(sigmas=list(sigmas), device=device)
        self.scheduler.set_begin_index(0)

        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                inputs = {
                    "hidden_states": latents,
                    "timestep": t.expand(batch).to(dtype) / 1000,
                    "img_shapes": img_shapes,
                    "return_dict": False,
                }
                with self.transformer.cache_context("cond"):
                    velocity = self.transformer(encoder_hidden_states=cond, **inputs)[0]
                if uncond is not None:
                    with self.transformer.cache_context("uncond"):
                        velocity_uncond = self.transformer(encoder_hidden_states=uncond, **inputs)[0]
                    velocity = velocity_uncond + guidance_scale * (velocity - velocity_uncond)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    offered = {"latents": latents}
                    chosen = {name: offered[name] for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, i, t, chosen).get("latents", latents)
                progress.update()

        if output_type == "latent":
            images = latents
        else:
            pictures = unpack_patches(latents, height, width).float()
            images = self.image_processor.postprocess(pictures, output_type=output_type)
        self.maybe_free_model_hooks()
        return DemoPipelineOutput(images=images) if return_dict else (images,)


def load_demo_pipeline(device: str | torch.device | None = None) -> DemoPipeline:
    """The bundled, trained pipeline in fp32, on the CUDA GPU where there is one and no device is named.

    Raises:
        MissingExtraError: its weights are not installed.
    """
    weights = find_weights()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DemoPipeline(
        transformer=QwenImageTransformer2DModel.from_pretrained(
            weights / "transformer", torch_dtype=torch.float32, low_cpu_mem_usage=False
        ),
        class_encoder=ClassEncoder.from_pretrained(
            weights / "class_encoder", torch_dtype=torch.float32, low_cpu_mem_usage=False
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return pipe.to(device)
