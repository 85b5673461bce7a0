"""FasterCache against the published rules written out, and against diffusers' hooks where they do the same."""

import copy
from dataclasses import replace

import pytest
import torch

import layercache
from layercache.errors import MethodError, ScheduleError
from layercache.methods import FasterCache
from layercache.models.registry import spec_for
from layercache.runtime.frequency import grid_of, low_pass
from layercache.runtime.modules import module_units
from layercache.schedule.module_schedule import ModuleSchedule
from support.tiny import calm_pipeline, fingerprint, generate, shifted_sigmas
from support.zoo_pipelines import PIPELINES
from support.zoo_pipelines import generate as from_noise

STEPS = 10
METHOD = FasterCache(start=0.4, interval=2, guidance_interval=4)


@pytest.fixture(scope="module")
def pipe():
    return calm_pipeline()


def units_of(pipe):
    return tuple(unit.name for unit in module_units(pipe.transformer, spec_for(pipe.transformer)))


def by_hand(pipe, method=METHOD, **call):
    """The paper's rules in hooks: attention outputs kept per block, branch outputs split by an FFT at every step."""
    model, kept, place, hooks = pipe.transformer, {}, {"calls": 0}, []
    first = round(method.start * STEPS)
    log, state = [], {}

    def at():
        return place["calls"] // 2, place["calls"] % 2

    def splits(tensor):
        """Tokens of 8 x 8 as pictures, their spectrum shifted, and cut by a circle."""
        pictures = tensor.float().unflatten(1, (8, 8)).permute(0, 3, 1, 2)
        spectrum = torch.fft.fftshift(torch.fft.fft2(pictures), dim=(-2, -1))
        y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        circle = (x - 4) ** 2 + (y - 4) ** 2 <= (8 // 5) ** 2
        return spectrum * circle, spectrum * ~circle

    def is_derived(step):
        return step >= first and step % method.guidance_interval != 0

    def attention(module, original):
        def forward(*args, **kwargs):
            step, branch = at()
            if step >= first and step % method.interval and (method.guidance_interval == 1 or is_derived(step)):
                old, new = kept[module, branch]
                weight = method.weight * (step - first + 1) / (STEPS - first)
                log.append((step, branch))
                return tuple(b + weight * (b - a) for a, b in zip(old, new, strict=True))
            output = original(*args, **kwargs)
            kept[module, branch] = [kept.get((module, branch), [None, output])[1], output]
            return output

        return forward

    def whole(original):
        def forward(*args, **kwargs):
            step, branch = at()
            if branch == 1 and is_derived(step):
                state["low"] *= method.low_factor if step + 1 <= method.low_until * STEPS else 1.0
                state["high"] *= method.high_factor if step + 1 >= method.high_from * STEPS else 1.0
                low, high = splits(state["cond"])
                spectrum = low + state["low"] + high + state["high"]
                pictures = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real
                output = (pictures.permute(0, 2, 3, 1).flatten(1, 2),)
            else:
                output = original(*args, **kwargs)
            if branch == 0:
                state["cond"] = output[0]
            elif not is_derived(step):
                (a, b), (c, d) = splits(output[0]), splits(state["cond"])
                state["low"], state["high"] = a - c, b - d
            place["calls"] += 1
            return output

        return forward

    modules = [model, *(block.attn for block in model.transformer_blocks)]
    for module in modules:
        own = module.forward
        hooks.append(module)
        module.forward = whole(own) if module is model else attention(module, own)
    try:
        return generate(pipe, steps=STEPS, **call), log
    finally:
        for module in hooks:
            del module.forward


def test_outputs_are_those_of_the_published_rules(pipe):
    expected, log = by_hand(pipe)
    full = generate(pipe, steps=STEPS)
    with layercache.enabled(pipe, METHOD) as cache:
        found = generate(pipe, steps=STEPS)
        report, schedule = cache.report(), cache.schedule
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - full).abs().max() > 100 * (found - expected).abs().max()
    blocks = len(pipe.transformer.transformer_blocks)
    assert log == [(step, 0) for step in (5, 7, 9) for _ in range(blocks)]
    assert report.used == pytest.approx(schedule.used) and report.fallback_rows == 0
    assert schedule.derived[4:] == (None, *schedule.derived[5:8], None, schedule.derived[9])
    assert schedule.derived[7] == pytest.approx((1.1**3, 1.1**3)) and schedule.derived[9] == pytest.approx((1.0, 1.1))
    with layercache.enabled(pipe, ModuleSchedule.from_json(schedule.to_json())) as again:
        assert torch.equal(generate(pipe, steps=STEPS), found)
        stored = again.report()
    image, text, latents = 2 * 64 * 56 * 4, 2 * 4 * 56 * 4, 2 * 64 * 48 * 4
    assert stored.cache_bytes == report.cache_bytes == blocks * 2 * (image + text) + 3 * latents
    with layercache.enabled(pipe, schedule, offload=True) as again:
        assert torch.equal(generate(pipe, steps=STEPS), found)
        assert again.report().host_bytes == report.cache_bytes - latents, "the branch's output is of one step alone"


def test_neutral_settings_give_the_full_runs_bits(pipe):
    full = generate(pipe, steps=STEPS)
    for neutral in (FasterCache(interval=1, guidance_interval=1), FasterCache(start=1.0)):
        with layercache.enabled(pipe, neutral) as cache:
            assert torch.equal(generate(pipe, steps=STEPS), full) and cache.report().used == 1.0


def test_without_a_second_branch_attention_alone_is_reused_as_by_diffusers(pipe):
    """With weight 0, for diffusers extends from its own approximations, the paper from computed outputs."""
    diffusers = pytest.importorskip("diffusers")
    method = FasterCache(start=0.4, guidance_interval=1, weight=0.0)
    with layercache.enabled(pipe, method) as cache:
        ours = generate(pipe, steps=STEPS, guidance_scale=1.0)
        assert cache.report().used == pytest.approx(cache.schedule.used) and cache.schedule.derived == ()
    peer = copy.deepcopy(pipe)
    now = {"step": -1}
    peer.transformer.register_forward_pre_hook(lambda *_: now.__setitem__("step", now["step"] + 1))
    peer.transformer.enable_cache(
        diffusers.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, STEPS - 4),
            attention_weight_callback=lambda _: 0.0,
            is_guidance_distilled=True,
            current_timestep_callback=lambda: STEPS - 1 - max(now["step"], 0),
        )
    )
    theirs = generate(peer, steps=STEPS, guidance_scale=1.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, one_branch",
    [
        ("wan", {"guidance_scale": 1.0}),
        ("ltx", {"guidance_scale": 1.0}),
        ("qwen-image", {"true_cfg_scale": 1.0}),
        ("hunyuan video", {"true_cfg_scale": 1.0}),
    ],
)
def test_attention_of_other_models_is_reused_as_by_diffusers(name, one_branch):
    diffusers = pytest.importorskip("diffusers")
    made, call = PIPELINES[name]()
    call, steps = call | one_branch, call["num_inference_steps"]
    full = from_noise(made, call)
    with layercache.enabled(made, FasterCache(start=0.5, guidance_interval=1, weight=0.0)) as cache:
        ours = from_noise(made, call)
        assert cache.report().used < 1
    now = {"step": -1}
    made.transformer.register_forward_pre_hook(lambda *_: now.__setitem__("step", now["step"] + 1))
    made.transformer.enable_cache(
        diffusers.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, steps // 2),
            spatial_attention_block_identifiers=("attn1?$",),  # by default also LTX's cross-attention
            attention_weight_callback=lambda _: 0.0,
            is_guidance_distilled=True,
            current_timestep_callback=lambda: steps - 1 - max(now["step"], 0),
        )
    )
    theirs = from_noise(made, call)
    assert not torch.equal(ours, full)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_branches_that_cannot_be_derived_are_computed(pipe):
    """The unconditional branch first, as a loop of one's own may call it."""
    schedule = METHOD.module_schedule(fingerprint(pipe.transformer, shifted_sigmas(STEPS)), units_of(pipe))
    alone = replace(schedule, fingerprint=replace(schedule.fingerprint, branches=("cond",)))
    assert schedule.used < alone.used == replace(alone, derived=()).used, "a run without guidance derives nothing"
    generator = torch.Generator().manual_seed(3)
    arguments = {
        "hidden_states": torch.randn(1, 64, 48, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 64, generator=generator),
        "timestep": torch.ones(1),
        "img_shapes": [(1, 8, 8)],
    }
    with torch.no_grad(), layercache.enabled(pipe.transformer, schedule) as cache:
        full = pipe.transformer(**arguments)[0]
        cache.reset()
        for step in range(STEPS):
            for branch in ("uncond", "cond"):
                with cache.step(step, branch=branch):
                    found = pipe.transformer(**arguments)[0]
        assert torch.allclose(found, full, atol=1e-5) and cache.report().cached_cells > 0
        cache.reset()
        scales = {"cond": 2.0, "perturbed": -2.0, "uncond": 1.0}
        for step in range(6):  # what is stored is the difference from the branch that came first before
            for branch in ("cond", "uncond") if step < 5 else ("perturbed", "uncond"):
                with cache.step(step, branch=branch):
                    given = {**arguments, "hidden_states": scales[branch] * arguments["hidden_states"]}
                    found = pipe.transformer(**given)[0]
        assert torch.allclose(found, full, atol=1e-5)
    rows = replace(schedule, weights=(0.0,) * STEPS)
    for wrong in ({"weights": (1.0,)}, {"derived": ((1.0, 1.0),) * STEPS}, {"derived": (None,) * 3}):
        with pytest.raises(ScheduleError):
            replace(rows, **wrong)
    with pytest.raises(MethodError, match="interval"):
        FasterCache(interval=0)


def test_bands_and_grids():
    tensor = torch.randn(2, 3, 4, 12, 20, generator=torch.Generator().manual_seed(0))
    low = low_pass(tensor)
    spectrum = torch.fft.fft2(low)
    assert spectrum[..., 3:10, :].abs().max() < 1e-4 and torch.allclose(low.mean((-1, -2)), tensor.mean((-1, -2)))
    assert torch.allclose(low_pass(low), low, atol=1e-5)
    assert grid_of({"img_shapes": [[(1, 4, 6)], [(1, 4, 6)]]}, 24) == (1, 4, 6)
    assert grid_of({"num_frames": 2, "height": 3, "width": 5}, 30) == (2, 3, 5)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    ids = torch.stack([torch.zeros(24), rows.flatten(), columns.flatten()], -1)
    assert grid_of({"img_ids": ids}, 24) == (1, 4, 6) and grid_of({}, 24) is None and grid_of({}, 64) == (1, 8, 8)
