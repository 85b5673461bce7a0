"""Long skip connections (U-ViT): groups are cut behind what is read elsewhere, and what would be wrong is refused."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

import layercache
from layercache.errors import CacheStateError, UnsupportedModelError
from layercache.methods import DBCache, FBCache, InvarDiff, ProCache, TaylorSeer
from layercache.methods.l2c import LearningToCache
from layercache.models.spec import ModelSpec
from layercache.runtime.attachment import attachment_of
from layercache.schedule.partition import broken_skip, cut_behind_skips
from layercache.schedule.schedule import Schedule
from support.marks import slow
from support.tiny import generators, randomise

STEPS = 6
LABELS = [1, 2]
CALL = {"num_inference_steps": STEPS, "output_type": "latent"}
EXAMPLE = Path(__file__).parents[2] / "examples" / "uvit.py"


@pytest.fixture(scope="module")
def uvit():
    spec = importlib.util.spec_from_file_location("uvit", EXAMPLE)
    module = sys.modules["uvit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe(uvit):
    model = uvit.UViT(size=16, dim=32, heads=2, half=3)
    randomise(model)
    pipe = uvit.UViTPipeline(model.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def profile(pipe):
    return layercache.calibrate(pipe, [LABELS], progress=False, num_inference_steps=STEPS, sensitivity="substitution")


def picture(pipe, plan=None):
    call = {**CALL, "prompt": LABELS, "generator": generators(2)}
    if plan is None:
        return pipe(**call).images
    with layercache.enabled(pipe, plan) as cache:
        found = pipe(**call).images
        assert cache.report().fallback_rows == 0
    return found


def blocks_of(model) -> list[nn.Module]:
    return [*model.in_blocks, *model.mid_blocks, *model.out_blocks]


def by_hand(pipe, schedule):
    """The picture with residuals put back by hooks, at the last block of every group that is reused."""
    blocks, step, inputs, kept, hooks = blocks_of(pipe.transformer), [0], {}, {}, []
    for group, (lo, hi) in enumerate(schedule.groups):

        def before(module, args, group=group):
            inputs[group] = args[0]

        def after(module, args, output, group=group):
            cell = schedule.cells[step[0]][group]
            if cell is None:
                kept[step[0], group] = output - inputs[group]
                return output
            return inputs[group] + sum(c * kept[anchor, group] for anchor, c in cell.items())

        hooks += [blocks[lo].register_forward_pre_hook(before), blocks[hi - 1].register_forward_hook(after)]
    hooks.append(pipe.transformer.register_forward_hook(lambda *_: step.__setitem__(0, step[0] + 1)))
    try:
        return picture(pipe)
    finally:
        for hook in hooks:
            hook.remove()


def schedule_with(profile, groups, reused: dict[int, tuple[int, ...]]) -> Schedule:
    """Everything computed but these groups at these steps, which take the residual of step 0."""
    rows = [[{0: 1.0} if g in reused.get(step, ()) else None for g in range(len(groups))] for step in range(STEPS)]
    return Schedule(profile.fingerprint, groups, tuple(map(tuple, rows)), (1.0,) * len(groups))


def test_groups_are_cut_behind_what_others_read():
    mirrored = ModelSpec("U", skips="mirrored").skip_pairs(9)
    assert mirrored == ((0, 8), (1, 7), (2, 6), (3, 5))
    assert cut_behind_skips([(0, 3), (3, 6), (6, 9)], mirrored) == ((0, 1), (1, 2), (2, 3), (3, 6), (6, 9))
    assert cut_behind_skips([(0, 9)], mirrored) == ((0, 9),)
    # what was in one group is apart behind another cut
    assert cut_behind_skips([(0, 4), (4, 5)], ((2, 4), (0, 3))) == ((0, 1), (1, 3), (3, 4), (4, 5))
    groups = ((0, 3), (3, 6), (6, 9))
    assert broken_skip(groups, {0}, mirrored) == (0, 8) and broken_skip(groups, {0, 2}, mirrored) is None
    assert broken_skip(groups, {1, 2}, mirrored) is None and broken_skip(groups, set(), mirrored) is None
    assert ModelSpec("U", skips=((0, 2),)).skip_pairs(9) == ((0, 2),)
    for wrong in ("crossed", ((2, 2),), ((3, 1),)):
        with pytest.raises(UnsupportedModelError, match="skip"):
            ModelSpec("U", skips=wrong)


def test_a_full_run_and_schedules_of_groups(pipe, profile):
    full = picture(pipe)
    assert profile.groups[:2] == ((0, 1), (1, 2)) and profile.groups[-1][1] == 7
    assert torch.equal(picture(pipe, Schedule.compute_all(profile.fingerprint)), full)
    schedule = layercache.plan(profile, 0.7)
    assert 0 < schedule.used <= 0.7
    front = schedule_with(profile, profile.groups, {2: (0,), 3: (0, 1), 4: tuple(range(len(profile.groups)))})
    for plan in (schedule, front, Schedule.from_json(schedule.to_json())):
        found = picture(pipe, plan)
        torch.testing.assert_close(found, by_hand(pipe, plan), rtol=1e-4, atol=1e-5)
        assert not torch.equal(found, full)


def test_what_is_held_of_a_group_in_front_reaches_the_velocity(pipe, profile):
    """Sensitivity is measured with the groups in front held, and the skips that lead out of them."""
    weights = profile.sensitivity()
    assert np.isfinite(weights[1:]).all() and (weights[1:] > 0).all()
    step, group = 2, 1
    blocks, seen = blocks_of(pipe.transformer), {}
    lo, hi = profile.groups[group]
    calls: list = []
    hooks = [pipe.transformer.register_forward_pre_hook(lambda m, a: calls.append(a))]
    hooks.append(blocks[lo].register_forward_pre_hook(lambda m, a: seen.__setitem__("in", a[0])))
    hooks.append(blocks[hi - 1].register_forward_hook(lambda m, a, o: seen.__setitem__(len(calls) - 1, o - seen["in"])))
    pipe(**CALL, prompt=LABELS, generator=torch.Generator().manual_seed(0))
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        full = pipe.transformer(*calls[step])
        start = {}
        hooks = [blocks[lo].register_forward_pre_hook(lambda m, a: start.__setitem__(0, a[0]))]
        hooks.append(blocks[hi - 1].register_forward_hook(lambda m, a, o: start[0] + seen[step - 1]))
        moved = pipe.transformer(*calls[step])
        for hook in hooks:
            hook.remove()
    size = lambda a: float(a.abs().sum())  # noqa: E731
    error = size(seen[step] - seen[step - 1]) / size(seen[step])
    assert weights[step, group] == pytest.approx(size(moved - full) / size(full) / error, rel=1e-3)


def test_what_would_be_a_wrong_picture_is_refused(pipe, profile):
    groups = ((0, 2), (2, 5), (5, 7))
    wrong = schedule_with(profile, groups, {3: (0,)})
    for plan in (wrong, DBCache(front=1, back=2, threshold=1.0)):
        with pytest.raises(CacheStateError, match=r"block [56] of UViT reads what block [01] gave"):
            layercache.enable(pipe, plan)
        assert attachment_of(pipe.transformer) is None
    both = schedule_with(profile, groups, {3: (0, 2), 4: (1,)})  # who reads it is reused too
    torch.testing.assert_close(picture(pipe, both), by_hand(pipe, both), rtol=1e-4, atol=1e-5)


def test_a_schedule_that_is_made_at_the_run_is_refused_once(pipe, monkeypatch):
    """And what ends with the pipeline's loop meets nothing else."""
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    full = picture(pipe)
    with pytest.raises(CacheStateError, match="block 6 of UViT reads what block 0 gave"):
        picture(pipe, ProCache((3, 2, 1)))
    assert not ignored and torch.equal(picture(pipe), full)


@pytest.mark.parametrize(
    "method",
    [
        FBCache(threshold=1.0, warmup=2),
        *slow(
            DBCache(front=2, back=2, threshold=1.0, warmup=2),
            TaylorSeer(interval=2, groups=((0, 3), (3, 7))),
            TaylorSeer(interval=2),
        ),
    ],
    ids=lambda method: method.name,
)
def test_methods_hold_what_nobody_reads(pipe, method):
    full = picture(pipe)
    with layercache.enabled(pipe, method) as cache:
        found = pipe(**CALL, prompt=LABELS, generator=generators(2)).images
        assert cache.report().used < 1
        schedule = cache.export_schedule() if hasattr(cache, "export_schedule") else None
    assert not torch.equal(found, full)
    if schedule is not None:
        assert torch.equal(picture(pipe, schedule), found)


def test_a_router_learns_on_it(pipe):
    """Of outer points, as published, and by flow matching; modules cross no skip."""
    full = picture(pipe)
    router = LearningToCache(rounds=1, period=3, learning_rate=0.5).train(pipe, [LABELS], progress=False, **CALL)
    assert len(router.units) == 14 and router.units[-1] == "out_blocks.2.mlp" and router.losses[0][0] > 0
    assert torch.equal(picture(pipe, router.schedule(0.0)), full)
    half = router.schedule(0.5)
    assert half.used < 1 and not torch.equal(picture(pipe, half), full)
    euler, flow = pipe.scheduler, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipe.scheduler = DPMSolverSinglestepScheduler(solver_order=2, **flow)
    try:
        shifted = LearningToCache(rounds=1, shifted=True).train(pipe, [LABELS], progress=False, **CALL)
        schedule = shifted.schedule(1.0)
        assert [all(row) for row in schedule.computed] == [True, True, False, True, False, True]
        assert torch.isfinite(picture(pipe, schedule)).all()
    finally:
        pipe.scheduler = euler
    plan = InvarDiff(0.4, 0.5, 0.0).schedule(pipe, [LABELS], **CALL)
    assert plan.reused_steps and not torch.equal(picture(pipe, plan), full)


class Within(nn.Module):
    """Reads what the first blocks gave between its blocks, where nobody can see it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6))

    def forward(self, x):
        given = []
        for number, layer in enumerate(self.layers):
            x = layer(x + 0.5 * given.pop() if number > 2 else x)
            if number < 3:
                given.append(x)
        return x


def test_skips_are_found_by_watching(uvit, pipe, monkeypatch):
    class Unknown(uvit.UViT):
        pass

    monkeypatch.delitem(layercache.models.registry._REGISTRY, "UViT")
    model = Unknown(size=16, dim=32, heads=2, half=3)
    randomise(model)
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 0.5]), torch.tensor([1, 2])
    found = layercache.infer_model(model, lambda: model(*inputs), register=False)
    assert found.skips == "mirrored" and found.block_lists == uvit.SPEC.block_lists and found.arguments[0] == "x"
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="with blocks 0 to 1 replaced by the stored residual"):
        layercache.infer_model(hidden := Within(), lambda: hidden(torch.randn(1, 4, 8)), register=False)
    assert replace(found, skips=((0, 6),)).needs_every_output and not ModelSpec("Plain").needs_every_output
