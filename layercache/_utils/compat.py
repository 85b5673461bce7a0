"""The only place that touches version-dependent names of diffusers and torch (diffusers 0.41 and later)."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

try:
    from torch._C._dynamo.eval_frame import get_eval_frame_callback
except ImportError:
    get_eval_frame_callback = None  # type: ignore[assignment]


is_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on, for any kind of device."""


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """The module inside wrappers of ``torch.compile(module)`` and of PEFT (`peft.PeftModel`), or the module itself."""
    while True:
        if isinstance(module, OptimizedModule):
            module = module._orig_mod
        elif _is_peft_model(module):
            module = module.get_base_model()  # type: ignore[operator]
        else:
            return module


def _is_peft_model(module: nn.Module) -> bool:
    """Whether PEFT wrapped it; PEFT is not imported for that."""
    return any(cls.__name__ == "PeftModel" and cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of the module, or of what it wraps, run as a compiled graph."""
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


class OutsideGraphs:
    """A function that torch.compile does not see.

    The hooks of the outermost compiled module run before and after its graph, but dynamo would still trace
    the hook itself and specialise on the step number. Where nothing is compiled the function is called as it is:
    the wrapper of `torch.compiler.disable` takes longer than most hooks.
    """

    def __init__(self, call: Callable[..., Any]):
        self._call, self._disabled = call, torch.compiler.disable(call)

    @torch._dynamo.decorators.skip
    def __call__(self, *args: Any) -> Any:
        traced = get_eval_frame_callback is None or get_eval_frame_callback()
        return self._disabled(*args) if traced else self._call(*args)


def allow_graphs(graphs: int) -> None:
    """Makes room for so many compiled graphs more in torch.compile's limit of graphs per function.

    The limit (8 by default) guards against graphs without end; a schedule has a known number of them. It is
    not lowered again: the graphs stay with the function, and the uncached one needs its place beside them.
    """
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), 8 + graphs))


def allow_more_graphs(graphs: int) -> None:
    """The same on top of the present limits: for other shapes, or another schedule, on a function with graphs."""
    config = torch._dynamo.config
    for names in (
        ("recompile_limit", "cache_size_limit"),
        ("accumulated_recompile_limit", "accumulated_cache_size_limit"),
    ):
        name = next(name for name in names if hasattr(config, name))
        setattr(config, name, getattr(config, name) + graphs)


def keep_address(tensor: torch.Tensor) -> torch.Tensor:
    """Tells torch.compile that the tensor stays where it is: CUDA graphs may write into it instead of copying it.

    Without it a graph that stores residuals is not captured at all ("mutated inputs"). Other slots at the same place
    of a graph do not compile it again, they are captured once more.
    """
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


CACHE_CONFIG = "_cache_config"
"""Attribute of a transformer that makes diffusers' `is_cache_enabled` true."""


ADAPTER_METHODS = (
    "load_lora_adapter",
    "add_adapter",
    "set_adapter",
    "set_adapters",
    "enable_adapters",
    "disable_adapters",
    "enable_lora",
    "disable_lora",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora",
    "delete_adapters",
)
"""Methods of a transformer that change what its blocks compute."""


def has_foreign_cache(transformer: nn.Module) -> bool:
    """Whether one of diffusers' own caches is enabled on the transformer."""
    return bool(getattr(transformer, "is_cache_enabled", False))


HOOK_REGISTRY = "_diffusers_hook"
"""Attribute of a module that diffusers' hooks are registered on."""


def stream_splits(block: nn.Module, streams: tuple[str, ...]) -> tuple[Any, ...]:
    """Hooks of diffusers' context parallelism by which this block takes its own shard of streams it is given whole."""
    registry = block.__dict__.get(HOOK_REGISTRY)
    if registry is None:
        return ()
    hooks = (hook for name, hook in registry.hooks.items() if name.startswith("cp_input---"))
    return tuple(hook for hook in hooks if any(name in hook.metadata for name in streams))


def splits_tokens(transformer: nn.Module) -> bool:
    """Whether diffusers' context parallelism gives this process a shard of the streams' tokens."""
    config = getattr(transformer, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None) is not None


def has_own_contexts(transformer: nn.Module) -> bool:
    """Whether the model's ``cache_context`` does more than tell diffusers' hooks."""
    from diffusers import CacheMixin

    method = getattr(transformer, "cache_context", None)
    return getattr(method, "__func__", None) is not CacheMixin.cache_context


def is_hooked(transformer: nn.Module) -> bool:
    """Whether a hook of diffusers sits on the model or in it, by diffusers' own list of them, or nobody knows."""
    root = transformer.__dict__.get(HOOK_REGISTRY)
    inner = getattr(root, "_get_child_registries", None)
    if root is None or inner is None:
        return True
    for registry in (root, *inner()):  # at every step; a generator would cost more than the rest
        if registry.hooks:
            return True
    return False


def offloading_of(modules: Iterable[nn.Module]) -> str | None:
    """What moves or casts the weights of one of these modules at every forward; ``None`` where nothing does."""
    for module in modules:
        if "_hf_hook" in module.__dict__:
            return "a hook of accelerate (offloading, a device map)"
        for name in _hook_names(module):
            if "offloading" in name or "layerwise_casting" in name:
                return f"diffusers' hook {name!r}"
    return None


def stateful_hook_of(model: nn.Module) -> str | None:
    """A hook of diffusers in the model that counts forwards, as its caches do; not those that split tokens."""
    names = (name for module in model.modules() for name in _hook_names(module))
    return next((name for name in names if not name.startswith("cp_")), None)


def _hook_names(module: nn.Module) -> tuple[str, ...]:
    registry = module.__dict__.get(HOOK_REGISTRY)
    return () if registry is None else tuple(registry.hooks)


def model_config(transformer: nn.Module) -> dict[str, Any]:
    """Public configuration entries of a diffusers model (``{}`` when it has none)."""
    config = getattr(transformer, "config", None)
    entries = dict(config) if config is not None else {}
    return {key: value for key, value in entries.items() if not key.startswith("_")}


def model_defaults(transformer: nn.Module) -> dict[str, Any] | None:
    """What a diffusers model's class takes where an entry of its configuration is left out; required ones are missing.

    ``None`` where the class is not configured by the arguments it is made with.
    """
    if getattr(transformer, "config", None) is None or not hasattr(type(transformer), "config_name"):
        return None
    found = list(inspect.signature(type(transformer).__init__).parameters.values())[1:]
    return {p.name: p.default for p in found if p.default is not inspect.Parameter.empty}


def model_arguments(transformer: nn.Module) -> frozenset[str]:
    """Names of the arguments that a transformer's class is made with."""
    return frozenset(list(inspect.signature(type(transformer).__init__).parameters)[1:])


def quantisation_of(transformer: nn.Module) -> str | None:
    """The method that a model's weights are quantised by, as its configuration, or the class of its weights, says."""
    config = getattr(transformer, "config", None)
    found = config.get("quantization_config") if isinstance(config, Mapping) else None
    if found is None:
        return _quantised_weights(transformer)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method or "quantised"))


_QUANTISERS = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "optimum": "quanto", "diffusers": "gguf"}


def _quantised_weights(transformer: nn.Module) -> str | None:
    """By whom weights were quantised in place, whose classes are of the packages that did it."""
    for parameter in transformer.parameters():
        if (package := type(parameter).__module__.partition(".")[0]) in _QUANTISERS:
            return _QUANTISERS[package]
    if any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in transformer.modules()):
        return "torch.ao"
    return None


def adapters_of(transformer: nn.Module) -> list[str]:
    """Names of the LoRA adapters that were loaded into a model; what is fused into its weights is not seen."""
    found = getattr(transformer, "peft_config", None)
    return sorted(map(str, found)) if isinstance(found, Mapping) else []


_NO_COUNTER = object()


def scheduler_step(scheduler: Any) -> int | None:
    """The step a pipeline is about to take, from the scheduler's own counter; no device is asked.

    ``None`` when the scheduler keeps no counter or its timesteps were never set.
    """
    if getattr(scheduler, "timesteps", None) is None:
        return None
    step: Any = getattr(scheduler, "step_index", _NO_COUNTER)
    if step is _NO_COUNTER:
        return None
    return int(getattr(scheduler, "begin_index", None) or 0 if step is None else step)


@functools.lru_cache(maxsize=64)
def _step_places(step: Any) -> dict[str, int]:
    names = list(inspect.signature(step).parameters)[1:]
    return {"timestep": 1, "sample": 2} | {name: place for place, name in enumerate(names)}


def step_argument(scheduler: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call of a scheduler's ``step`` was given as ``"timestep"`` or ``"sample"``, by name or by its place.

    The place is the third for the sample of nearly all; CogVideoX's DPM takes others in between.
    """
    if name in kwargs:
        return kwargs[name]
    place = _step_places(type(scheduler).step)[name]
    return args[place] if place < len(args) else None


def with_velocity(
    velocity: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of a scheduler's ``step`` with another model output, the first of them."""
    return ((velocity, *args[1:]), kwargs) if args else (args, {**kwargs, "model_output": velocity})


def counts_steps(scheduler: Any) -> bool:
    """Whether the scheduler has a counter of its own."""
    return hasattr(scheduler, "step_index")


def tells_steps(scheduler: Any) -> bool:
    """Whether the step a scheduler takes can be known, from its counter or by counting its calls."""
    return counts_steps(scheduler) or (hasattr(scheduler, "step") and hasattr(scheduler, "timesteps"))


def scheduler_sigmas(scheduler: Any) -> tuple[float, ...] | None:
    """Noise levels of the current run, ``num_steps + 1`` values; reads them from the device once.

    A scheduler without sigmas (DDIM, DDPM, CogVideoX's) has ``sqrt((1 - a) / a)`` of its cumulative alphas, and 0
    at the end.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        alphas, timesteps = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "timesteps", None)
        if alphas is None or timesteps is None:
            return None
        kept = alphas.double().cpu()[torch.as_tensor(timesteps).long().cpu()]
        return (*((1 - kept) / kept).sqrt().tolist(), 0.0)
    values = torch.as_tensor(sigmas).tolist()
    return tuple(float(s) for s in values)


def count_levels(scheduler: Any) -> int:
    """How many noise levels `scheduler_sigmas` gives; no device is asked. 0 where there are none."""
    sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    if sigmas is not None:
        return len(sigmas)
    return 0 if timesteps is None or getattr(scheduler, "alphas_cumprod", None) is None else len(timesteps) + 1


def has_run(scheduler: Any) -> bool:
    """Whether the scheduler's timesteps were set for a run, and are not those of training that it has before."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or getattr(scheduler, "num_inference_steps", 0) is None:
        return False
    return count_levels(scheduler) > len(timesteps)  # those of a run have the final one


def takes_euler_steps(scheduler: Any) -> bool:
    """Whether every step adds ``(sigma[i+1] - sigma[i]) * velocity`` to the latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    stochastic = getattr(getattr(scheduler, "config", None), "stochastic_sampling", False)
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not stochastic


def progress_bar_settings(pipeline: Any) -> dict[str, Any]:
    """What `DiffusionPipeline.set_progress_bar_config` was last given."""
    return dict(getattr(pipeline, "_progress_bar_config", {}))


def guider_class() -> Any:
    """The class that diffusers' guiders are derived from; ``None`` where it is not as this library knows it."""
    try:
        from diffusers.guiders.guider_utils import BaseGuidance
    except ImportError:
        return None
    methods = ("set_state", "prepare_inputs", "prepare_inputs_from_block_state", "prepare_models", "cleanup_models")
    known = all(callable(getattr(BaseGuidance, name, None)) for name in (*methods, "forward"))
    return BaseGuidance if known and hasattr(BaseGuidance, "_identifier_key") else None


def condition_names(guider: Any, batches: Any) -> tuple[str, ...]:
    """Names of the conditions that a guider has prepared, such as ``pred_cond``; none where it gives them no names."""
    key = getattr(guider, "_identifier_key", "")
    found: list[Any] = [getattr(batch, key, None) for batch in batches] if isinstance(batches, (list, tuple)) else []
    return tuple(found) if all(isinstance(name, str) for name in found) else ()


def guider_output(cond: Any, uncond: Any) -> Any:
    """What a guider gives where only the prediction of the condition itself counts."""
    from diffusers.guiders.guider_utils import GuiderOutput

    return GuiderOutput(pred=cond, pred_cond=cond, pred_uncond=uncond)


def hooks_in(blocks: Sequence[nn.Module]) -> dict[tuple[int, int], tuple[str, ...]]:
    """Names of diffusers' hooks on the modules of blocks, by the block's number and the module's id."""
    found = {}
    for number, block in enumerate(blocks):
        for module in block.modules():
            if names := _hook_names(module):
                found[number, id(module)] = names
    return found


def loops_of(pipeline: Any) -> list[Any]:
    """What shows a progress bar around a pipeline's denoising loop: the pipeline, or blocks of a modular one."""
    return [owner for owner in (pipeline, *_inner_blocks(pipeline)) if hasattr(owner, "progress_bar")]


def _inner_blocks(pipeline: Any) -> list[Any]:
    found, blocks = list[Any](), [getattr(pipeline, "_blocks", None)]
    while blocks:
        block = blocks.pop()
        if block is not None and all(block is not known for known in found):
            found.append(block)
            blocks += dict(getattr(block, "sub_blocks", None) or {}).values()
    return found


def call_parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's call takes, by name; of a modular one the inputs of its blocks."""
    own = getattr(pipeline, "default_call_parameters", None)
    if not isinstance(own, Mapping):
        return inspect.signature(type(pipeline).__call__).parameters
    kind = inspect.Parameter.KEYWORD_ONLY
    return {name: inspect.Parameter(name, kind, default=value) for name, value in own.items() if isinstance(name, str)}


def is_modular(pipeline: Any) -> bool:
    """Whether it is one of diffusers' modular pipelines, whose calls give a state."""
    return hasattr(pipeline, "default_call_parameters") and hasattr(pipeline, "_blocks")


def guiders_of(pipeline: Any) -> dict[str, Any]:
    """The guiders among a modular pipeline's components, by their names."""
    base = guider_class() if is_modular(pipeline) else None
    components: Mapping[str, Any] = pipeline.components if base is not None else {}
    return {name: one for name, one in components.items() if base is not None and isinstance(one, base)}


def guider_settings(pipeline: Any) -> dict[str, str]:
    """Class and settings of each of a modular pipeline's guiders, as text."""
    found = {}
    for name, guider in guiders_of(pipeline).items():
        settings = {key: value for key, value in dict(guider.config).items() if not key.startswith("_")}
        found[name] = f"{type(guider).__name__} {settings} {getattr(guider, '_enabled', True)}"
    return found


def quiet_copy(pipeline: Any) -> Any:
    """A pipeline with the same models, whose calls show no progress; a modular one has blocks and guiders of its own.

    A call writes to the pipeline, to its scheduler and guiders, and reads its models.
    """
    made = copy.copy(pipeline)
    if not is_modular(pipeline):
        made.set_progress_bar_config(disable=True)
        return made
    made.__dict__ |= {name: copy.deepcopy(guider) for name, guider in guiders_of(pipeline).items()}
    made.__dict__["_blocks"] = copy.deepcopy(pipeline._blocks)
    for loop in loops_of(made):
        loop.set_progress_bar_config(disable=True)
    return made


def arguments_in(pipeline: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call, from what its loop knows by name; a modular one's, from state and guider."""
    values = getattr(names.get("state"), "values", None)
    if not isinstance(values, Mapping):
        return dict(names)
    return {**names, **values, **guidance_of(pipeline)}


def guidance_of(pipeline: Any) -> dict[str, float]:
    """A modular pipeline's guidance by the names that other pipelines' calls have for it; empty without a guider.

    Which of the two names a model's scale has elsewhere is not known, it stands under both.
    """
    guider = getattr(pipeline, "guider", None)
    scale = getattr(guider, "guidance_scale", None)
    if not isinstance(scale, (int, float)) or not hasattr(guider, "_input_predictions"):
        return {}
    scale = scale if getattr(guider, "_enabled", True) else 1.0
    interval = {"guidance_start": getattr(guider, "_start", 0.0), "guidance_stop": getattr(guider, "_stop", 1.0)}
    return {"guidance_scale": scale, "true_cfg_scale": scale, **interval}
