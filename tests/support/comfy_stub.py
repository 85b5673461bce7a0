"""As much of ComfyUI as the nodes hold on to: models with wrappers, guiders, networks of replaceable blocks."""

from __future__ import annotations

import copy
import sys
import threading
import types
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

COND, UNCOND = "uuid of cond", "uuid of uncond"
CONDS = {COND: 0.7, UNCOND: -0.4}
CFG = 3.0


class WrappersMP:
    OUTER_SAMPLE, PREDICT_NOISE, DIFFUSION_MODEL = "outer_sample", "predict_noise", "diffusion_model"


def set_model_options_patch_replace(
    options: Any, patch: Any, name: str, block: str, number: int, transformer_index: Any = None
) -> Any:
    inner = dict(options["transformer_options"])
    inner["patches_replace"] = {**inner.get("patches_replace", {})}
    inner["patches_replace"][name] = {**inner["patches_replace"].get(name, {}), (block, number): patch}
    options["transformer_options"] = inner
    return options


def install(patch: pytest.MonkeyPatch, folder: Any = None) -> tuple[types.ModuleType, types.ModuleType]:
    """ComfyUI's modules; those of wrappers and of patches, for a test to rename what is in them."""
    wrappers, patcher = types.ModuleType("comfy.patcher_extension"), types.ModuleType("comfy.model_patcher")
    wrappers.WrappersMP = type("WrappersMP", (), dict(vars(WrappersMP)))
    patcher.set_model_options_patch_replace = set_model_options_patch_replace
    paths = types.ModuleType("folder_paths")
    paths.models_dir = str(folder)
    comfy = types.ModuleType("comfy")
    for module in (comfy, wrappers, patcher, paths):
        patch.setitem(sys.modules, module.__name__, module)
    return wrappers, patcher


class Executor:
    """A function in its wrappers."""

    def __init__(self, function: Any, wrappers: Sequence[Any], owner: Any):
        self.function, self.wrappers, self.class_obj = function, wrappers, owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.function(*args, **kwargs)
        return self.wrappers[0](Executor(self.function, self.wrappers[1:], self.class_obj), *args, **kwargs)


def wrapped(kind: str, options: Any, function: Any, owner: Any) -> Executor:
    found = options.get("transformer_options", {}).get("wrappers", {}).get(kind, {})
    return Executor(function, [one for some in found.values() for one in some], owner)


class Model:
    """A MODEL (``ModelPatcher``)."""

    def __init__(self, network: nn.Module):
        self.model = SimpleNamespace(diffusion_model=network, model_config=SimpleNamespace(unet_config={}))
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> Model:
        other = type(self)(self.model.diffusion_model)
        other.model, other.model_options = self.model, copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(some) for key, some in own.items()} for kind, own in self.wrappers.items()}
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)


def sample_euler(model: Any, x: Any, sigmas: Any, extra_args: Any, callback: Any = None, disable: Any = None) -> Any:
    for here, there in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (x - model(x, here * x.new_ones(len(x)), **extra_args)) / here * (there - here)
    return x


def sample_heun(model: Any, x: Any, sigmas: Any, extra_args: Any, callback: Any = None, disable: Any = None) -> Any:
    raise AssertionError("not reached: it is refused")


def sample_euler_cfg_pp(model: Any, x: Any, sigmas: Any, extra_args: Any, **_: Any) -> Any:
    raise AssertionError("not reached: it is refused")


class Guider:
    """A CFGGuider.

    Attributes:
        batches: of a step's number, which conditionings run together.
        in_threads: those of a step run at once.
        names_conditionings: whether forwards are given the uuids.
        calls: of the network, in whole batches.
        after: called at the end of every step, with guider, latents, noise level and options.
    """

    def __init__(self, model: Model):
        inner = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
        self.model_patcher, self.model_options = model, {**model.model_options, "transformer_options": inner}
        self.batches: Callable[[int], Sequence[Sequence[str]]] = lambda step: [[UNCOND, COND]]
        self.in_threads, self.names_conditionings = False, True
        self.control: torch.Tensor | None = None
        self.calls, self.fails_at, self.after = 0, -1, lambda *_: None

    def sample(self, noise: Any, sigmas: Any, function: Any = sample_euler) -> Any:
        sampler = SimpleNamespace(sampler_function=function, extra_options={})
        run = wrapped(WrappersMP.OUTER_SAMPLE, self.model_options, self.outer_sample, self)
        with torch.no_grad():
            return run(noise, torch.zeros_like(noise), sampler, sigmas, None, None, True, 0)

    def outer_sample(self, noise: Any, latent: Any, sampler: Any, sigmas: Any, *rest: Any) -> Any:
        options = {**self.model_options}
        options["transformer_options"] = {**options["transformer_options"], "sample_sigmas": sigmas}
        step_number = -1

        def step(x: Any, sigma: Any, model_options: Any, seed: Any) -> Any:
            nonlocal step_number
            step_number += 1
            run = wrapped(WrappersMP.PREDICT_NOISE, model_options, self.predict_noise, self)
            found = self.ask(run, x, sigma, {**model_options, "step": step_number}, seed)
            self.after(self, x, sigma, model_options)
            return found

        return sampler.sampler_function(step, noise, sigmas, {"model_options": options, "seed": 0})

    def ask(self, run: Any, x: Any, sigma: Any, options: Any, seed: Any) -> Any:
        return run(x, sigma, options, seed)

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
        found: dict[str, Any] = {}
        batches = self.batches(model_options["step"])
        if self.in_threads:
            threads = [threading.Thread(target=self.run, args=(b, x, timestep, model_options, found)) for b in batches]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            for batch in batches:
                self.run(batch, x, timestep, model_options, found)
        return found[UNCOND] + CFG * (found[COND] - found[UNCOND])

    @torch.no_grad()
    def run(self, batch: Sequence[str], x: Any, sigma: Any, model_options: Any, found: dict[str, Any]) -> None:
        """The denoised latents of some conditionings, in one forward."""
        self.calls += 1
        if self.calls == self.fails_at:
            raise InterruptedError
        kinds = [0 if uuid == COND else 1 for uuid in batch]
        options = {**model_options["transformer_options"], "uuids": list(batch), "cond_or_uncond": kinds}
        if not self.names_conditionings:
            del options["uuids"], options["cond_or_uncond"]
        sigma = sigma.as_subclass(torch.Tensor)
        network, n = self.model_patcher.model.diffusion_model, len(batch)
        conds = torch.tensor([CONDS[uuid] for uuid in batch for _ in range(len(x))])
        forward = wrapped(WrappersMP.DIFFUSION_MODEL, {"transformer_options": options}, network.forward, network)
        velocity = forward(
            torch.cat([x] * n), torch.cat([sigma] * n), conds, control=self.control, transformer_options=options
        )
        for uuid, v in zip(batch, velocity.chunk(n), strict=True):
            found[uuid] = x - sigma.reshape(-1, 1, 1) * v


class Block(nn.Module):
    """Writes into the stream that it is given, where ComfyUI's do."""

    def __init__(self, width: int):
        super().__init__()
        self.own, self.other = nn.Linear(width, width), nn.Linear(width, width)

    def double(self, img: Any, txt: Any, vec: Any) -> tuple[Any, Any]:
        out = img + torch.tanh(self.own(img) + txt.mean(1, keepdim=True) + vec)
        txt += torch.tanh(self.other(txt) + img.mean(1, keepdim=True))
        return out, txt

    def single(self, img: Any, vec: Any) -> Any:
        img += 0.5 * torch.tanh(self.own(img) + self.other(img.mean(1, keepdim=True)) + vec)
        return img


class Network(nn.Module):
    """Blocks in lists, as ComfyUI's networks have them.

    Args:
        lists: attribute, kind of the blocks, number of blocks.
        has_text: whether blocks of kind "double_block" take and return a text stream.
        text_first: of the joined stream of the others.
        width_name: attribute with the number of channels.
    """

    def __init__(
        self,
        lists: Sequence[tuple[str, str, int]],
        has_text: bool = True,
        text_first: bool = True,
        width_name: str = "hidden_size",
    ):
        super().__init__()
        torch.manual_seed(3)
        self.lists, self.has_text, self.text_first, width = lists, has_text, text_first, 16
        setattr(self, width_name, width)
        for name, _, number in lists:
            setattr(self, name, nn.ModuleList(Block(width) for _ in range(number)))
        self.embed, self.text, self.head = nn.Linear(4, width), nn.Linear(1, width), nn.Linear(width, 4)
        self.with_prefix_cache, self.suffix = 0, ""
        self.requires_grad_(False)

    @property
    def all_blocks(self) -> list[tuple[str, int, Block]]:
        return [(kind, k, block) for name, kind, _ in self.lists for k, block in enumerate(getattr(self, name))]

    def inputs(self, x: Any, sigma: Any, conds: Any) -> tuple[Any, Any, Any]:
        txt = self.text(conds.reshape(-1, 1, 1) * torch.tensor([0.5, 1.0, -1.0]).reshape(1, 3, 1))
        return self.embed(x), txt, sigma.reshape(-1, 1, 1) - 0.5

    def joined(self, img: Any, txt: Any) -> Any:
        return torch.cat((txt, img) if self.text_first else (img, txt), 1)

    def image(self, joined: Any, tokens: int) -> Any:
        return joined[:, -tokens:] if self.text_first else joined[:, :tokens]

    def forward(self, x: Any, timestep: Any, context: Any, control: Any = None, transformer_options: Any = None) -> Any:
        img, txt, vec = self.inputs(x, timestep, context)
        first = img
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        self.with_prefix_cache += not replaced
        is_joined = False
        for kind, number, block in self.all_blocks:
            if kind == "single_block" and not is_joined:
                img, is_joined = self.joined(img, txt), True

            def original(args: Any, block: Block = block, kind: str = kind) -> Any:
                if kind == "single_block":
                    return {"img": block.single(args["img"], args["vec"])}
                own, beside = block.double(
                    args["img"], args["txt"] if self.has_text else args["txt"].clone(), args["vec"]
                )
                return {"img": own, "txt": beside} if self.has_text else {"img": own}

            args = {"img": img, "vec": vec, "transformer_options": transformer_options}
            args |= {} if kind == "single_block" else {"txt": txt}
            if (kind + self.suffix, number) in replaced:
                out = replaced[kind + self.suffix, number](args, {"original_block": original})
            else:
                out = original(args)
            img = out["img"]
            txt = out["txt"] if self.has_text and not is_joined else txt
            if control is not None:  # in place, as ComfyUI does
                self.image(img, x.shape[1]).add_(control) if is_joined else img.add_(control)
        own = self.image(img, x.shape[1]) if is_joined else img
        return self.head(own) + 0.01 * first.mean()  # VACE too reads what went into the first block


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Flux": ("FluxTransformer2DModel", {}),
    "Chroma": ("ChromaTransformer2DModel", {}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {"text_first": False}),
    "QwenImageTransformer2DModel": ("QwenImageTransformer2DModel", {"width_name": "inner_dim"}),
    "WanModel": ("WanTransformer3DModel", {"has_text": False, "width_name": "dim"}),
    "LTXVModel": ("LTXVideoTransformer3DModel", {"has_text": False, "width_name": "inner_dim"}),
    "QwenImage21Transformer2DModel": ("QwenImage21Transformer2DModel", {"width_name": "inner_dim"}),
}
"""Of ComfyUI's class: that of diffusers, and how it differs."""
LISTS = {
    "QwenImageTransformer2DModel": (("transformer_blocks", "double_block", 5),),
    "LTXVModel": (("transformer_blocks", "double_block", 5),),
    "WanModel": (("blocks", "double_block", 5),),
    "QwenImage21Transformer2DModel": (("transformer_blocks", "single_block", 5),),
}


def network_of(name: str) -> Network:
    lists = LISTS.get(name, (("double_blocks", "double_block", 2), ("single_blocks", "single_block", 3)))
    return type(name, (Network,), {})(lists, **FAMILIES[name][1])
