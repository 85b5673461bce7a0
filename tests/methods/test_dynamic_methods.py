"""Decisions and results of the dynamic methods against literal NumPy transcriptions of the published rules.

The cached run is watched by plain hooks; the transcription then decides from what was seen, and has to decide alike.
"""

import copy
import inspect
import pickle
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import CacheStateError, LayerCacheError, MethodError, NonFiniteResidualError, NonFiniteWarning
from layercache.methods.dicache import DiCache
from layercache.methods.easycache import EasyCache
from layercache.methods.fbcache import MASKS, DBCache, FBCache, steps_mask
from layercache.methods.seacache import SeaCache
from layercache.methods.sencache import SenCache
from layercache.methods.teacache import COEFFICIENTS, IDENTITY, SpectralCache, TeaCache, fit
from layercache.runtime.attachment import attachment_of
from layercache.runtime.dynamic import Reader
from layercache.runtime.policy import DynamicMethod
from support.marks import slow
from support.tiny import LAYERS, SlopeTransformer, calm_pipeline, generate, shifted_sigmas, tiny_pipeline
from support.watch import mean1, watched

STEPS = 12


@pytest.fixture(scope="module")
def pipe():
    return calm_pipeline()


@pytest.fixture(scope="module")
def full(pipe):
    return generate(pipe, steps=STEPS)


def check(cache, seen, literal, *args):
    """Same decisions in every branch, some of both kinds."""
    decided = set()
    for branch, arrays in seen.items():
        expected = literal(arrays, *args)
        assert cache.decisions[branch] == tuple(expected)
        decided |= set(expected)
    assert decided == {True, False}


def fbcache_literal(a, threshold, warmup):
    computed, reference = [], None
    for i in range(STEPS):
        p = a["y"][i] - a["h0"][i]
        if reference is None or i < warmup or mean1(p - reference) / mean1(reference) > threshold:
            computed.append(True)
            reference = p
        else:
            computed.append(False)
    return computed


@pytest.mark.parametrize("threshold, warmup", [(0.4, 0), (0.5, 3), (0.8, 0)])
def test_fbcache(pipe, threshold, warmup):
    seen, cache, _ = watched(pipe, FBCache(threshold=threshold, warmup=warmup))
    check(cache, seen, fbcache_literal, threshold, warmup)
    for a in seen.values():
        residual = None
        for i, computed in enumerate(fbcache_literal(a, threshold, warmup)):
            if computed:
                residual = a["h"][i] - a["y"][i]
            np.testing.assert_allclose(a["h"][i], a["y"][i] + residual, atol=2e-5)


def dbcache_literal(a, m):
    computed, reference, cached, row = [], None, 0, 0
    for i in range(STEPS):
        p = a["y"][i] - a["h0"][i]
        d = np.inf if reference is None else mean1(p - reference) / mean1(reference)
        reuse = (
            reference is not None
            and m.threshold > 0
            and (d < m.threshold or m.threshold >= 1)
            and i >= m.warmup
            and (m.max_cached == -1 or cached < m.max_cached)
            and (m.max_consecutive == -1 or row < m.max_consecutive)
        )
        computed.append(not reuse)
        cached, row = cached + reuse, row + 1 if reuse else 0
        reference = reference if reuse else p
    return computed


@pytest.mark.parametrize(
    "method",
    [
        DBCache(front=2, back=1, warmup=2, threshold=0.5),
        DBCache(front=1, warmup=1, threshold=1.0, max_consecutive=2),
        DBCache(front=3, back=2, warmup=0, threshold=0.9, max_cached=3),
    ],
)
def test_dbcache(pipe, method):
    seen, cache, _ = watched(pipe, method, probe=method.front)
    check(cache, seen, dbcache_literal, method)


def test_dbcache_thresholds_at_the_ends(pipe, full):
    with layercache.enabled(pipe, DBCache(front=1, threshold=0.0)) as cache:
        assert torch.equal(generate(pipe, steps=STEPS), full)
    assert all(map(all, cache.decisions.values()))
    with layercache.enabled(pipe, DBCache(front=1, threshold=1.0, warmup=3)) as cache:
        generate(pipe, steps=STEPS)
    assert set(cache.decisions.values()) == {(True,) * 3 + (False,) * (STEPS - 3)}


def test_dbcache_mask(pipe):
    mask = (1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1)
    with layercache.enabled(pipe, DBCache(front=1, warmup=0, mask=mask)) as cache:
        generate(pipe, steps=STEPS)
    assert cache.decisions["cond"] == tuple(map(bool, mask))
    slow = "11111111 0 111 00 111 00 11 00 1 000 1".replace(" ", "")
    assert "".join(map(str, steps_mask(*MASKS["slow"]))) == slow
    assert all(len(steps_mask(*lengths)) == 28 for lengths in MASKS.values())


def teacache_literal(a, threshold, coefficients, warmup=1):
    computed, total, before = [], 0.0, None
    for i in range(STEPS):
        m = a["M"][i]
        if i < max(1, warmup) or i == STEPS - 1:
            compute, total = True, 0.0
        else:
            total += max(0.0, np.poly1d(coefficients)(mean1(m - before) / mean1(before)))
            compute = not total < threshold
            total = 0.0 if compute else total
        computed.append(compute)
        before = m
    return computed


@pytest.mark.parametrize("coefficients", [IDENTITY, (4.0, -1.0, 0.5, 0.01)])
def test_teacache(pipe, coefficients):
    method = TeaCache(threshold=0.15, coefficients=coefficients)
    seen, cache, _ = watched(pipe, method)
    check(cache, seen, teacache_literal, 0.15, coefficients)
    for a in seen.values():
        residual = None
        for i, computed in enumerate(teacache_literal(a, 0.15, coefficients)):
            if computed:
                residual = a["h"][i] - a["h0"][i]
            np.testing.assert_allclose(a["h"][i], a["h0"][i] + residual, atol=2e-5)


def spectralcache_literal(a, m):
    computed, total, row, before = [], 0.0, 0, None
    for i in range(STEPS):
        z = a["M"][i]
        if i in (0, STEPS - 1):
            computed.append(True)
            total, row, before = 0.0, 0, z
            continue
        s = m.least + (m.most - m.least) * (1 - np.cos(2 * np.pi * i / STEPS)) / 2
        limit = m.threshold * s
        cut = int(m.low_share * z.shape[-1])
        low, high = (mean1(z[..., k] - before[..., k]) / mean1(before[..., k]) for k in (slice(cut), slice(cut, None)))
        total += max(0.0, np.poly1d(m.coefficients)(mean1(z - before) / mean1(before)))
        skip = total < limit and row < m.max_consecutive and low <= 0.8 * limit and high <= 1.5 * limit
        computed.append(not skip)
        total, row = (total, row + 1) if skip else (0.0, 0)
        before = z
    return computed


@pytest.mark.parametrize("threshold, share", [(0.2, 0.5), (0.1, 0.25), (0.6, 0.5)])
def test_spectralcache(pipe, threshold, share):
    method = SpectralCache(threshold=threshold, coefficients=IDENTITY, low_share=share)
    seen, cache, _ = watched(pipe, method)
    check(cache, seen, spectralcache_literal, method)


def dicache_literal(a, m):
    """Decisions, and what the stream behind the last block is where it was extended."""
    computed, streams, total = [], [], 0.0
    residuals, probes = [], []
    for i in range(STEPS):
        h0, y = a["h0"][i], a["y"][i]
        compute = True
        if i > int(m.retention * STEPS) and i < STEPS - 1:
            dx = mean1(h0 - a["h0"][i - 1]) / mean1(a["h0"][i - 1])
            dy = mean1(y - a["y"][i - 1]) / mean1(a["y"][i - 1])
            total += dy if m.mode == "delta_y" else abs(dy - dx)
            compute = not total < m.threshold
        if compute:
            total = 0.0
            residuals.append(a["h"][i] - h0)
            probes.append(y - h0)
            streams.append(None)
        elif len(residuals) > 1:
            gamma = np.clip(mean1(y - h0 - probes[-2]) / mean1(probes[-1] - probes[-2]), 1.0, 1.5)
            streams.append(h0 + residuals[-2] + gamma * (residuals[-1] - residuals[-2]))
        else:
            streams.append(h0 + residuals[-1])
        computed.append(compute)
    return computed, streams


@pytest.mark.parametrize(
    "method",
    [
        DiCache(threshold=0.15, retention=0.1),
        DiCache(threshold=0.04, mode="delta_minus", retention=0.0, probe_blocks=2),
    ],
)
def test_dicache(pipe, method):
    seen, cache, _ = watched(pipe, method, probe=method.probe_blocks)
    check(cache, seen, lambda a: dicache_literal(a, method)[0])
    for a in seen.values():
        for found, expected in zip(a["h"], dicache_literal(a, method)[1], strict=True):
            if expected is not None:
                np.testing.assert_allclose(found, expected, atol=3e-5)


def easycache_literal(x, v, sigmas, m):
    """Of latents and guided velocities as taken, per step."""
    computed, total, steps = [], 0.0, []
    for i in range(STEPS):
        compute = i < m.warmup or i >= STEPS - m.cooldown or len(steps) < 2
        if not compute:
            a, b = steps[-1], steps[-2]
            k = mean1(v[a] - v[b]) / mean1(x[a] - x[b])
            total += k * mean1(x[i] - x[i - 1]) / mean1(v[a])
            compute = not total < m.threshold
        if compute:
            total = 0.0
            steps.append(i)
        else:
            np.testing.assert_allclose(v[i], x[i] + (v[steps[-1]] - x[steps[-1]]), atol=2e-5)
        computed.append(compute)
    return computed


@pytest.mark.parametrize("threshold, warmup, cooldown", [(0.08, 3, 1), (0.3, 2, 0)])
def test_easycache(pipe, threshold, warmup, cooldown):
    method = EasyCache(threshold=threshold, warmup=warmup, cooldown=cooldown)
    latents, taken = [], []
    original = pipe.scheduler.step

    def step(velocity, timestep, sample, *args, **kwargs):
        latents.append(sample.double().numpy().copy())
        taken.append(velocity.double().numpy().copy())
        return original(velocity, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = step
    try:
        with layercache.enabled(pipe, method) as cache:
            generate(pipe, steps=STEPS)
        assert pipe.scheduler.step is step  # what was there before is there again
    finally:
        del pipe.scheduler.__dict__["step"]
    expected = easycache_literal(latents, taken, shifted_sigmas(STEPS), method)
    assert cache.decisions["cond"] == cache.decisions["uncond"] == tuple(expected)
    assert set(expected) == {True, False}


EVERY = [
    FBCache(threshold=0.4),
    FBCache(threshold=0.5, order=1),
    FBCache(threshold=0.5, order=2, warmup=3),
    FBCache(threshold=0.5, sync="lagged"),
    FBCache(threshold=0.5, per_branch=False),
    DBCache(front=2, back=1, warmup=2, threshold=0.6),
    DBCache(front=2, back=2, warmup=2, threshold=0.6, order=1),
    TeaCache(threshold=0.15, coefficients=IDENTITY),
    TeaCache(threshold=0.15, coefficients=IDENTITY, order=1),
    SpectralCache(threshold=0.3, coefficients=IDENTITY),
    SeaCache(threshold=0.2, order=1),
    SeaCache(threshold=0.5, indicator="latents"),
    SenCache(threshold=0.3, sensitivities=((0.5, 0.5, 1.0),)),
    DiCache(threshold=0.15, retention=0.1),
    DiCache(threshold=0.15, retention=0.1, per_branch=False),
    EasyCache(threshold=0.3, warmup=3),
]


# One of each name daily.
DAILY = list({method.name: method for method in reversed(EVERY)}.values())
OTHERS = [method for method in EVERY if method not in DAILY]
every = pytest.mark.parametrize("method", [*DAILY, *slow(*OTHERS)], ids=repr)


@every
def test_an_exported_schedule_gives_the_same_bits(pipe, full, method):
    with layercache.enabled(pipe, method) as cache:
        first = generate(pipe, steps=STEPS)
        second = generate(pipe, steps=STEPS)
        assert cache.report().generations == 2 and cache.report().cache_bytes > 0
    assert torch.equal(first, second)
    schedule = cache.export_schedule()
    kinds = {computed for row in cache.decisions.values() for computed in row}
    assert kinds == {True, False}
    assert not schedule.is_timed  # its weights are numbers of blocks
    loaded = layercache.Schedule.from_json(schedule.to_json())
    with layercache.enabled(pipe, loaded):
        assert torch.equal(generate(pipe, steps=STEPS), first)
    assert not torch.equal(first, full)
    assert torch.equal(generate(pipe, steps=STEPS), full)
    assert attachment_of(pipe.transformer) is None


@every
def test_a_forward_on_its_own_computes_everything(pipe, full, method):
    """After another shape, and from the middle of a run, nothing stale is read."""
    if method.name == "easycache":
        pytest.skip("it decides by the latents of all pictures together")
    with layercache.enabled(pipe, method) as cache:
        generate(pipe, steps=STEPS)
        single = generate(pipe, prompts=["rocket"], steps=STEPS, seed=7)
        with_fresh = cache.decisions
    with layercache.enabled(pipe, method) as cache:
        assert torch.equal(generate(pipe, prompts=["rocket"], steps=STEPS, seed=7), single)
        assert cache.decisions == with_fresh


def test_lagged_decisions_use_what_was_seen_a_step_before():
    reader = Reader("lagged")
    values = [torch.tensor([float(k)]) for k in range(4)]
    assert [reader.read(v) for v in values] == [None, [0.0], [1.0], [2.0]]
    assert reader.read(None) == [3.0]
    assert reader.read(values[0]) is None
    assert Reader("step").read(values[2]) == [2.0]


def test_a_branch_that_follows_decides_like_the_first(pipe):
    with layercache.enabled(pipe, FBCache(threshold=0.5, per_branch=False)) as cache:
        generate(pipe, steps=STEPS)
    assert cache.decisions["cond"] == cache.decisions["uncond"]


def test_one_small_transfer_per_decision(pipe, monkeypatch):
    """No other host synchronisation: on the CPU what would be one is a call of tolist, item or bool."""
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(tuple(t.shape)) or original(t))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("item() in the hot path"))
    method = FBCache(threshold=0.5, warmup=2)
    with layercache.enabled(pipe, method) as cache:
        cache._flag = None
        monkeypatch.setattr(type(cache), "check", lambda self: None)
        reads.clear()
        generate(pipe, steps=STEPS)
    small = [shape for shape in reads if shape == (7,)]
    assert len(small) == 2 * (STEPS - 2)


def test_numbers_that_are_not_finite_are_never_small(pipe):
    decider = FBCache(threshold=0.5).decider(None)
    assert not decider.may_reuse(3, [np.nan] * 7)
    assert not decider.may_reuse(3, [0.0] * 7)
    poisoned = pipe.transformer.transformer_blocks[LAYERS - 1].img_mlp.net[2].bias
    kept = poisoned.detach().clone()
    with torch.no_grad():
        poisoned[0] = float("nan")
    try:
        with layercache.enabled(pipe, FBCache(threshold=0.5)) as cache:
            with pytest.warns(NonFiniteWarning, match="samples? 0, 1 of the batch"):
                generate(pipe, steps=4)
            with pytest.raises(NonFiniteResidualError):
                cache.check()
    finally:
        with torch.no_grad():
            poisoned.copy_(kept)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FBCache(threshold=-1), "threshold"),
        (lambda: FBCache(threshold=float("nan")), "threshold"),
        (lambda: FBCache(order=9), "order"),
        (lambda: FBCache(sync="never"), "sync"),
        (lambda: DBCache(front=0), "front"),
        (lambda: DBCache(mask=(0, 1)), "mask"),
        (lambda: DBCache(max_cached=-2), "max_cached"),
        (lambda: TeaCache(coefficients="no-such-model"), "no coefficients"),
        (lambda: TeaCache(coefficients=(1.0, float("inf"))), "finite"),
        (lambda: SpectralCache(low_share=1.0), "low_share"),
        (lambda: SpectralCache(least=2.0), "most"),
        (lambda: SeaCache(indicator="output"), "indicator"),
        (lambda: SeaCache(power=0.0), "power"),
        (lambda: SenCache(early_share=1.5), "early_share"),
        (lambda: SenCache(sensitivities=((0.5, 1.0, -1.0),)), "rows"),
        (lambda: DiCache(mode="delta"), "mode"),
        (lambda: DiCache(order=1), "order"),
        (lambda: DiCache(retention=2), "retention"),
        (lambda: EasyCache(warmup=0), "warmup"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(MethodError, match=message):
        make()


@pytest.mark.parametrize(
    "kind, given, text",
    [
        (FBCache, (0.3,), "FBCache(threshold=0.3); there are threshold, warmup, order, sync, per_branch"),
        (DBCache, (1, 4), "DBCache(threshold=1); there are threshold, warmup, front, back, max_cached"),
        (TeaCache, ("flux",), "TeaCache(threshold=0.25); there are threshold, coefficients, warmup, cooldown"),
        (SpectralCache, (0.6,), "SpectralCache(threshold=0.6); there are threshold, least, most"),
        (DiCache, (0.4,), "DiCache(threshold=0.4); there are threshold, retention, mode, probe_blocks, order"),
        (EasyCache, (object(),), "EasyCache(threshold=0.05); there are threshold, warmup"),
    ],
)
def test_settings_without_their_name_are_refused(kind, given, text):
    with pytest.raises(MethodError) as caught:
        kind(*given)
    assert str(caught.value).startswith(f"give the settings of {kind.__name__} by name, such as {text}")


@pytest.mark.parametrize("kind", [FBCache, DBCache, TeaCache, SpectralCache, SeaCache, SenCache, DiCache, EasyCache])
def test_methods_are_copied_shown_and_changed_as_dataclasses(kind):
    method = kind(threshold=0.7)
    assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method
    assert eval(repr(method)) == method and "threshold=0.7" in repr(method)
    assert replace(method, threshold=0.2) == kind(threshold=0.2) != method
    parameters = inspect.signature(kind).parameters
    assert list(parameters) == [field.name for field in fields(kind)]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())


def test_a_policy_of_ones_own_may_take_its_own_settings_by_position():
    @dataclass(frozen=True)
    class Own(DynamicMethod):
        cosine: float = 0.99

        def decider(self, run):
            raise NotImplementedError

    assert (Own(0.5).cosine, Own(0.5).order) == (0.5, 0)
    with pytest.raises(TypeError):
        Own(0.5, 1)


def test_what_cannot_work_on_a_model_is_refused_before_any_compute(pipe):
    with pytest.raises(MethodError, match="nothing is left to skip"):
        layercache.enable(pipe, DBCache(front=LAYERS))
    with pytest.raises(MethodError, match="fit"):
        layercache.enable(pipe, TeaCache())  # none are published for Qwen-Image
    layercache.register_model(layercache.ModelSpec("SlopeTransformer", timestep=None))
    bare = SlopeTransformer()
    with pytest.raises(MethodError, match="modulated input"):
        layercache.enable(bare, TeaCache(coefficients=IDENTITY))
    with pytest.raises(MethodError, match="num_steps"):
        layercache.enable(bare, DiCache())
    with pytest.raises(MethodError, match="Euler"):
        layercache.enable(bare, EasyCache())
    assert attachment_of(bare) is None and attachment_of(pipe.transformer) is None


def test_a_bare_transformer_without_scheduler():
    layercache.register_model(layercache.ModelSpec("SlopeTransformer", timestep="timestep"))
    bare = SlopeTransformer()
    x, text = torch.randn(1, 8, 16), torch.randn(1, 3, 16)
    with torch.no_grad(), layercache.enabled(bare, FBCache(threshold=2.0, warmup=2), num_steps=5) as cache:
        for sigma in (1.0, 0.8, 0.6, 0.4, 0.2):
            bare(x, text, timestep=torch.tensor(sigma))
        assert cache.decisions == {"call 0": (True, True, False, False, False)}
        with pytest.raises(CacheStateError, match="noise levels"):
            cache.export_schedule()
        bare(x, text, timestep=torch.tensor(1.0))
        assert cache.decisions == {"call 0": (True,)}


def test_one_graph_cannot_hold_a_decision(pipe):
    compiled = torch.compile(pipe.transformer, backend="eager")
    whole = replace_transformer(pipe, compiled)
    with layercache.enabled(whole, FBCache()), pytest.raises(CacheStateError, match="compile_repeated_blocks"):
        generate(whole, steps=4)


def replace_transformer(pipe, transformer):
    import copy

    other = copy.copy(pipe)
    other.__dict__["transformer"] = transformer
    return other


def test_fitted_coefficients_are_the_least_squares_polynomial(pipe):
    call = {"num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "latent"}
    coefficients, pairs = fit(pipe, ["cat", "rocket"], degree=3, **call)
    assert pairs.shape == (2 * 2 * 7, 2) and (pairs > 0).all()
    expected = np.polyfit(pairs[:, 0], pairs[:, 1], 3)
    np.testing.assert_allclose(coefficients, expected, rtol=1e-6)
    with layercache.enabled(pipe, TeaCache(threshold=0.1, coefficients=coefficients)):
        generate(pipe, steps=8)
    with pytest.raises(LayerCacheError, match="too few"):
        fit(pipe, ["cat"], degree=20, **call)


def test_published_coefficients_are_taken_as_they_are():
    assert all(len(c) == 5 for c in COEFFICIENTS.values())
    assert COEFFICIENTS["flux"][0] == 498.651651 and COEFFICIENTS["flux"][-1] == 0.264230861
    assert TeaCache().for_model("FluxTransformer2DModel").coefficients == COEFFICIENTS["flux"]
    named = replace(TeaCache(), coefficients="mochi").for_model("Anything")
    assert named.rescaled(0.1) == pytest.approx(max(0.0, np.polyval(COEFFICIENTS["mochi"], 0.1)))
    assert TeaCache(coefficients=(1.0, -5.0)).rescaled(1.0) == 0.0


def test_compiled_blocks(full):
    """One graph for all blocks, no more of them with the cache on."""
    other = tiny_pipeline()
    torch._dynamo.reset()
    other.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    uncached = generate(other, steps=STEPS)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with layercache.enabled(other, DBCache(front=1, threshold=1.0, warmup=3)) as cache:
        first = generate(other, steps=STEPS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert set(cache.decisions["cond"]) == {True, False}
    with layercache.enabled(other, cache.export_schedule()):
        assert torch.equal(generate(other, steps=STEPS), first)
    assert not torch.equal(first, uncached)
