"""Calls of a pipeline as they were asked for: their arguments, and what of them is settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from layercache._utils.compat import call_parameters, is_modular
from layercache.planning.samples import copied

PER_CALL = frozenset({"generator", "latents", "output", "output_type", "return_dict", "num_images_per_prompt"})
"""Arguments that differ from picture to picture, beside prompts; no setting."""

LEVELS = ("sigmas", "timesteps")
"""Arguments that give the steps themselves, in whatever kind of array."""

TEXTS = ("prompt", "embeds", "attention_mask")


def intercepted(cls: type, call: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> type:
    """A pipeline's class whose calls go to ``call``, with the original call and its arguments.

    Python looks up ``__call__`` on the class, so that an attribute of the instance would not be found. Copies and
    pickles of an instance are of the original class.
    """

    original: Any = cls.__call__
    reduce: Any = cls.__reduce_ex__

    @functools.wraps(original)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(functools.partial(original, self), args, kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        _, arguments, *state = reduce(self, protocol)
        return (_new, tuple(cls if one is made else one for one in arguments), *state)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made = type(cls.__name__, (cls,), {**names, "__call__": called, "__reduce_ex__": reduced})
    return made


def _new(cls: type, *arguments: Any) -> Any:
    """As pickle makes an instance; its own way to say so demands the instance's class."""
    return cls.__new__(cls, *arguments)


def arguments_of_call(cls: type, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """All arguments of a call by name, defaults included; ``None`` where the call will fail."""
    signature = inspect.signature(cls.__call__)
    try:
        bound = signature.bind(pipe, *args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    found = dict(list(bound.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= found.pop(name)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and found.pop(name, ()):
            return None
    if is_modular(pipe) and found.get("state") is None:  # else its inputs are in the state, and it is not repeated
        found = {name: parameter.default for name, parameter in call_parameters(pipe).items()} | found
    return found


def settings_of_call(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of a call's arguments is not of its picture alone: steps, guidance, size; of prompts whether they are given.

    Tensors and pictures count by their sizes.
    """
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in LEVELS and value is not None:
            found[name] = [float(level) for level in value]
        elif any(text in name for text in TEXTS):
            found[name] = value is not None
        elif name not in PER_CALL and not name.startswith("callback"):
            found[name] = _setting(value)
    return found


def _setting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _setting(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_setting(one) for one in value]
    for name in ("shape", "size"):
        if hasattr(value, name):
            size = getattr(value, name)
            return list(size) if isinstance(size, Sequence) else str(size)
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def repeatable(arguments: Mapping[str, Any], pipe: Any) -> dict[str, Any]:
    """The arguments by which the call can be made again: tensors and generators as they are now, no callbacks.

    Without a generator the call draws from the device's own; it gets one that draws the same.
    """
    kept = {name: value for name, value in arguments.items() if not name.startswith("callback")}
    kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kept.items()}
    if "generator" in kept:
        kept["generator"] = _default_generator(pipe) if kept["generator"] is None else copied(kept["generator"])
    return kept


def _default_generator(pipe: Any) -> torch.Generator:
    device = torch.device(getattr(pipe, "_execution_device", "cpu"))
    generator = torch.Generator(device)
    if device.type == "cpu":
        generator.set_state(torch.get_rng_state())
    else:
        generator.set_state(torch.get_device_module(device).get_rng_state(device))
    return generator


def watched(callback: Any, changed: Callable[[], object]) -> Any:
    """A pipeline's step callback that says when it changes the generation.

    That is, when it gives another value than it was given, or sets one of the pipeline's own attributes.
    """
    if not inspect.isroutine(callback) and not isinstance(callback, functools.partial):
        changed()  # diffusers' callback classes, whose purpose it is
        return callback

    @functools.wraps(callback)
    def call(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> Any:
        before = {name: value for name, value in vars(pipe).items() if name.startswith("_")}
        given = dict(values)
        result = callback(pipe, step, time, values)
        returned = result if isinstance(result, Mapping) else {}
        is_same = all(value is given.get(name) for name, value in returned.items())
        if not is_same or any(vars(pipe).get(name) is not value for name, value in before.items()):
            changed()
        return result

    return call
