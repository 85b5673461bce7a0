"""SeaCache, SenCache and PreciseCache against literal NumPy transcriptions of the papers' formulas."""

import numpy as np
import pytest
import torch
from diffusers import SeaCacheConfig

import layercache
from layercache.errors import MethodError, UnsupportedModelError
from layercache.methods.seacache import SeaCache
from layercache.methods.sencache import SenCache, fit
from layercache.models.positions import on_grid, token_grid
from layercache.runtime.policy import Run
from support.marks import slow
from support.tiny import calm_pipeline, generate, shifted_sigmas
from support.watch import STEPS, mean1, watched
from support.zoo_pipelines import PIPELINES

SIDE = 8  # tokens of the bundled model's picture


@pytest.fixture(scope="module")
def pipe():
    return calm_pipeline()


@pytest.fixture(scope="module")
def full(pipe):
    return generate(pipe, steps=STEPS)


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


@pytest.mark.parametrize("threshold", [0.2, *slow(0.05, 0.8)])
def test_seacache_decides_as_diffusers_does(threshold):
    pipe, call = PIPELINES["wan"]()

    def run():
        return pipe(generator=torch.Generator().manual_seed(0), **call).frames

    method = SeaCache(threshold=threshold, indicator="latents", order=1, max_consecutive=2)
    with layercache.enabled(pipe, method) as cache:
        ours, decisions = run(), cache.decisions
    ran = []
    hooks = [
        pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(False)),
        pipe.transformer.blocks[1].attn1.register_forward_pre_hook(lambda *_: ran.__setitem__(-1, True)),
    ]
    pipe.transformer.enable_cache(SeaCacheConfig(threshold=threshold))
    theirs = run()
    for hook in hooks:
        hook.remove()
    assert decisions == {"cond": tuple(ran[0::2]), "uncond": tuple(ran[1::2])}
    assert set(ran) == {True, False}
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
    call, calls = CALL | {"num_inference_steps": 4}, []
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
    assert len(found) == 3
    twice = fit(pipe, ["cat", "cat"], [3, 3], **call)
    np.testing.assert_allclose(twice, found, rtol=1e-5)
    with pytest.raises(MethodError, match="more steps"):
        fit(pipe, ["cat"], **CALL | {"num_inference_steps": 1})
    with pytest.raises(MethodError, match="sencache.fit"):
        layercache.enable(pipe, SenCache())


NEUTRAL = [
    SeaCache(threshold=0.0),
    SenCache(threshold=0.0, early_threshold=0.0, sensitivities=SENSITIVITIES),
]


@pytest.mark.parametrize("method", NEUTRAL, ids=lambda m: m.name)
def test_at_the_neutral_setting_everything_is_computed(pipe, full, method):
    with layercache.enabled(pipe, method) as cache:
        assert torch.equal(generate(pipe, steps=STEPS), full)
    assert all(map(all, cache.decisions.values()))


def stream_bytes(pipe, tokens=SIDE * SIDE):
    """Of the image stream of two pictures."""
    config = pipe.transformer.config
    return 2 * tokens * config.num_attention_heads * config.attention_head_dim * 4


def test_memory_of_seacache(pipe):
    """Two residuals and what the input was before, per branch."""
    with layercache.enabled(pipe, SeaCache(threshold=0.2, order=1)) as cache:
        generate(pipe, steps=STEPS)
    assert cache.report().cache_bytes == 2 * 3 * stream_bytes(pipe)


def test_memory_of_sencache(pipe):
    """A residual per branch, and the latents of two steps of the branch that decides."""
    with layercache.enabled(pipe, SenCache(threshold=0.3, sensitivities=SENSITIVITIES)) as cache:
        latents = generate(pipe, steps=STEPS)
    assert cache.report().cache_bytes == 2 * stream_bytes(pipe) + 2 * latents.numel() * latents.element_size()


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
