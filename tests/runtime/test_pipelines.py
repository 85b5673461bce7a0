"""Real pipelines of diffusers with tiny random transformers: which step a call belongs to, branch by branch."""

from __future__ import annotations

import pytest
import torch

import layercache
from layercache.errors import CacheStateError, LayerCacheWarning, ScheduleMismatchError
from layercache.methods.fbcache import FBCache
from support.marks import slow
from support.tiny import randomise
from support.zoo import _qwen as tiny_qwen
from support.zoo_pipelines import (
    PIPELINES,
    STEPS,
    _flux2,
    _qwen,
    _sd3,
    _wan,
    _wan_two_experts,
    block_calls,
    flux_img2img,
    generate,
    schedule_of,
)

SKIPS_A_BRANCH = ("lumina 2", "z-image", "sd3, skipping layers")


# Daily: every way in which the steps of a generation are counted, and every shape of a velocity.
NIGHTLY = ("aura flow", "chroma", "cogvideox, DDIM", "cogview 4", "hunyuan video", "sana", "sana, DPM", "wan")


@pytest.fixture(scope="module", params=[*sorted(PIPELINES.keys() - set(NIGHTLY)), *slow(*NIGHTLY)])
def case(request):
    pipe, call = PIPELINES[request.param]()
    return request.param, pipe, call, generate(pipe, call)


def test_nothing_reused_changes_no_bit(case):
    _, pipe, call, full = case
    with layercache.enabled(pipe, schedule_of(pipe, "c")) as cache:
        assert torch.equal(generate(pipe, call), full)
        assert cache.report().used == 1.0 and cache.report().fallback_rows == 0
    assert torch.equal(generate(pipe, call), full)


def test_blocks_run_at_the_steps_of_the_schedule(case):
    name, pipe, call, full = case
    with block_calls(pipe) as plain:
        generate(pipe, call)
    schedule = schedule_of(pipe, "ccrflrcfr")
    with layercache.enabled(pipe, schedule) as cache:
        with block_calls(pipe) as calls:
            cached = generate(pipe, call)
        report = cache.report()
    assert report.generations == 1 and not torch.equal(cached, full)
    bypassed = {step: plain["forwards"][step] - 1 for step in plain["forwards"]} if "skipping" in name else {}
    in_vain = set()
    for step, row in enumerate(schedule.cells):
        for group, end in enumerate(("first", "last")):
            expected = plain[end][step] if row[group] is None else 0
            if row[group] is not None and bypassed.get(step):
                expected = plain[end][step] - 1  # the call that leaves layers out runs as it is
            if calls[end][step] != expected:
                in_vain.add(step)
    # where Z-Image stops guiding the batch halves, and nothing stored fits
    assert len(in_vain) == report.fallback_rows == (name == "z-image")


def test_generations_do_not_disturb_each_other(case):
    _, pipe, call, full = case
    with layercache.enabled(pipe, schedule_of(pipe, "crfcl")) as cache:
        first, other, again = (generate(pipe, call, seed) for seed in (0, 1, 0))
        assert cache.report().generations == 3
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(generate(pipe, call), full)


def test_from_calibration_to_a_cached_picture(case):
    name, pipe, call, full = case
    sample = {k: v for k, v in call.items() if "embeds" in k or "mask" in k}
    rest = {k: v for k, v in call.items() if k not in sample}
    ends_early = name in ("lumina 2", "z-image")
    profile = layercache.calibrate(pipe, [sample], progress=False, max_distance=3, max_span=2, **rest)
    schedule = layercache.plan(profile, 0.75)
    with layercache.enabled(pipe, schedule) as cache:
        picture = generate(pipe, rest | sample)
    assert ("forecast_seen" in profile.tables) is ends_early
    assert cache.report().cached_cells > 0
    if not ends_early:  # where its guidance ends, Z-Image has half the batch, for which nothing is stored
        assert cache.report().fallback_rows == 0 and cache.report().used == pytest.approx(schedule.used)
    assert torch.isfinite(picture).all() and picture.shape == full.shape


def test_decisions_are_replayed(case):
    """Also where guidance ends early."""
    _, pipe, call, _ = case
    with layercache.enabled(pipe, FBCache(threshold=5.0, warmup=3)) as cache:
        cached = generate(pipe, call)
        assert any(not computed for row in cache.decisions.values() for computed in row)
        schedule = cache.export_schedule()
    with layercache.enabled(pipe, schedule):
        assert torch.equal(generate(pipe, call), cached)


# --- further ways to call them -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd3():
    return _sd3()


def test_a_run_that_was_interrupted_leaves_nothing_behind(sd3):
    pipe, call = sd3
    full = generate(pipe, call)

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step >= 2
        return kwargs

    def fail(pipe, step, timestep, kwargs):
        if step == 3:
            raise KeyboardInterrupt
        return kwargs

    with layercache.enabled(pipe, schedule_of(pipe, "ccr")) as cache:
        expected = generate(pipe, call)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, call | {"callback_on_step_end": fail})
        assert torch.equal(generate(pipe, call), expected)
        generate(pipe, call | {"callback_on_step_end": stop})
        assert torch.equal(generate(pipe, call), expected)
        assert cache.report().fallback_rows == 0
    assert torch.equal(generate(pipe, call), full)


def test_several_pictures_per_prompt_are_those_of_single_calls(sd3):
    pipe, call = sd3
    latents = torch.randn(2, 4, 4, 4)
    generate(pipe, call)
    twice = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in call.items() if "embeds" in name}
    with layercache.enabled(pipe, schedule_of(pipe, "ccrf")):
        both = generate(pipe, call | twice | {"latents": latents})
        apart = [generate(pipe, call | {"latents": one[None]}) for one in latents]
    torch.testing.assert_close(both, torch.cat(apart), rtol=1e-4, atol=1e-5)


def test_guidance_off_and_on_again(sd3):
    """Half the batch is another shape: nothing of the first run is used in the second."""
    pipe, call = sd3
    with layercache.enabled(pipe, schedule_of(pipe, "ccrf")) as cache:
        first = generate(pipe, call)
        single = generate(pipe, call | {"guidance_scale": 1.0})
        assert torch.equal(generate(pipe, call), first)
        assert torch.equal(generate(pipe, call | {"guidance_scale": 1.0}), single)
        assert cache.report().fallback_rows == 0


def test_other_sigmas_and_step_counts_are_refused(sd3):
    pipe, call = sd3
    generate(pipe, call)
    with layercache.enabled(pipe, schedule_of(pipe, "ccr")):
        with pytest.raises(ScheduleMismatchError, match="calibrate"):
            generate(pipe, call | {"num_inference_steps": STEPS + 2})
        with pytest.raises(ScheduleMismatchError, match="sigma"):
            generate(pipe, call | {"sigmas": [1 - 0.1 * k for k in range(STEPS)]})
        generate(pipe, call)
    custom = call | {"sigmas": [1 - 0.1 * k for k in range(STEPS)]}
    full = generate(pipe, custom)
    with layercache.enabled(pipe, schedule_of(pipe, "ccr")) as cache:
        assert not torch.equal(generate(pipe, custom), full) and cache.report().fallback_rows == 0


def test_resolution_dependent_shift_is_part_of_the_run():
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe, call = _flux2()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    generate(pipe, call)
    with layercache.enabled(pipe, schedule_of(pipe, "ccr")):
        generate(pipe, call)
        with pytest.raises(ScheduleMismatchError, match="resolution"):
            generate(pipe, call | {"height": 128, "width": 128})


def test_two_pipelines_share_one_transformer():
    import diffusers

    pipe, call = _qwen()
    twin = diffusers.QwenImagePipeline(**{**pipe.components, "scheduler": type(pipe.scheduler)()})
    twin.set_progress_bar_config(disable=True)
    full = generate(twin, call)
    assert torch.equal(generate(pipe, call), full)
    schedule = schedule_of(pipe, "ccr")
    cache = layercache.enable(pipe, schedule)
    expected = generate(pipe, call)
    with pytest.warns(LayerCacheWarning, match="that pipeline as well"):
        assert torch.equal(generate(twin, call), full), "computed in full"
    with pytest.raises(CacheStateError, match="already enabled"):
        layercache.enable(twin, schedule_of(twin, "crr"))
    assert layercache.enable(twin, schedule) is cache
    for one in (twin, pipe, pipe, twin):
        assert torch.equal(generate(one, call), expected)
    assert cache.report().fallback_rows == 0
    layercache.disable(pipe)
    assert torch.equal(generate(twin, call), full) and "maybe_free_model_hooks" not in vars(twin)


def test_two_experts_each_with_its_own_schedule():
    """Wan 2.2: one transformer for the first steps, another for the rest."""
    pipe, call = _wan_two_experts()
    full = generate(pipe, call)
    first = schedule_of(pipe, "ccr")
    second = schedule_of(pipe, "ccr", pipe.transformer_2)
    layercache.enable(pipe, first)
    layercache.enable(pipe.transformer_2, second, pipe.scheduler)
    with block_calls(pipe) as early:
        cached = generate(pipe, call)
    with block_calls(pipe, pipe.transformer_2) as late:
        assert torch.equal(generate(pipe, call), cached)
    assert not torch.equal(cached, full)
    assert early["forwards"].keys() | late["forwards"].keys() == set(range(STEPS))
    assert early["forwards"].keys().isdisjoint(late["forwards"])
    reused = [step for step in range(STEPS) if first.cells[step] != (None, None)]
    begins = min(late["forwards"])  # the second expert has nothing stored at its first step
    assert {s for s in reused if not (early["first"] + late["first"])[s]} == set(reused) - {begins}
    layercache.disable(pipe)
    layercache.disable(pipe.transformer_2)
    assert torch.equal(generate(pipe, call), full)


def test_wan_tells_its_steps_itself():
    pipe, call = _wan()
    generate(pipe, call)
    with layercache.enabled(pipe.transformer, schedule_of(pipe, "ccr")) as cache:
        bare = generate(pipe, call)
        assert cache.report().fallback_rows == 0 and cache.report().branches == ("cond", "uncond")
    with layercache.enabled(pipe, schedule_of(pipe, "ccr")):
        assert torch.equal(generate(pipe, call), bare)


@pytest.mark.parametrize("strength, first", [(1.0, 0), (0.75, 2), (0.5, 4)])
def test_a_picture_to_start_from(strength, first):
    """img2img begins in the middle: steps keep their numbers, and what was never stored is computed."""
    pipe, call = flux_img2img()
    call["strength"] = strength
    full = generate(pipe, call)
    kinds = "crrcrrcr"
    with layercache.enabled(pipe, schedule_of(pipe, kinds)) as cache:
        with block_calls(pipe) as calls:
            cached = generate(pipe, call)
        ran = [first + step for step in sorted(calls["first"])]
        assert len(calls["forwards"]) == STEPS - first
        in_vain = [
            s for s in range(first, STEPS) if kinds[s] == "r" and not any(kinds[k] == "c" for k in range(first, s))
        ]
        assert ran == sorted([*in_vain, *(s for s in range(first, STEPS) if kinds[s] == "c")])
        assert cache.report().fallback_rows == len(in_vain)
        assert torch.equal(generate(pipe, call), cached) and not torch.equal(cached, full)


def test_edit_models_of_qwen_image():
    """A second picture behind the first in the sequence, modulated otherwise (zero_cond_t)."""
    import diffusers

    config, inputs = tiny_qwen()
    model = diffusers.QwenImageTransformer2DModel(**config, zero_cond_t=True)
    randomise(model)
    inputs |= {"hidden_states": torch.randn(2, 20, 16), "img_shapes": [[(1, 4, 4), (1, 2, 2)]] * 2}
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        with layercache.enabled(model, FBCache(threshold=1e9, warmup=1), num_steps=4) as cache:
            for step in range(2):
                with cache.step(step, branch="cond"):
                    found = model(**inputs, return_dict=False)[0]
            assert cache.decisions == {"cond": (True, False)}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
