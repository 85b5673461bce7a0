"""Uniform skips, TaylorSeer, SmoothCache and MagCache against literal transcriptions of the published rules."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import MethodError
from layercache.methods.fixed import SmoothCache, TaylorSeer, Uniform, taylorseer_steps
from layercache.methods.full_runs import magnitude_ratios
from layercache.methods.magcache import FLUX_28, QWEN_IMAGE_50, RATIOS, MagCache
from layercache.models.registry import fingerprint_of
from support.tiny import GROUPS, generate, generators, shifted_sigmas, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def prints(pipe, steps, branches=("cond", "uncond")):
    return fingerprint_of(pipe.transformer, shifted_sigmas(steps), branches)


def computed_steps(schedule):
    return [step for step in range(schedule.num_steps) if not schedule.is_skipped(step)]


def test_uniform(pipe):
    assert computed_steps(Uniform(interval=3).schedule(prints(pipe, 10))) == [0, 3, 6, 9]
    assert computed_steps(Uniform(interval=3, warmup=3, cooldown=1).schedule(prints(pipe, 10))) == [0, 1, 2, 5, 8, 9]
    assert computed_steps(Uniform(interval=1).schedule(prints(pipe, 5))) == [0, 1, 2, 3, 4]
    held = Uniform(interval=2).schedule(prints(pipe, 6))
    assert held.velocity(3).terms == {2: 1.0}
    with layercache.enabled(pipe, held) as cache:
        generate(pipe, steps=6)
    assert cache.report().used == pytest.approx(0.5)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_steps_that_are_not_run_are_left_out(pipe, groups):
    """Of img2img, or of one of two experts: the same rule, counted from the first step that is run."""
    part = replace(prints(pipe, 12), steps_run=tuple(range(4, 12)))
    later = TaylorSeer(interval=3, order=1, groups=groups).schedule(part)
    alone = TaylorSeer(interval=3, order=1, groups=groups).schedule(prints(pipe, 8))
    for step in range(8):
        rule, expected = (s.velocity(k) for s, k in ((later, step + 4), (alone, step)))
        moved = None if expected is None else {k + 4: c for k, c in expected.terms.items()}
        assert (None if rule is None else rule.terms) == moved
        for cell, own in zip(later.cells[step + 4], alone.cells[step], strict=True):
            assert cell == (own and {k + 4: c for k, c in own.items()})
    assert all(cell == {} for row in later.cells[:4] for cell in row) and later.used == alone.used
    assert computed_steps(Uniform(interval=3).schedule(part)) == [4, 7, 10]


def taylor_literal(features, computed, order):
    """TaylorSeer's recursion on arrays, step by step."""
    factors, last, results = [], None, []
    for i, feature in enumerate(features):
        if i in computed:
            updated = [feature]
            for old in factors[:order]:
                updated.append((updated[-1] - old) / (i - last))
            factors, last = updated, i
            results.append(feature)
        else:
            results.append(sum(f * (i - last) ** q / np.prod(range(1, q + 1)) for q, f in enumerate(factors)))
    return results


@pytest.mark.parametrize("interval, order, warmup", [(5, 1, 3), (3, 2, 3), (4, 4, 2), (2, 0, 1)])
def test_taylorseer_follows_the_recursion(pipe, interval, order, warmup):
    steps = 24
    schedule = TaylorSeer(interval=interval, order=order, warmup=warmup).schedule(prints(pipe, steps))
    features = np.random.default_rng(0).normal(size=(steps, 7))
    expected = taylor_literal(features, taylorseer_steps(steps, interval, warmup), order)
    for step in range(steps):
        rule = schedule.velocity(step)
        found = features[step] if rule is None else sum(c * features[k] for k, c in rule.terms.items())
        np.testing.assert_allclose(found, expected[step], rtol=1e-9, atol=1e-9)


def test_taylorseer_steps_are_those_of_diffusers():
    assert taylorseer_steps(20) == [0, 1, 2, 4, 9, 14, 19]
    assert taylorseer_steps(20, stop=17) == [0, 1, 2, 4, 9, 14, 17, 18, 19]


def test_taylorseer_per_block(pipe):
    blocks = [(k, k + 1) for k in range(6)]
    schedule = TaylorSeer(interval=3, order=1, groups=blocks).schedule(prints(pipe, 8))
    assert schedule.groups == tuple(blocks) and schedule.cells[3] == ({2: 2.0, 1: -1.0},) * 6
    with layercache.enabled(pipe, schedule):
        assert torch.isfinite(generate(pipe, steps=8)).all()


def smooth_literal(error, alpha, longest):
    """``error[j][i]``: of step i + j from i, as SmoothCache measures it."""
    steps, i = len(error[1]) + 1, 0
    compute = [False] * steps
    while i < steps:
        for j in range(longest, 0, -1):
            if i < len(error[j]) and error[j][i] <= alpha:
                compute[i] = True
                i += j + 1
                break
        else:
            compute[i] = True
            i += 1
    compute[0] = compute[-1] = True
    return compute


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.6, 5.0])
def test_smoothcache(pipe, alpha):
    call = {"num_inference_steps": 10, "guidance_scale": 1.0}
    profile = layercache.calibrate(pipe, ["cat"], seeds=[0], progress=False, max_distance=4, max_span=1, **call)
    schedule = SmoothCache(alpha=alpha).schedule(profile)
    residuals = recorded_residuals(pipe, call)
    for group in range(len(GROUPS)):
        r = [row[group] for row in residuals]
        error = [[float((r[i] - r[i + j]).abs().sum() / r[i + j].abs().sum()) for i in range(10 - j)] for j in range(4)]
        assert [row[group] is None for row in schedule.cells] == smooth_literal(error, alpha, 3)
        newest = 0
        for step, row in enumerate(schedule.cells):
            newest = step if row[group] is None else newest
            assert row[group] is None or row[group] == {newest: 1.0}


def recorded_residuals(pipe, call):
    starts, rows, hooks = {}, [], []
    blocks = pipe.transformer.transformer_blocks
    for group, (lo, hi) in enumerate(GROUPS):

        def before(module, args, kwargs, group=group):
            starts[group] = kwargs["hidden_states"]

        def after(module, args, output, group=group):
            rows.append((output[1] - starts[group]).double())

        hooks.append(blocks[lo].register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(blocks[hi - 1].register_forward_hook(after))
    pipe("cat", generator=generators(1)[0], output_type="latent", **call)
    for hook in hooks:
        hook.remove()
    return [rows[k : k + len(GROUPS)] for k in range(0, len(rows), len(GROUPS))]


def mag_literal(ratios, steps, threshold, longest, retention):
    gamma = np.asarray(ratios)[np.round(np.linspace(0, len(ratios) - 1, steps)).astype(int)]
    computed, p, n, e = [], 1.0, 0, 0.0
    for i in range(steps):
        skip = False
        if i >= int(retention * steps + 0.5) and i > 0:
            p, n = p * gamma[i], n + 1
            e += abs(1 - p)
            skip = e <= threshold and n <= longest
            if not skip:
                p, n, e = 1.0, 0, 0.0
        computed.append(not skip)
    return computed


@pytest.mark.parametrize("steps", [28, 50, 13])
@pytest.mark.parametrize("threshold, longest, retention", [(0.24, 5, 0.1), (0.06, 2, 0.2), (0.0, 3, 0.0)])
@pytest.mark.parametrize("name", list(RATIOS))
def test_magcache(pipe, name, steps, threshold, longest, retention):
    schedule = MagCache(ratios=name, threshold=threshold, max_consecutive=longest, retention=retention).schedule(
        prints(pipe, steps)
    )
    expected = mag_literal(RATIOS[name], steps, threshold, longest, retention)
    assert [row[0] is None for row in schedule.cells] == expected
    assert not schedule.branch_cells


def test_published_ratios_and_decisions_per_branch(pipe):
    assert len(FLUX_28) == 28 and len(QWEN_IMAGE_50) == 50
    assert (FLUX_28[1], FLUX_28[-1], QWEN_IMAGE_50[1], QWEN_IMAGE_50[-1]) == (1.21094, 0.89062, 1.64062, 0.55078)
    own = {"cond": [1.0] * 10, "uncond": [1.0, *[1.5] * 9]}
    schedule = MagCache(ratios=own).schedule(prints(pipe, 10))
    assert [row[0] is None for row in schedule.cells_of("uncond")] == [True] * 10
    assert [row[0] is None for row in schedule.cells_of("cond")] == mag_literal([1.0] * 10, 10, 0.06, 3, 0.2)
    automatic = MagCache().schedule(prints(pipe, 50))
    assert automatic.cells == MagCache(ratios=QWEN_IMAGE_50).schedule(prints(pipe, 50)).cells


def test_measured_ratios(pipe):
    call = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent"}
    starts, residuals = [], []
    transformer = pipe.transformer
    hooks = [
        transformer.img_in.register_forward_hook(lambda m, a, out: starts.append(out.double())),
        transformer.norm_out.register_forward_pre_hook(lambda m, a: residuals.append(a[0].double() - starts[-1])),
    ]
    pipe("cat", generator=generators(1, 4)[0], **call)
    for hook in hooks:
        hook.remove()
    found = magnitude_ratios(pipe, "cat", seed=4, **call)
    for branch, at in (("cond", 0), ("uncond", 1)):
        own = residuals[at::2]
        expected = [1.0] + [float((b.norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in zip(own, own[1:], strict=False)]
        np.testing.assert_allclose(found[branch], expected, rtol=1e-4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: Uniform(interval=0), "interval"),
        (lambda p: Uniform(interval=2, warmup=0), "warmup"),
        (lambda p: TaylorSeer(interval=3, order=9), "order"),
        (lambda p: TaylorSeer(interval=3, warmup=0), "warmup"),
        (lambda p: MagCache(ratios="no-such").schedule(p), "published"),
        (lambda p: MagCache(ratios=[1.0, -1.0]).schedule(p), "positive"),
        (lambda p: MagCache(ratios={"cond": [1.0]}).schedule(p), "uncond"),
        (lambda p: MagCache(threshold=-1), "threshold"),
        (lambda p: MagCache(retention=1.5), "retention"),
    ],
)
def test_bad_settings_are_refused(pipe, make, message):
    with pytest.raises(MethodError, match=message):
        make(prints(pipe, 10))
