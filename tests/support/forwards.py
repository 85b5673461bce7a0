"""Single forwards of the tiny transformers: outputs, schedules of three groups, and ControlNet residuals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from layercache.models.registry import first_tensor, spec_for
from layercache.runtime.attachment import attachment_of
from layercache.schedule.schedule import Schedule
from support.tiny import fingerprint

GROUPS = ((0, 1), (1, 3), (3, 4))


SIGMAS = (1.0, 0.8, 0.5, 0.0)


CONTROLS = {
    "QwenImageTransformer2DModel": {"controlnet_block_samples": 1},
    "FluxTransformer2DModel": {"controlnet_block_samples": 2, "controlnet_single_block_samples": 2},
    "ChromaTransformer2DModel": {"controlnet_block_samples": 2, "controlnet_single_block_samples": 2},
    "BriaTransformer2DModel": {"controlnet_block_samples": 2, "controlnet_single_block_samples": 2},
    "SD3Transformer2DModel": {"block_controlnet_hidden_states": 2},
    "SanaTransformer2DModel": {"controlnet_block_samples": 2},
    "CosmosTransformer3DModel": {"block_controlnet_hidden_states": 4},
    "ZImageTransformer2DModel": {"controlnet_block_samples": 2},
}


def stepping(cache: Any, steps: int) -> Callable[..., Any]:
    """Calls a function as the steps of a loop that says them: 0, 1, ... and again from 0 after the last."""
    numbers = itertools.cycle(range(steps))

    def step(do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with cache.step(next(numbers)):
            return do(*args, **kwargs)

    return step


_steps: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def next_step(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    """`call` as the next step of a loop that says its steps where a cache is enabled; after the last from 0 again."""
    attachment = attachment_of(model)
    if attachment is None:
        return call(model, inputs)
    identity = attachment.router.identity
    step = _steps.get(attachment, 0)
    _steps[attachment] = (step + 1) % (identity.num_steps or 2**31)
    with attachment.router.step(step):
        return call(model, inputs)


def call(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    """Every tensor that the forward gives; LTX-2 gives two."""
    with torch.no_grad():
        output = model(**inputs, return_dict=False)
    parts = output if isinstance(output, tuple) else (output,)
    return [first_tensor((part,)) for part in parts if part is not None]


def schedule(model: nn.Module, *rows: tuple, groups=GROUPS) -> Schedule:
    prints = fingerprint(model, SIGMAS[: len(rows)] + (0.0,), ("all",))
    return Schedule(prints, tuple(groups), tuple(rows), (1.0,) * len(groups))


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-5)


def controls(name: str, model: nn.Module, inputs: dict, seed: int = 0) -> dict:
    """Residuals of the size of the image stream, as a ControlNet gives them."""
    shape = stream_shape(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    given = {}
    for argument, count in CONTROLS[name].items():
        samples = [torch.randn(shape, generator=generator) * 0.5 for _ in range(count)]
        if name.startswith("Bria") and "single" in argument:  # added behind as many image tokens as there is text
            samples = [sample[:, inputs["encoder_hidden_states"].shape[1] :] for sample in samples]
        given[argument] = dict(enumerate(samples)) if name.startswith("ZImage") else samples
    return given


def stream_shape(model: nn.Module, inputs: dict) -> torch.Size:
    spec, shapes = spec_for(model), []
    block = spec.block_modules(model)[0][0]
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(spec.calls(0).given(args, kwargs).shape), with_kwargs=True
    )
    call(model, inputs)
    hook.remove()
    return shapes[0]
