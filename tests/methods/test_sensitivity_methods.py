"""SeaCache, SenCache and PreciseCache against literal NumPy transcriptions of the papers' formulas."""

import numpy as np
import pytest
import torch
from diffusers import SeaCacheConfig

import layercache
from layercache.demo.model import CLASS_NAMES, TEXT_TOKENS
from layercache.errors import MethodError, NonFiniteWarning, UnsupportedModelError
from layercache.methods.precisecache import PreciseCache
from layercache.methods.seacache import SeaCache
from layercache.methods.sencache import SenCache, fit
from layercache.models.positions import on_grid, token_grid
from layercache.runtime.policy import Run
from support.marks import slow
from support.tiny import LAYERS, calm_pipeline, generate, shifted_sigmas
from support.watch import STEPS, mean1, watched
from support.zoo_pipelines import PIPELINES
from support.zoo_pipelines import STEPS as STEPS_OF_ZOO
from support.zoo_pipelines import generate as from_noise

SIDE = 8  # tokens of the bundled model's picture


@pytest.fixture(scope="module")
def pipe():
    return calm_pipeline()


def sea_filter(z, sigma, power):
    """The paper's filter over the two axes of the picture, in NumPy."""
    grid = z.reshape(len(z), SIDE, SIDE, -1)
    sigma = np.clip(sigma, 1e-6, 1 - 1e-6)
    prior = 1 / (np.abs(np.fft.fftfreq(SIDE)) ** power + 1e-16)
    gain = (1 - sigma) * prior / ((1 - sigma) ** 2 * prior + sigma**2)
    both = gain[:, None] * gain[None, :]
    spectrum = np.fft.fftn(grid, axes=(1, 2)) * (both / both.mean())[..., None]
    return np.fft.ifftn(spectrum, axes=(1, 2)).real


def seacache_literal(a, m):
    computed, total, row, before = [], 0.0, 0, None
    sigmas = shifted_sigmas(STEPS)
    for i in range(STEPS):
        z = sea_filter(a["M" if m.indicator == "modulated" else "x"][i], sigmas[i], m.power or 2.0)
        compute = i == 0 or i == STEPS - 1 or row == m.max_consecutive
        if not compute:
            total += np.mean([mean1(new - old) / mean1(old) for new, old in zip(z, before, strict=True)])
            compute = not total < m.threshold
        total, row, before = (0.0, 0, z) if compute else (total, row + 1, z)
        computed.append(compute)
    return computed


@pytest.mark.parametrize(
    "method",
    [
        SeaCache(threshold=0.2, order=1),
        SeaCache(threshold=0.6, indicator="latents", max_consecutive=2, power=3.0),
    ],
)
def test_seacache(pipe, method):
    seen, cache, _ = watched(pipe, method)
    for branch, a in seen.items():
        assert cache.decisions[branch] == tuple(expected := seacache_literal(a, method))
        assert set(expected) == {True, False}
        steps, residuals = [], []
        for i, computed in enumerate(expected):
            if computed:
                steps.append(i)
                residuals.append(a["h"][i] - a["h0"][i])
                continue
            forecast = residuals[-1]
            if method.order and len(steps) > 1:
                forecast = forecast + (forecast - residuals[-2]) * (i - steps[-1]) / (steps[-1] - steps[-2])
            np.testing.assert_allclose(a["h"][i], a["h0"][i] + forecast, atol=5e-5)


def of_tokens(model, arguments, given):
    """Tokens of latents in the places that the call says, as diffusers' SeaCache takes them: ``(C, T, H, W)`` each."""
    shapes = given.get("img_shapes")
    grid = shapes[0][0] if shapes else [given[name] for name in ("num_frames", "height", "width")]
    return [sample.movedim(-1, 0).unflatten(1, tuple(grid)) for sample in given["hidden_states"]]


# where diffusers' SeaCache finds the latents; of Wan's it knows itself
VISION = {
    "wan": None,
    "hunyuan video": lambda model, arguments, given: list(given["hidden_states"]),
    "qwen-image": of_tokens,
    "ltx": of_tokens,
}


@pytest.mark.parametrize(
    "name, threshold", [("wan", 0.2), *slow(("wan", 0.05), ("wan", 0.8), *((n, 0.4) for n in VISION if n != "wan"))]
)
def test_seacache_decides_as_diffusers_does(name, threshold, monkeypatch):
    pipe, call = PIPELINES[name]()
    method = SeaCache(threshold=threshold, indicator="latents", order=1, max_consecutive=2, power=3.0)
    with layercache.enabled(pipe, method) as cache:
        ours, decisions = from_noise(pipe, call), cache.decisions
    ran, enter = {}, pipe.transformer.cache_context

    def with_place(branch, **place):  # which only the pipelines of Wan and Cosmos 3 say
        ran.setdefault(branch, []).append(False)
        ran["now"] = ran[branch]
        step = pipe.scheduler.step_index or 0
        said = {"step_index": step, "sigma": float(pipe.scheduler.sigmas[step]), "num_inference_steps": STEPS_OF_ZOO}
        return enter(branch, **(said | place))

    monkeypatch.setattr(pipe.transformer, "cache_context", with_place)
    last = getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks
    hook = next(last[-1].children()).register_forward_pre_hook(lambda *_: ran["now"].__setitem__(-1, True))
    pipe.transformer.enable_cache(SeaCacheConfig(threshold=threshold, raw_vision_callback=VISION[name]))
    theirs = from_noise(pipe, call)
    hook.remove()
    del ran["now"]
    assert list(decisions.values()) == [tuple(computed) for computed in ran.values()]
    assert {True, False} == set(decisions["cond" if "cond" in decisions else next(iter(decisions))])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


CALL = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
# of a model that answers to both; rows are looked up by the nearest timestep
SENSITIVITIES = ((1.0, 0.5, 1.0), (0.7, 0.3, 0.6), (0.4, 0.4, 0.8), (0.1, 0.9, 1.5))


def sencache_literal(a, m):
    """Of the branch that is run first; the others follow it."""
    computed, row, reference = [], 0, None
    for i in range(STEPS):
        x, t = a["x"][i], a["t"][i].max()
        compute = i in (0, STEPS - 1) or row == m.max_consecutive
        if not compute:
            x_a, t_a = reference
            _, j_x, j_t = min(m.sensitivities, key=lambda entry: abs(entry[0] - t_a))
            score = j_x * np.linalg.norm(x - x_a) + j_t * np.sqrt(x.size) * abs(t - t_a)
            limit = m.early_threshold if i < round(m.early_share * STEPS) else m.threshold
            compute = not score < limit * np.sqrt(x.size)
        if compute:
            row, reference = 0, (x, t)
        else:
            row += 1
        computed.append(compute)
    return computed


@pytest.mark.parametrize(
    "method",
    [
        SenCache(threshold=0.12, sensitivities=SENSITIVITIES),
        SenCache(threshold=0.3, early_threshold=0.1, early_share=0.5, max_consecutive=3, sensitivities=SENSITIVITIES),
    ],
)
def test_sencache(pipe, method):
    seen, cache, _ = watched(pipe, method)
    expected = tuple(sencache_literal(seen["cond"], method))
    assert cache.decisions == {"cond": expected, "uncond": expected} and set(expected) == {True, False}
    for a in seen.values():
        residual = None
        for i, computed in enumerate(expected):
            if computed:
                residual = a["h"][i] - a["h0"][i]
            np.testing.assert_allclose(a["h"][i], a["h0"][i] + residual, atol=2e-5)


def test_sensitivities_are_finite_differences_along_the_steps(pipe):
    call, calls = CALL | {"num_inference_steps": 3}, []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    pipe("cat", generator=torch.Generator().manual_seed(3), **call)
    hook.remove()
    expected = []
    with torch.no_grad():
        for (before, output), (after, _) in zip(calls[0::2], calls[2::2], strict=False):
            x, t = ({name: after[name]} for name in ("hidden_states", "timestep"))
            dx = (after["hidden_states"] - before["hidden_states"]).norm()
            dt = (after["timestep"] - before["timestep"]).abs().max()
            moved = (pipe.transformer(**{**before, **x})[0] - output).norm() / dx
            later = (pipe.transformer(**{**before, **t})[0] - output).norm() / dt / output.numel() ** 0.5
            expected.append((before["timestep"].max().item(), moved.item(), later.item()))
    found = fit(pipe, ["cat"], [3], **call)
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert len(found) == 2
    twice = fit(pipe, ["cat", "cat"], [3, 3], **call)
    np.testing.assert_allclose(twice, found, rtol=1e-5)
    with pytest.raises(MethodError, match="more steps"):
        fit(pipe, ["cat"], **CALL | {"num_inference_steps": 1})
    with pytest.raises(MethodError, match="sencache.fit"):
        layercache.enable(pipe, SenCache())


def low(output, radius):
    """The low frequencies of ``[B, side, side, C]``."""
    side = output.shape[1]
    places = np.fft.fftfreq(side) * side
    kept = places[:, None] ** 2 + places[None, :] ** 2 <= (radius * side) ** 2
    return np.fft.ifftn(np.fft.fftn(output, axes=(1, 2)) * kept[None, ..., None], axes=(1, 2)).real


def precisecache_literal(pipe, m, inputs, residuals):
    """Rows of computed blocks, by a trial on every ``m.shrink[1]``-th token in each direction."""
    side = SIDE // m.shrink[1]
    at = (np.arange(side) * m.shrink[1] + m.shrink[1] // 2).astype(int)
    tokens = (at[:, None] * SIDE + at[None, :]).ravel()
    rows, total, largest, before, left, pivotal = [], 0.0, 0.0, None, m.window, None
    for i in range(STEPS):
        small = {"hidden_states": inputs[i]["hidden_states"][:, tokens], "img_shapes": [[(1, side, side)]] * 2}
        with torch.no_grad():
            output = pipe.transformer(**{**inputs[i], **small})[0].double().numpy()
        now = low(output.reshape(2, side, side, -1), m.radius)
        if before is not None:
            total += np.linalg.norm(now - before)
            largest = max(largest, np.linalg.norm(now - before))
        if before is not None and total < m.alpha * largest:
            rows.append((False,) * LAYERS)
        elif m.cached_blocks and left < m.window:
            rows.append(pivotal)
            total, left = 0.0, left + 1
        else:
            rows.append((True,) * LAYERS)
            sizes = [np.linalg.norm(residuals[i][block]) for block in range(LAYERS)]
            smallest = np.argsort(sizes)[: round(m.cached_blocks * LAYERS)]
            total, left, pivotal = 0.0, 0, tuple(block not in smallest for block in range(LAYERS))
        before = now
    return rows


@pytest.mark.parametrize(
    "method",
    [
        PreciseCache(alpha=0.9, window=2, shrink=(2, 2), radius=0.3),
        *slow(PreciseCache(alpha=2.0, cached_blocks=0.0)),
    ],
)
def test_precisecache(pipe, method):
    inputs, streams, residuals = [], [], []

    def begin(module, args, kwargs):
        inputs.append(kwargs)
        streams.append({})
        residuals.append({})

    def watch(block):
        def hook(module, args, kwargs, output):
            before, after = kwargs["hidden_states"], output[1]
            if after.shape[1] == SIDE * SIDE:  # no trial
                streams[-1][block] = before.double().numpy(), after.double().numpy()
                residuals[-1][block] = streams[-1][block][1] - streams[-1][block][0]

        return hook

    def end(module, args):
        if args[0].shape[1] == SIDE * SIDE:
            streams[-1]["end"] = args[0].double().numpy()

    model = pipe.transformer
    hooks = [model.norm_out.register_forward_pre_hook(end)]
    hooks += [b.register_forward_hook(watch(k), with_kwargs=True) for k, b in enumerate(model.transformer_blocks)]
    with layercache.enabled(pipe, method) as cache:
        hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True))
        generate(pipe, steps=STEPS)
    for hook in hooks:
        hook.remove()
    expected = precisecache_literal(pipe, method, inputs[0::2], residuals[0::2])
    kinds = {sum(row) for row in expected}
    assert kinds == ({0, 4, 6} if method.cached_blocks else {0, 6})
    found = cache.rows["cond"]
    assert found == tuple(expected if method.cached_blocks else [(all(row),) for row in expected])
    assert cache.rows["uncond"] == found and cache.decisions["cond"] == tuple(any(row) for row in expected)
    for branch in (0, 1):
        newest = {}
        for row, seen, own in zip(expected, streams[branch::2], residuals[branch::2], strict=True):
            newest |= own
            assert set(own) == {block for block in range(LAYERS) if row[block]}
            for block in range(LAYERS):
                if row[block] and block and not row[block - 1]:  # what the left out blocks add lies between
                    first = max((k for k in range(block) if row[k]), default=None)
                    if first is not None:
                        between = sum(newest[k] for k in range(first + 1, block))
                        np.testing.assert_allclose(seen[block][0], seen[first][1] + between, atol=5e-5)
            if any(row) and not row[-1]:
                first = max(k for k in range(LAYERS) if row[k])
                between = sum(newest[k] for k in range(first + 1, LAYERS))
                np.testing.assert_allclose(seen["end"], seen[first][1] + between, atol=5e-5)


@pytest.mark.parametrize("method", [PreciseCache(alpha=0.9, window=2, shrink=(2, 2)), *slow(PreciseCache(alpha=1.5))])
def test_rows_as_a_schedule_give_the_same_bits(pipe, method):
    with layercache.enabled(pipe, method) as cache:
        first = generate(pipe, steps=8)
        rows, report = cache.rows, cache.report()
    schedule = layercache.Schedule.from_json(cache.export_schedule().to_json())
    with layercache.enabled(pipe, schedule) as replayed:
        assert torch.equal(generate(pipe, steps=8), first)
    assert not torch.equal(generate(pipe, steps=8), first)
    # trials of a branch of two, each as large as its share of the tokens
    trials = 0.5 / method.shrink[1] ** 2
    assert report.used == pytest.approx(np.mean([np.mean(own) for own in rows.values()]) + trials)
    assert replayed.report().used == pytest.approx(report.used - trials)


def test_rows_of_another_batch_and_of_a_bad_sample(pipe):
    """Nothing of a generation is read in the next; one picture that is NaN is left out of the decisions."""
    method = PreciseCache(alpha=0.9, window=2, shrink=(2, 2))
    with layercache.enabled(pipe, method) as cache:
        single = generate(pipe, prompts=["rocket"], steps=6, seed=7)
        alone = cache.rows["cond"]
        generate(pipe, steps=6)
        assert torch.equal(generate(pipe, prompts=["rocket"], steps=6, seed=7), single)
        embedding = pipe.class_encoder.embedding.weight
        with torch.no_grad():
            kept = embedding[CLASS_NAMES.index("cat")].clone()
            embedding[CLASS_NAMES.index("cat")] = float("nan")
        try:
            with pytest.warns(NonFiniteWarning):
                broken = generate(pipe, prompts=["rocket", "cat"], steps=6, seed=7)
        finally:
            with torch.no_grad():
                embedding[CLASS_NAMES.index("cat")] = kept
        assert cache.rows["cond"] == alone
        torch.testing.assert_close(broken[:1], single, rtol=1e-4, atol=1e-4)


def test_settings_of_precisecache():
    assert PreciseCache.preset("flash") == PreciseCache() and PreciseCache.preset("base").alpha == 0.5
    assert PreciseCache.preset("turbo").groups(6) == ((0, 6),) and len(PreciseCache().groups(6)) == 6
    assert eval(repr(method := PreciseCache(alpha=0.3))) == method != PreciseCache()
    for settings in ({"alpha": -1.0}, {"cached_blocks": 2.0}, {"shrink": (0, 4)}, {"shrink": (4,)}, {"window": -1}):
        with pytest.raises(MethodError, match=next(iter(settings))):
            PreciseCache(**settings)
    with pytest.raises(MethodError, match="preset"):
        PreciseCache.preset("fast")


NEUTRAL = [
    PreciseCache(alpha=0.0, cached_blocks=0.0),
    PreciseCache(alpha=0.0, window=0),
    SeaCache(threshold=0.0),
    SenCache(threshold=0.0, early_threshold=0.0, sensitivities=SENSITIVITIES),
]


@pytest.mark.parametrize("method", NEUTRAL, ids=lambda m: m.name)
def test_at_the_neutral_setting_everything_is_computed(pipe, method):
    full = generate(pipe, prompts=["cat"], steps=5)
    with layercache.enabled(pipe, method) as cache:
        assert torch.equal(generate(pipe, prompts=["cat"], steps=5), full)
    assert all(map(all, cache.decisions.values()))


def stream_bytes(pipe, tokens=SIDE * SIDE):
    """Of a stream of two pictures."""
    config = pipe.transformer.config
    return 2 * tokens * config.num_attention_heads * config.attention_head_dim * 4


def test_memory_is_what_is_reported(pipe):
    image, text = stream_bytes(pipe), stream_bytes(pipe, TEXT_TOKENS)
    methods = {
        SeaCache(threshold=0.2, order=1): lambda latents: 2 * 3 * image,  # two residuals and the input before, a branch
        SenCache(threshold=0.3, sensitivities=SENSITIVITIES): lambda latents: 2 * image + 2 * latents,
        # of the text nothing behind the last block; low frequencies on every fourth token
        PreciseCache(shrink=(2, 2)): lambda latents: 2 * (LAYERS * image + (LAYERS - 1) * text) + latents // 4,
    }
    for method, expected in methods.items():
        with layercache.enabled(pipe, method) as cache:
            latents = generate(pipe, steps=5)
        assert cache.report().cache_bytes == expected(latents.numel() * latents.element_size())


def test_where_the_tokens_of_a_picture_lie():
    packed = torch.zeros(1, 12, 16)
    places = torch.tensor([[0, row, column] for row in range(2) for column in range(4)] + [[1, 0, k] for k in range(4)])
    assert token_grid(packed, {"img_ids": places}, {}, 12) == (2, 4)  # a reference follows
    assert token_grid(packed, {"img_shapes": [[(1, 2, 4), (1, 2, 2)]]}, {}, 12) == (1, 2, 4)
    assert on_grid(packed, {"num_frames": 3, "height": 2, "width": 2}, {}).shape == (1, 3, 2, 2, 16)
    video, config = torch.zeros(1, 3, 16, 8, 6), {"in_channels": 16, "patch_size": 2, "patch_size_t": 2}
    assert token_grid(video, {}, config, 24) == (2, 4, 3)
    assert on_grid([*video], {}, config).shape == (1, 3, 8, 6, 16)
    with pytest.raises(UnsupportedModelError, match="25 tokens"):
        token_grid(video, {}, config, 25)


def test_without_noise_levels_nothing_is_reused(pipe):
    with pytest.raises(MethodError, match="num_steps"):
        layercache.enable(pipe.transformer, SeaCache())
    assert SeaCache().decider(Run(num_steps=8)).must_compute(4)
