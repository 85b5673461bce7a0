"""Generations in turns: one thread at a time, the same numbers as alone, nothing left behind."""

import threading

import pytest
import torch

from layercache.planning.stepper import PausableRun, clones, paused_at_steps, run_in_step
from support.tiny import generators, tiny_pipeline

STEPS = 4


def counting(turn_box, log, name, count=3):
    def function():
        total = 0
        for k in range(count):
            log.append((name, k, threading.get_ident()))
            total += turn_box[0].pause((k, f"{name}{k}", None))
        return total

    return function


def runs_of(log, *names):
    runs = []
    for name in names:
        box = []
        box.append(PausableRun(counting(box, log, name)))
        runs.append(box[0])
    return runs


def test_turns_alternate_and_get_their_replies():
    log, seen = [], []
    runs = runs_of(log, "a", "b")

    def answer(step, items):
        seen.append((step, [item[0] for item in items]))
        return [10**step, 2 * 10**step]

    assert run_in_step(runs, lambda _: None, answer) == [111, 222]
    assert [entry[:2] for entry in log] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert seen == [(k, [f"a{k}", f"b{k}"]) for k in range(3)]
    assert len({entry[2] for entry in log}) == 2


def test_select_precedes_every_turn():
    order = []
    runs = runs_of([], "a", "b")
    run_in_step(runs, order.append, lambda step, items: [0, 0])
    assert order == [0, 1] * 4


def test_an_exception_reaches_the_caller_and_ends_the_others():
    before = threading.active_count()
    box = []

    def broken():
        box[0].pause((0, None, None))
        raise KeyError("lost")

    good = runs_of([], "a")[0]
    box.append(PausableRun(broken))
    with pytest.raises(KeyError, match="lost"):
        run_in_step([good, box[0]], lambda _: None, lambda step, items: [0, 0])
    assert threading.active_count() == before


def test_an_exception_of_the_answer_ends_all_turns():
    before = threading.active_count()

    def answer(step, items):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_step(runs_of([], "a", "b"), lambda _: None, answer)
    assert threading.active_count() == before


def test_turns_of_different_length_are_refused():
    log, box = [], []
    box.append(PausableRun(counting(box, log, "short", count=2)))
    with pytest.raises(ValueError, match="same steps"):
        run_in_step([*runs_of(log, "long"), box[0]], lambda _: None, lambda step, items: [0, 0])


def test_grad_and_autocast_modes_are_the_callers():
    seen = []

    def look():
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        PausableRun(look).resume()
    with torch.inference_mode():
        PausableRun(look).resume()
    PausableRun(look).resume()
    assert seen == [(False, False, True), (False, True, False), (True, False, False)]


def test_pipelines_in_turns_equal_pipelines_alone():
    pipe = tiny_pipeline()
    alone = [
        pipe([name], num_inference_steps=STEPS, generator=generators(1, seed), output_type="latent").images
        for seed, name in enumerate(("cat", "coffee", "rocket"))
    ]
    copies = clones(pipe, 3)
    assert all(c.transformer is pipe.transformer and c.scheduler is not pipe.scheduler for c in copies)
    runs = []
    for seed, (clone, name) in enumerate(zip(copies, ("cat", "coffee", "rocket"), strict=True)):

        def generate(clone=clone, name=name, seed=seed):
            with paused_at_steps(clone.scheduler, runs[seed]):
                return clone(
                    [name], num_inference_steps=STEPS, generator=generators(1, seed), output_type="latent"
                ).images

        runs.append(PausableRun(generate))
    steps = []

    def answer(step, items):
        steps.append(step)
        return [velocity for velocity, _ in items]

    together = run_in_step(runs, lambda _: None, answer)
    assert steps == list(range(STEPS))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    assert all("step" not in c.scheduler.__dict__ for c in copies)
