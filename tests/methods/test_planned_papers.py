"""DPCache, ProCache and ERTACache against literal transcriptions of what was published."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import ArgumentError, BudgetError, MethodError, ScheduleError
from layercache.methods import DPCache, ERTACache, ProCache, dpcache, ertacache, procache
from layercache.models.registry import fingerprint_of
from layercache.planning.rollout import Rollouts
from layercache.schedule.memory_plan import stored_bytes
from support.tiny import generate, shifted_sigmas, tiny_pipeline

STEPS = 12


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(layers=4)


def prints(pipe, steps=STEPS):
    return fingerprint_of(pipe.transformer, shifted_sigmas(steps), ("cond", "uncond"))


def run_of(steps=STEPS, seed=0, size=30):
    """Velocities that turn slowly, of one sample."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn((steps, size), generator=generator).cumsum(0).cumsum(0))


def dpcache_derivatives(history, order):
    found = [history[-1][0]]
    if order:
        at, before = history[-1][1], history[-2][1]
        lower, older = dpcache_derivatives(history, order - 1), dpcache_derivatives(history[:-1], order - 1)
        found = [*lower, (lower[-1] - older[-1]) / (at - before)]
    return found


def dpcache_tensor(h, order, reach):
    """The released calibration: accumulated error from key step j, with i before it, up to k."""
    n = len(h)

    def taylor(history, target):
        d = dpcache_derivatives(history, order)
        return sum(f * (target - history[-1][1]) ** q / math.factorial(q) for q, f in enumerate(d))

    mean = np.mean(h[-order - 1 :], axis=0)
    last = 0.8 * taylor([(h[m], m) for m in range(n - 1 - order, n)], n) + 0.2 * mean
    cost = np.full((n, n + 1, n + 1), np.inf)
    for j in range(order):
        cost[: j + 1, j, j + 1] = 0
    for j in range(order, n):
        for i in range(max(0, j - reach), j):
            if i < order - 1:
                continue
            total, history = 0.0, [(h[m], m) for m in range(i - (order - 1), i + 1)] + [(h[j], j)]
            for k in range(j + 1, n + 1):
                total += np.abs(taylor(history, k) - (last if k == n else h[k])).mean()
                cost[i, j, k] = total
    return cost


def dpcache_path(cost, budget, first, reach):
    n = len(cost)
    fixed = {*range(first), 0, n}
    cost = cost.copy()
    for j in range(n + 1):
        for i in range(j + 1, n + 1):
            if fixed & set(range(j + 1, i)):
                cost[:, j, i] = np.inf
    best, path = {(0, 0): 0.0}, {}
    for k in range(1, budget + 1):
        for i in range(k, n + 1):
            for j in range(max(k - 1, i - reach), i):
                if (k - 1, j) not in best:
                    continue
                older = 0 if j == 0 else j - 1 if {j, j - 1} <= fixed else path[k - 1, j]
                total = best[k - 1, j] + cost[older, j, i]
                if total < best.get((k, i), np.inf):
                    best[k, i], path[k, i] = total, j
    steps = [n]
    for k in range(budget, 0, -1):
        steps.append(path[k, steps[-1]])
    return steps[:0:-1]


@pytest.mark.parametrize("order, budget, reach", [(2, 6, 4), (1, 5, 6), (3, 7, 4)])
def test_dpcache_takes_the_published_path(order, budget, reach):
    runs = [run_of(seed=seed) for seed in range(3)]
    costs = dpcache.path_costs(runs, order, reach)
    literal = np.mean([dpcache_tensor([v.double().numpy() for v in run], order, reach) for run in runs], axis=0)
    near = np.abs(np.subtract.outer(np.arange(STEPS + 1), np.arange(STEPS + 1))) <= reach
    np.testing.assert_allclose(costs[:, near], literal[:, near], rtol=1e-4)
    found = dpcache.plan_steps(costs, budget)
    assert found == dpcache_path(literal, budget, 3, reach) and len(found) == budget
    assert dpcache.plan_steps(costs, budget, last=1)[-1] == STEPS - 1


def test_dpcache_runs_its_path(pipe):
    """Velocities between the steps are TaylorSeer's of order 2; refusals say what is wrong."""
    schedule = DPCache((0, 1, 2, 5, 9)).schedule(prints(pipe))
    assert [k for k in range(STEPS) if not schedule.is_skipped(k)] == [0, 1, 2, 5, 9]
    h = np.random.default_rng(0).normal(size=(STEPS, 4))
    d = dpcache_derivatives([(h[k], k) for k in (2, 5, 9)], 2)
    expected = d[0] + 2 * d[1] + 2 * d[2]
    np.testing.assert_allclose(sum(c * h[k] for k, c in schedule.velocity(11).terms.items()), expected)
    assert DPCache((0, 1, 2), groups=((0, 4),)).schedule(prints(pipe)).cells[3][0].keys() == {0, 1, 2}
    short = dpcache.path_costs([run_of()], longest=2)
    for make, error, message in (
        (lambda: dpcache.plan_steps(short, 4), BudgetError, "longest"),
        (lambda: dpcache.path_costs([run_of(3)]), ArgumentError, "all steps"),
        (lambda: DPCache((1, 2)), ScheduleError, "ascend from 0"),
        (lambda: DPCache((0,), order=0), MethodError, "order"),
        (lambda: DPCache((0, 20)).schedule(prints(pipe)), ScheduleError, "below 12"),
    ):
        with pytest.raises(error, match=message):
            make()


def test_dpcache_runs(pipe):
    """Skipped steps take Taylor's series of the velocities that the sampler was given at the three computed before."""
    computed, history, inner = (0, 1, 2, 5), [], pipe.scheduler.step

    def step(velocity, *args, **kwargs):
        number = step.number = getattr(step, "number", -1) + 1
        if number in computed:
            history.append((velocity.double().numpy(), number))
        else:
            d = dpcache_derivatives(history[-3:], 2)
            off = number - history[-1][1]
            velocity = torch.from_numpy(d[0] + off * d[1] + off**2 / 2 * d[2]).float()
        return inner(velocity, *args, **kwargs)

    pipe.scheduler.step = step
    expected = generate(pipe, steps=8)
    del pipe.scheduler.step
    method = DPCache(computed, num_steps=8)
    with layercache.enabled(pipe, method) as cache:
        found = generate(pipe, steps=8)
        schedule, report = cache.schedule, cache.report()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert report.used == 0.5 and report.fallback_rows == 0
    assert report.cache_bytes == stored_bytes(schedule, {}, found.nbytes) == 3 * found.nbytes
    with layercache.enabled(pipe, layercache.Schedule.from_json(schedule.to_json())):
        assert torch.equal(generate(pipe, steps=8), found)
    with layercache.enabled(pipe, DPCache(tuple(range(4)))):
        neutral = generate(pipe, steps=4)
    assert torch.equal(neutral, generate(pipe, steps=4))


PUBLISHED = {  # 1 computes, 2 computes the deep blocks, 0 reuses
    "dit-xl-2": "10201020102010201020102010210210210210101010101010",
    "flux": "10210210210210210210210210101010101010101010101010",
    "flux-taylor": "10202010202010202010202010202010202102021020210202",
    "pixart-alpha": "10210210210210210210",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_procache_presets_are_the_released_patterns(pipe, name):
    """Behind the first three steps, which the code for FLUX computes, and with Taylor forecasts instead of 2."""
    method = ProCache.preset(name)
    schedule = method.schedule(prints(pipe, len(PUBLISHED[name])))
    assert schedule.groups == (((0, 3), (3, 4)) if method.selective else ((0, 4),))
    for step, (kind, row) in enumerate(zip(PUBLISHED[name], schedule.cells, strict=True)):
        if step < method.warmup or kind == "1":
            assert row == (None,) * len(row)
        else:
            assert row[0] is not None and (row[-1] is None) == (kind == "2" and method.selective)
            assert all(cell is None or len(cell) == min(step, method.order + 1) for cell in row)


def test_procache_computes_the_first_and_the_last_steps(pipe):
    cells = ProCache((4, 4, 4), warmup=2, cooldown=3).schedule(prints(pipe)).cells
    assert [step for step, row in enumerate(cells) if row == (None, None)] == [0, 1, 4, 8, 9, 10, 11]
    assert cells[2][1] is None and cells[2][0] == {1: 1.0}


@pytest.mark.parametrize("computed, shortest, longest", [(13, 2, 5), (11, 3, 6), (30, 1, 3), (50, None, None)])
def test_procache_candidates_keep_to_the_constraints(computed, shortest, longest):
    found = procache.sample_intervals(50, computed, shortest=shortest, longest=longest)
    assert found == procache.sample_intervals(50, computed) and len(set(found)) == len(found) <= 5
    assert len(found) == (1 if computed == 50 else 5)
    for intervals in found:
        assert sum(intervals) == 50 and len(intervals) == computed
        assert list(intervals) == sorted(intervals, reverse=True)
        assert (shortest or 1) <= intervals[-1] and intervals[0] <= (longest or 1)


def residuals_put_back(pipe, schedule, steps):
    """The run in which hooks put stored residuals of groups in the place of what their blocks gave."""
    stored, start, calls, hooks = {}, {}, [0], []
    for group, (lo, hi) in enumerate(schedule.groups):

        def before(module, args, kwargs, group=group):
            start[group] = kwargs["encoder_hidden_states"], kwargs["hidden_states"]

        def after(module, args, output, group=group):
            step, branch = divmod(calls[0], 2)
            calls[0] += group == len(schedule.groups) - 1
            cell = schedule.cells[step][group]
            if cell is None:
                stored[branch, group, step] = [b - a for a, b in zip(start[group], output, strict=True)]
                return output
            sums = [sum(c * stored[branch, group, k][stream] for k, c in cell.items()) for stream in (0, 1)]
            return tuple(a + b for a, b in zip(start[group], sums, strict=True))

        hooks.append(pipe.transformer.transformer_blocks[lo].register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(pipe.transformer.transformer_blocks[hi - 1].register_forward_hook(after))
    try:
        return generate(pipe, steps=steps), stored[0, 0, 0]
    finally:
        for hook in hooks:
            hook.remove()


def test_procache_runs(pipe):
    """Residuals of shallow and deep blocks as hooks put them back, in memory that is planned, and the neutral run."""
    with layercache.enabled(pipe, ProCache((4, 3, 2))) as cache:
        found = generate(pipe, steps=9)
        schedule, report = cache.schedule, cache.report()
    expected, (text, image) = residuals_put_back(pipe, schedule, 9)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert report.used == schedule.used == (3 * 4 + 2 * 1) / (9 * 4)
    streams = dict.fromkeys(("cond", "uncond"), (image.nbytes, text.nbytes))
    assert report.cache_bytes == stored_bytes(schedule, streams)
    with layercache.enabled(pipe, schedule):
        assert torch.equal(generate(pipe, steps=9), found)
    with layercache.enabled(pipe, ProCache((1,) * 4)):
        neutral = generate(pipe, steps=4)
    assert torch.equal(neutral, generate(pipe, steps=4))
    for make, error, message in (
        (lambda: ProCache(()), ScheduleError, "numbers of steps"),
        (lambda: ProCache((2,), depth=2), MethodError, "depth"),
        (lambda: ProCache((2, 2)).schedule(prints(pipe)), ScheduleError, "sample_intervals"),
        (lambda: ProCache.preset("sdxl"), MethodError, "dit-xl-2"),
        (lambda: procache.sample_intervals(10, 2, longest=4), BudgetError, "add up"),
    ):
        with pytest.raises(error, match=message):
            make()


def ertacache_fit(runs, threshold):
    """Policy, shares and closed form of the paper, over runs of (latents, velocities) as arrays."""
    steps = len(runs[0][0])
    computed, phi, k_i, b_i = [0], [1.0] * steps, [0.0] * steps, [-2.0] * steps
    for i in range(1, steps):
        cached = [x[i] + v[computed[-1]] - x[computed[-1]] for x, v in runs]
        change = [
            np.abs((v[computed[-1]] - x[computed[-1]]) - (v[i] - x[i])).sum() / np.abs(v[i] - x[i]).sum()
            for x, v in runs
        ]
        if np.mean(change) >= threshold:
            computed.append(i)
            continue
        errors = [c - v[i] for c, (_, v) in zip(cached, runs, strict=True)]
        missed = [np.abs(e).sum() / np.abs(v[i] - v[i - 1]).sum() for e, (_, v) in zip(errors, runs, strict=True)]
        phi[i] = np.clip(1 - np.mean(missed), 0, 1)
        c, e = np.concatenate(cached), np.concatenate(errors)
        k_i[i] = 4 * ((c * e).mean() - c.mean() * e.mean()) / c.var()
        b_i[i] = 4 * (e.mean() - 0.5) - k_i[i] * c.mean()
    return computed, phi, k_i, b_i


class ErtaLoop:
    """The paper's loop: cached residuals, shortened steps, what remains of the time shared out."""

    def __init__(self, method, sigmas):
        self.method, self.sigmas, self.left = method, sigmas, sigmas[0]

    def take(self, i, x, model):
        """Latents behind step i and the velocity taken; ``model`` is called with latents and time where it runs."""
        m, last = self.method, i == len(self.sigmas) - 2
        dt = self.left * (self.sigmas[i] - self.sigmas[i + 1]) / self.sigmas[i]
        if i in m.computed:
            v = model(x, self.left)
            self.residual = v - x
        else:
            v = x + self.residual
            v = v - ((m.slopes[i] * v + m.intercepts[i]) / 4 + 0.5)
            dt = dt if last else dt * m.shares[i]
        self.left -= dt
        return x - dt * v, v


def test_ertacache_is_fitted_as_published():
    runs = [(run_of(seed=seed), run_of(seed=seed + 9)) for seed in range(3)]
    table = np.mean([ertacache.reuse_statistics(*run) for run in runs], axis=0)
    arrays = [tuple(np.stack([t.double().numpy() for t in side]) for side in run) for run in runs]
    for threshold in (0.3, 0.8):
        found = ertacache.fit(table, threshold)
        expected = ertacache_fit(arrays, threshold)
        assert list(found.computed) == expected[0] and 1 < len(found.computed) < STEPS
        for name, values in zip(("shares", "slopes", "intercepts"), expected[1:], strict=True):
            np.testing.assert_allclose(getattr(found, name), values, rtol=1e-4, atol=1e-5)
    assert ertacache.fit(table, 0.0).computed == tuple(range(STEPS))
    assert ertacache.fit(table, np.inf, first=3, last=2).computed == (0, 1, 2, STEPS - 2, STEPS - 1)


def erta_method(steps, computed, seed=0):
    rng = np.random.default_rng(seed)
    ranges = (0.0, 1.0), (-0.4, 0.4), (-2.3, -1.7)
    return ERTACache(computed, *(tuple(rng.uniform(low, high, steps)) for low, high in ranges))


@pytest.mark.parametrize("computed", [(0, 1, 4, 5, 8), (0, 2, 3, 11)])
def test_ertacache_levels_and_velocities_are_those_of_the_published_loop(pipe, computed):
    method, sigmas = erta_method(STEPS, computed), shifted_sigmas(STEPS)
    levels = method.levels(sigmas)
    schedule = method.schedule(replace(prints(pipe), sigmas=levels))
    loop, given = ErtaLoop(method, sigmas), {}
    x = y = np.random.default_rng(1).normal(size=9)
    for i in range(STEPS):
        assert loop.left == pytest.approx(levels[i])
        x, _ = loop.take(i, x, lambda x, t: np.sin(3 * x + t) - x * t)
        if not schedule.is_skipped(i):
            given[i] = u = np.sin(3 * y + levels[i]) - y * levels[i]
        else:
            rule = schedule.velocity(i)
            u = sum(c * given[k] for k, c in rule.terms.items()) + rule.offset
        y = y + (levels[i + 1] - levels[i]) * u
        np.testing.assert_allclose(y, x, rtol=1e-9)
    assert levels[-1] == 0.0 and loop.left == pytest.approx(0.0, abs=1e-12)
    assert ERTACache(computed).levels(sigmas) == pytest.approx(sigmas)


def test_ertacache_runs(pipe):
    """On the shortened levels, which the call is given; a schedule holds all of it, and rollouts take the same."""
    method, sigmas = erta_method(6, (0, 1, 4)), shifted_sigmas(6)
    levels = np.array(method.levels(sigmas))
    call = {"sigmas": (levels / (3 - 2 * levels))[:-1].tolist()}  # the scheduler shifts by 3
    loop, inner, seen = ErtaLoop(method, sigmas), pipe.scheduler.step, []

    def step(velocity, timestep, latents, **kwargs):
        seen.append(loop.take(len(seen), latents.double(), lambda x, t: velocity.double())[1])
        return inner(seen[-1].float(), timestep, latents, **kwargs)

    pipe.scheduler.step = step
    expected = generate(pipe, ["cat"], 6, **call)
    del pipe.scheduler.step
    with layercache.enabled(pipe, method) as cache:
        found = generate(pipe, ["cat"], 6, **call)
        schedule, report = cache.schedule, cache.report()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert report.used == 0.5 and report.fallback_rows == 0
    assert report.cache_bytes == stored_bytes(schedule, {}, found.nbytes) == found.nbytes
    reread = layercache.Schedule.from_json(schedule.to_json())
    assert reread.velocities == schedule.velocities and schedule.velocity(2).offset
    with layercache.enabled(pipe, reread):
        assert torch.equal(generate(pipe, ["cat"], 6, **call), found)
    rollouts = Rollouts(pipe, ["cat"], seeds=[0], num_inference_steps=6, guidance_scale=4.0)
    own = method.schedule(rollouts.fingerprint)
    assert torch.equal(rollouts.run(own).traces[0].taken[2], taken(pipe, own, 2))
    with layercache.enabled(pipe, ERTACache(tuple(range(4)), (0.5,) * 4, (1.0,) * 4, (0.0,) * 4)):
        neutral = generate(pipe, ["cat"], 4)
    assert torch.equal(neutral, generate(pipe, ["cat"], 4))
    for make, error, message in (
        (lambda: ERTACache((1,)), ScheduleError, "ascend"),
        (lambda: ERTACache((0,), (1.5,)), MethodError, "shares"),
        (lambda: ERTACache((0,), slopes=(0.0,)), MethodError, "intercepts"),
        (lambda: ERTACache((0,), (1.0,) * 5).schedule(prints(pipe)), ScheduleError, "5 steps"),
        (lambda: ERTACache((0,)).schedule_of_run(prints(pipe), None, 0), MethodError, "Euler"),
        (lambda: ertacache.reuse_statistics(run_of(3), run_of(4)), ArgumentError, "same steps"),
    ):
        with pytest.raises(error, match=message):
            make()


def taken(pipe, schedule, wanted):
    """What the sampler was given at a step of the cached run of one picture."""
    given, inner = [], pipe.scheduler.step

    def step(velocity, *args, **kwargs):
        given.append(velocity.clone())
        return inner(velocity, *args, **kwargs)

    pipe.scheduler.step = step
    with layercache.enabled(pipe, schedule):
        generate(pipe, ["cat"], 6)
    del pipe.scheduler.step
    return given[wanted]
