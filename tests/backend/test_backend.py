"""Our ops for other caches: the primitives, and what diffusers' and cache-dit's own caches do on them."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig, first_block_cache, taylorseer_cache
from typer.testing import CliRunner

from layercache import backend
from layercache.backend import patching, primitives
from layercache.errors import CacheStateError, MissingExtraError, OpInputError, UnsupportedModelError
from layercache.tools.cli.app import app
from support.forwards import call
from support.marks import slow
from support.peers import STEPS, TOLERANCE, full_size_counts, peer
from support.tiny import generate
from support.zoo import build

HAS_CACHE_DIT = importlib.util.find_spec("cache_dit") is not None
needs_cache_dit = pytest.mark.skipif(not HAS_CACHE_DIT, reason="cache-dit is not installed")

SNAPSHOT = {
    "align": "(x: 'Tensor', y: 'Tensor', probes: 'Sequence[Tensor]', residuals: 'Sequence[Tensor]') -> 'Tensor'",
    "apply_residual": "(stream: 'Tensor', residual: 'Tensor', result: 'Tensor | None' = None) -> 'Tensor'",
    "apply_residuals": "(streams: 'Sequence[Tensor]', residuals: 'Sequence[Tensor]', "
    "results: 'Sequence[Tensor] | None' = None) -> 'list[Tensor]'",
    "capture": "(outputs: 'Sequence[Tensor]', inputs: 'Sequence[Tensor]', residuals: 'Sequence[Tensor] | None' = None) "
    "-> 'list[Tensor]'",
    "change": "(previous: 'Tensor', current: 'Tensor', kind: 'str' = 'l1') -> 'Tensor'",
    "changes": "(previous: 'Sequence[Tensor]', current: 'Sequence[Tensor]', kind: 'str' = 'l1') -> 'Tensor'",
    "probe": "(output: 'Tensor', before: 'Tensor', previous: 'Tensor | None' = None, residual: 'Tensor | None' = None) "
    "-> 'tuple[Tensor, Tensor | None]'",
    "read_later": "(tensor: 'Tensor') -> 'Pending'",
    "accelerate": "(package: 'str', sync: 'str' = 'step') -> 'Acceleration'",
    "accelerated": "(package: 'str', sync: 'str' = 'step') -> 'Iterator[None]'",
}


# --- primitives --------------------------------------------------------------------------------------------------


def test_the_interface_is_the_promised_one():
    """A change here asks for another number in API_VERSION."""
    assert backend.API_VERSION == "1.1"
    assert {name: str(inspect.signature(getattr(backend, name))) for name in SNAPSHOT} == SNAPSHOT
    assert set(backend.__all__) == set(SNAPSHOT) | {
        "API_VERSION",
        "KINDS",
        "NewtonForecaster",
        "Pending",
        "TaylorForecaster",
        "mean_velocity",
        "modulate",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes(dtype):
    a, b = torch.randn(2, 3, 7, 16).to(dtype)
    joined = torch.cat([a, b], dim=1)
    x, y = a.double(), b.double()
    expected = {
        "l1": (x - y).abs().mean() / x.abs().mean(),
        "l2": (x - y).norm() / x.norm(),
        "cosine": 1 - (x * y).sum() / (x.norm() * y.norm()),
    }
    for kind, value in expected.items():
        assert float(backend.change(a, b, kind)) == pytest.approx(float(value), rel=1e-5)
        many = backend.changes([a, joined[:, :7]], [b, joined[:, 7:]], kind)
        assert many.shape == (2,) and many.tolist() == pytest.approx([float(value)] * 2, rel=1e-5)
    with pytest.raises(OpInputError, match="l1, l2, cosine"):
        backend.change(a, b, "l3")


def test_probe_is_subtraction_and_change_in_one():
    before, output, previous = torch.randn(3, 2, 5, 8)
    residual, nothing = backend.probe(output, before)
    assert torch.equal(residual, output - before) and nothing is None
    residual, change = backend.probe(output, before, previous)
    expected = ((output - before) - previous).abs().mean() / previous.abs().mean()
    assert torch.equal(residual, output - before) and float(change) == pytest.approx(float(expected), rel=1e-5)
    kept = previous.clone()
    same, again = backend.probe(output, before, kept, residual=kept)
    assert same is kept and torch.equal(kept, residual) and again == change


def test_residuals_of_slices_in_place():
    joined, stored = torch.randn(1, 9, 8), torch.randn(1, 6, 8)
    expected = joined.clone()
    expected[:, 3:] += stored
    image = joined[:, 3:]
    assert backend.apply_residual(image, stored, image) is image
    assert torch.equal(joined, expected)
    (residual,) = backend.capture([expected[:, 3:]], [torch.zeros(1, 6, 8)])
    assert torch.equal(residual, expected[:, 3:])


def test_reading_later():
    pending = backend.read_later(torch.tensor([1.5, 2.0]))
    assert pending.ready() and pending.value() == [1.5, 2.0]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_forecaster_follows_the_recursion(order):
    """Against the published recursion written out in NumPy, with uneven gaps between the computed steps."""
    computed, rng = [0, 1, 3, 6, 7], np.random.default_rng(order)
    values = {step: rng.standard_normal((1, 4, 8)) for step in computed}
    forecaster, factors, last = backend.TaylorForecaster(order), [], None
    with pytest.raises(OpInputError, match="call update first"):
        forecaster.approximate()
    for step in range(11):
        forecaster.mark_step_begin()
        if step in values:
            fresh = [values[step]]
            for q in range(min(len(factors), order)):
                fresh.append((fresh[q] - factors[q]) / (step - last))
            factors, last = fresh, step
            forecaster.update(torch.from_numpy(values[step]).float())
        offset = step - last
        expected = sum(offset**q / float(np.prod(range(1, q + 1))) * f for q, f in enumerate(factors))
        np.testing.assert_allclose(forecaster.approximate().numpy(), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(OpInputError, match="twice"):
        (
            forecaster.update(torch.zeros(1, 4, 8)),
            forecaster.update(torch.zeros(1, 4, 8)),
            forecaster.update(torch.zeros(1, 4, 8)),
        )
    forecaster.mark_step_begin()
    forecaster.update(torch.zeros(1, 2, 8))  # another shape: from the beginning
    assert torch.equal(forecaster.approximate(), torch.zeros(1, 2, 8))
    forecaster.reset()
    assert forecaster.step == -1


@pytest.mark.parametrize("order", range(6))
def test_newtons_forecaster_is_exact_for_polynomials_between_any_positions(order):
    """Against NumPy's polynomial of that degree, at noise levels that are not evenly spaced."""
    rng = np.random.default_rng(order)
    sigmas = 1.0 - np.cumsum(rng.uniform(0.02, 0.1, 12))
    coefficients = rng.standard_normal((order + 1, 4 * 8))
    computed = {0, 1, 3, 4, 6, 7}

    def value(sigma):
        return np.polynomial.polynomial.polyval(sigma, coefficients).reshape(1, 4, 8)

    forecaster = backend.NewtonForecaster(order, torch.float32)
    for step, sigma in enumerate(sigmas):
        forecaster.mark_step_begin(sigma)
        if step in computed:
            forecaster.update(torch.from_numpy(value(sigma)).float())
        if len([s for s in computed if s <= step]) > order:
            np.testing.assert_allclose(forecaster.approximate().numpy(), value(sigma), rtol=1e-2, atol=2e-3)
    with pytest.raises(OpInputError, match="twice at position"):
        forecaster.mark_step_begin(sigmas[7])
        forecaster.update(torch.zeros(1, 4, 8))
    forecaster.mark_step_begin(0.0)
    forecaster.update(torch.zeros(1, 2, 8))  # another shape: from the beginning
    forecaster.mark_step_begin(-0.1)
    assert torch.equal(forecaster.approximate(), torch.zeros(1, 2, 8))
    forecaster.reset()
    forecaster.mark_step_begin()
    assert forecaster.position == 0.0


@pytest.mark.parametrize("position", [float("nan"), float("inf"), -float("inf"), "0.5 or so", torch.zeros(2)])
def test_positions_that_are_no_number_are_refused_before_anything_changes(position):
    forecaster = backend.NewtonForecaster(1, torch.float32)
    for at, value in ((1.0, 0.0), (0.5, 1.0)):
        forecaster.mark_step_begin(at)
        forecaster.update(torch.full((1, 2, 8), value))
    with pytest.raises(OpInputError, match="the position of a step must be a finite number, such as its sigma; got"):
        forecaster.mark_step_begin(position)
    assert (forecaster.step, forecaster.position) == (1, 0.5)
    forecaster.mark_step_begin(torch.tensor(0.25))
    assert torch.equal(forecaster.approximate(), torch.full((1, 2, 8), 1.5))


# --- diffusers ---------------------------------------------------------------------------------------------------


def snapshot() -> list:
    owners = [
        first_block_cache.FBCHeadBlockHook,
        first_block_cache.FBCBlockHook,
        taylorseer_cache.TaylorSeerState,
    ]
    return [dict(vars(owner)) for owner in owners]


@pytest.mark.parametrize(
    "config, block",
    [
        (FirstBlockCacheConfig(threshold=0.35), 1),
        (
            TaylorSeerCacheConfig(
                cache_interval=4, max_order=1, taylor_factors_dtype=torch.float32, use_lite_mode=True
            ),
            0,
        ),
        *slow(
            (FirstBlockCacheConfig(threshold=0.1), 1),
            (TaylorSeerCacheConfig(cache_interval=3, max_order=1, taylor_factors_dtype=torch.float32), 0),
            (TaylorSeerCacheConfig(cache_interval=3, max_order=2, taylor_factors_dtype=torch.float32), 0),
        ),
    ],
    ids=["fbc 0.35", "taylor lite", "fbc 0.1", "taylor 1", "taylor 2"],
)
def test_diffusers_caches_decide_and_give_the_same(pipe, config, block):
    before = snapshot()
    expected, decisions = peer(pipe, config, block)
    with backend.accelerated("diffusers"):
        assert snapshot() != before
        found, same = peer(pipe, config, block)
    assert snapshot() == before and not patching._active
    assert same == decisions
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1)
    again, _ = peer(pipe, config, block)
    assert torch.equal(again, expected)


CLASSES = ["FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"]


@pytest.mark.parametrize("name", [*CLASSES, "HunyuanVideoTransformer3DModel"])  # the last has a transposed stream
@pytest.mark.parametrize("kind", ["fbc", "taylor"])
def test_diffusers_caches_on_other_classes(name, kind):
    model, inputs = build(name)
    config = (
        FirstBlockCacheConfig(threshold=0.3)
        if kind == "fbc"
        else TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32)
    )

    def run() -> list[torch.Tensor]:
        model.enable_cache(config)
        try:
            found = []
            for step in range(6):
                with model.cache_context("cond"):
                    changed = inputs | {"timestep": inputs["timestep"] * (1 - 0.01 * step)}
                    found.append(call(model, changed)[0])
            return found
        finally:
            model.disable_cache()

    expected = run()
    with backend.accelerated("diffusers"):
        found = run()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
def test_full_size_operators_of_diffusers_caches(pipe):
    """Two instead of seven for a first-block cache, computing or reusing; one instead of seven per Taylor tensor."""
    config = FirstBlockCacheConfig(threshold=0.35)
    pipe.transformer.enable_cache(config)
    theirs, _ = full_size_counts(pipe)
    pipe.transformer.disable_cache()
    with backend.accelerated("diffusers"):
        pipe.transformer.enable_cache(config)
        calls, ours = full_size_counts(pipe)
        pipe.transformer.disable_cache()
    of_the_model = [all_ - own for all_, own in zip(calls, ours, strict=True)]
    assert len(set(of_the_model)) == 2, "both computing and reusing steps"
    for at in range(2, len(calls)):  # the first step compares nothing
        assert ours[at] == 2 and theirs[at] - of_the_model[at] == 7


@pytest.mark.slow
def test_full_size_operators_of_a_taylor_prediction(pipe):
    config = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3, taylor_factors_dtype=torch.float32)
    _, decisions = peer(pipe, config, 0)
    counts = []
    for context in (nullcontext(), backend.accelerated("diffusers")):
        with context:
            pipe.transformer.enable_cache(config)
            counts.append(full_size_counts(pipe))
            pipe.transformer.disable_cache()
    (theirs, _), (calls, ours) = counts
    cached = [2 * step for step, computed in enumerate(decisions["cond"]) if not computed]
    for at in cached:
        assert ours[at] and theirs[at] - (calls[at] - ours[at]) == 7 * ours[at]


def reads_of(pipe, config) -> int:
    from layercache.tools.compare.run import Counter

    pipe.transformer.enable_cache(config)
    try:
        with Counter() as counter:
            generate(pipe, steps=STEPS)
    finally:
        pipe.transformer.disable_cache()
    return counter.reads


def test_one_read_per_decision_and_none_that_waits(pipe, monkeypatch):
    config = FirstBlockCacheConfig(threshold=0.35)
    theirs = reads_of(pipe, config)
    with backend.accelerated("diffusers"):
        assert reads_of(pipe, config) <= theirs
    waits = []
    for name in ("item", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, original=original):
            if sys._getframe(1).f_globals["__name__"].startswith("layercache.backend"):
                waits.append(tensor)
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, counted)
    found = {}
    for sync in ("step", "lagged"):
        waits.clear()
        with backend.accelerated("diffusers", sync=sync):
            pipe.transformer.enable_cache(config)
            found[sync] = generate(pipe, steps=STEPS)
            pipe.transformer.disable_cache()
        assert bool(waits) is (sync == "step")
    assert torch.isfinite(found["lagged"]).all()


def test_wrong_use_of_accelerate(monkeypatch):
    with pytest.raises(UnsupportedModelError, match="diffusers, cache-dit"):
        backend.accelerate("xdit")
    with pytest.raises(CacheStateError, match="step or lagged"):
        backend.accelerate("diffusers", sync="never")
    made = backend.accelerate("diffusers")
    with pytest.raises(CacheStateError, match="already"):
        backend.accelerate("diffusers")
    made.undo()
    with pytest.raises(CacheStateError, match="undone already"):
        made.undo()
    monkeypatch.setattr(patching.importlib.metadata, "version", lambda name: "0.99.0")
    with pytest.raises(UnsupportedModelError, match=r"0.99.0 is not known.*0.41.x and 0.42.x"):
        backend.accelerate("diffusers")

    def missing(name):
        raise patching.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(patching.importlib.metadata, "version", missing)
    with pytest.raises(MissingExtraError, match="pip install cache-dit"):
        backend.accelerate("cache-dit")


# --- cache-dit ---------------------------------------------------------------------------------------------------


@contextmanager
def db_cache(pipe, threshold=0.3, front=1, back=0, taylor=False, warmup=2):
    import cache_dit

    adapter = cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=pipe.transformer.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_1,
        has_separate_cfg=True,
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=front,
        Bn_compute_blocks=back,
        residual_diff_threshold=threshold,
        max_warmup_steps=warmup,
        enable_separate_cfg=True,
        num_inference_steps=STEPS,
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
    try:
        yield
    finally:
        cache_dit.disable_cache(adapter)


def through_cache_dit(pipe, **options):
    ran = []
    blocks = list(pipe.transformer.transformer_blocks)
    hooks = [
        blocks[0].attn.register_forward_pre_hook(lambda *_: ran.append(False)),
        blocks[5].attn.register_forward_pre_hook(lambda *_: ran.__setitem__(-1, True)),
    ]
    try:
        with db_cache(pipe, **options):
            return generate(pipe, steps=STEPS), ran
    finally:
        for hook in hooks:
            hook.remove()


@needs_cache_dit
@pytest.mark.parametrize(
    "options",
    [{"front": 2, "back": 1}, {"taylor": True, "warmup": 4}, *slow({}, {"threshold": 0.15, "taylor": True})],
    ids=str,
)
def test_cache_dit_decides_and_gives_the_same(pipe, options):
    from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

    before = dict(vars(CachedContextManager))
    expected, decisions = through_cache_dit(pipe, **options)
    assert {True, False} == set(decisions)
    with backend.accelerated("cache-dit"):
        assert dict(vars(CachedContextManager)) != before
        found, same = through_cache_dit(pipe, **options)
    assert dict(vars(CachedContextManager)) == before
    assert same == decisions
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1)


@pytest.mark.slow
@needs_cache_dit
def test_full_size_operators_of_cache_dit(pipe):
    def counts():
        with db_cache(pipe):
            return full_size_counts(pipe, pipe.transformer.transformer_blocks[0].attn)

    theirs, _ = counts()
    with backend.accelerated("cache-dit"):
        calls, ours = counts()
    of_the_model = [all_ - own for all_, own in zip(calls, ours, strict=True)]
    assert len(set(of_the_model[:-1])) == 2, "both computing and reusing steps"
    for at in range(2 * 3, len(calls)):  # behind the warm-up
        assert ours[at] == 2 and theirs[at] - of_the_model[at] == 7


@needs_cache_dit
@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("kind", ["scalar", "float32", "tensor without dims", "one dim", "empty"])
def test_series_of_any_kind_in_cache_dits_expansion(kind, order):
    from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

    make = {
        "scalar": np.float64,
        "float32": np.float32,
        "tensor without dims": torch.tensor,
        "one dim": lambda value: torch.full((5,), float(value)),
        "empty": lambda value: torch.empty(2, 0),
    }[kind]

    def run():
        state = TaylorSeerState(n_derivatives=order, max_warmup_steps=2, skip_interval_steps=2)
        state.current_step = np.int64(-1)
        return [torch.as_tensor(state.step(make(np.sin(0.3 * k) + 0.1 * k))).double() for k in range(1, 11)]

    expected = run()
    with backend.accelerated("cache-dit"):
        found = run()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_cache_dit
def test_cache_dit_without_waiting(pipe):
    with backend.accelerated("cache-dit", sync="lagged"):
        found, decisions = through_cache_dit(pipe)
    assert torch.isfinite(found).all() and {True, False} == set(decisions)


# --- what diffusers' own tests ask of these caches, with our ops under them ------------------------------------


OWN = {
    "fbc": (FirstBlockCacheConfig(threshold=0.9), ("fbc_leader_block_hook", "fbc_block_hook")),
    "taylor": (
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32),
        ("taylorseer_cache",),
    ),
}


@pytest.fixture(
    params=[(kind, name) for kind in OWN for name in ("FluxTransformer2DModel", "QwenImageTransformer2DModel")]
)
def own(request):
    kind, name = request.param
    model, inputs = build(name)
    with backend.accelerated("diffusers"):
        yield (*OWN[kind], model, inputs)


def hooks_of(model, names) -> list:
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    return [r for r in registries if r is not None and any(r.get_hook(name) is not None for name in names)]


def test_own_enabled_state_and_enabling_twice(own):
    config, _, model, _ = own
    assert not model.is_cache_enabled
    model.enable_cache(config)
    assert model.is_cache_enabled
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        model.enable_cache(config)
    model.disable_cache()
    assert not model.is_cache_enabled


def test_own_hooks_inference_contexts_and_reset(own):
    config, names, model, inputs = own
    other = inputs | {"hidden_states": inputs["hidden_states"] + 0.1 * torch.randn_like(inputs["hidden_states"])}
    full = call(model, other)[0]
    model.enable_cache(config)
    assert hooks_of(model, names)
    with model.cache_context("cond"):
        for _ in range(3):
            call(model, inputs)
        cached = call(model, other)[0]
    assert torch.isfinite(cached).all() and (cached - full).abs().max() > 1e-5
    outputs = []
    for name in ("context_1", "context_2"):
        with model.cache_context(name):
            outputs.append(call(model, inputs)[0])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    model._reset_stateful_cache()
    model.disable_cache()
    assert not hooks_of(model, names)
    torch.testing.assert_close(call(model, other)[0], full, rtol=0, atol=0)


@pytest.mark.slow
def test_the_benchmark_of_peers(tmp_path):
    """On a small shape: the counts, which do not depend on it, and the files."""
    result = CliRunner().invoke(
        app,
        ["bench", "peers", "--shape", "1x64x32", "--dtype", "float32", "--rounds", "1", "--device", "cpu"]
        + ["--json", str(tmp_path / "peers.json"), "--plot", str(tmp_path / "peers.png")],
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    plain, fast = (
        {(row["mode"], row["reuses"]): row for row in rows if row["accelerated"] is which} for which in (False, True)
    )
    for reuses in (False, True):
        assert (plain["diffusers FBC", reuses]["operators"], plain["diffusers FBC", reuses]["passes"]) == (7, 15)
        assert (fast["diffusers FBC", reuses]["operators"], fast["diffusers FBC", reuses]["passes"]) == (2, 7)
        assert fast["diffusers FBC", reuses]["ours"] == 2 and fast["diffusers FBC", reuses]["reads"] == 1
    assert fast["diffusers Taylor", True]["operators"] == 1
    assert (tmp_path / "peers.png").stat().st_size > 1000


# --- cache-dit's six forward patterns, and a class with two lists of blocks --------------------------------------


class PatternBlock(torch.nn.Module):
    """Takes and returns the streams as one of cache-dit's patterns says."""

    def __init__(self, pattern: int, dim: int = 16):
        super().__init__()
        self.pattern = pattern
        self.image, self.text = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim)

    def forward(self, hidden_states, encoder_hidden_states=None):
        image = hidden_states + 0.1 * torch.tanh(self.image(hidden_states))
        text = hidden_states[:, :2] if encoder_hidden_states is None else encoder_hidden_states
        text = text + 0.1 * torch.tanh(self.text(text))
        return {0: (image, text), 1: (text, image), 2: image, 3: image, 4: (image, text), 5: (text, image)}[
            self.pattern
        ]


class PatternTransformer(torch.nn.Module):
    def __init__(self, pattern: int):
        super().__init__()
        self.pattern = pattern
        self.transformer_blocks = torch.nn.ModuleList(PatternBlock(pattern) for _ in range(5))

    def forward(self, hidden_states, encoder_hidden_states):
        image, text = hidden_states, encoder_hidden_states
        for block in self.transformer_blocks:
            output = block(image, text) if self.pattern < 3 else block(image)
            parts = output if isinstance(output, tuple) else (output,)
            if len(parts) == 2:
                image, text = parts if self.pattern in (0, 4) else parts[::-1]
            else:
                (image,) = parts
        return image


@contextmanager
def transformer_only(model, blocks, patterns, **options):
    import cache_dit

    adapter = cache_dit.BlockAdapter(
        transformer=model,
        blocks=blocks,
        forward_pattern=[getattr(cache_dit.ForwardPattern, f"Pattern_{number}") for number in patterns],
        has_separate_cfg=False,
        check_forward_pattern=False,
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=3, num_inference_steps=10**6, **options
    )
    cache_dit.enable_cache(adapter, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(adapter)


@needs_cache_dit
@pytest.mark.parametrize("pattern", range(6))
def test_every_forward_pattern_of_cache_dit(pattern):
    torch.manual_seed(pattern)
    model = PatternTransformer(pattern)
    image, text = torch.randn(1, 6, 16), torch.randn(1, 3, 16)

    def run() -> list[torch.Tensor]:
        with (
            transformer_only(model, [model.transformer_blocks], [pattern], residual_diff_threshold=0.2),
            torch.no_grad(),
        ):
            return [model(image * (1 - 0.02 * step), text) for step in range(10)]

    with torch.no_grad():
        full = [model(image * (1 - 0.02 * step), text) for step in range(10)]
    expected = run()
    assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(full, expected, strict=True)), "something is reused"
    with backend.accelerated("cache-dit"):
        found = run()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@needs_cache_dit
def test_cache_dit_on_two_lists_of_blocks():
    model, inputs = build("FluxTransformer2DModel")

    def run() -> list[torch.Tensor]:
        lists = [model.transformer_blocks, model.single_transformer_blocks]
        with transformer_only(model, lists, [1, 1], residual_diff_threshold=0.5):
            steps = [inputs | {"timestep": inputs["timestep"] * (1 - 0.01 * step)} for step in range(7)]
            return [call(model, step)[0] for step in steps]

    expected = run()
    with backend.accelerated("cache-dit"):
        found = run()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("make", [lambda: torch.zeros(1, 8, 4).mT, lambda: torch.zeros(2, 8, 4, 3).permute(0, 3, 1, 2)])
def test_differences_are_not_lost_in_older_tensors_that_are_strided(make):
    """A forecast that began without our ops may have any strides."""
    kept = make()
    tensor, older = torch.randn(kept.shape), torch.randn(kept.shape)
    (found,) = primitives.differences(tensor, [older], 2, torch.float32, [kept])
    torch.testing.assert_close(found, (tensor - older) / 2)
