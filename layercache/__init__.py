"""layercache: cached layer groups for flow-matching and diffusion transformers.

profile = layercache.calibrate(pipe, prompts)
schedule = layercache.plan(profile, budget=0.6)
with layercache.enabled(pipe, schedule) as cache:
    pipe(...)
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercache._utils.imports import after_import
from layercache._version import __version__

# In a checkout the kernels lie beside this folder; an installed wheel has them inside it.
if not (Path(__file__).parent / "kernels").is_dir() and (Path(__file__).parents[1] / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from layercache.errors import LayerCacheError as LayerCacheError
    from layercache.models.registry import register_model as register_model
    from layercache.models.spec import ModelSpec as ModelSpec
    from layercache.planning.calibrate import calibrate as calibrate
    from layercache.planning.front import Front as Front
    from layercache.planning.infer_model import infer_model as infer_model
    from layercache.planning.plan import plan as plan
    from layercache.planning.profile import StabilityProfile as StabilityProfile
    from layercache.planning.refit import refit as refit
    from layercache.planning.search import search as search
    from layercache.runtime.convention import CacheConfig as CacheConfig
    from layercache.runtime.convention import cache_of as cache_of
    from layercache.runtime.enable import disable as disable
    from layercache.runtime.enable import enable as enable
    from layercache.runtime.enable import enabled as enabled
    from layercache.runtime.timestep_tables import fold_timesteps as fold_timesteps
    from layercache.schedule.schedule import Schedule as Schedule
    from layercache.tools.compare.api import compare as compare
    from layercache.tools.compare.measure import measure as measure

# Loaded on first use, so that `import layercache` costs no torch or diffusers import.
_HOMES = {
    "cache_of": "runtime.convention",
    "CacheConfig": "runtime.convention",
    "calibrate": "planning.calibrate",
    "compare": "tools.compare.api",
    "disable": "runtime.enable",
    "enable": "runtime.enable",
    "enabled": "runtime.enable",
    "fold_timesteps": "runtime.timestep_tables",
    "Front": "planning.front",
    "LayerCacheError": "errors",
    "infer_model": "planning.infer_model",
    "measure": "tools.compare.measure",
    "ModelSpec": "models.spec",
    "plan": "planning.plan",
    "register_model": "models.registry",
    "refit": "planning.refit",
    "Schedule": "schedule.schedule",
    "search": "planning.search",
    "StabilityProfile": "planning.profile",
}

__all__ = ["__version__", *sorted(_HOMES)]


def _accept_cache_config(cache_utils: Any) -> None:
    from layercache.runtime.convention import accept_our_config

    accept_our_config(cache_utils, lambda *args, **options: __getattr__("enable")(*args, **options))


after_import("diffusers.models.cache_utils", _accept_cache_config)


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return importlib.import_module("layercache.metrics")
    if name not in _HOMES:
        raise AttributeError(f"module 'layercache' has no attribute {name!r}")
    if name in ("enable", "enabled"):  # it registers what is run where no plan is given
        importlib.import_module("layercache.methods.automatic")
    value = getattr(importlib.import_module(f"layercache.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
