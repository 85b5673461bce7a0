"""Every registered class under ``torch.autocast``, where blocks may give another dtype than they take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import layercache
from layercache.methods import DiCache, FBCache
from layercache.models import registry
from layercache.models.registry import known_models
from support.block_reuse import BlockReuse
from support.forwards import next_step, schedule
from support.zoo import MODELS, build

GROUPS = ((0, 1), (1, 2), (2, 4))
FIRST: dict = {0: 1.0}
ROWS = ((None,) * 3, (FIRST, None, FIRST), (FIRST, FIRST, None))
MIXED = ("Cosmos", "HunyuanVideo15", "LTX2Video", "LTXVideo", "PixArt", "Sana")
"""Classes with blocks that give another dtype than they take, or streams of two dtypes."""


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    """The steps of these tests share one timestep."""
    for spec in known_models():
        monkeypatch.setitem(registry._REGISTRY, spec.model_class, replace(spec, timestep=None))


def steps_of(inputs):
    """The same forward with a picture that moves a little from step to step."""
    name = "x" if "x" in inputs else "hidden_states"

    def moved(value, step):
        generator = torch.Generator().manual_seed(step)
        return value + 0.1 * step * torch.randn(value.shape, generator=generator)

    for step in range(3):
        given = inputs[name]
        new = [moved(g, step) for g in given] if isinstance(given, list) else moved(given, step)
        yield inputs | {name: new}


def dtypes_given(model):
    """Dtypes that the blocks' calls are given from now on."""
    found: list[list[torch.dtype]] = []
    reuse = BlockReuse(model, GROUPS)
    for number, (block, single) in enumerate(reuse.blocks):
        found.append([])
        block.register_forward_pre_hook(
            lambda module, args, kwargs, number=number, single=single: found[number].append(
                reuse._streams(single, args, kwargs)[0].dtype
            ),
            with_kwargs=True,
        )
    return found


@pytest.mark.parametrize("name", sorted(MODELS))
def test_reuse_under_autocast_is_reuse_by_hand(name):
    model, inputs = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with BlockReuse(model, GROUPS) as by_hand:
            expected = []
            for row, given in zip(ROWS, steps_of(inputs), strict=True):
                by_hand.row(row)
                expected.append(next_step(model, given))
        seen = dtypes_given(model)
        with layercache.enabled(model, schedule(model, *ROWS, groups=GROUPS)) as cache:
            found = [next_step(model, given) for given in steps_of(inputs)]
            assert cache.report().fallback_rows == 0 and cache.report().cached_cells == 4
    for output, right in zip(found, expected, strict=True):
        for a, b in zip(output, right, strict=True):
            assert a.dtype == b.dtype
            assert (a.float() - b.float()).abs().max() < 0.02 * b.float().abs().max()
    assert seen[1] == [by_hand.given[1][0], by_hand.given[1][1]]  # computed at steps 0 and 1
    assert set(seen[3]) <= set(by_hand.given[3])
    assert cache.storage.is_mixed or not name.startswith(MIXED)


@pytest.mark.parametrize("storage", ["same", "float32", "compact"])
@pytest.mark.parametrize("method", [FBCache(threshold=1e9, warmup=1), DiCache(threshold=1e9, retention=0.0)])
@pytest.mark.parametrize("name", ["LTX2VideoTransformer3DModel", "SanaTransformer2DModel"])
def test_methods_that_decide_under_autocast(name, method, storage):
    model, inputs = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = next_step(model, inputs)
        with layercache.enabled(model, method, num_steps=5, storage=storage) as cache:
            found = [next_step(model, inputs) for _ in range(3)]
            assert not all(next(iter(cache.decisions.values())))
    allowed = 0.08 if storage == "compact" else 1e-2
    for output in found:
        for a, b in zip(output, full, strict=True):
            assert a.dtype == b.dtype and (a.float() - b.float()).abs().max() <= allowed * b.float().abs().max()


@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "LTX2VideoTransformer3DModel"])
def test_batches_of_requests_under_autocast(name):
    """Two requests in one forward give what each gives alone."""
    model, inputs = build(name)
    model_steps = list(steps_of(inputs))
    one = [{k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in given.items()} for given in model_steps]
    plan = schedule(model, (None,) * 3, (FIRST,) * 3, (FIRST, FIRST, None), groups=GROUPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with layercache.enabled(model, plan):
            alone = [next_step(model, given) for given in one]
        with layercache.enabled(model, plan) as cache:
            for given, right in zip(model_steps, alone, strict=True):
                with cache.batch({"a": 1, "b": 1}):
                    found = next_step(model, given)
                for a, b in zip(found, right, strict=True):
                    assert a.dtype == b.dtype
                    assert (a[:1].float() - b.float()).abs().max() <= 0.02 * b.float().abs().max()
            assert cache.metrics()["hits"] > 0
