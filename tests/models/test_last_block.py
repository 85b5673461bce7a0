"""SD3, whose last block gives no text, under schedules that store the last group before the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

import layercache
from layercache.models import registry
from layercache.models.registry import known_models
from support.block_reuse import BlockReuse
from support.forwards import next_step, schedule
from support.zoo import build

A, B = {0: 1.0}, {1: 1.0}
ORDERS = {
    "last first": (((0, 2), (2, 4)), ((None, None), (None, A), (A, None))),
    "last alone": (((0, 2), (2, 4)), ((None, None), (None, A), (None, A))),
    "middle later": (((0, 1), (1, 3), (3, 4)), ((None,) * 3, (None, None, A), (None, B, A))),
}


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    for spec in known_models():
        monkeypatch.setitem(registry._REGISTRY, spec.model_class, replace(spec, timestep=None))


@pytest.mark.parametrize("storage", ["same", "compact"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_last_group_is_stored_first(order, storage):
    groups, rows = ORDERS[order]
    model, inputs = build("SD3Transformer2DModel")
    steps = [inputs | {"hidden_states": inputs["hidden_states"] * (1 + 0.1 * step)} for step in range(3)]
    expected = []
    with BlockReuse(model, groups) as by_hand:
        for row, given in zip(rows, steps, strict=True):
            by_hand.row(row)
            expected.append(next_step(model, given)[0])
    small = [given | {"hidden_states": given["hidden_states"][:1]} for given in steps]
    small = [given | {k: given[k][:1] for k in ("encoder_hidden_states", "pooled_projections")} for given in small]
    small = [given | {"timestep": given["timestep"][:1]} for given in small]
    with layercache.enabled(model, schedule(model, *rows, groups=groups), storage=storage) as cache:
        for runs, size in ((steps, 2), (small, 1), (steps, 2)):
            for given, right in zip(runs, expected, strict=True):
                off = (next_step(model, given)[0] - right[:size]).abs().max() / right.abs().max()
                assert off < (0.1 if storage == "compact" else 1e-5)
        assert cache.report().fallback_rows == 0
