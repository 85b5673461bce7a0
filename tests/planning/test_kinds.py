"""Search, refit and learning on every kind of pipeline: samplers, beginnings in the middle, videos, images as input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import layercache
from layercache.errors import CalibrationError
from layercache.planning.rollout import Rollouts, psnr_of, skipping
from layercache.planning.samples import call_of, count_of, pictures_in, seeds_of
from layercache.schedule.schedule import Schedule
from support.zoo_pipelines import PIPELINES, flux_controlnet, flux_img2img, flux_inpaint, generate

KINDS = {name: PIPELINES[name] for name in ("cogvideox, DDIM", "cogvideox, DPM", "sana, DPM")}
KINDS |= {"img2img": flux_img2img, "inpainting": flux_inpaint, "ControlNet": flux_controlnet}

pytestmark = pytest.mark.usefixtures("short_searches")


def own_arguments(call: dict) -> tuple[list[dict], dict]:
    """Two samples, the second with weaker prompts, and what they share."""
    own = {name: value for name, value in call.items() if any(part in name for part in ("embeds", "mask", "image"))}

    def weaker(value):
        if isinstance(value, list):
            return [weaker(one) for one in value]
        return value * 0.7 if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    other = {name: weaker(value) for name, value in own.items()}
    return [own, other], {name: value for name, value in call.items() if name not in own}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_is_what_enable_gives(kind):
    """The schedule's PSNR is that of the pipeline with it enabled; computing every step gives the full run's bits."""
    pipe, call = KINDS[kind]()
    prompts, rest = own_arguments(call)
    front = layercache.search(pipe, prompts, effort="quick", budgets=(0.5,), progress=False, **rest)
    (point,) = front.points
    steps = point.schedule.fingerprint.steps
    assert point.used <= 0.5 and point.schedule.velocities[steps[-1]] is not None
    full = [pictures_in(generate(pipe, rest | own, seed)) for seed, own in enumerate(prompts)]
    for schedule, expected in ((point.schedule, point.psnr), (Schedule.compute_all(point.schedule.fingerprint), None)):
        with layercache.enabled(pipe, schedule) as cache:
            found = [pictures_in(generate(pipe, rest | own, seed)) for seed, own in enumerate(prompts)]
            report = cache.report()
        assert report.fallback_rows == 0 and report.unidentified == 0 and report.used == pytest.approx(schedule.used)
        if expected is None:
            assert all(np.array_equal(a, b) for a, b in zip(full, found, strict=True))
        else:
            psnr = [value for a, b in zip(full, found, strict=True) for value in psnr_of(a, b)]
            assert psnr == pytest.approx(expected, rel=1e-4)


def test_runs_that_begin_in_the_middle():
    """Steps count from the run's first one; refit goes to another strength, which takes other steps."""
    pipe, call = flux_img2img()
    prompts, rest = own_arguments(call)
    rollouts = Rollouts(pipe, prompts, strength=0.5, **rest)  # 4 of 8 steps
    assert (rollouts.first, rollouts.num_steps) == (4, 4) and len(rollouts.sigmas) == 5
    prints = rollouts.fingerprint
    assert prints.num_steps == 8 and prints.steps_run == (4, 5, 6, 7)
    with pytest.raises(CalibrationError, match="4, 8 steps"):
        Rollouts(pipe, [prompts[0], prompts[0] | {"strength": 1.0}], strength=0.5, **rest)
    schedule = skipping(prints, [0, 2])
    assert [step for step in range(8) if schedule.velocity(step)] == [5, 7] and schedule.used == 0.5
    rollout = rollouts.run(schedule)
    with layercache.enabled(pipe, rollout.schedule) as cache:
        found = pictures_in(generate(pipe, rest | prompts[0] | {"strength": 0.5}))
        assert cache.report().fallback_rows == 0
        later = generate(pipe, rest | prompts[0] | {"strength": 0.3})  # from step 5 on, which nothing is held for
        assert cache.report().fallback_rows == 1 and torch.isfinite(later).all()
    assert psnr_of(rollouts.pictures[0], found) == pytest.approx([rollout.psnr[0]], rel=1e-4)
    point = layercache.refit(pipe, rollout.schedule, prompts, progress=False, strength=1.0, **rest)
    assert point.schedule.fingerprint.steps_run == () and point.used == 0.5


def test_refit_and_files_of_a_search_from_the_middle(tmp_path):
    pipe, call = flux_img2img()
    prompts, rest = own_arguments(call)
    search = {"effort": "quick", "budgets": (0.5,), "progress": False, "resume": tmp_path, "strength": 0.5, **rest}
    first = layercache.search(pipe, prompts, **search)
    again = layercache.search(pipe, prompts, **search)
    assert again.points == first.points
    refitted = layercache.refit(pipe, first.points[0].schedule, prompts, progress=False, strength=0.5, **rest)
    assert refitted.schedule.cells == first.points[0].schedule.cells


# --- samples and their pictures --------------------------------------------------------------------------------------


def test_arguments_of_samples():
    call = {"height": 8, "num_images_per_prompt": None}
    both = {"prompt_embeds": torch.zeros(2, 5, 4), "height": 16}
    assert [count_of(prompt, call) for prompt in ("a", ["a", "b"], {"prompt": "a"}, both)] == [1, 2, 1, 2]
    assert count_of(["a", "b"], {"num_images_per_prompt": 3}) == 6 == count_of(both, {"num_videos_per_prompt": 3})
    assert seeds_of(["a", ["b", "c"], both], None, call) == [[0], [1, 2], [3, 4]]
    with pytest.raises(CalibrationError, match="3 pictures, 2 seeds"):
        seeds_of(["a", ["b", "c"]], [1, 2], call)
    made = call_of(both, [3, 4], call)
    assert made["height"] == 16 and [g.initial_seed() for g in made["generator"]] == [3, 4]
    assert call_of("a", [7], call)["generator"].initial_seed() == 7 and call_of("a", [7], call)["prompt"] == "a"
    own = torch.Generator().manual_seed(9)
    torch.rand(3, generator=own)
    given = call_of({"prompt": "a", "generator": own}, [0], {})["generator"]
    assert given is not own and torch.equal(torch.rand(2, generator=given), torch.rand(2, generator=own))


def test_pictures_of_every_output():
    """Of videos all frames are one picture, however they are given."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)  # two videos of three frames
    as_pil = [[Image.fromarray(frame) for frame in video] for video in frames]
    shares = (frames / 255).astype(np.float32)

    class Output:
        def __init__(self, **found):
            vars(self).update(found)

    for result in (Output(frames=as_pil), Output(frames=frames), (list(frames),), as_pil):
        np.testing.assert_array_equal(pictures_in(result, 2), frames)
    for result in (Output(frames=shares), Output(videos=torch.from_numpy(shares)), (list(map(torch.tensor, shares)),)):
        np.testing.assert_array_equal(pictures_in(result, 2), shares)
    assert pictures_in(Output(frames=shares[0]), 1).shape == (1, 3, 4, 5, 3)  # [frames, H, W, C] of one video
    assert pictures_in(Output(frames=shares.reshape(6, 4, 5, 3)), 2).shape == shares.shape
    assert pictures_in(Output(images=torch.zeros(2, 4, dtype=torch.bfloat16))).dtype == np.float32
    with pytest.raises(CalibrationError, match="3 pictures for 2 prompts"):
        pictures_in(Output(images=np.zeros((3, 4))), 2)
    other = np.clip(shares + 0.1 * np.arange(2, dtype=np.float32)[:, None, None, None, None] * (shares < 0.5), 0, 1)
    expected = -10 * np.log10(((shares[1].astype(float) - other[1]) ** 2).mean())
    assert psnr_of(shares, other) == pytest.approx([100.0, expected])
    assert psnr_of(frames, other) == pytest.approx([100.0, expected], rel=1e-5)
    with pytest.raises(CalibrationError, match="cannot be compared"):
        psnr_of(shares, shares[:, :2])
