"""Descriptions of transformers that are found out by watching a forward."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import layercache
from layercache.errors import UnsupportedModelError
from layercache.models import registry as models
from layercache.models.registry import spec_for
from layercache.runtime.attachment import attachment_of
from support.forwards import call, schedule
from support.zoo import MODELS, build

REFUSED = {
    "HiDreamImageTransformer2DModel": "arguments of the next block",  # joins a part of the text anew for every block
    "WanAnimateTransformer3DModel": "arguments of the next block",  # an adapter between the blocks
    "WanVACETransformer3DModel": "arguments of the next block",  # hints between the blocks
}


@pytest.fixture
def forgotten(monkeypatch):
    monkeypatch.setattr(models, "_REGISTRY", {})


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(REFUSED)))
def test_every_class_is_found_out_as_it_is_registered(name, monkeypatch):
    model, inputs = build(name)
    known = spec_for(model)
    monkeypatch.setattr(models, "_REGISTRY", {})
    expected = model(**inputs)[0]
    found = layercache.infer_model(model, lambda: model(**inputs))
    for part in ("model_class", "block_lists", "streams", "joint", "leaves"):
        assert getattr(found, part) == getattr(known, part), part
    assert found.arguments[: len(found.streams)] == known.arguments[: len(found.streams)]
    assert spec_for(model) == found and attachment_of(model) is None
    again = model(**inputs)[0]
    assert torch.equal(again[0], expected[0])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_understood_is_refused(name, forgotten):
    model, inputs = build(name)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        layercache.infer_model(model, lambda: model(**inputs))
    assert not models._REGISTRY


class Chain(nn.Module):
    """Two blocks, and what is asked of them in between."""

    def __init__(self, between=lambda x, first: x):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.between = between

    def forward(self, hidden_states):
        first = hidden_states
        for block in self.blocks:
            hidden_states = self.between(block(hidden_states), first)
        return hidden_states


def test_a_plain_chain_of_blocks_is_enough(forgotten):
    model, x = Chain(), torch.randn(1, 5, 4)
    with pytest.raises(UnsupportedModelError, match="infer_model"):
        spec_for(model)
    spec = layercache.infer_model(model, lambda: model(x), register=False)
    assert spec.block_lists == ("blocks",) and spec.streams == ("image",)
    with pytest.raises(UnsupportedModelError):
        spec_for(model)


class Stateful(Chain):
    """Blocks with an effect besides their result: a residual in their place loses it."""

    def __init__(self):
        super().__init__()
        self.seen = []
        for block in self.blocks:
            block.register_forward_hook(lambda module, args, output: self.seen.append(output))

    def forward(self, hidden_states):
        self.seen.clear()
        x = super().forward(hidden_states)
        return x + sum(self.seen[1:], torch.zeros_like(x))


def test_a_description_that_does_not_hold_is_refused(forgotten):
    model, x = Stateful(), torch.randn(1, 5, 4)
    with pytest.raises(UnsupportedModelError, match="does not hold"):
        layercache.infer_model(model, lambda: model(x))
    assert attachment_of_class(model) is None


def attachment_of_class(model):
    return getattr(model.blocks, "_layercache_router", None)


def test_a_run_that_does_not_run_is_told(forgotten):
    with pytest.raises(UnsupportedModelError, match="did not call"):
        layercache.infer_model(Chain(), lambda: None)
    model = Chain()
    del model.blocks[1:]
    with pytest.raises(UnsupportedModelError, match="two are needed"):
        layercache.infer_model(model, lambda: model(torch.randn(1, 5, 4)))


def test_a_model_of_ones_own_is_cached_after_it(forgotten):
    """From nothing known to a cached step."""
    model, inputs = build("FluxTransformer2DModel")
    spec = layercache.infer_model(model, lambda: model(**inputs))
    assert spec == replace(spec, timestep=None)
    expected = call(model, inputs)
    with layercache.enabled(model, schedule(model, (None,) * 3, ({0: 1.0},) * 3)):
        call(model, inputs)
        torch.testing.assert_close(call(model, inputs), expected, rtol=1e-4, atol=1e-5)
