"""Numbers that are not finite: one NaN picture of a batch, and residuals that float16 cannot hold."""

from __future__ import annotations

import warnings

import pytest
import torch

import layercache
from layercache.errors import NonFiniteResidualError, NonFiniteWarning
from layercache.methods import DBCache, DiCache, EasyCache, FBCache, MagCache, TeaCache, Uniform
from layercache.runtime.storage import Buffer, Storage
from support.forwards import call, schedule, stepping
from support.tiny import generate, mixed_cells, schedule_for, tiny_pipeline
from support.zoo import build

STEPS = 8
PLANS = {
    "groups": lambda pipe: schedule_for(pipe, mixed_cells(STEPS)),
    "uniform": lambda pipe: Uniform(interval=2),
    "magcache": lambda pipe: MagCache(ratios=[1.0] * STEPS, threshold=1.0, retention=0.2),
    "fbcache": lambda pipe: FBCache(threshold=1.15, warmup=2),
    "fbcache, lagged": lambda pipe: FBCache(threshold=1.15, warmup=2, sync="lagged"),
    "dbcache": lambda pipe: DBCache(threshold=0.99, front=1, back=1, warmup=2),
    "dicache": lambda pipe: DiCache(threshold=1.0, retention=0.1),
    "teacache": lambda pipe: TeaCache(threshold=0.3, coefficients=(1.0, 0.0)),
    "easycache": lambda pipe: EasyCache(threshold=0.5, warmup=2),
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def spoiled(pipe):
    """The second picture's text is NaN from the first step on."""

    def spoil(module, args, kwargs):
        text = kwargs["encoder_hidden_states"].clone()
        text[1:] = float("nan")
        return args, kwargs | {"encoder_hidden_states": text}

    hook = pipe.transformer.register_forward_pre_hook(spoil, with_kwargs=True, prepend=True)
    yield
    hook.remove()


@pytest.mark.parametrize("kind", PLANS)
def test_the_other_picture_of_a_batch_is_what_it_is_alone(pipe, spoiled, kind):
    plan = PLANS[kind](pipe)
    with layercache.enabled(pipe, plan) as cache:
        alone = generate(pipe, prompts=["cat"], steps=STEPS)
        used = cache.report().used
        decisions = getattr(cache, "decisions", None)
    with layercache.enabled(pipe, plan) as cache:
        with pytest.warns(NonFiniteWarning, match=r"in sample 1 of the batch \(counted from 0\)"):
            pictures = generate(pipe, steps=STEPS)
        assert cache.report().used == used < 1 and getattr(cache, "decisions", None) == decisions
        with pytest.raises(NonFiniteResidualError) as caught:
            cache.check()
        assert caught.value.samples == (1,)
        cache.check()
    torch.testing.assert_close(pictures[:1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.isfinite(pictures[1]).any()


@pytest.mark.parametrize("kind", ["groups", "uniform", "fbcache", "easycache"])
def test_the_end_of_a_block_keeps_the_pictures(pipe, spoiled, kind):
    def pictures():
        with layercache.enabled(pipe, PLANS[kind](pipe)):
            return generate(pipe, steps=STEPS)

    with pytest.warns(NonFiniteWarning) as told:
        assert len(pictures()) == 2
    assert sum(warning.category is NonFiniteWarning for warning in told) == 1


@pytest.mark.parametrize("kind", ["fbcache", "dicache", "easycache"])
def test_a_picture_that_becomes_nan_on_the_way(pipe, kind):
    """From step 4 on; nothing raises, and reuse goes on for the other one."""
    calls = []

    def spoil(module, args, output):
        calls.append(0)
        velocity = output[0].clone()
        velocity[1:] *= float("nan") if len(calls) > 8 else 1.0
        return (velocity, *output[1:])

    hook = pipe.transformer.register_forward_hook(spoil)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWarning)
            with layercache.enabled(pipe, PLANS[kind](pipe)) as cache:
                pictures = generate(pipe, steps=12)
    finally:
        hook.remove()
    assert torch.isfinite(pictures[0]).all() and not torch.isfinite(pictures[1]).any()
    assert not all(cache.decisions["cond"][7:])


# --- float16 ---------------------------------------------------------------------------------------------------------


def massive():
    """A FLUX in float16 whose stream begins at -40000 in one channel; two blocks add 40000 there each."""
    model, inputs = build("FluxTransformer2DModel", num_layers=3, num_single_layers=1)
    width = model.x_embedder.bias.shape[0]
    with torch.no_grad():
        model.x_embedder.bias[0] = -40000.0
        for block in model.transformer_blocks[1:]:
            block.norm1.linear.weight[5 * width] = 0.0  # the gate of the feed-forward in that channel
            block.norm1.linear.bias[5 * width] = 1.0
            block.ff.net[2].bias[0] = 40000.0
    halves = {k: v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return model.half(), halves


GROUPS = ((0, 1), (1, 3), (3, 4))
FIRST: dict = {0: 1.0}


def plans(model):
    rows = ((None,) * 3, (None, FIRST, FIRST), (FIRST, FIRST, None))
    whole = ((None,), (FIRST,), (FIRST,))
    return {
        "groups": schedule(model, *rows, groups=GROUPS),
        "all blocks": schedule(model, *whole, groups=((0, 4),)),
        "fbcache": FBCache(threshold=1e9, warmup=1),
        "fbcache, lagged": FBCache(threshold=1e9, warmup=1, sync="lagged"),
    }


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    from dataclasses import replace

    from layercache.models import registry

    for spec in registry.known_models():
        monkeypatch.setitem(registry._REGISTRY, spec.model_class, replace(spec, timestep=None))


@pytest.mark.parametrize("storage", ["same", "float32", "compact"])
@pytest.mark.parametrize("kind", ["groups", "all blocks", "fbcache", "fbcache, lagged"])
def test_residuals_that_float16_cannot_hold(kind, storage):
    model, inputs = massive()
    full = call(model, inputs)[0]
    assert torch.isfinite(full).all()
    cache = layercache.enable(model, plans(model)[kind], num_steps=3, storage=storage)
    step = stepping(cache, 3)
    found = [step(call, model, inputs)[0] for _ in range(6)]
    cache.check()
    layercache.disable(model)
    allowed = 0.3 if storage == "compact" else 0.02
    assert all((f - full).abs().max() <= allowed * full.abs().max() for f in found)
    assert cache.report().used < 1 and cache.storage.is_widened is (storage == "same")


@pytest.mark.slow
def test_a_compiled_graph_says_what_overflowed_and_goes_on_in_float32():
    model, inputs = massive()
    full = call(model, inputs)[0]
    model.compile(fullgraph=True, backend="eager")
    with layercache.enabled(model, plans(model)["groups"]) as cache:
        step = stepping(cache, 3)
        step(call, model, inputs)
        step(call, model, inputs)
        with pytest.raises(NonFiniteResidualError, match="may have overflowed float16.*stored in float32 from now on"):
            step(call, model, inputs)
        for _ in range(3):
            assert (step(call, model, inputs)[0] - full).abs().max() <= 0.02 * full.abs().max()
    assert cache.storage.is_widened


def test_a_model_that_gives_nan_in_float16_is_named_as_the_cause():
    model, inputs = massive()
    inputs["hidden_states"][1] = float("nan")
    layercache.enable(model, plans(model)["groups"])
    for _ in range(3):
        call(model, inputs)
    with pytest.raises(NonFiniteResidualError, match="in sample 1 of.*the model itself produced it"):
        layercache.runtime.attachment.attachment_of(model).router.check()
    layercache.disable(model)


def test_bad_samples_of_codes():
    before, after = torch.zeros(3, 2, 16), torch.randn(3, 2, 16)
    after[0, 1, 3], after[2, 0, 0] = float("nan"), float("inf")
    storage, buffer = Storage("compact"), Buffer()
    storage.allocate(buffer, after)
    storage.store([after], [before], [buffer], None)
    assert buffer.bad_samples() == {2}
    storage.store([after], [before], [buffer], torch.zeros(1, dtype=torch.int32))
    assert storage.bad_among([buffer]) == {0, 2} and storage.bad_among([]) == set()
