"""SeaCache, SenCache and PreciseCache against literal NumPy transcriptions of the papers' formulas."""

import numpy as np
import pytest
import torch
from diffusers import SeaCacheConfig

import layercache
from layercache.errors import MethodError, UnsupportedModelError
from layercache.methods.seacache import SeaCache
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


NEUTRAL = [SeaCache(threshold=0.0)]


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
