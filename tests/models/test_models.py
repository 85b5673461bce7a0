"""Every registered transformer class of diffusers, tiny and with random weights, on the one executor."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from torch import nn

import layercache
from layercache import ops
from layercache.methods.fbcache import DBCache
from layercache.models import registry as models
from layercache.models.registry import known_models, spec_for
from support.forwards import CONTROLS, GROUPS, assert_close, controls, next_step, schedule
from support.zoo import MODELS, build


@pytest.fixture(scope="module", params=sorted(MODELS))
def zoo(request):
    return build(request.param)


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    """The steps of these tests share one timestep."""
    for spec in known_models():
        monkeypatch.setitem(models._REGISTRY, spec.model_class, replace(spec, timestep=None))


def test_every_registered_class_is_in_the_zoo():
    known = {spec.model_class for spec in known_models()}
    assert {name for name in known if hasattr(diffusers, name)} == set(MODELS)


def test_computing_everything_changes_no_bit_and_disabling_leaves_nothing(zoo):
    model, inputs = zoo
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = next_step(model, inputs)
    # the second step reads every group's residual, so that the first one stores them all
    plan = schedule(model, (None,) * 3, ({0: 1.0},) * 3)
    layercache.enable(model, plan)
    stored = next_step(model, inputs)
    layercache.disable(model)
    assert all(torch.equal(a, b) for a, b in zip(stored, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(next_step(model, inputs), expected, strict=True))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


EVERY_SET = [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)]


def assert_reused_steps_are_the_full_step(model, inputs, sets=EVERY_SET, groups=GROUPS):
    """A full step, then one for each of ``sets``, in which those groups reuse what the first one stored."""
    expected = next_step(model, inputs)
    rows = [tuple({0: 1.0} if group in reused else None for group in range(3)) for reused in sets]
    for at in range(0, len(rows), 2):  # two steps at a time: there are as many sigmas
        with layercache.enabled(model, schedule(model, (None,) * 3, *rows[at : at + 2], groups=groups)) as cache:
            next_step(model, inputs)
            for _ in rows[at : at + 2]:
                assert_close(next_step(model, inputs), expected)
            assert cache.report().fallback_rows == 0


def test_a_cached_step_with_the_same_input_is_the_full_step(zoo):
    assert_reused_steps_are_the_full_step(*zoo)


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_a_cached_step_with_the_same_controlnet_residuals_is_the_full_step(name):
    model, inputs = build(name)
    plain = next_step(model, inputs)
    inputs = inputs | controls(name, model, inputs)
    assert not torch.allclose(plain[0], next_step(model, inputs)[0], atol=1e-3)
    assert_reused_steps_are_the_full_step(model, inputs, [(0,), (1,), (2,), (0, 1, 2)])


@pytest.mark.parametrize("name", [n for n in CONTROLS if "controlnet_single_block_samples" in CONTROLS[n]])
def test_controlnet_residuals_within_groups_of_several_single_blocks(name):
    model, inputs = build(name, num_single_layers=6)
    inputs = inputs | controls(name, model, inputs)
    assert_reused_steps_are_the_full_step(model, inputs, [(1,), (2,), (1, 2)], groups=((0, 2), (2, 5), (5, 8)))


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_controlnet_residuals_outside_reused_groups_are_live(name):
    """Behind the last computed group the residuals of the present step are added, not those of the anchor."""
    model, inputs = build(name)
    with layercache.enabled(model, schedule(model, (None,) * 3, ({0: 1.0}, None, None))):
        next_step(model, inputs | controls(name, model, inputs))
        found = next_step(model, inputs | controls(name, model, inputs, seed=1))
        # the same step, with the first group's residual in its place
        again = next_step(model, inputs | controls(name, model, inputs, seed=2))
    assert not torch.allclose(found[0], again[0], atol=1e-4)


def test_one_launch_per_stored_group_and_one_per_run(zoo, monkeypatch):
    model, inputs = zoo
    launches = {"store": 0, "restore": 0}
    for name in launches:
        original = getattr(ops, name)

        def counted(*args, name=name, original=original, **kwargs):
            launches[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, counted)
    runs = 3 if spec_for(model).couples else 1
    rows = ((None,) * 3, ({0: 1.0}, None, {0: 1.0}), ({0: 1.0}, {1: 1.0}, {0: 1.0}))
    with layercache.enabled(model, schedule(model, *rows)):
        next_step(model, inputs)
        assert launches == {"store": 2, "restore": 0}
        next_step(model, inputs)
        assert launches == {"store": 3, "restore": 2}
        next_step(model, inputs)
        assert launches == {"store": 3, "restore": 2 + runs}


class Ramp(nn.Module):
    """In a block's place: adds what grows linearly with ``time`` to every stream."""

    time = 0.0

    def __init__(self, spec: layercache.ModelSpec, index: int, block: nn.Module):
        super().__init__()
        self.spec, self.index = spec, index
        self.block = block  # the forward may look at its attributes

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args, **kwargs):
        change = 0.3 + 0.7 * Ramp.time
        calls = self.spec.calls(self.index)
        first = calls.given(args, kwargs)
        if calls.single:
            return first + change
        second = kwargs[self.spec.arguments[1]] if self.spec.arguments[1] in kwargs else args[1]
        return calls.pack(first + change, second - 0.5 * change)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_extrapolation_over_two_anchors_is_exact_for_linear_blocks(name):
    model, inputs = build(name)
    spec = spec_for(model)
    for index, blocks in enumerate(spec.block_modules(model)):
        for number in range(len(blocks)):
            blocks[number] = Ramp(spec, index, blocks[number])
    sigmas, secant = (0.0, 1.0, 3.0), {1: 3.0, 0: -2.0}  # linear in time 0, 1, 3
    for row in [(secant,) * 3, (secant, None, secant), (None, secant, None)]:
        with layercache.enabled(model, schedule(model, (None,) * 3, (None,) * 3, row)):
            for Ramp.time in sigmas[:2]:
                next_step(model, inputs)
            Ramp.time = sigmas[2]
            found = next_step(model, inputs)
        assert_close(found, next_step(model, inputs))


def test_a_dynamic_method_that_always_reuses_gives_the_full_step_again(zoo):
    model, inputs = zoo
    expected = next_step(model, inputs)
    with layercache.enabled(model, DBCache(threshold=1.0, front=1, back=1, warmup=0), num_steps=3) as cache:
        next_step(model, inputs)
        assert_close(next_step(model, inputs), expected)
        assert cache.report().cached_cells == 1


def test_a_changed_shape_is_noticed(zoo):
    """Half the batch: what is stored does not fit, and everything is computed again."""
    model, inputs = zoo
    if len(next(iter(inputs.values()))) == 1:
        pytest.skip("the model takes one sample at a time here")
    smaller = {name: v if name.startswith("indices") else half(v) for name, v in inputs.items()}
    expected = next_step(model, smaller)
    with layercache.enabled(model, schedule(model, (None,) * 3, ({0: 1.0},) * 3)) as cache:
        next_step(model, inputs)
        assert_close(next_step(model, smaller), expected)
        assert cache.report().fallback_rows == 1


def half(value):
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == 2:
        return value[:1]
    if isinstance(value, list) and len(value) == 2:
        return value[:1]
    return value
