"""Modular pipelines of diffusers and their guiders."""

from __future__ import annotations

from collections import UserList, defaultdict
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    MagnitudeAwareGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig

import layercache
from layercache._utils.compat import scheduler_sigmas
from layercache.errors import LayerCacheError, LayerCacheWarning
from layercache.methods.easycache import EasyCache
from layercache.methods.fbcache import FBCache
from layercache.models.registry import fingerprint_of
from layercache.schedule.schedule import Schedule, Velocity
from support import zoo_pipelines as classic
from support.marks import slow
from support.modular import PIPELINES, generate
from support.zoo_pipelines import STEPS, schedule_of

CFG = {"guidance_scale": 3.0}
PERTURBED = {"perturbed_guidance_layers": [1], "perturbed_guidance_start": 0.2, "perturbed_guidance_stop": 0.8}
FEWER = 4  # steps, where nothing begins or ends in the middle


def made(name, guider=None):
    pipe, call = PIPELINES[name]()
    if guider is not None:
        pipe.update_components(guider=guider)
    return pipe, call


@pytest.mark.parametrize(
    "name", ["z-image", "ltx", *slow(*(name for name in PIPELINES if name not in ("z-image", "ltx")))]
)
def test_kinds_of_pipelines(name):
    """Full rows give the full run's bits; each condition is a branch, and nothing is left behind."""
    pipe, call = made(name)
    call["num_inference_steps"] = FEWER
    full = generate(pipe, call)
    set_state, own = BaseGuidance.set_state, dict(vars(getattr(pipe, "guider", None) or object))
    with layercache.enabled(pipe, schedule_of(pipe, "c")):
        assert torch.equal(generate(pipe, call), full)
    plan = schedule_of(pipe, "crr")
    with layercache.enabled(pipe, plan) as cache:
        reused = generate(pipe, call)
        assert cache.generation is None  # the loop's end is known
    report = cache.report()
    assert not torch.allclose(reused, full, atol=1e-6)
    branches = {"flux": ("call 0",), "ltx 2": ("cond", "uncond", "cond_stg")}.get(name, ("cond", "uncond"))
    assert report.branches == branches and report.generations == 1 and report.source == "scheduler"
    assert (report.unidentified, report.fallback_rows) == (0, 0)
    if name != "wan, two experts":  # of its plan for all steps the first transformer runs some
        assert report.used == pytest.approx(plan.used)
    if hasattr(pipe.transformer, "enable_cache"):
        pipe.transformer.enable_cache(layercache.CacheConfig(plan, scheduler=pipe.scheduler))
        assert torch.equal(generate(pipe, call), reused)
        pipe.transformer.disable_cache()
    assert BaseGuidance.set_state is set_state
    assert not {"forward", "prepare_models"} & set(vars(getattr(pipe, "guider", None) or object)) - set(own)


@pytest.mark.parametrize("name", ["flux", "qwen-image", *slow("wan")])
def test_schedules_do_what_they_do_in_other_pipelines(name):
    pipe, call = made(name)
    call["num_inference_steps"] = FEWER
    of_kind = {
        "flux": lambda: (classic.make("FluxPipeline", "FluxTransformer2DModel"), {}),
        "qwen-image": lambda: (classic._qwen()[0], {"true_cfg_scale": 4.0}),
        "wan": lambda: (classic._wan()[0], {}),
    }
    other, more = of_kind[name]()
    size = {"height": classic.SIDE, "width": classic.SIDE, "output_type": "latent"}
    other_call = call | size | more

    def both():
        found = generate(pipe, call), classic.generate(other, other_call)
        return [latents.flatten().sort().values for latents in found]  # one of them is packed

    one, two = full = both()
    assert torch.equal(one, two)
    plan = schedule_of(other, "crrl")
    with layercache.enabled(pipe, plan), layercache.enabled(other, plan):
        one, two = both()
    assert torch.equal(one, two) and not torch.equal(one, full[0])


class Reference:
    """Reuses all blocks of Wan by branch in plain PyTorch: every block runs, the last one's output is replaced.

    Args:
        conditions: branches of a step, in their order, by its number.
        kinds: per step whether all blocks are computed (c) or the newest such step's residual is added.
    """

    def __init__(self, pipe, conditions, kinds):
        self.pipe, self.conditions, self.kinds = pipe, conditions, kinds
        self.stored, self.step, self.count = defaultdict(dict), -1, 0

    def begin(self, *_):
        step = self.pipe.scheduler.step_index or 0
        self.count = self.count + 1 if step == self.step else 0
        self.step = step

    def enter(self, block, args):
        self.start = args[0]

    def leave(self, block, args, output):
        branch = self.conditions(self.step)[self.count]
        kind = self.kinds[self.step % len(self.kinds)]
        if kind == "c" or self.step == 0:
            self.stored[branch][self.step] = output - self.start
        anchor = max(k for k in range(self.step + 1) if k == 0 or self.kinds[k % len(self.kinds)] == "c")
        return self.start + self.stored[branch][anchor] if anchor in self.stored[branch] else output

    def __enter__(self):
        model = self.pipe.transformer
        self.hooks = [
            model.register_forward_pre_hook(self.begin),
            model.blocks[0].register_forward_pre_hook(self.enter),
            model.blocks[-1].register_forward_hook(self.leave),
        ]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def skipping(layers, **more):
    interval = {"skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.8}
    return interval | {"skip_layer_config": LayerSkipConfig(layers, fqn="blocks")} | more


def with_skip(step):
    return ["cond", "uncond", "skip"] if 1 < step < 6 else ["cond", "uncond"]


INSIDE = LayerSkipConfig([1], fqn="blocks", skip_attention=False)  # hooks on modules of a block, none on itself
GUIDERS = {
    "begins late": (lambda: ClassifierFreeGuidance(**CFG, start=0.5), lambda k: ["cond", "uncond"][: 1 + (k >= 4)]),
    "skips layers": (lambda: SkipLayerGuidance(**CFG, **skipping([1, 2])), with_skip),
    "other layers": (
        lambda: AutoGuidance(**CFG, auto_guidance_config=INSIDE),
        lambda k: ["cond", "uncond"],
    ),
    # diffusers puts no hooks on the second of two conditions, and so on none of the first steps' here
    "hooks begin late": (
        lambda: SkipLayerGuidance(**CFG, **skipping([1, 2], skip_layer_guidance_start=0.0, start=0.6)),
        lambda k: ["cond", *["uncond"] * (k >= 4), *[f"skip {k < 4}"] * (0 < k < 6)],
    ),
}


EVERY_STEP = lambda k: ["cond", "uncond"]  # noqa: E731
OTHER_GUIDERS = {
    "ends early": (lambda: ClassifierFreeGuidance(**CFG, stop=0.5), lambda k: ["cond", "uncond"][: 1 + (k < 4)]),
    "zero star": (lambda: ClassifierFreeZeroStarGuidance(**CFG), EVERY_STEP),
    "mix": (lambda: AdaptiveProjectedMixGuidance(**CFG), EVERY_STEP),
    "tangential": (lambda: TangentialClassifierFreeGuidance(**CFG), EVERY_STEP),
    "smoothed energy": (
        lambda: SmoothedEnergyGuidance(
            **CFG,
            seg_guidance_config=SmoothedEnergyGuidanceConfig([1], fqn="blocks"),
            seg_guidance_start=0.2,
            seg_guidance_stop=0.8,
        ),
        with_skip,
    ),
}


@pytest.mark.parametrize("name", [*GUIDERS, *slow(*OTHER_GUIDERS)])
def test_branches_keep_residuals_of_their_own(name):
    guider, conditions = (GUIDERS | OTHER_GUIDERS)[name]
    pipe, call = made("wan", guider())
    full = generate(pipe, call)
    plan = schedule_of(pipe, "crr")
    with Reference(pipe, conditions, "crr"):
        expected = generate(pipe, call)
    with layercache.enabled(pipe, plan):
        found = generate(pipe, call)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(full, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "guider", "branches"),
    [
        ("qwen-image", lambda: MagnitudeAwareGuidance(), ("cond", "uncond")),
        ("z-image", lambda: PerturbedAttentionGuidance(**CFG, **PERTURBED), ("cond", "uncond", "cond_skip")),
    ],
)
def test_guiders_of_pictures(name, guider, branches):
    pipe, call = made(name, guider())
    full = generate(pipe, call)
    with layercache.enabled(pipe, schedule_of(pipe, "c")):
        assert torch.equal(generate(pipe, call), full)
    with layercache.enabled(pipe, schedule_of(pipe, "crr")) as cache:
        assert not torch.equal(generate(pipe, call), full)
    assert cache.report().branches == branches and cache.report().unidentified == 0


def skipping_steps(pipe, skipped):
    """A schedule by which these steps take the velocity of the newest computed one."""
    sigmas, rules = scheduler_sigmas(pipe.scheduler), []
    for step in range(STEPS):
        newest = max(k for k in range(step + 1) if k not in skipped)
        rules.append(Velocity({newest: 1.0}) if step in skipped else None)
    cells = tuple((None,) if rule is None else ({},) for rule in rules)
    prints = fingerprint_of(pipe.transformer, sigmas, ())
    return Schedule(prints, ((0, prints.num_blocks),), cells, (1.0,), velocities=tuple(rules))


@contextmanager
def held_velocities(pipe, skipped):
    """In plain PyTorch: at these steps samplers take their last velocity again, and the guider is not asked."""
    cls, held = type(pipe.scheduler), {}
    step, guide = cls.step, pipe.guider.forward

    def stepped(scheduler, velocity, *args, **kwargs):
        if (scheduler.step_index or 0) not in skipped:
            held[id(scheduler)] = velocity
        return step(scheduler, held[id(scheduler)], *args, **kwargs)

    def guided(pred_cond, **others):
        skips = (pipe.scheduler.step_index or 0) in skipped
        return GuiderOutput(pred=pred_cond, pred_cond=pred_cond) if skips else guide(pred_cond=pred_cond, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "step", stepped)
        patch.setattr(pipe.guider, "forward", guided)
        yield


@pytest.mark.parametrize(
    ("name", "guider", "skipped"),
    [
        # of step 3's velocity, which is guided, nothing is taken where guidance has ended: steps 4 and 5 are computed
        ("wan", lambda: ClassifierFreeGuidance(**CFG, stop=0.5), {1, 4, 5, 7}),
        # its momentum sees nothing of a skipped step
        ("wan", lambda: AdaptiveProjectedGuidance(**CFG, adaptive_projected_guidance_momentum=-0.5), {2, 3, 5}),
        *slow(*((name, None, {1, 3, 4}) for name in PIPELINES if name not in ("flux", "wan"))),
    ],
)
def test_velocities_are_of_the_same_guidance(name, guider, skipped):
    pipe, call = made(name, guider and guider())
    full = generate(pipe, call)
    with layercache.enabled(pipe, skipping_steps(pipe, skipped)):
        found = generate(pipe, call)
    with held_velocities(pipe, skipped - {4, 5} if 7 in skipped else skipped):
        expected = generate(pipe, call)
    assert torch.equal(found, expected) and not torch.allclose(found, full, atol=1e-5)


class Swapping(ClassifierFreeGuidance):
    """Runs its conditions in turns, the other one first at every second step."""

    def prepare_inputs_from_block_state(self, *args):
        batches = super().prepare_inputs_from_block_state(*args)
        return batches[:: -1 if self._step % 2 else 1]


class Unnamed(ClassifierFreeGuidance):
    """Gives its conditions in a way that nobody knows."""

    def prepare_inputs_from_block_state(self, *args):
        return UserList(super().prepare_inputs_from_block_state(*args))


def test_names_and_not_places_tell_branches():
    pipe, call = made("wan", ClassifierFreeGuidance(**CFG))
    full = generate(pipe, call)
    with layercache.enabled(pipe, schedule_of(pipe, "cr")) as cache:
        expected = generate(pipe, call)
        pipe.update_components(guider=Swapping(**CFG))  # behind the cache's back
        assert torch.equal(generate(pipe, call), expected) and not torch.equal(expected, full)
        assert cache.report().unidentified == 0
        pipe.guider = Unnamed(**CFG)
        with pytest.warns(LayerCacheWarning, match="more conditions than its guider has prepared"):
            assert torch.equal(generate(pipe, call), full)
        assert cache.report().unidentified == 2 * STEPS


def test_decisions_are_none_of_a_guider():
    """A block that a guider skips says nothing of the streams, nor a velocity of one guidance of another's."""
    pipe, call = made("wan", SkipLayerGuidance(**CFG, **skipping([0])))
    with layercache.enabled(pipe, FBCache(threshold=9.0, warmup=1, per_branch=True)) as cache:
        generate(pipe, call)
        assert cache.decisions["cond"] == (True, *[False] * 7)
        assert cache.decisions["cond_skip"] == (True,) * 6
    with layercache.enabled(pipe, EasyCache(threshold=9.0)) as cache:
        pipe.update_components(guider=ClassifierFreeGuidance(**CFG))
        generate(pipe, call)
        held = cache.decisions["cond"]
        pipe.update_components(guider=ClassifierFreeGuidance(**CFG, stop=0.75))
        generate(pipe, call)
    assert not held[6] and cache.decisions["cond"] == (*held[:6], True, True)


def test_guidance_is_a_setting():
    pipe, call = made("wan", ClassifierFreeGuidance(**CFG))
    embeds = {name: call.pop(name) for name in ("prompt_embeds", "negative_prompt_embeds", "latents")}
    call["num_inference_steps"] = 4
    profile = layercache.calibrate(pipe, [embeds], progress=False, **call)
    assert profile.fingerprint.branches == ("cond", "uncond")
    assert "guidance_scale 3" in profile.fingerprint.settings["guidance"]
    with layercache.enabled(pipe, replace(schedule_of(pipe, "c"), fingerprint=profile.fingerprint)):
        generate(pipe, call | embeds)
        pipe.update_components(guider=ClassifierFreeGuidance(**CFG, stop=0.5))
        with pytest.warns(LayerCacheWarning, match="guidance_stop 0.5"):
            generate(pipe, call | embeds)


@pytest.mark.slow
def test_learns_and_searches():
    pipe, call = made("qwen-image", ClassifierFreeGuidance(**CFG))
    call["num_inference_steps"] = 6
    full = generate(pipe, call)
    cache = layercache.enable(pipe, budget=0.5, learn=1)
    assert torch.equal(generate(pipe, call), full)
    learnt = generate(pipe, call)
    assert not torch.equal(learnt, full) and cache.report().used < 1
    pipe.update_components(guider=ClassifierFreeGuidance(**CFG, stop=0.5))
    with pytest.warns(LayerCacheWarning, match="conditions change in the middle"):
        generate(pipe, call)
    layercache.disable(pipe)
    with pytest.raises(LayerCacheError, match="conditions change in the middle"):
        layercache.search(pipe, [call], budgets=[0.5], num_inference_steps=6)
