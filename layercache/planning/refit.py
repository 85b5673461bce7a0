"""`refit`: the coefficients of a schedule fitted anew, to other weights, settings or another number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from layercache._utils.validate import expect
from layercache.errors import ScheduleError
from layercache.parallel.crew import Crew
from layercache.planning.front import Point
from layercache.planning.noise_levels import GivenLevels
from layercache.planning.rollout import Rollouts
from layercache.planning.samples import count_of, with_settings
from layercache.planning.surrogate import with_count
from layercache.planning.whole_steps import TERMS, WholeStepSearch
from layercache.schedule.schedule import Schedule

BAR = "refitting: {n:.1f} of {total:.1f} full generations |{bar}| {elapsed}, {remaining} left"


def refit(
    pipe: Any,
    schedule: Schedule,
    prompts: Sequence[Any],
    *,
    seeds: Sequence[int] | None = None,
    progress: bool = True,
    guidance: Sequence[float] = (),
    sizes: Sequence[Sequence[int]] = (),
    crew: Crew | None = None,
    reference: Any = None,
    **call: Any,
) -> Point:
    """A schedule of whole steps with its forecasts fitted anew, for one full run and one cached run per picture.

    For a model whose weights changed (a LoRA, another checkpoint), for other guidance or another size, and for other
    steps: where their number differs, each computed step becomes the one of nearest noise level, and as large a share
    of the steps is computed.

    Args:
        pipe: a diffusers pipeline, as it will be used.
        schedule: of whole steps, from `layercache.search`.
        prompts, seeds, call: the samples, see `layercache.planning.rollout.Rollouts`.
        progress: show a progress bar, in full generations.
        guidance, sizes: guidance scales and sizes that it is fitted to, as for `layercache.search`; every prompt is run
            with each.
        crew: processes that share out the samples, each with the whole pipeline; all of them get the same schedule.
        reference: a pipeline whose full runs it is fitted to, as for `layercache.search`.

    Returns:
        the schedule, with what it gave on these pictures, and what it is expected to give on others.

    Raises:
        ArgumentError: no schedule.
        ScheduleError: the schedule reuses residuals of groups.
        MethodError: the schedule has noise levels of its own, and this pipeline cannot be given them.
        CalibrationError, CrewError, UnsupportedModelError: as for `Rollouts`.
    """
    expect("layercache.refit", schedule, Schedule)
    if schedule.branch_cells or any(cell for row in schedule.cells for cell in row):
        raise ScheduleError(
            "only schedules of whole steps are fitted anew (layercache.search gives them); of groups of layers, "
            "calibrate and plan again",
            argument="schedule",
        )
    terms = max((len(velocity.terms) for velocity in schedule.velocities if velocity is not None), default=TERMS)
    prompts, seeds = with_settings(pipe, prompts, seeds, guidance, sizes, call)
    pictures = sum(count_of(prompt, call) for prompt in prompts)
    crew = crew or Crew()
    shows = progress and crew.leads
    with crew.together(), tqdm(disable=not shows, bar_format=BAR, total=pictures * (1 + schedule.used)) as bar:
        rollouts = Rollouts(pipe, prompts, seeds, bar.update, crew=crew, reference=reference, **call)
        own = schedule.fingerprint.sigmas_given
        if own and len(own) == rollouts.num_steps:  # of other steps, the levels are those of the call
            rollouts = rollouts.moved(GivenLevels.of_sample(pipe, prompts[0], call).levels(own), own)
        path = path_of(schedule, rollouts.sigmas)
        bar.total = pictures * (1 + path.mean())
        search = WholeStepSearch(rollouts, rollouts.seconds[0], terms=terms)
        origin = str(schedule.made_by.get("origin", "a schedule")).removesuffix(", refitted")
        return search.run_path(path, search.forecast_of(int(path.sum())), f"{origin}, refitted").point


def path_of(schedule: Schedule, sigmas: Sequence[float]) -> np.ndarray:
    """Which steps between these N + 1 noise levels are computed, ``[N]``: those of the schedule, or the nearest."""
    run = schedule.fingerprint.steps
    computed = [place for place, step in enumerate(run) if not schedule.is_skipped(step)]
    steps = len(sigmas) - 1
    if steps != len(run):
        before, now = np.asarray(schedule.fingerprint.sigmas)[list(run)], np.asarray(sigmas[:-1])
        nearest = [int(np.abs(now - before[place]).argmin()) for place in computed]
        return with_count(nearest, steps, max(1, round(len(computed) * steps / len(run))), 1)
    found = np.zeros(steps, dtype=bool)
    found[computed] = True
    return found
