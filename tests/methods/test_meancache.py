"""MeanCache against the published update written out with latents and logs, and its identities."""

import itertools

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import BudgetError, ScheduleError
from layercache.methods import MeanCache, meancache
from layercache.schedule.fingerprint import Fingerprint
from support.tiny import tiny_pipeline

STEPS = 12
UNIFORM = tuple(np.linspace(1, 0, STEPS + 1).tolist())
SHIFTED = tuple((3 * s / (1 + 2 * s)) for s in UNIFORM)


def prints(sigmas=SHIFTED):
    return Fingerprint("Model", "0" * 12, 4, tuple(sigmas), ("cond",), "0")


def raw(step, x):
    """Some model: depends on the latents and the step, not linearly."""
    return np.sin(3 * x + step) + 0.3 * x * step / STEPS


def literal_recursive(sigmas, steps, spans, x):
    """The released update with its logs of latents and velocities, in float64."""
    edge_of = {}
    for (a, b), k in zip(itertools.pairwise([*steps, len(sigmas) - 1]), spans, strict=True):
        edge_of |= dict.fromkeys(range(a, b), k)
    xs, vs = [x], []
    for i in range(len(sigmas) - 1):
        if i in steps:
            v = raw(i, xs[i])
        elif edge_of[i - 1] == 1:
            v = vs[i - 1]
        else:
            b = i - min(edge_of[i - 1], i)
            ubar = (xs[i] - xs[b]) / (sigmas[i] - sigmas[b])
            q = (vs[b] - ubar) / (sigmas[i] - sigmas[b])
            v = vs[i - 1] - q * (sigmas[i + 1] - sigmas[i])
        vs.append(v)
        xs.append(xs[i] + (sigmas[i + 1] - sigmas[i]) * v)
    return xs[-1]


def literal_one_shot(sigmas, steps, spans, x):
    """The paper's interval update."""
    xs, vs = {0: x}, {}
    for (t, s), k in zip(itertools.pairwise([*steps, len(sigmas) - 1]), spans, strict=True):
        v = raw(t, xs[t])
        r = t - min(k, t)
        jvp = 0.0
        if k > 1 and r < t and s > t + 1:
            gap = sigmas[t] - sigmas[r]
            jvp = (xs[t] - xs[r] - gap * vs[r]) / gap**2
        u = v + (sigmas[s] - sigmas[t]) * jvp
        for i in range(t, s):
            vs[i] = u
            xs[i + 1] = xs[i] + (sigmas[i + 1] - sigmas[i]) * u
    return xs[len(sigmas) - 1]


def ours(schedule, x):
    sigmas, vs = schedule.fingerprint.sigmas, {}
    for i in range(schedule.num_steps):
        if not schedule.is_skipped(i):
            vs[i] = raw(i, x)
        rule = schedule.velocity(i)
        v = vs[i] if rule is None else sum(c * vs[s] for s, c in rule.terms.items())
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x


@pytest.mark.parametrize("sigmas", [UNIFORM, SHIFTED])
@pytest.mark.parametrize(
    ("steps", "spans"),
    [
        ([0, 1, 2, 5, 8, 11], [1, 1, 2, 3, 5, 1]),
        ([0, 3, 6, 9], [2, 2, 4, 6]),
        ([0, 1, 2, 3, 10], [1, 1, 1, 1, 2]),
        ([0], [3]),
    ],
)
def test_both_forms_equal_the_published_updates(sigmas, steps, spans):
    x = np.random.default_rng(0).normal(size=50)
    recursive = meancache.MeanCache(steps, spans, "recursive").schedule(prints(sigmas))
    np.testing.assert_allclose(ours(recursive, x), literal_recursive(sigmas, steps, spans, x), rtol=1e-9, atol=1e-9)
    one_shot = meancache.MeanCache(steps, spans, "one-shot").schedule(prints(sigmas))
    np.testing.assert_allclose(ours(one_shot, x), literal_one_shot(sigmas, steps, spans, x), rtol=1e-9, atol=1e-9)


def linear_velocities(beta=2.0):
    return [torch.full((3,), 1.0 + beta * sigma, dtype=torch.float64) for sigma in UNIFORM[:-1]]


@pytest.mark.parametrize("span", [2, 3, 4])
@pytest.mark.parametrize("length", [2, 3, 4])
def test_interval_is_exact_exactly_where_span_equals_length(span, length):
    """For velocities linear in sigma on a uniform grid, with Euler displacements (docs/methods.md, MeanCache)."""
    table = meancache.stability_deviation([linear_velocities()], UNIFORM, 4, (span,))
    h, beta, start = 1 / STEPS, 2.0, 6
    expected = abs(beta * h * ((length - 1) / 2 - length * (span - 1) / (2 * span)))
    assert table[start, length, 0] == pytest.approx(expected, abs=1e-12)
    assert (expected < 1e-12) == (span == length)


def test_plain_reuse_misses_the_mean_of_the_interval():
    table = meancache.stability_deviation([linear_velocities()], UNIFORM, 5, (1,))
    assert table[2, 5, 0] == pytest.approx(2.0 / STEPS * 4 / 2)
    assert (table[:, 1] == 0).all()
    assert np.isinf(table[10, 3:]).all()


def test_deviation_is_the_mean_over_samples():
    a, b = linear_velocities(1.0), linear_velocities(3.0)
    one = [meancache.stability_deviation([v], UNIFORM, 3, (1, 2)) for v in (a, b)]
    both = meancache.stability_deviation([a, b], UNIFORM, 3, (1, 2))
    np.testing.assert_allclose(both, (one[0] + one[1]) / 2)


def test_steps_are_planned_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    velocities = [torch.randn(20, generator=generator).cumsum(0) * (0.1 + k) for k in range(STEPS)]
    table = meancache.stability_deviation([velocities], SHIFTED, 6)
    for budget in (4, 6, STEPS):
        steps, spans = meancache.plan_steps(table, budget)
        assert steps[0] == 0
        assert len(steps) == len(spans) <= budget
        assert all(b - a <= 6 for a, b in itertools.pairwise([*steps, STEPS]))
        for form in meancache.FORMS:
            assert meancache.MeanCache(steps, spans, form).schedule(prints()).used == pytest.approx(len(steps) / STEPS)
    with pytest.raises(BudgetError, match="too few"):
        meancache.plan_steps(table, 1)


@pytest.mark.parametrize(
    ("steps", "spans", "form", "message"),
    [
        ([1, 2], [1, 1], "recursive", "ascend from 0"),
        ([0, 2, 2], [1, 1, 1], "recursive", "ascend from 0"),
        ([0, STEPS], [1, 1], "recursive", "lie below"),
        ([0, 2], [1], "recursive", "one span"),
        ([0, 2], [1, 0], "recursive", "one span"),
        ([0, 2], [1, 1], "implicit", "unknown form"),
    ],
)
def test_refusals(steps, spans, form, message):
    with pytest.raises(ScheduleError, match=message):
        meancache.MeanCache(steps, spans, form).schedule(prints())


@pytest.mark.parametrize(
    ("name", "evaluations", "computed", "edges"),
    [
        ("qwen-image", 25, [*range(17), 24, 32, 40, 43, 45, 47, 48, 49], [1] * 16 + [1, 1, 1, 5, 5, 5, 1, 1]),
        ("qwen-image", 17, [*range(9), 10, 17, 24, 31, 38, 45, 48, 49], [1] * 8 + [2, 1, 1, 1, 1, 1, 4, 1]),
        ("qwen-image", 10, [0, 1, 3, 7, 14, 21, 28, 35, 42, 49], [1, 2, 1, 1, 1, 1, 1, 1, 4]),
        ("qwen-image-2512", 25, [*range(16), 23, 31, 37, *range(44, 50)], [1] * 15 + [2, 2, 2, 1] + [1] * 5),
        ("qwen-image-2512", 17, [*range(10), 11, 19, 27, 35, 43, 47, 49], [1] * 9 + [2, 1, 1, 1, 1, 5, 5]),
        ("qwen-image-2512", 10, [0, 2, 4, 7, 14, 21, 28, 35, 42, 49], [1, 3, 1, 1, 1, 1, 1, 1, 4]),
        (
            "z-image",
            25,
            [*range(7), 8, *range(10, 14), *range(15, 19), 20, 22, 29, 37, 42, 45, 47, 48, 49],
            [1] * 6 + [2, 2, 1, 1, 1, 2, 1, 1, 1, 5, 5, 1, 1, 1, 5, 5, 1, 1],
        ),
        (
            "z-image",
            20,
            [*range(5), 6, 8, 10, 12, 14, 16, 18, 20, 22, 30, 38, 43, 46, 48, 49],
            [1] * 4 + [2] * 5 + [5, 4, 5, 5, 1, 1, 1, 5, 2, 1],
        ),
        (
            "z-image",
            17,
            [*range(5), 6, 8, 10, 12, 14, 19, 27, 35, 43, 46, 48, 49],
            [1] * 4 + [2] * 5 + [1] * 4 + [5, 2, 1],
        ),
        ("z-image", 15, [*range(4), 5, 7, 10, 12, 17, 25, 33, 41, 45, 48, 49], [1] * 3 + [2] * 4 + [1] * 4 + [5, 4, 1]),
        ("z-image", 13, [*range(4), 5, 9, 15, 22, 29, 36, 43, 47, 49], [1] * 3 + [2] + [1] * 6 + [5, 2]),
    ],
)
def test_released_schedules(name, evaluations, computed, edges):
    """The lists of the released scripts: what a preset computes, and the latents that their update ends with."""
    sigmas = [3 * s / (1 + 2 * s) for s in np.linspace(1, 0, 51).tolist()]
    schedule = meancache.MeanCache.preset(name, evaluations).schedule(prints(sigmas))
    x = np.random.default_rng(evaluations).normal(size=20)
    np.testing.assert_allclose(ours(schedule, x), literal_recursive(sigmas, computed, [*edges, 1], x), rtol=1e-8)
    assert [step for step in range(50) if not schedule.is_skipped(step)] == computed
    assert schedule.made_by["spans"] == [*edges, 1] and len(computed) == evaluations
    assert schedule.used == pytest.approx(evaluations / 50)


def test_unknown_presets_are_refused():
    with pytest.raises(ScheduleError, match="z-image: 25, 20"):
        meancache.MeanCache.preset("qwen-image", 26)
    with pytest.raises(ScheduleError, match="50 steps"):
        meancache.MeanCache.preset("qwen-image", 25).schedule(prints())


def test_lexicographic_path_is_the_least_of_all_by_brute_force():
    rng = np.random.default_rng(3)
    steps, budget = 9, 4
    errors = rng.integers(1, 50, (steps, steps + 1)).astype(float)
    errors[:, 1] = 0.0
    best = min(
        (
            sorted((errors[a, b - a] for a, b in zip([0, *inner], [*inner, steps], strict=True)), reverse=True),
            (0, *inner),
        )
        for count in range(budget)
        for inner in itertools.combinations(range(1, steps), count)
    )
    found = meancache.lexicographic_steps(errors, budget)
    cost = sorted((errors[a, b - a] for a, b in zip(found, [*found[1:], steps], strict=True)), reverse=True)
    assert [c for c in cost if c] == [c for c in best[0] if c]


def test_a_run_may_begin_in_the_middle():
    """As img2img begins: what is read of steps that were not run is computed."""
    pipe = tiny_pipeline(2)
    plan = MeanCache(computed=(0, 1, 4, 8), spans=(1, 1, 1, 1))
    steps = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: steps.append(pipe.scheduler.step_index))
    pipe.scheduler.set_timesteps(12)
    pipe.scheduler.set_begin_index(3)
    encoded = pipe.class_encoder(torch.tensor([0])).detach()
    latents = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0))
    with layercache.enabled(pipe, plan), torch.no_grad(), pipe.progress_bar(total=9):
        for time in pipe.scheduler.timesteps[3:]:
            with pipe.transformer.cache_context("cond"):
                velocity = pipe.transformer(
                    latents, encoded, timestep=time[None] / 1000, img_shapes=[(1, 2, 2)], return_dict=False
                )[0]
            latents = pipe.scheduler.step(velocity, time, latents, return_dict=False)[0]
    assert len(steps) == 3 and torch.isfinite(latents).all()
