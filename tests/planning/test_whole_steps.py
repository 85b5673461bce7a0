"""The search over whole steps: its cost, what it measures on the way, and what it finds on a tiny pipeline."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache.errors import ArgumentError, BudgetError, ScheduleMismatchError
from layercache.parallel.crew import Crew
from layercache.planning import search_files
from layercache.planning.rollout import Rollout, Rollouts
from layercache.planning.search import EFFORTS, fitting_terms
from layercache.planning.surrogate import Answers, FullRuns, answers_of, deviations, starts
from layercache.planning.trace import Trace
from layercache.planning.whole_steps import WholeStepSearch, runs_per_budget
from support.tiny import tiny_pipeline

COUNTS = [21, 18, 15, 9, 6]  # of 30 steps, the budgets .7 .6 .5 .33 .2


@pytest.fixture(scope="module")
def rollouts():
    return Rollouts(
        tiny_pipeline(2), [["cat", "coffee"], "rocket"], [3, 4, 5], num_inference_steps=8, guidance_scale=3.0
    )


@pytest.mark.parametrize(
    ("effort", "pictures", "expected"),
    [("quick", 8, [1, 1, 1, 2, 3]), ("normal", 8, [3, 3, 3, 5, 5]), ("thorough", 16, [3, 3, 3, 6, 9])],
)
def test_what_each_effort_runs(effort, pictures, expected):
    found = runs_per_budget(COUNTS, 30, pictures, EFFORTS[effort])
    cost = pictures * (1 + sum(n * count / 30 for n, count in zip(found, COUNTS, strict=True)))
    assert cost <= EFFORTS[effort] + 1e-9
    assert found == expected


def test_too_little_effort_for_the_pictures_is_refused():
    with pytest.raises(BudgetError, match=r"24 pictures and 5 budgets cost 79.2 full generations at least"):
        runs_per_budget(COUNTS, 30, 24, EFFORTS["normal"])


def test_memory_is_known_after_the_first_full_run():
    sizes = []
    prompts, seeds = [["cat", "coffee"], "rocket"], [3, 4, 5]
    made = Rollouts(tiny_pipeline(1), prompts, seeds, on_memory=sizes.append, num_inference_steps=3)
    assert sizes == [sum(t.nbytes for trace in made.full for t in (*trace.latents, *trace.raw))]


def test_grams_are_of_latents_and_velocities_of_each_picture(rollouts):
    vectors = FullRuns.of(rollouts).vectors
    grams = vectors @ vectors.transpose(0, 2, 1)
    assert grams.shape == (3, 9, 9)
    batch, single = rollouts.full
    second = torch.stack([batch.latents[0][1].flatten(), *(v[1].flatten() for v in batch.raw)]).double()
    np.testing.assert_allclose(grams[1], second @ second.T / len(second[0]), rtol=1e-12)
    last = single.raw[-1].double()
    np.testing.assert_allclose(grams[2, -1, -1], float((last * last).mean()), rtol=1e-12)


def test_deviations_are_of_mean_velocities(rollouts):
    velocities = [v.double() for v in rollouts.full[1].raw]
    sigmas = rollouts.sigmas
    runs = FullRuns.of(rollouts)
    table = deviations(replace(runs, vectors=runs.vectors[2:]), 5, 2)
    h = [sigmas[k + 1] - sigmas[k] for k in range(8)]
    slope = (velocities[3] - velocities[1]) / (sigmas[3] - sigmas[1])
    mean = sum(h[k] * velocities[k] for k in (3, 4, 5)) / sum(h[3:6])
    forecast = sum(h[k] * (velocities[3] + (sigmas[k] - sigmas[3]) * slope) for k in (3, 4, 5)) / sum(h[3:6])
    assert table[3, 3, 2] == pytest.approx(float((mean - forecast).square().mean().sqrt()), rel=1e-9)
    assert table[2, 1, 0] == 0 and np.isinf(table[0, 3, 1]) and np.isinf(table[6, 3, 0])


def test_starts_have_so_many_steps_and_a_dense_beginning(rollouts):
    table = deviations(FullRuns.of(rollouts), 8)
    for count in range(1, 9):
        for dense in range(1, count + 1):
            for _, path in starts(table, rollouts.sigmas, count, dense):
                assert path.sum() == count and path[:dense].all()


def test_answers_to_drift_are_found():
    """Of traces made with a known answer: between measured steps and over two runs as documented."""
    random = torch.Generator().manual_seed(0)
    zeros = [torch.zeros(1, 6, dtype=torch.float64) for _ in range(4)]
    full = Trace(zeros, list(zeros), zeros)

    def run(kappa, eta):
        trace = Trace()
        for step in range(4):
            drift = torch.randn(1, 6, generator=random, dtype=torch.float64) if step else zeros[0]
            across = torch.randn(1, 6, generator=random, dtype=torch.float64)
            across -= (across * drift).sum() / max(float(drift.square().sum()), 1e-30) * drift
            across *= eta * drift.norm() / across.norm()
            trace.add(drift, None if step == 2 else kappa * step * drift + across)
        return Rollout(None, (), (trace,))

    given = SimpleNamespace(full=(full,), num_steps=4, pictures=[[None]], crew=Crew())
    answers = Answers.of([answers_of(given, run(1.0, 2.0)), answers_of(given, run(3.0, 8.0))])
    np.testing.assert_allclose(answers.kappa, [[2.0, 2.0, 4.0, 6.0]], rtol=1e-9)
    np.testing.assert_allclose(answers.eta, [[4.0] * 4], rtol=1e-9)
    assert Answers.of([]) is None
    assert answers_of(given, Rollout(None, (), (full,))) is None  # which has not drifted


def test_a_search_costs_what_it_says_and_is_repeatable(rollouts):
    def search():
        before = rollouts.runs
        search = WholeStepSearch(rollouts, seed=1)
        tried = list(search.run([4, 2], [4, 3]))
        return tried, rollouts.runs - before

    (first, cost), (second, _) = search(), search()
    assert cost == 7
    assert [int(one.computed.sum()) for one in first] == [2, 2, 2, 4, 4, 4, 4]
    assert [one.rollout.psnr for one in first] == [one.rollout.psnr for one in second]
    assert [one.point.schedule for one in first] == [one.point.schedule for one in second]
    assert len({one.computed.tobytes() for one in first}) == 5  # only the last of a budget runs a path again
    assert first[0].point.schedule.used == pytest.approx(2 / 8)


PROMPTS, CALL = [["cat", "coffee"], "rocket"], {"num_inference_steps": 8, "guidance_scale": 3.0, "progress": False}


def test_the_front_of_a_search():
    """Without a profile: of at most the effort's pictures and generations, and it holds on the pipeline."""
    pipe = tiny_pipeline(2)
    front = layercache.search(pipe, [["cat"] * 5, ["rocket"] * 9], budgets=(0.6, 0.3), effort="quick", **CALL)
    assert [len(point.psnr) for point in front.points] == [8] * len(front.points)
    assert "8 pictures, 32.0 full generations in all" in front.notes
    assert {point.schedule.used for point in front.points} <= {2 / 8, 4 / 8}
    assert front.speedup(front.points[0]) > 1
    schedule = front.choose(0.6).schedule
    with layercache.enabled(pipe, schedule) as cache:
        pipe("cat", generator=torch.Generator().manual_seed(0), num_inference_steps=8, guidance_scale=3.0)
    assert cache.computed == [2 * round(8 * schedule.used)]  # of both branches


def test_an_interrupted_search_keeps_what_it_found(monkeypatch):
    runs = []

    def run(self, *args, **kwargs):
        runs.append(args)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    original = Rollouts.run
    monkeypatch.setattr(Rollouts, "run", run)
    front = layercache.search(tiny_pipeline(2), PROMPTS, budgets=(0.6,), effort="quick", **CALL)
    assert "it was interrupted after 2 schedules" in front.notes and front.points


def test_a_time_limit_ends_a_search():
    front = layercache.search(tiny_pipeline(2), PROMPTS, budgets=(0.6,), effort="quick", time_limit=0.0, **CALL)
    assert "the time limit of 0 s ended it after 1 schedules" in front.notes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"effort": "heroic"}, "unknown effort 'heroic'; choose quick, normal, thorough"),
        ({"budgets": (0.01,)}, "which leaves one step to compute"),
        ({"max_cache_bytes": 10}, "more than the 10 allowed"),
    ],
)
def test_what_cannot_be_searched_is_refused(given, message):
    with pytest.raises((ArgumentError, BudgetError), match=message):
        layercache.search(tiny_pipeline(2), PROMPTS, **given, **CALL)


def test_the_cost_is_refused_before_anything_runs(monkeypatch):
    pipe = tiny_pipeline(2)
    monkeypatch.setattr(type(pipe.transformer), "forward", None)
    with pytest.raises(BudgetError, match=r"8 pictures and 7 budgets cost 36.0 full generations at least"):
        budgets = [k / 8 for k in range(1, 8)]
        layercache.search(pipe, [["cat"] * 8], budgets=budgets, effort="quick", **CALL)


class Halved(FlowMatchEulerDiscreteScheduler):
    """A sampler that takes other steps than Euler's, as linear."""

    def step(self, model_output, *args, **kwargs):
        return super().step(0.5 * model_output, *args, **kwargs)


NOISY = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)


@pytest.mark.parametrize(("scheduler", "goal"), [(Halved(), "steer"), (NOISY, "teacher")])
def test_other_samplers_are_searched_too(scheduler, goal):
    """What would steer one that adds noise is not known: forecasts are fitted to the full run's velocity."""
    pipe = tiny_pipeline(2)
    pipe.scheduler = scheduler
    front = layercache.search(pipe, PROMPTS, budgets=(0.6,), effort="quick", **CALL)
    assert front.points and goal in front.points[-1].origin


def test_memory_limits_the_terms(rollouts):
    one, three = (fitting_terms(rollouts, [4], limit) for limit in (rollouts.full[0].latents[0].nbytes, None))
    assert (one, three) == (1, 3)


def test_weights_are_known_by_a_number_of_each_parameter():
    """By name, device and, however it was written, the number that is there now; half precision beside fp32."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in "bca"})
    model["c"].bfloat16()
    model["c"].register_parameter("scale", torch.nn.Parameter(torch.full((2,), 6.0).to(torch.float8_e4m3fn)))
    model["a"].register_parameter("empty", torch.nn.Parameter(torch.zeros(0)))
    model["a"].register_parameter("offloaded", torch.nn.Parameter(torch.zeros(1, device="meta")))
    with torch.no_grad():
        for value, name in enumerate(("a.bias", "a.weight", "b.bias", "b.weight", "c.bias", "c.weight")):
            model.get_parameter(name).fill_(9.0).flatten()[0] = value
        model["b"].weight = torch.nn.Parameter(model["b"].weight.t())
    (found,) = search_files._firsts(model)
    assert found.tolist() == [0, 1, 2, 3, 4, 6, 5] and found.dtype == torch.float32
    model["c"].weight.data += 1  # as an adapter is fused: no counter of versions sees it
    model["b"].bias.data = torch.full((2,), 7.0)
    (found,) = search_files._firsts(model)
    assert found.tolist() == [0, 1, 7, 3, 4, 6, 6]


class Killed(BaseException):
    pass


def test_a_killed_search_goes_on_to_the_same_front(tmp_path, monkeypatch):
    """Killed as a file would be written, behind the first full run and behind two schedules: nothing runs twice."""
    prompts, settings = ["cat", "rocket"], {"budgets": (0.5,), "effort": "quick", **CALL, "num_inference_steps": 6}
    expected = layercache.search(tiny_pipeline(2), prompts, **settings)
    write, run, runs = search_files.write_atomically, Rollouts.run, []
    monkeypatch.setattr(Rollouts, "run", lambda self, *given: runs.append(given) or run(self, *given))

    def killed_behind(files):
        left = iter(range(files))

        def written(*given):
            if next(left, None) is None:
                raise Killed
            return write(*given)

        return written

    for files, schedules in ((2, 0), (5, 2)):  # the first file says what the search is of
        folder = tmp_path / str(files)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(search_files, "write_atomically", killed_behind(files))
            layercache.search(tiny_pipeline(2), prompts, resume=folder, **settings)
        runs.clear()
        found = layercache.search(tiny_pipeline(2), prompts, resume=folder, **settings)
        assert [(p.psnr, p.expected, p.schedule.velocities) for p in found.points] == [
            (p.psnr, p.expected, p.schedule.velocities) for p in expected.points
        ]
        assert len(runs) == expected.tried - 1 - schedules and found.tried == expected.tried
    layercache.search(tiny_pipeline(2), prompts, resume=folder, **settings)
    assert len(runs) == expected.tried - 1 - schedules
    with pytest.raises(ScheduleMismatchError, match="belongs to a search with another model"):
        layercache.search(tiny_pipeline(2), ["cat"], resume=folder, **settings)
    files = search_files.SearchFiles(folder)
    assert files.sample(0) is not None
    files.search = "another"  # as where another machine keeps full runs of an earlier search
    assert files.sample(0) is None
