"""Processes on threads: what each gives of its samples, how it is added, whose path is taken, and who ends whom."""

from __future__ import annotations

import hashlib
import importlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import layercache
from layercache.parallel import launching
from layercache.parallel.crew import Crew
from layercache.planning import rollout_run
from layercache.planning.fit import Forecast, products_of, solve_velocity
from layercache.planning.rollout import Rollouts, skipping
from layercache.planning.whole_steps import WholeStepSearch
from layercache.tools.cli.workers import _CREW, _HAS_JOINED, run_words
from support import planning_tasks
from support.planning_tasks import CALL, PROMPTS, pipeline

STEPS = {"num_inference_steps": 4}


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("scale")


def test_a_profile_holds_of_every_sample_what_it_gives_alone():
    """And so what it held before processes shared them, when one loop ran them all."""
    call = {**CALL, **STEPS, "max_distance": 2, "max_span": 1}
    _, samples, tables, *_ = planning_tasks.contents_of(layercache.calibrate(pipeline(), PROMPTS, **call))
    alone = [
        planning_tasks.contents_of(layercache.calibrate(pipeline(), [prompt], seeds=[seed], **call))
        for seed, prompt in enumerate(PROMPTS)
    ]
    assert samples == tuple(name for one in alone for name in one[1])
    for name, (shape, content) in tables.items():
        assert shape[0] == len(PROMPTS)
        assert content == b"".join(one[2][name][1] for one in alone), name


@pytest.mark.parametrize("weighting", [0.0, 1.0])
def test_terms_of_very_different_sizes_are_added_in_sample_order(monkeypatch, scale, weighting):
    """Added per process first, or in another order, they would give other coefficients."""
    forecast, seen = Forecast(terms=2, weighting=weighting), []

    def products(*arguments: Any) -> list[np.ndarray]:
        """A sample's own, times a power of two that depends on them alone."""
        found = [one * 2.0 ** (hashlib.sha256(one.tobytes()).digest()[0] % 50) for one in products_of(*arguments)]
        seen.append(found)
        return found

    monkeypatch.setattr(rollout_run, "products_of", products)

    def coefficients(crew: Crew) -> list:
        rollouts = Rollouts(pipeline(), ["cat", "coffee", "temple", "rocket", "flower"], crew=crew, **STEPS)
        found = rollouts.run(skipping(rollouts.fingerprint, [0, 1]), forecast).schedule.velocities
        return [velocity and velocity.to_json() for velocity in found]

    alone = coefficients(Crew())
    samples = seen[0]
    inner = {tuple(np.tensordot(np.ones(5), np.concatenate(order), 1).ravel()) for order in (samples, samples[::-1])}
    assert len(inner) == 2  # the order of these can be seen in their sum
    assert alone[2] == solve_velocity(forecast, [1, 0], np.concatenate(samples)).to_json()
    for world in (2, 3):
        assert scale.on_threads(coefficients, scale.Meeting(world)) == [alone] * world


def test_all_processes_search_the_leaders_paths(monkeypatch, scale):
    """Those that others would choose, whose CPUs may round otherwise, are not taken."""
    choose = WholeStepSearch._next

    def chosen(search: WholeStepSearch, *arguments: Any) -> Any:
        path, forecast, origin = choose(search, *arguments)
        return (path if search.rollouts.crew.leads else ~path), forecast, origin

    def searched(crew: Crew) -> list:
        search = WholeStepSearch(Rollouts(pipeline(), ["cat", "coffee"], crew=crew, **STEPS))
        return [(tried.computed.tolist(), tried.rollout.psnr) for tried in search.run([2], [2])]

    monkeypatch.setattr(WholeStepSearch, "_next", chosen)
    assert scale.on_threads(searched, scale.Meeting(2)) == [searched(Crew())] * 2


def test_a_process_that_ends_before_the_others_are_asked_ends_them(monkeypatch, scale):
    def command(argv: Any) -> None:
        if threading.current_thread() in refused:
            raise SystemExit(2)
        _HAS_JOINED.set(True)
        _CREW.get().gather([1])

    def process(crew: Crew) -> int:
        if crew.rank == 1:
            refused.append(threading.current_thread())
        return run_words(("calibrate",), crew)

    refused: list = []
    monkeypatch.setattr(launching, "run_python", command)
    assert scale.on_threads(process, scale.Meeting(3)) == [2] * 3
