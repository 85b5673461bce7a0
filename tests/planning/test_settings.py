"""One schedule fitted to several guidance scales and sizes: which samples are run, what it knows of them."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache.errors import ArgumentError, LayerCacheWarning, ScheduleError, ScheduleMismatchError
from layercache.planning.rollout import Rollouts, psnr_of
from layercache.planning.samples import with_settings
from layercache.schedule.fingerprint import Fingerprint, call_settings
from layercache.schedule.schedule import Schedule
from support.tiny import mixed_cells, schedule_for, tiny_pipeline
from support.zoo_pipelines import _flux2, _qwen, _sd3, generate

CALL = {"num_inference_steps": 4}
pytestmark = pytest.mark.usefixtures("short_searches")


def test_prompts_take_all_settings_in_turns():
    pipe = tiny_pipeline(1)
    prompts, seeds = with_settings(pipe, ["cat", "coffee"], [5, 6], (3, 5, 7), ((32, 32), (64, 32)), {})
    assert len(prompts) == 12
    assert [(one["prompt"] == "coffee") + 5 for one in prompts] == seeds
    of = [(one["prompt"], one["guidance_scale"], one["height"]) for one in prompts]
    assert len(set(of)) == 12 and all(one["width"] == 32 for one in prompts)
    assert {of[k][1:] for k in range(6)} == {(g, h) for g in (3.0, 5.0, 7.0) for h in (32, 64)}
    assert with_settings(pipe, ["cat"], None, (), (), {}) == (["cat"], None)
    batch, seeds = with_settings(pipe, [["cat", "coffee"]], [1, 2], (2, 4), (), {})
    assert [one["prompt"] for one in batch] == [["cat", "coffee"]] * 2 and seeds == [1, 2, 1, 2]


def test_which_argument_is_the_guidance_scale():
    for made, call, name in (
        (_qwen, {}, "true_cfg_scale"),  # 4 by default
        (_flux2, {}, "guidance_scale"),
        (_qwen, {"guidance_scale": 2.0}, "guidance_scale"),
    ):
        (prompt,), _ = with_settings(made()[0], ["a"], None, (5,), (), call)
        assert prompt == {"prompt": "a", name: 5.0}
    pipe = tiny_pipeline(1)
    for wrong, message in (
        ({"guidance": ("high",), "sizes": ()}, "takes numbers"),
        ({"guidance": (), "sizes": ((32,),)}, "a size is"),
        ({"guidance": (), "sizes": ((32, 32, 5),)}, "takes no num_frames"),
    ):
        with pytest.raises(ArgumentError, match=message):
            with_settings(pipe, ["cat"], None, **wrong, call={})
    with pytest.raises(ArgumentError, match="9 settings.*fits to 8 pictures"):
        layercache.search(pipe, ["cat"], effort="quick", guidance=(1, 2, 3), sizes=((32, 32),) * 3, **CALL)


def test_a_schedule_for_several_settings_warns_outside_of_them():
    pipe = tiny_pipeline(2)
    settings = {"guidance": (2, 4), "sizes": ((32, 32), (64, 32))}
    front = layercache.search(
        pipe, ["cat", "coffee"], effort="quick", budgets=(0.5,), progress=False, **settings, **CALL
    )
    (point,) = front.points
    assert len(point.psnr) == 8
    prints = Schedule.from_json(point.schedule.to_json()).fingerprint
    assert prints.settings["guidance"] == ["guidance_scale 2 to 4"]
    assert prints.settings["size"] == ["height 32 to 64", "width 32"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for inside in ({"guidance_scale": 4.0, "height": 48, "width": 32}, {"guidance_scale": 2.5}, {"height": 32}):
            prints.warn_of(call_settings(inside))
    for outside in ({"guidance_scale": 4.5}, {"height": 65, "width": 32}, {"height": 64, "width": 64}):
        with pytest.warns(LayerCacheWarning, match="2 to 4, not|32 to 64 and width 32, not"):
            prints.warn_of(call_settings(outside))
    # each picture's figure is that of its own settings
    calls = [("coffee", 2.0, 64, 1), ("cat", 2.0, 32, 0)]
    order, _ = with_settings(pipe, ["cat", "coffee"], None, *settings.values(), {})
    for prompt, scale, height, _ in calls:
        at = next(
            k for k, one in enumerate(order)
            if (one["prompt"], one["guidance_scale"], one["height"]) == (prompt, scale, height)
        )  # fmt: skip
        call = {"guidance_scale": scale, "height": height, "width": 32, "output_type": "np", **CALL}
        found = []
        for plan in (None, point.schedule):
            generator = torch.Generator().manual_seed(at)
            if plan is None:
                found.append(np.asarray(pipe(prompt, generator=generator, **call).images))
                continue
            with layercache.enabled(pipe, plan):
                found.append(np.asarray(pipe(prompt, generator=generator, **call).images))
        assert psnr_of(*found) == pytest.approx([point.psnr[at]], rel=1e-5)
    with (
        layercache.enabled(pipe, point.schedule),
        pytest.warns(LayerCacheWarning, match="2 to 4, not .*5.*as here") as all_of,
    ):
        for _ in range(2):
            pipe("cat", guidance_scale=5.0, height=64, width=32, output_type="latent", **CALL)
        pipe("cat", guidance_scale=2.5, height=48, width=32, output_type="latent", **CALL)
    assert len(all_of) == 1
    refitted = layercache.refit(pipe, point.schedule, ["cat"], guidance=(6,), progress=False, **CALL)
    assert refitted.schedule.fingerprint.settings["guidance"] == ["guidance_scale 6"]


def test_sizes_with_noise_levels_of_their_own():
    """Where the shift depends on the size, a schedule is for all noise levels between those it was fitted to."""
    pipe, call = _sd3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=1, max_image_seq_len=64
    )
    own = {name: value for name, value in call.items() if "embeds" in name}
    rest = {"num_inference_steps": 5, "output_type": "latent"}
    prompts, _ = with_settings(pipe, [own], None, (), ((32, 32), (128, 128)), {})
    rollouts = Rollouts(pipe, prompts, **rest)
    prints = rollouts.fingerprint
    assert Fingerprint.from_json(prints.to_json()) == prints and len(prints.sigma_range) == 6
    low, high = prints.sigma_range[2]
    assert high - low > 0.01 and prints.sigmas[2] == pytest.approx((low + high) / 2)
    schedule = Schedule.compute_all(prints)
    with layercache.enabled(pipe, schedule) as cache:
        for side in (32, 64, 128):
            generate(pipe, own | rest | {"height": side, "width": side})
        assert cache.report().unidentified == 0
        with pytest.raises(ScheduleMismatchError, match="noise schedule differs"):
            generate(pipe, own | rest | {"height": 256, "width": 256})
    with pytest.raises(ScheduleError, match="2 ranges for 6 noise levels"):
        replace(prints, sigma_range=((0.0, 1.0),) * 2)


def test_a_request_is_warned_of_by_its_own_schedule():
    pipe = tiny_pipeline(3)
    plan = schedule_for(pipe, mixed_cells(4), ((0, 1), (1, 2), (2, 3)))
    of_3, of_5 = (
        replace(plan, fingerprint=replace(plan.fingerprint, settings={"guidance": [f"guidance_scale {scale}"]}))
        for scale in (3, 5)
    )
    call = {"num_inference_steps": 4, "guidance_scale": 3.0}
    with layercache.enabled(pipe, of_5) as cache:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with cache.request("own", schedule=of_3):
                pipe("cat", **call)
        with pytest.warns(LayerCacheWarning, match="guidance_scale 5"):
            pipe("cat", **call)
