"""Published caching methods: one file each, each method one frozen config of its settings.

>>> from layercache.methods import FBCache, TaylorSeer
>>> layercache.enable(pipe, FBCache(threshold=0.1))
>>> layercache.enable(pipe, TaylorSeer(interval=4))

Methods of other packages join by an entry point in the group ``layercache.methods``: its name is the method's, its
object the config class, a subclass of one of the four kinds in `layercache.methods.policy`. `layercache compare` then
knows it by that name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layercache.methods.automatic import Automatic as Automatic
    from layercache.methods.cachequant import CacheQuant as CacheQuant
    from layercache.methods.dicache import DiCache as DiCache
    from layercache.methods.dpcache import DPCache as DPCache
    from layercache.methods.easycache import EasyCache as EasyCache
    from layercache.methods.ertacache import ERTACache as ERTACache
    from layercache.methods.fastercache import FasterCache as FasterCache
    from layercache.methods.fbcache import DBCache as DBCache
    from layercache.methods.fbcache import FBCache as FBCache
    from layercache.methods.fixed import SmoothCache as SmoothCache
    from layercache.methods.fixed import TaylorSeer as TaylorSeer
    from layercache.methods.fixed import Uniform as Uniform
    from layercache.methods.invardiff import InvarDiff as InvarDiff
    from layercache.methods.l2c import LearningToCache as LearningToCache
    from layercache.methods.magcache import MagCache as MagCache
    from layercache.methods.meancache import MeanCache as MeanCache
    from layercache.methods.precisecache import PreciseCache as PreciseCache
    from layercache.methods.procache import ProCache as ProCache
    from layercache.methods.seacache import SeaCache as SeaCache
    from layercache.methods.sencache import SenCache as SenCache
    from layercache.methods.spectrum import Spectrum as Spectrum
    from layercache.methods.teacache import SpectralCache as SpectralCache
    from layercache.methods.teacache import TeaCache as TeaCache
    from layercache.methods.universal import Universal as Universal

ENTRY_POINTS = "layercache.methods"
# Loaded on first use, so that one method costs no import of the others.
_HOMES = {
    "Automatic": "automatic",
    "CacheQuant": "cachequant",
    "DBCache": "fbcache",
    "DPCache": "dpcache",
    "DiCache": "dicache",
    "ERTACache": "ertacache",
    "EasyCache": "easycache",
    "FBCache": "fbcache",
    "FasterCache": "fastercache",
    "InvarDiff": "invardiff",
    "LearningToCache": "l2c",
    "MagCache": "magcache",
    "MeanCache": "meancache",
    "ProCache": "procache",
    "PreciseCache": "precisecache",
    "SeaCache": "seacache",
    "SenCache": "sencache",
    "SmoothCache": "fixed",
    "SpectralCache": "teacache",
    "Spectrum": "spectrum",
    "TaylorSeer": "fixed",
    "TeaCache": "teacache",
    "Uniform": "fixed",
    "Universal": "universal",
}

__all__ = ["ENTRY_POINTS", "installed", *sorted(_HOMES)]


def installed() -> dict[str, type]:
    """Config classes of other packages' methods, by the name of their entry point.

    Raises:
        ImportError: one of them does not import.
    """
    return {entry.name: entry.load() for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layercache.methods' has no attribute {name!r}")
    return getattr(importlib.import_module(f"layercache.methods.{_HOMES[name]}"), name)
