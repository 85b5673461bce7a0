"""Modular pipelines of diffusers and their guiders."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    SkipLayerGuidance,
)
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.hooks import LayerSkipConfig

import layercache
from layercache._utils.compat import scheduler_sigmas
from layercache.models.registry import fingerprint_of
from layercache.schedule.schedule import Schedule, Velocity
from support.marks import slow
from support.modular import PIPELINES, generate
from support.zoo_pipelines import STEPS, schedule_of

CFG = {"guidance_scale": 3.0}


def made(name, guider=None):
    pipe, call = PIPELINES[name]()
    if guider is not None:
        pipe.update_components(guider=guider)
    return pipe, call


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


GUIDERS = {
    "ends early": (lambda: ClassifierFreeGuidance(**CFG, stop=0.5), lambda k: ["cond", "uncond"][: 1 + (k < 4)]),
    "begins late": (lambda: ClassifierFreeGuidance(**CFG, start=0.5), lambda k: ["cond", "uncond"][: 1 + (k >= 4)]),
    "skips layers": (lambda: SkipLayerGuidance(**CFG, **skipping([1, 2])), with_skip),
    "other layers": (
        lambda: AutoGuidance(**CFG, auto_guidance_config=LayerSkipConfig([1])),
        lambda k: ["cond", "uncond"],
    ),
    # diffusers puts no hooks on the second of two conditions, and so on none of the first steps' here
    "hooks begin late": (
        lambda: SkipLayerGuidance(**CFG, **skipping([1, 2], skip_layer_guidance_start=0.0, start=0.6)),
        lambda k: ["cond", *["uncond"] * (k >= 4), *[f"skip {k < 4}"] * (0 < k < 6)],
    ),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_branches_keep_residuals_of_their_own(name):
    guider, conditions = GUIDERS[name]
    pipe, call = made("wan", guider())
    full = generate(pipe, call)
    plan = schedule_of(pipe, "crr")
    with Reference(pipe, conditions, "crr"):
        expected = generate(pipe, call)
    with layercache.enabled(pipe, plan):
        found = generate(pipe, call)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(full, expected, atol=1e-5)


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
