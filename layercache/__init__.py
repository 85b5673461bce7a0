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

from layercache._version import __version__

# In a checkout the kernels lie beside this folder; an installed wheel has them inside it.
if not (Path(__file__).parent / "kernels").is_dir() and (Path(__file__).parents[1] / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from layercache.calibration import calibrate as calibrate
    from layercache.errors import LayerCacheError as LayerCacheError
    from layercache.front import Front as Front
    from layercache.inference import infer_model as infer_model
    from layercache.integration import disable as disable
    from layercache.integration import enable as enable
    from layercache.integration import enabled as enabled
    from layercache.model_spec import ModelSpec as ModelSpec
    from layercache.models import register_model as register_model
    from layercache.planner import plan as plan
    from layercache.profile import StabilityProfile as StabilityProfile
    from layercache.schedule import Schedule as Schedule
    from layercache.searching import search as search

# Loaded on first use, so that `import layercache` costs no torch or diffusers import.
_HOMES = {
    "calibrate": "calibration",
    "disable": "integration",
    "enable": "integration",
    "enabled": "integration",
    "Front": "front",
    "LayerCacheError": "errors",
    "infer_model": "inference",
    "ModelSpec": "model_spec",
    "plan": "planner",
    "register_model": "models",
    "Schedule": "schedule",
    "search": "searching",
    "StabilityProfile": "profile",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layercache' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"layercache.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
