"""The memory that every method reports is what it holds, at every step; what is planned ahead is what is taken."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import FunctionType, MethodType, ModuleType

import numpy as np
import pytest
import torch

import layercache
from layercache import methods
from layercache.methods.invardiff import Rates
from layercache.methods.invardiff import plan as plan_modules
from layercache.methods.l2c import LearnedRouter
from layercache.models.registry import spec_for
from layercache.planning.rollout import Rollouts
from layercache.runtime.modules import module_units
from layercache.schedule.memory_plan import stored_bytes
from layercache.schedule.schedule import Schedule
from support.marks import slow
from support.profiles import made_profile
from support.tiny import PROMPTS, calm_pipeline, fingerprint, generate, shifted_sigmas

STEPS, LAYERS = 8, 4
LATENTS = len(PROMPTS) * 64 * 48 * 4
STREAMS = {name: (len(PROMPTS) * 64 * 56 * 4, len(PROMPTS) * 4 * 56 * 4) for name in ("cond", "uncond")}
LEAST = 1024  # bytes: flags, coefficients and statistics are smaller, and in no report


@pytest.fixture(scope="module")
def pipe():
    return calm_pipeline(LAYERS)


@pytest.fixture(scope="module")
def prints(pipe):
    return fingerprint(pipe.transformer, shifted_sigmas(STEPS))


def rates_of(pipe, prints) -> Rates:
    units = module_units(pipe.transformer, spec_for(pipe.transformer))
    rho = np.random.default_rng(0).uniform(0.5, 1.5, (STEPS, 1 + len(units)))
    names, kinds = zip(*((unit.name, unit.kind) for unit in units), strict=True)
    return Rates(prints, names, kinds, rho[:, 0], rho[:, 1:])


def invardiff(pipe, prints):
    return plan_modules(*[rates_of(pipe, prints)] * 2, methods.InvarDiff(0.4, 0.5))


def learned(pipe, prints):
    units = rates_of(pipe, prints).units
    theta = torch.linspace(-3, 3, STEPS // 2 * len(units)).reshape(STEPS // 2, -1)
    return LearnedRouter(prints, units, theta, (1.0,) * len(units)).schedule(threshold=0.5)


def smoothcache(pipe, prints):
    made = made_profile(steps=STEPS, groups=LAYERS // 2, distance=3, span=2)
    return methods.SmoothCache(alpha=0.2).schedule(replace(made, fingerprint=prints))


def cachequant(pipe, prints):
    call = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    return methods.CacheQuant().plan(Rollouts(pipe, ["cat"], [0], **call), 0.5)


PLANS = {
    "Automatic": lambda *_: methods.Automatic(budget=0.6),
    "CacheQuant": cachequant,
    "DBCache": lambda *_: methods.DBCache(front=1, back=1, warmup=2, threshold=0.9, order=1),
    "DPCache": lambda *_: methods.DPCache((0, 1, 2, 5), groups=((0, 2), (2, 4))),
    "DiCache": lambda *_: methods.DiCache(threshold=0.5, retention=0.1),
    "ERTACache": lambda *_: methods.ERTACache((0, 1, 4)),
    "EasyCache": lambda *_: methods.EasyCache(threshold=1.0, warmup=2),
    "FBCache": lambda *_: methods.FBCache(threshold=0.9, order=1),
    "FasterCache": lambda *_: methods.FasterCache(),
    "InvarDiff": invardiff,
    "LearningToCache": learned,
    "MagCache": lambda *_: methods.MagCache(ratios=(1.0, *(0.98,) * (STEPS - 1)), threshold=0.1),
    "MeanCache": lambda *_: methods.MeanCache((0, 1, 3, 6), (1, 1, 2, 2)),
    "PreciseCache": lambda *_: methods.PreciseCache(alpha=0.9, shrink=(2, 2)),
    "ProCache": lambda *_: methods.ProCache((4, 3, 1)),
    "SeaCache": lambda *_: methods.SeaCache(threshold=0.5, order=1),
    "SenCache": lambda *_: methods.SenCache(threshold=0.5, sensitivities=((0.5, 0.5, 1.0),)),
    "SmoothCache": smoothcache,
    "SpectralCache": lambda *_: methods.SpectralCache(threshold=0.5, coefficients=(1.0, 0.0)),
    "Spectrum": lambda *_: methods.Spectrum(warmup=3, groups=((0, 4),)),
    "TaylorSeer": lambda *_: methods.TaylorSeer(interval=3, order=2, warmup=2),
    "TeaCache": lambda *_: methods.TeaCache(threshold=0.5, coefficients=(1.0, 0.0)),
    "Uniform": lambda *_: methods.Uniform(interval=2),
    "Universal": lambda *_: methods.Universal(budget=0.6),
}
"""A plan of every method of `layercache.methods`."""


def held_bytes(cache) -> int:
    """Of all tensors that can be reached from a cache, without the model, what is said of forwards, and small ones."""
    apart = (torch.nn.Module, type, FunctionType, MethodType, ModuleType, torch.Generator)
    outside = {id(cache.identity), id(getattr(cache, "attachment", None)), id(cache.spec)}
    found, seen, left = {}, set(outside), [cache]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, apart):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif hasattr(one, "identity") and hasattr(one, "attachment") and one is not cache:  # of a planned method
            seen |= {id(one.identity), id(one.attachment), id(one.spec)}
            left += gc.get_referents(one)
        else:
            left += gc.get_referents(one)
    return sum(size for size in found.values() if size >= LEAST)


DAILY = ("EasyCache", "FBCache", "FasterCache", "PreciseCache", "ProCache", "Uniform")  # one of every router
OTHERS = sorted({*methods._HOMES} - {*DAILY})


@pytest.mark.parametrize("name", [*DAILY, *slow(*OTHERS)])
def test_memory_is_what_is_reported(pipe, prints, name):
    assert set(PLANS) == set(methods._HOMES)
    plan, seen = PLANS[name](pipe, prints), []

    def note(_, step, time, tensors):
        held = held_bytes(cache)
        seen.append((held, cache.report().cache_bytes))
        return tensors

    with layercache.enabled(pipe, plan) as cache:
        generate(pipe, steps=STEPS, callback_on_step_end=note)
        report, schedule = cache.report(), getattr(cache, "schedule", None)
    assert report.cached_cells > 0 and report.cache_bytes > 0
    assert [held for held, _ in seen] == [said for _, said in seen]
    assert report.cache_bytes == max(said for _, said in seen)
    if isinstance(schedule, Schedule):
        assert stored_bytes(schedule, STREAMS, LATENTS) == report.cache_bytes
