"""Pipelines of diffusers around tiny transformers of the zoo: no text encoders, no VAE, latents out."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from layercache._utils.compat import scheduler_sigmas
from layercache.models.registry import count_blocks, fingerprint_of, spec_for
from layercache.schedule.schedule import Schedule
from support.zoo import build

STEPS = 8
SIDE = 32


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def make(
    pipeline: str, transformer: str, scheduler: Any = None, vae: Any = None, **components: Any
) -> diffusers.DiffusionPipeline:
    cls = getattr(diffusers, pipeline)
    model, _ = build(transformer)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    wanted = {p.name: None if p.default is inspect.Parameter.empty else p.default for p in parameters}
    given = {"transformer": model, "scheduler": scheduler or FlowMatchEulerDiscreteScheduler(), "vae": vae}
    pipe = cls(**{name: value for name, value in (wanted | given | components).items() if name in wanted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _size(**more: Any) -> dict[str, Any]:
    return {"num_inference_steps": STEPS, "height": SIDE, "width": SIDE, "output_type": "latent"} | more


def _both(*names_and_tensors: Any, **more: Any) -> dict[str, Any]:
    """Prompt embeddings, and others for the negative prompt."""
    call = dict(more)
    for name, tensor in names_and_tensors:
        call[name] = tensor
        call["negative_" + name] = tensor if tensor.dtype != torch.float32 else tensor * 0.3
    return call


def _mask(tokens: int = 6) -> torch.Tensor:
    return torch.ones(1, tokens, dtype=torch.bool)


def _sd3() -> tuple[Any, dict]:
    pipe = make("StableDiffusion3Pipeline", "SD3Transformer2DModel")
    return pipe, _size(**_both(("prompt_embeds", noise(1, 6, 16)), ("pooled_prompt_embeds", noise(1, 8))))


def _sd3_skipping_layers() -> tuple[Any, dict]:
    pipe, call = _sd3()
    return pipe, call | {"skip_guidance_layers": [0, 3], "skip_layer_guidance_stop": 0.6}


def _qwen() -> tuple[Any, dict]:
    pipe = make("QwenImagePipeline", "QwenImageTransformer2DModel")
    call = _both(("prompt_embeds", noise(1, 6, 16)), ("prompt_embeds_mask", _mask().long()), true_cfg_scale=3.0)
    return pipe, _size(**call)


def _chroma() -> tuple[Any, dict]:
    pipe = make("ChromaPipeline", "ChromaTransformer2DModel")
    call = _both(("prompt_embeds", noise(1, 6, 32)), ("prompt_attention_mask", _mask()))
    pipe.transformer.config["in_channels"] = 4
    return pipe, _size(**call)


def _video(**more: Any) -> dict[str, Any]:
    return _size(num_frames=5) | more


def _wan(scheduler: Any = None) -> tuple[Any, dict]:
    pipe = make("WanPipeline", "WanTransformer3DModel", scheduler)
    return pipe, _video(**_both(("prompt_embeds", noise(1, 6, 16))))


def _wan_two_experts() -> tuple[Any, dict]:
    second, _ = build("WanTransformer3DModel", seed=1)
    pipe = make("WanPipeline", "WanTransformer3DModel", transformer_2=second, boundary_ratio=0.6)
    return pipe, _video(**_both(("prompt_embeds", noise(1, 6, 16))))


def _ltx() -> tuple[Any, dict]:
    pipe = make("LTXPipeline", "LTXVideoTransformer3DModel")
    call = _both(("prompt_embeds", noise(1, 6, 16)), ("prompt_attention_mask", _mask()))
    return pipe, _video(num_frames=9, height=64, width=64) | call


def _cogvideox(scheduler: Any) -> tuple[Any, dict]:
    pipe = make("CogVideoXPipeline", "CogVideoXTransformer3DModel", scheduler)
    return pipe, _video(height=64, width=64, **_both(("prompt_embeds", noise(1, 6, 8))))


def _sana(scheduler: Any = None) -> tuple[Any, dict]:
    pipe = make("SanaPipeline", "SanaTransformer2DModel", scheduler)
    call = _both(("prompt_embeds", noise(1, 6, 8)), ("prompt_attention_mask", _mask()), negative_prompt=None)
    return pipe, _size(use_resolution_binning=False, **call)


def _lumina2() -> tuple[Any, dict]:
    pipe = make("Lumina2Pipeline", "Lumina2Transformer2DModel")
    call = _both(("prompt_embeds", noise(1, 6, 16)), ("prompt_attention_mask", _mask()))
    return pipe, _size(cfg_trunc_ratio=0.5, **call)  # no uncond call in the second half


def _pixart() -> tuple[Any, dict]:
    pipe = make("PixArtAlphaPipeline", "PixArtTransformer2DModel", DPMSolverMultistepScheduler())
    call = _both(("prompt_embeds", noise(1, 6, 16)), ("prompt_attention_mask", _mask()), negative_prompt=None)
    return pipe, _size(use_resolution_binning=False, **call)


def _hunyuan_video() -> tuple[Any, dict]:
    pipe = make("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel")
    parts = [("prompt_embeds", noise(1, 6, 16)), ("pooled_prompt_embeds", noise(1, 8))]
    return pipe, _video(true_cfg_scale=2.0, **_both(*parts, ("prompt_attention_mask", _mask())))


def _mochi() -> tuple[Any, dict]:
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = make("MochiPipeline", "MochiTransformer3DModel", scheduler)
    call = _both(("prompt_embeds", noise(1, 6, 16)), ("prompt_attention_mask", _mask()))
    return pipe, _video(num_frames=7, **call)


def _aura_flow() -> tuple[Any, dict]:
    pipe = make("AuraFlowPipeline", "AuraFlowTransformer2DModel")
    return pipe, _size(**_both(("prompt_embeds", noise(1, 6, 16)), ("prompt_attention_mask", _mask())))


def _cogview4() -> tuple[Any, dict]:
    pipe = make("CogView4Pipeline", "CogView4Transformer2DModel")
    return pipe, _size(**_both(("prompt_embeds", noise(1, 6, 8))))


def _z_image() -> tuple[Any, dict]:
    pipe = make("ZImagePipeline", "ZImageTransformer2DModel")
    prompts = {"prompt_embeds": [noise(6, 16)], "negative_prompt_embeds": [noise(5, 16)]}
    return pipe, _size(cfg_truncation=0.5, **prompts)


def _flux2() -> tuple[Any, dict]:
    pipe = make("Flux2Pipeline", "Flux2Transformer2DModel")
    return pipe, _size(prompt_embeds=noise(1, 6, 32))


class Codec:
    """As much of an autoencoder as a pipeline asks for where latents are wanted."""

    def __init__(self, **attributes: Any):
        vars(self).update(attributes)


def _ltx2() -> tuple[Any, dict]:
    """Video and sound, without autoencoders."""

    def connectors(embeds: torch.Tensor, mask: torch.Tensor, padding_side: str) -> tuple[torch.Tensor, ...]:
        return embeds, 0.5 * embeds, mask

    pipe = make("LTX2Pipeline", "LTX2VideoTransformer3DModel")
    ratios = {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4, "mel_compression_ratio": 4}
    statistics = {"latents_mean": torch.zeros(4), "latents_std": torch.ones(4)}
    config = Codec(scaling_factor=1.0, latent_channels=4, sample_rate=16000, mel_hop_length=160, mel_bins=4)
    pipe.connectors, pipe.vae = connectors, Codec(config=config, **ratios, **statistics)
    pipe.audio_vae = pipe.vae
    pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio = 8, 4
    call = _both(("prompt_embeds", noise(1, 6, 16)), ("prompt_attention_mask", _mask()))
    return pipe, _video(num_frames=9, frame_rate=45.0, guidance_scale=3.0, **call)


PIPELINES: dict[str, Callable[[], tuple[Any, dict]]] = {
    "sd3": _sd3,
    "sd3, skipping layers": _sd3_skipping_layers,
    "sd3, Heun": lambda: _with_scheduler(_sd3(), FlowMatchHeunDiscreteScheduler()),
    "qwen-image": _qwen,
    "chroma": _chroma,
    "flux 2": _flux2,
    "wan": _wan,
    "wan, UniPC": lambda: _wan(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
    "ltx": _ltx,
    "cogvideox, DDIM": lambda: _cogvideox(CogVideoXDDIMScheduler()),
    "cogvideox, DPM": lambda: _cogvideox(CogVideoXDPMScheduler()),
    "sana": _sana,
    "sana, DPM": lambda: _sana(DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")),
    "lumina 2": _lumina2,
    "pixart": _pixart,
    "hunyuan video": _hunyuan_video,
    "mochi": _mochi,
    "aura flow": _aura_flow,
    "cogview 4": _cogview4,
    "z-image": _z_image,
}


def _with_scheduler(made: tuple[Any, dict], scheduler: Any) -> tuple[Any, dict]:
    made[0].scheduler = scheduler
    return made


def generate(pipe, call, seed=0) -> torch.Tensor:
    output = pipe(**call, generator=torch.Generator().manual_seed(seed))
    for name in ("images", "frames", "videos"):
        if hasattr(output, name):
            return getattr(output, name)
    return output[0]


@contextmanager
def block_calls(pipe, transformer=None):
    """Calls of the first and last block per step; steps are counted by the sampler's own ``step``."""
    transformer = transformer or pipe.transformer
    spec = spec_for(transformer)
    blocks = [block for blocks in spec.block_modules(transformer) for block in blocks._modules.values()]
    seen, step = {"first": Counter(), "last": Counter(), "forwards": Counter()}, [0]
    original = pipe.scheduler.step

    def stepped(*args, **kwargs):
        step[0] += 1
        return original(*args, **kwargs)

    ends = {"first": blocks[0], "last": blocks[-1]}
    hooks = [b.register_forward_hook(lambda *_, n=n: seen[n].update([step[0]])) for n, b in ends.items()]
    hooks.append(transformer.register_forward_hook(lambda *_: seen["forwards"].update([step[0]])))
    pipe.scheduler.step = stepped
    try:
        yield seen
    finally:
        del pipe.scheduler.step
        for hook in hooks:
            hook.remove()


def schedule_of(pipe, kinds: str, transformer=None, groups=None) -> Schedule:
    """From letters per step: c computes, r reuses everything, f the first half, l the last half of the blocks."""
    transformer = transformer or pipe.transformer
    blocks, sigmas = count_blocks(transformer), scheduler_sigmas(pipe.scheduler)
    groups = groups or ((0, blocks // 2), (blocks // 2, blocks))
    rows, newest = [], [0, 0]
    for step in range(len(sigmas) - 1):
        kind = kinds[step % len(kinds)]
        row = []
        for group, letter in enumerate("fl"):
            reused = step > 0 and kind in ("r", letter)
            row.append({newest[group]: 1.0} if reused else None)
            newest[group] = newest[group] if reused else step
        rows.append(tuple(row))
    return Schedule(fingerprint_of(transformer, sigmas, ("all",)), groups, tuple(rows), (1.0, 1.0))


def _flux_with_vae(pipeline: str, **components: Any) -> tuple[Any, dict]:
    """Of a kind that takes a picture, which is encoded."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8, latent_channels=1)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    pipe = make(pipeline, "FluxTransformer2DModel", vae=vae, **components)
    call = {"height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe, call | {"prompt_embeds": noise(1, 6, 32), "pooled_prompt_embeds": noise(1, 32)}


def flux_img2img():
    pipe, call = _flux_with_vae("FluxImg2ImgPipeline")
    return pipe, call | {"image": torch.rand(1, 3, 16, 16)}


def flux_inpaint():
    """Its latents are mixed with the picture's own after every step, so that the sampler's steps are not linear."""
    pipe, call = _flux_with_vae("FluxInpaintPipeline")
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    return pipe, call | {"image": torch.rand(1, 3, 16, 16), "mask_image": mask}


def flux_controlnet():
    model, _ = build("FluxTransformer2DModel")
    sizes = {name: getattr(model.config, name) for name in ("attention_head_dim", "num_attention_heads")}
    controlnet = diffusers.FluxControlNetModel.from_transformer(model, num_layers=1, num_single_layers=1, **sizes)
    with torch.no_grad():
        for parameter in controlnet.parameters():  # those that lead out of it begin as zeros
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    pipe, call = _flux_with_vae("FluxControlNetPipeline", controlnet=controlnet)
    return pipe, call | {"control_image": torch.rand(1, 3, 16, 16)}
