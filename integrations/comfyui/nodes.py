"""The nodes, in the form that every ComfyUI of today takes (v1); `new_nodes` makes v3 nodes of them."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

from layercache.schedule import Schedule

from . import engine
from .caching import REFUSE, RUN_UNCACHED, Caching
from .recording import Recorder, schedule_of

WITHOUT_FILE = "(none: from other models' runs)"
HANDLE = "LAYERCACHE"
"""Type of the connection to what a node put into a model."""

Inputs = dict[str, dict[str, tuple[Any, ...]]]


class LayerCacheModel:
    """A model whose samplings follow a schedule: some steps are computed, the others forecast."""

    CATEGORY = "model_patches/layercache"
    FUNCTION = "execute"
    RETURN_TYPES: ClassVar = ("MODEL", HANDLE)
    RETURN_NAMES: ClassVar = ("model", "cache")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        budget = {
            "default": 0.5,
            "min": 0.05,
            "max": 0.95,
            "step": 0.05,
            "tooltip": "Largest share of the steps that is computed; of a schedule file, the file says it.",
        }
        return {
            "required": {
                "model": ("MODEL",),
                "schedule": ([WITHOUT_FILE, *engine.schedule_files()], {"tooltip": "A file in models/layercache."}),
                "budget": ("FLOAT", budget),
                "on_mismatch": ([REFUSE, RUN_UNCACHED], {"tooltip": "Where the schedule does not fit the sampling."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, schedule: str = WITHOUT_FILE, **_: Any) -> str:
        """A file that was written anew is read anew."""
        path = None if schedule == WITHOUT_FILE else engine.schedule_path(schedule)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else ""

    def execute(self, model: Any, schedule: str, budget: float, on_mismatch: str = REFUSE) -> tuple[Any, Caching]:
        read = None if schedule == WITHOUT_FILE else Schedule.load(engine.schedule_path(schedule))
        caching = Caching(read, budget, on_mismatch)
        forward = None if caching.is_of_whole_steps else caching.forward
        found, is_there = engine.with_wrappers(model, caching.outer, caching.predict, forward)
        if not is_there:
            caching.reports = ["in full: this ComfyUI is not known to this version of the node"]
        return found, caching


class LayerCacheRecord:
    """A model whose samplings are computed in full and recorded, for a schedule to be made from."""

    CATEGORY = "model_patches/layercache"
    FUNCTION = "execute"
    RETURN_TYPES: ClassVar = ("MODEL", HANDLE)
    RETURN_NAMES: ClassVar = ("model", "runs")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        keep = {"default": 8, "min": 1, "max": 64, "tooltip": "How many samplings are kept, the newest."}
        return {"required": {"model": ("MODEL",), "keep": ("INT", keep)}}

    def execute(self, model: Any, keep: int) -> tuple[Any, Recorder]:
        recorder = Recorder(keep)
        return engine.with_wrappers(model, recorder.outer, recorder.predict)[0], recorder


class LayerCacheMakeSchedule:
    """Makes a schedule from the samplings recorded so far, and writes its file into models/layercache."""

    CATEGORY = "model_patches/layercache"
    FUNCTION = "execute"
    RETURN_TYPES: ClassVar = ("STRING",)
    RETURN_NAMES: ClassVar = ("report",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        budget = {"default": 0.5, "min": 0.05, "max": 0.95, "step": 0.05, "tooltip": "Share of the steps computed."}
        return {
            "required": {
                "runs": (HANDLE,),
                "latent": ("LATENT", {"tooltip": "Of the sampler, so that it has run before."}),
                "budget": ("FLOAT", budget),
                "name": ("STRING", {"default": "schedule", "tooltip": "Of the file in models/layercache."}),
            }
        }

    def execute(self, runs: Recorder, latent: Any, budget: float, name: str) -> tuple[str]:
        path = engine.schedule_path(name)
        schedule = schedule_of(runs.like_newest, budget)
        schedule.save(path)
        return (f"{path.name}\n{schedule}",)


class LayerCacheReport:
    """What the cache of a model did in its newest sampling."""

    CATEGORY = "model_patches/layercache"
    FUNCTION = "execute"
    RETURN_TYPES: ClassVar = ("LATENT", "STRING")
    RETURN_NAMES: ClassVar = ("latent", "report")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        latent = ("LATENT", {"tooltip": "Of the sampler, so that it has run before; handed on as it is."})
        return {"required": {"cache": (HANDLE,), "latent": latent}}

    def execute(self, cache: Any, latent: Any) -> tuple[Any, str]:
        return latent, str(cache)


NODES: dict[str, type] = {
    "LayerCacheModel": LayerCacheModel,
    "LayerCacheRecord": LayerCacheRecord,
    "LayerCacheMakeSchedule": LayerCacheMakeSchedule,
    "LayerCacheReport": LayerCacheReport,
}
DISPLAY_NAMES = {
    "LayerCacheModel": "LayerCache",
    "LayerCacheRecord": "LayerCache Record",
    "LayerCacheMakeSchedule": "LayerCache Make Schedule",
    "LayerCacheReport": "LayerCache Report",
}
