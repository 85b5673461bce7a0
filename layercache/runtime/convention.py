"""Diffusers' own way to enable a cache: ``transformer.enable_cache(layercache.CacheConfig(...))``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any

from layercache.errors import CacheStateError

if TYPE_CHECKING:
    from layercache.runtime.cache import Cache


@dataclass(frozen=True)
class CacheConfig:
    """A plan and its options, for the ``enable_cache`` of diffusers' transformers.

    Examples:
        >>> pipe.transformer.enable_cache(layercache.CacheConfig(budget=0.5, scheduler=pipe.scheduler))
        >>> pipe("a lighthouse")
        >>> layercache.cache_of(pipe).report()
        >>> pipe.transformer.disable_cache()

    A transformer does not know its pipeline. Plans that replace velocities (schedules of whole steps, most methods)
    need the pipeline's scheduler; ``learn=`` needs the pipeline: `layercache.enable(pipe, learn=4)`.

    Attributes:
        plan: a schedule or a method, as `layercache.enable` takes it; ``None``: what needs no calibration.
        scheduler: that steps the transformer.
        num_steps, process_group, storage, budget, speedup: as for `layercache.enable`.
    """

    plan: Any = None
    scheduler: Any = None
    num_steps: int | None = None
    process_group: Any = None
    storage: str = "same"
    budget: float | None = None
    speedup: float | None = None


def cache_of(pipe: Any) -> Cache:
    """The cache that is enabled on a pipeline or transformer, however it was enabled.

    Raises:
        CacheStateError: none is.
        UnsupportedModelError: the transformer is of an unknown class.
    """
    from layercache.models.registry import find_transformer
    from layercache.runtime.attachment import attachment_of

    attachment = attachment_of(find_transformer(pipe))
    if attachment is None:
        raise CacheStateError("no layercache cache is enabled here")
    cache: Any = attachment.root
    return cache


def accept_our_config(cache_utils: ModuleType, enable: Callable[..., object]) -> None:
    """Lets ``enable_cache`` of all of diffusers' models take a `CacheConfig`; other configs go where they went.

    Args:
        cache_utils: diffusers' module of that method.
        enable: `layercache.enable`, whose errors it has.
    """
    mixin: Any = cache_utils.CacheMixin
    original = mixin.enable_cache

    @functools.wraps(original)
    def enable_cache(self: Any, config: Any) -> None:
        if isinstance(config, CacheConfig):
            enable(self, **{field.name: getattr(config, field.name) for field in fields(config)})
        else:
            original(self, config)

    mixin.enable_cache = enable_cache
