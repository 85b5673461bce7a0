"""InvarDiff on pipelines of videos, and where a transformer does not run at all steps, against plain hooks."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import MethodError, UnsupportedModelError
from layercache.methods import invardiff
from layercache.methods.invardiff import InvarDiff
from layercache.models.registry import spec_for
from layercache.runtime.modules import module_units, tensors_of
from layercache.schedule.module_schedule import ModuleSchedule
from support.marks import slow
from support.zoo_pipelines import PIPELINES, _wan_two_experts, flux_img2img, generate

SETTINGS = InvarDiff(step_quantile=0.4, module_quantiles=0.5, nonskip=0.2)
# pipeline, component, calls of it at a step, the steps at which it runs, the head's norm
CASES = {
    "wan": (PIPELINES["wan"], "transformer", 2, range(8), "norm_out"),
    "cogvideox": (PIPELINES["cogvideox, DDIM"], "transformer", 1, range(8), "norm_final"),
    "wan 2.2": (_wan_two_experts, "transformer_2", 2, range(5, 12), "norm_out"),
    "flux img2img": (flux_img2img, "transformer", 1, range(3, 8), "norm_out"),
}


class Video:
    def __init__(self, case: str):
        make, self.name, self.calls, self.steps, self.norm = CASES[case]
        self.pipe, call = make()
        self.model = getattr(self.pipe, self.name)
        self.units = module_units(self.model, spec_for(self.model))
        own = {name: value for name, value in call.items() if "prompt" in name}
        self.prompts = [own, {k: v * 0.6 if v.is_floating_point() else v for k, v in own.items()}]
        self.call = {k: v for k, v in call.items() if k not in own} | {"num_inference_steps": self.steps[-1] + 1}

    def video(self, seed=0):
        return generate(self.pipe, self.call | self.prompts[seed], seed)

    @contextmanager
    def hooked(self, module_hook, head_hook):
        """Hooks with the name of the unit, the branch and the place among the steps; ``final`` in front of the head."""
        count = [0]

        def called(hook, name, *arguments):
            return hook(name, count[0] % self.calls, count[0] // self.calls, arguments[-1])

        hooks = [u.modules[-1].register_forward_hook(partial(called, module_hook, u.name)) for u in self.units]
        hooks.append(getattr(self.model, self.norm).register_forward_pre_hook(partial(called, head_hook, "final")))
        hooks.append(self.model.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def recorded(self) -> list[dict]:
        """``(unit or "final", branch) -> [flat output per step]`` of a full run per prompt."""
        runs = []
        for seed in range(len(self.prompts)):
            seen = defaultdict(list)

            def note(name, branch, step, output, seen=seen):
                seen[name, branch].append(np.concatenate([t.double().numpy().ravel() for t in tensors_of(output)]))

            with self.hooked(note, note):
                self.video(seed)
            runs.append(seen)
        return runs

    def by_hand(self, schedule):
        """The video with outputs of earlier steps put back by hooks."""
        kept = {}

        def module(name, branch, step, output):
            number, place = [u.name for u in self.units].index(name), self.steps[step]
            if place in schedule.reused_steps:
                return None
            if schedule.computed[place][number]:
                kept[name, branch] = output
            return kept[name, branch]

        def head(name, branch, step, arguments):
            if self.steps[step] in schedule.reused_steps:
                return kept[name, branch], *arguments[1:]
            kept[name, branch] = arguments[0]
            return None

        with self.hooked(module, head):
            return self.video()


def rates(outputs, cached=None):
    """Ratios of successive L1 changes; of the second phase, from the output that would be there."""
    rho, reference, moved, flag = np.ones(len(outputs)), outputs[1], np.abs(outputs[1] - outputs[0] + 1e-8).sum(), False
    for k in range(2, len(outputs)):
        now = np.abs(outputs[k] - reference + 1e-8).sum()
        rho[k - 1] = now / moved
        reused = cached is not None and cached[k - 1]
        if not (reused and flag):
            reference, moved = outputs[k], now
        flag = reused
    return rho


def below(rho, quantile, first):
    found = rho < np.quantile(rho[1:-1], quantile)
    found[:first], found[-1] = False, False
    return found


def planned(video: Video) -> tuple[np.ndarray, np.ndarray]:
    """Reused steps, and reused modules, of the steps at which the transformer runs."""
    runs, n = video.recorded(), len(video.steps)
    first = max(1, int(SETTINGS.nonskip * n))

    def mean(name, cached=None):
        return np.mean([rates(run[name, b], cached) for run in runs for b in range(video.calls)], axis=0)

    def modules(cached, first):
        found = np.zeros((n, len(video.units)), dtype=bool)
        for kind in {u.kind for u in video.units}:
            own = [k for k, u in enumerate(video.units) if u.kind == kind]
            rho = [mean(video.units[k].name, None if cached is None else cached[:, k]) for k in own]
            found[:, own] = below(np.stack(rho, axis=1), SETTINGS.module_quantiles, first)
        return found

    steps, final = below(mean("final"), SETTINGS.step_quantile, first), modules(modules(None, 1), first)
    for k in np.flatnonzero(steps):
        final[k], final[k + 1] = True, False
    return steps, final


@pytest.mark.parametrize("case", ["cogvideox", "wan 2.2", *slow("wan", "flux img2img")])
def test_the_plan_and_the_video_are_those_of_plain_hooks(case, tmp_path):
    video = Video(case)
    full = video.video()
    schedule = SETTINGS.schedule(video.pipe, video.prompts, transformer=video.name, **video.call)
    steps, modules = planned(video)
    own = list(video.steps)
    assert schedule.fingerprint.steps == tuple(own) and schedule.reused_steps == {own[k] for k in np.flatnonzero(steps)}
    np.testing.assert_array_equal(~np.array(schedule.computed)[own], modules)
    weights = np.array(schedule.seconds)
    spent = sum((weights * ~row).sum() for row, whole in zip(modules, steps, strict=True) if not whole)
    assert steps.any() and schedule.used == pytest.approx(spent / (len(own) * weights.sum()))
    schedule.save(tmp_path / "modules.json")
    expected = video.by_hand(schedule)
    assert not torch.equal(expected, full)
    target = video.pipe if video.name == "transformer" else video.model
    for plan in (schedule, ModuleSchedule.load(tmp_path / "modules.json")):
        with layercache.enabled(target, plan, video.pipe.scheduler) as cache:
            assert torch.equal(video.video(), expected)
            report = cache.report()
        assert report.fallback_rows == 0 and report.used == pytest.approx(schedule.used)
        assert report.cache_bytes > 0 and len(report.branches) == video.calls
    if case.startswith("wan"):
        assert (
            InvarDiff.preset("wan-steps").schedule(video.pipe, video.prompts, transformer=video.name, **video.call).used
            < 1
        )
    neutral = InvarDiff(0.0, 0.0).schedule(video.pipe, video.prompts[:1], transformer=video.name, **video.call)
    with layercache.enabled(target, neutral, video.pipe.scheduler):
        assert torch.equal(video.video(), full)


def test_a_transformer_that_never_runs():
    pipe, call = _wan_two_experts()
    pipe.register_to_config(boundary_ratio=0.0)
    own = [{name: value for name, value in call.items() if "prompt" in name}]
    rest = {name: value for name, value in call.items() if "prompt" not in name}
    with pytest.raises(MethodError, match="transformer_2 ran at no step"):
        invardiff.measure(pipe, own, transformer="transformer_2", **rest)
    with pytest.raises(UnsupportedModelError, match="its transformers are transformer, transformer_2"):
        invardiff.measure(pipe, own, transformer="unet", **rest)
