"""Several generations at a time on one transformer: by turns, in threads, in one batch; memory and counts."""

import threading
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache.demo.pipeline import DemoPipeline
from layercache.errors import CacheStateError, LayerCacheWarning, NonFiniteResidualError, ScheduleMismatchError
from layercache.methods import TaylorSeer
from layercache.planning.rollout import skipping
from layercache.schedule.schedule import Schedule
from support.tiny import fingerprint, generate, mixed_cells, schedule_for, shifted_sigmas, tiny_pipeline
from support.zoo import build

STEPS = 8
SIGMAS = tuple(1 - k / STEPS for k in range(STEPS + 1))
GROUPS = ((0, 2), (2, 3), (3, 4))
NAME = "QwenImageTransformer2DModel"


@pytest.fixture(scope="module")
def model():
    return build(NAME)[0]


def plan_of(model, cells) -> Schedule:
    return Schedule(fingerprint(model, SIGMAS, ("all",)), GROUPS, tuple(cells), (1.0, 2.0, 3.0))


class Job:
    """One generation of a bare transformer by Euler steps, taken one at a time."""

    def __init__(self, seed: int, count: int = 1):
        generator = torch.Generator().manual_seed(seed)
        self.latents = torch.randn(count, 16, 16, generator=generator)
        self.text = torch.randn(count, 6, 16, generator=generator)
        self.step = 0

    def arguments(self) -> dict:
        return {
            "hidden_states": self.latents,
            "encoder_hidden_states": self.text,
            "encoder_hidden_states_mask": torch.ones(self.text.shape[:2], dtype=torch.bool),
            "timestep": torch.full((len(self.latents),), SIGMAS[self.step]),
            "img_shapes": [[(1, 4, 4)]] * len(self.latents),
        }

    def advance(self, velocity: torch.Tensor) -> None:
        self.latents = self.latents + (SIGMAS[self.step + 1] - SIGMAS[self.step]) * velocity
        self.step += 1


def run(model, job: Job) -> torch.Tensor:
    with torch.no_grad():
        while job.step < STEPS:
            job.advance(model(**job.arguments(), return_dict=False)[0])
    return job.latents


def joined(jobs: list[Job]) -> dict:
    parts = [job.arguments() for job in jobs]
    return {
        name: torch.cat([p[name] for p in parts])
        if isinstance(value, torch.Tensor)
        else sum((p[name] for p in parts), [])
        for name, value in parts[0].items()
    }


def alone(model, plan, seed, count=1):
    with layercache.enabled(model, plan):
        return run(model, Job(seed, count))


def test_requests_by_turns_are_those_of_single_runs(model):
    plan = plan_of(model, mixed_cells(STEPS))
    expected = [alone(model, plan, seed) for seed in range(3)]
    jobs, order = [Job(seed) for seed in range(3)], [0, 1, 1, 2, 0, 2, 2, 0, 1]
    with layercache.enabled(model, plan) as cache, torch.no_grad():
        while any(job.step < STEPS for job in jobs):
            for k in order:
                if jobs[k].step < STEPS:
                    with cache.request(f"job {k}"):
                        jobs[k].advance(model(**jobs[k].arguments(), return_dict=False)[0])
        assert cache.metrics()["fallback_rows"] == 0 and cache.report().forwards == 0
    for job, latents in zip(jobs, expected, strict=True):
        assert torch.equal(job.latents, latents)


def test_threads_with_pipelines_of_their_own():
    pipe = tiny_pipeline()
    schedule = schedule_for(pipe, mixed_cells())
    with layercache.enabled(pipe, schedule):
        expected = [generate(pipe, seed=10 * k) for k in range(4)]
    found, errors = {}, []
    with layercache.enabled(pipe, schedule) as cache:

        def work(k: int) -> None:
            own = type(pipe)(pipe.transformer, pipe.class_encoder, FlowMatchEulerDiscreteScheduler(shift=3.0))
            own.set_progress_bar_config(disable=True)
            try:
                with cache.request(f"thread {k}", own.scheduler):
                    found[k] = generate(own, seed=10 * k)
            except Exception as error:  # a thread's exception would be lost
                errors.append(error)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = cache.metrics()
    assert not errors and metrics["requests"] == 4 and metrics["fallback_rows"] == 0
    for k in range(4):
        assert torch.equal(found[k], expected[k]), k


def test_threads_without_requests_are_refused_or_right():
    """Two pipelines on one cache without saying so: never a wrong picture silently."""
    pipe = tiny_pipeline()
    schedule = schedule_for(pipe, mixed_cells())
    other = type(pipe)(pipe.transformer, pipe.class_encoder, FlowMatchEulerDiscreteScheduler(shift=3.0))
    other.set_progress_bar_config(disable=True)
    full = generate(pipe)
    with layercache.enabled(pipe, schedule):
        expected = generate(pipe)
        with pytest.warns(LayerCacheWarning, match="that pipeline as well"):
            assert torch.equal(generate(other), full), "computed in full"
        assert torch.equal(generate(pipe), expected)
    assert torch.equal(generate(other), full)


def test_requests_of_a_schedule_that_changes_velocities():
    """Each request's sampler gets its own velocities; once forgotten, nothing of ours is left on the sampler."""
    pipe = tiny_pipeline()
    generate(pipe)
    schedule = skipping(schedule_for(pipe, [(None,) * 3] * STEPS).fingerprint, [0, 1, 3, 5])
    with layercache.enabled(pipe, schedule):
        expected = [generate(pipe, seed=10 * k) for k in range(2)]
    own = [type(pipe)(pipe.transformer, pipe.class_encoder, type(pipe.scheduler)(shift=3.0)) for _ in range(2)]
    with layercache.enabled(pipe, schedule) as cache:
        for k, other in enumerate(own):
            other.set_progress_bar_config(disable=True)
            with cache.request(str(k), other.scheduler):
                assert torch.equal(generate(other, seed=10 * k), expected[k])
            assert "step" in vars(other.scheduler)
            cache.forget(str(k))
            assert "step" not in vars(other.scheduler)
        assert torch.equal(generate(pipe, seed=10), expected[1])
    assert "step" not in vars(pipe.scheduler)


def test_requests_with_schedules_of_their_own():
    """Groups, whole steps, another number of steps: in turns each is what it would be alone, and all are counted."""
    pipe, own, latents = tiny_pipeline(), {}, {}
    grouped, short = schedule_for(pipe, mixed_cells()), schedule_for(pipe, mixed_cells(5)[:4] + [(None,) * 3])
    skipped = skipping(grouped.fingerprint, [0, 1, 3, 5])
    plans = {"grouped": (grouped, 8), "skipped": (skipped, 8), "short": (short, 5)}
    for name, (plan, steps) in plans.items():
        with layercache.enabled(pipe, plan):
            latents[name] = generate(pipe, steps=steps)
        own[name] = type(pipe)(pipe.transformer, pipe.class_encoder, FlowMatchEulerDiscreteScheduler(shift=3.0))
        own[name].set_progress_bar_config(disable=True)
    with layercache.enabled(pipe, grouped) as cache:
        found, turns = {}, {name: threading.Event() for name in plans}

        def work(name: str, after: str) -> None:
            def next_turn(*_: object) -> dict:
                turns[after].set()
                turns[name].wait(0.2)  # not for ever: another may have ended
                turns[name].clear()
                return {}

            plan, steps = plans[name]
            with cache.request(name, own[name].scheduler, plan):
                found[name] = generate(own[name], steps=steps, callback_on_step_end=next_turn)

        pairs = zip(plans, [*list(plans)[1:], "grouped"], strict=True)
        threads = [threading.Thread(target=work, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = cache.metrics()
        assert metrics["fallback_rows"] == 0 and metrics["generations"] == 3
        assert metrics["forwards"] == 2 * (8 + 8 + 5)
        used = [(8, grouped.used), (8, 0.5), (5, short.used)]
        assert metrics["hit_rate"] == pytest.approx(sum(n * (1 - share) for n, share in used) / 21)
        for name in plans:
            cache.forget(name)
            assert "step" not in vars(own[name].scheduler)
        assert torch.equal(generate(pipe), latents["grouped"])
    for name in plans:
        assert torch.equal(found[name], latents[name]), name


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_a_batch_reuses_what_all_its_requests_reuse(model, lag):
    """A request that begins ``lag`` steps later: each is what it would be alone, reusing only what both reuse."""
    cells = mixed_cells(STEPS)
    plan = plan_of(model, cells)

    def both(own: int, others: int) -> tuple:
        if not 0 <= others < STEPS:
            return cells[own]
        kept = [a if a is not None and b is not None else None for a, b in zip(cells[own], cells[others], strict=True)]
        return tuple(needs_text(kept, own, others))

    def needs_text(kept: list, own: int, others: int) -> list:
        """The text of a group whose own row reuses everything behind it was never stored."""
        for step in (own, others):
            for group in range(3):
                if kept[group] is not None and any(cell is None for cell in kept[group + 1 :]):
                    for anchor in cells[step][group] or {}:
                        if not text_stored(anchor, group):
                            kept[group] = None
        return kept

    def text_stored(anchor: int, group: int) -> bool:
        readers = [row for row in cells[anchor + 1 :] if row[group] and anchor in row[group]]
        return any(None in row[group + 1 :] for row in readers)

    first = plan_of(model, [both(step, step - lag) for step in range(STEPS)])
    second = plan_of(model, [both(step, step + lag) for step in range(STEPS)])
    expected = alone(model, first, 0, 2), alone(model, second, 1)
    a, b = Job(0, 2), Job(1)
    with layercache.enabled(model, plan) as cache, torch.no_grad():
        for tick in range(STEPS + lag):
            present = [(n, job) for n, job, t in (("a", a, tick), ("b", b, tick - lag)) if 0 <= t < STEPS]
            with cache.batch({name: len(job.latents) for name, job in present}):
                velocity = model(**joined([job for _, job in present]), return_dict=False)[0]
            for (_, job), part in zip(present, velocity.split([len(j.latents) for _, j in present]), strict=True):
                job.advance(part)
        assert cache.metrics()["fallback_rows"] == 0
        assert cache.metrics()["hits"] > 0
    torch.testing.assert_close(a.latents, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.latents, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "WanTransformer3DModel"])
def test_batches_of_other_models(name, monkeypatch):
    """Joined streams, and one stream: two requests in step are two runs."""
    from dataclasses import replace

    from layercache.models import registry

    model, inputs = build(name)
    monkeypatch.setitem(registry._REGISTRY, name, replace(registry._REGISTRY[name], timestep=None))
    plan = plan_of(model, mixed_cells(STEPS))
    halves = [{n: v[k : k + 1] if getattr(v, "shape", (0,))[0] == 2 else v for n, v in inputs.items()} for k in (0, 1)]

    def outputs(arguments, cache=None, step=0):
        with torch.no_grad():
            return model(**(arguments | changed(arguments, step)), return_dict=False)[0]

    def changed(arguments, step):
        return {"timestep": arguments["timestep"] * (1 - 0.05 * step)}

    expected = []
    for half in halves:
        with layercache.enabled(model, plan):
            expected.append([outputs(half, step=step) for step in range(STEPS)])
    with layercache.enabled(model, plan) as cache:
        for step in range(STEPS):
            with cache.batch({"a": 1, "b": 1}):
                found = outputs(inputs, cache, step)
            torch.testing.assert_close(found, torch.cat([e[step] for e in expected]), rtol=1e-4, atol=1e-5)
        assert cache.metrics()["hit_rate"] == pytest.approx(1 - plan.used)


def test_memory_is_limited_and_what_is_lost_is_computed(model):
    plan = plan_of(model, mixed_cells(STEPS))
    expected = [alone(model, plan, seed) for seed in range(2)]
    with layercache.enabled(model, plan) as cache, torch.no_grad():
        jobs = [Job(0), Job(1)]
        for k in (0, 1):
            with cache.request(str(k)):
                jobs[k].advance(model(**jobs[k].arguments(), return_dict=False)[0])
        both = cache.metrics()["bytes"]
        cache.requests.limit_bytes = int(both * 0.75)
        for _ in range(STEPS - 1):
            for k in (0, 1):
                with cache.request(str(k)):
                    jobs[k].advance(model(**jobs[k].arguments(), return_dict=False)[0])
                assert cache.metrics()["bytes"] <= both
        metrics = cache.metrics()
        assert metrics["evictions"] > 0 and metrics["fallback_rows"] > 0
        for job, latents in zip(jobs, expected, strict=True):
            assert torch.isfinite(job.latents).all()
            assert (job.latents - latents).abs().max() < 1.0


def test_seconds_that_nobody_measured_are_not_counted_as_saved(model):
    plan = plan_of(model, mixed_cells(STEPS))
    plan = replace(plan, group_seconds=(1.0,) * len(plan.groups))
    with layercache.enabled(model, plan) as cache:
        run(model, Job(0))
        assert cache.metrics()["hits"] > 0 and cache.metrics()["seconds_saved"] == 0.0


def test_metrics_count_what_happened(model):
    plan = plan_of(model, mixed_cells(STEPS))
    cells = [cell is not None for row in plan.cells for cell in row]
    with layercache.enabled(model, plan) as cache:
        for name in ("a", "b"):
            with cache.request(name):
                run(model, Job(0))
        metrics = cache.metrics()
        assert metrics["forwards"] == 2 * STEPS and metrics["requests"] == 2
        assert metrics["hits"] == 2 * sum(cells) and metrics["misses"] == 2 * (len(cells) - sum(cells))
        saved = sum(
            s for row in plan.cells for cell, s in zip(row, plan.group_seconds, strict=True) if cell is not None
        )
        assert metrics["seconds_saved"] == pytest.approx(2 * saved)
        assert metrics["hit_rate"] == pytest.approx(1 - plan.used) and metrics["bytes"] > 0
        assert (
            cache.requests.report("b").used == pytest.approx(plan.used) and cache.requests.report("b").forwards == STEPS
        )
        cache.forget("a")
        after = cache.metrics()
        assert after["requests"] == 1 and after["hits"] == metrics["hits"] and after["bytes"] == metrics["bytes"] / 2
        for ask in (cache.forget, cache.requests.report):
            with pytest.raises(CacheStateError, match="no request 'a'.*b"):
                ask("a")


def test_wrong_use(model):
    with layercache.enabled(model, plan_of(model, mixed_cells(STEPS))) as cache:
        for rows in ({}, {"a": 0}):
            with pytest.raises(CacheStateError, match="at least one sample"), cache.batch(rows):
                pass
        with cache.request("a", FlowMatchEulerDiscreteScheduler()):
            pass
        with pytest.raises(CacheStateError, match="another scheduler"):
            with cache.request("a", FlowMatchEulerDiscreteScheduler()):
                pass
        two = [tuple(row[:2]) for row in mixed_cells(STEPS)]
        other = Schedule(cache.schedule.fingerprint, ((0, 3), (3, 4)), tuple(two), (1.0, 1.0))
        with cache.request("other", None, other), cache.request("other", schedule=other):
            pass
        with pytest.raises(CacheStateError, match="another schedule"), cache.request("other", None, cache.schedule):
            pass
        with pytest.raises(CacheStateError, match="same groups"), cache.batch({"a": 1, "other": 1}), torch.no_grad():
            model(**Job(0, 2).arguments())
        cache.forget("other")
        skipped = skipping(other.fingerprint, [0, 1])
        with pytest.raises(CacheStateError, match=r"request\(name, scheduler, schedule\)"):
            with cache.request("skipped", schedule=skipped):
                pass
        foreign = replace(other, fingerprint=replace(other.fingerprint, model_class="Another"))
        with pytest.raises(ScheduleMismatchError, match="Another"), cache.request("foreign", schedule=foreign):
            pass
        assert list(cache.requests.routers) == ["a"]
        with cache.request("bad"):
            job = Job(0)
            job.latents[0, 0, 0] = float("nan")
            with torch.no_grad():
                model(**job.arguments())
        with pytest.raises(NonFiniteResidualError):
            cache.forget("bad")


@pytest.mark.parametrize("plan", ["groups", "velocities", "automatic"])
def test_another_threads_pipeline_is_computed_in_full(plan):
    """While a pipeline's loop runs, another one on the same transformer, enabled as well, makes its full picture."""
    pipe = tiny_pipeline(2)
    other = DemoPipeline(pipe.transformer, pipe.class_encoder, FlowMatchEulerDiscreteScheduler(shift=3.0))
    other.set_progress_bar_config(disable=True)
    expected = generate(other, steps=8, seed=5)
    cells = tuple((None,) if step % 2 == 0 else ({step - 1: 1.0},) for step in range(8))
    prints = fingerprint(pipe.transformer, shifted_sigmas(8))
    plans = {
        "groups": lambda: Schedule(prints, ((0, 2),), cells, (1.0,)),
        "velocities": lambda: TaylorSeer(interval=2).schedule(prints),
        "automatic": lambda: None,
    }
    with layercache.enabled(pipe, plans[plan]()):
        alone = generate(pipe, steps=8)
    found, threads = [], []

    def begin_the_other(pipe, step, time, values):
        if step == 3:
            threads.append(threading.Thread(target=lambda: found.append(generate(other, steps=8, seed=5))))
            threads[0].start()
            threads[0].join(60)
        return values

    cache = layercache.enable(pipe, plans[plan]())
    assert layercache.enable(other, plans[plan]()) is cache
    with pytest.warns(LayerCacheWarning, match="another thread's pipeline"):
        together = generate(pipe, steps=8, callback_on_step_end=begin_the_other)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert (generate(other, steps=8, seed=5) != expected).any()  # by itself it is cached
    layercache.disable(pipe)
