"""`search`: the best schedules for every budget, found by running a few on the model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from tqdm.auto import tqdm

from layercache._utils.compat import call_parameters, splits_tokens
from layercache.errors import ArgumentError, BudgetError, CacheStateError
from layercache.models.registry import find_transformer
from layercache.parallel.crew import Crew
from layercache.planning.fit import Forecast
from layercache.planning.free_levels import FreeLevels
from layercache.planning.front import Front, Point
from layercache.planning.noise_levels import GivenLevels
from layercache.planning.rollout import Rollouts, skipping, with_terms_of
from layercache.planning.samples import count_of, with_settings
from layercache.planning.search_files import SearchFiles
from layercache.planning.whole_steps import TAIL, TERMS, Tried, WholeStepSearch, cost_of, counts_of, runs_per_budget
from layercache.schedule.few_steps import warn_of_few_steps

BUDGETS = (0.75, 0.6, 0.5, 0.4, 0.33, 0.25)

PICTURES = {"quick": 8, "normal": 8, "thorough": 16}
"""Of the pictures given, so many are fitted to at most."""

EFFORTS = {"quick": 32, "normal": 72, "thorough": 160}
"""Full generations that a search may cost in all, its full runs included."""

FREE = "free"
"""As ``sigmas``: noise levels are moved."""

ENDED_EARLY = ("the time limit of ", "it was interrupted ")
"""Beginnings of the notes of a front whose search can go on."""

BAR = "searching: {n:.0f} of {total:.0f} generations |{bar}| {elapsed}, {remaining} left{postfix}"


@dataclass(frozen=True)
class SearchConfig:
    """Settings of `search`, which says what they mean.

    Raises:
        ArgumentError: on construction, for an unknown effort.
        BudgetError: for a budget or tail out of range.
    """

    budgets: tuple[float, ...]
    effort: str
    time_limit: float | None
    max_cache_bytes: int | None
    tail: float
    seed: int
    is_free: bool = False

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise ArgumentError(f"unknown effort {self.effort!r}; choose {', '.join(EFFORTS)}", argument="effort")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise BudgetError(
                    f"budgets must be shares of the block time above 0 and at most 1, got {budget}", argument="budgets"
                )
        if not 0 <= self.tail <= 1:
            raise BudgetError(f"tail is a weight from 0 to 1, got {self.tail}", argument="tail")


def search_cost(
    pictures: int, num_steps: int, budgets: Sequence[float], effort: str, is_free: bool = False
) -> tuple[float, int]:
    """Full generations that `search` costs in all, exactly, and how many schedules it runs.

    Args:
        pictures: that are fitted to; `search` takes no more of those given than `PICTURES`.
        num_steps: of a generation.
        budgets, effort: as for `search`.
        is_free: whether noise levels are moved, which takes one run more of each budget.

    Raises:
        BudgetError: it would cost more than the effort allows, or a budget is less than a step.
    """
    counts = counts_of(budgets, num_steps)
    runs = _runs(counts, num_steps, pictures, effort, is_free)
    more = [n + is_free for n in runs]
    return cost_of(counts, more, num_steps, pictures), sum(more)


def _runs(counts: Sequence[int], num_steps: int, pictures: int, effort: str, is_free: bool) -> list[int]:
    """How many schedules of each budget are run, besides those between moved noise levels."""
    moved = pictures * sum(counts) / num_steps if is_free else 0.0
    least = cost_of(counts, [1] * len(counts), num_steps, pictures) + moved
    if is_free and least > EFFORTS[effort] + 1e-9:
        raise BudgetError(
            f"{pictures} pictures and {len(counts)} budgets cost {least:.1f} full generations at least with "
            f'sigmas="free", more than the {EFFORTS[effort]} of this effort; give fewer pictures or budgets, or a '
            "higher effort",
            argument="effort",
        )
    return runs_per_budget(counts, num_steps, pictures, EFFORTS[effort] - moved)


def search(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    effort: str = "normal",
    seeds: Sequence[int] | None = None,
    validation: tuple[Sequence[Any], Sequence[int]] | None = None,
    budgets: Sequence[float] = BUDGETS,
    time_limit: float | None = None,
    max_cache_bytes: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    tail: float = TAIL,
    seed: int = 0,
    progress: bool = True,
    guidance: Sequence[float] = (),
    sizes: Sequence[Sequence[int]] = (),
    sigmas: str | Sequence[float] | None = None,
    crew: Crew | None = None,
    reference: Any = None,
    **call: Any,
) -> Front:
    """Finds the schedules of highest PSNR for every budget, for a fixed number of full generations in all.

    Schedules are of whole steps: some are computed, in the others the velocity is a combination of earlier ones. Paths
    are found in a surrogate made of the full runs' inner products, a few of each budget are run, and their forecasts
    fitted as they run, pictures weighted by what they miss (`layercache.planning.whole_steps`). They are compared by
    what they are expected to give on other pictures (`Point.expected`). Source: ours; docs/planning.md.

    Ctrl-C, and the time limit, end it with the best that was found so far, as a note says.

    Args:
        pipe: a diffusers pipeline.
        prompts, seeds, call: the calibration samples, see `layercache.planning.rollout.Rollouts`. 8 pictures of them
            are used, 16 by ``"thorough"``.
        effort: full generations that it costs at most, all pictures and budgets together: ``"quick"`` 32, ``"normal"``
            72, ``"thorough"`` 160.
        validation: prompts and seeds that nothing is fitted to; each point of the front is run on them once.
        budgets: shares of the block time.
        time_limit: seconds after which no further schedule is run; the result then depends on the machine's speed.
        max_cache_bytes: schedules that would store more than this, all branches together, are left out.
        resume: a folder that keeps the full runs and what every schedule gave; a search that was stopped, or killed,
            goes on from it to the same front.
        tail: weight of the 10 % quantile of the PSNR beside its mean; 0 looks at the mean alone.
        seed: of the order in which paths are tried in the surrogate.
        progress: show a progress bar, in full generations.
        guidance, sizes: guidance scales, and ``(height, width)`` or ``(height, width, frames)`` in pixels, that one
            schedule is fitted to: the pictures have them in turns. The schedule knows their range, and a run outside of
            it is warned of.
        sigmas: ``"free"``: noise levels are moved where that is expected to give more; such a schedule runs with
            ``pipe(..., **schedule.call_arguments())``. It takes Euler steps. Or the ``sigmas=`` of every call.
        crew: processes that share out the samples, each with the whole pipeline; all of them get the same front.
        reference: the pipeline with unquantised weights, where those of ``pipe`` are quantised: all is fitted to its
            full runs, so that the error of quantisation is corrected too; for one full run of ``pipe`` more.

    Raises:
        ArgumentError: an unknown effort, or more settings than pictures.
        BudgetError: a budget is out of range, the pictures cost more than the effort allows, or no schedule keeps to
            the memory.
        CacheStateError: a time limit, where the tokens are split over several processes.
        CalibrationError, CrewError: as for `Rollouts`.
        FileFormatError, OutputError: a file of ``resume`` is damaged, or none can be made in it.
        ScheduleMismatchError: ``resume`` belongs to another search.
        UnsupportedModelError, MethodError: the model is of an unknown class; noise levels cannot be moved.
    """
    start = time.monotonic()
    is_free, call = _levels_asked_for(sigmas, sizes, call)
    config = SearchConfig(tuple(budgets), effort, time_limit, max_cache_bytes, tail, seed, is_free)
    prompts, seeds, given = _samples_and_levels(pipe, prompts, seeds, (guidance, sizes), config, call)
    cost = _cost_ahead(pipe, prompts, config, call)
    crew = crew or Crew()
    shared: dict[str, Any] = {"crew": crew, "reference": reference}
    files = None if resume is None else SearchFiles(resume, crew)
    with crew.together(), tqdm(disable=not (progress and crew.leads), bar_format=BAR, total=cost) as bar:
        bar.set_postfix_str("full runs")
        rollouts = Rollouts(pipe, prompts, seeds, bar.update, files, None, partial(_say_memory, bar), **shared, **call)
        front = _searched(rollouts, config, start, bar, given)
    if validation is None:
        return front
    others, drawn = with_settings(pipe, *validation, guidance, sizes, call)
    return replace(front, points=tuple(validated(front.points, pipe, others, drawn, **shared, **call)))


def _cost_ahead(pipe: Any, prompts: Sequence[Any], config: SearchConfig, call: Mapping[str, Any]) -> float:
    """Full generations that the search costs in all; at most, where the number of steps is not known ahead.

    Raises:
        BudgetError: as for `search_cost`.
    """
    pictures, steps = sum(count_of(prompt, call) for prompt in prompts), steps_of(pipe, call)
    if steps is None or not pictures:
        return EFFORTS[config.effort]
    return search_cost(pictures, steps, config.budgets, config.effort, config.is_free)[0]


def _levels_asked_for(
    sigmas: Any, sizes: Sequence[Sequence[int]], call: Mapping[str, Any]
) -> tuple[bool, dict[str, Any]]:
    """Whether noise levels are to be moved, and the arguments of every call."""
    if isinstance(sigmas, str) and sigmas != FREE:
        raise ArgumentError(f'sigmas is "{FREE}", or a list of noise levels, got {sigmas!r}', argument="sigmas")
    if isinstance(sigmas, str) and len(sizes) > 1:
        raise ArgumentError(
            "noise levels are moved for one size, since each may have others: leave out sizes=, or sigmas=",
            argument="sizes",
        )
    if sigmas is None or isinstance(sigmas, str):
        return sigmas == FREE, dict(call)
    return False, {**call, "sigmas": sigmas}


def _check_time_limit(pipe: Any, time_limit: float | None) -> None:
    if time_limit is not None and splits_tokens(find_transformer(pipe)):
        raise CacheStateError(
            "the tokens are split over several processes (context parallelism), whose clocks would not end the search "
            "at the same schedule; leave out time_limit"
        )


def _samples_and_levels(
    pipe: Any,
    prompts: Sequence[Any],
    seeds: Sequence[int] | None,
    settings: tuple[Sequence[float], Sequence[Sequence[int]]],
    config: SearchConfig,
    call: Mapping[str, Any],
) -> tuple[list[Any], list[int] | None, GivenLevels | None]:
    """The samples that are fitted to, and, where they are to be moved, the noise levels of their calls."""
    _check_time_limit(pipe, config.time_limit)
    fitted, drawn = _fitted_samples(pipe, prompts, seeds, settings, config.effort, call)
    given = GivenLevels.of_sample(pipe, fitted[0], call) if config.is_free and fitted else None
    return fitted, drawn, given


def _fitted_samples(
    pipe: Any,
    prompts: Sequence[Any],
    seeds: Sequence[int] | None,
    settings: tuple[Sequence[float], Sequence[Sequence[int]]],
    effort: str,
    call: Mapping[str, Any],
) -> tuple[list[Any], list[int] | None]:
    """The samples that the effort fits to, with all settings among them.

    Raises:
        ArgumentError: there are more settings than pictures.
    """
    guidance, sizes = settings
    count, most = max(1, len(guidance)) * max(1, len(sizes)), PICTURES[effort]
    if count > most:
        raise ArgumentError(
            f"{len(guidance)} guidance scales and {len(sizes)} sizes are {count} settings, and {effort!r} fits to "
            f"{most} pictures; give fewer, or a higher effort",
            argument="guidance",
        )
    return first_pictures(*with_settings(pipe, prompts, seeds, guidance, sizes, call), most, call)


def _say_memory(bar: Any, size: float) -> None:
    bar.set_postfix_str(f"{size / 1e9:.2g} GB of memory")


def _searched(
    rollouts: Rollouts, config: SearchConfig, start: float, bar: Any, given: GivenLevels | None = None
) -> Front:
    """The search behind the full runs; warns of runs of few steps."""
    warn_of_few_steps(rollouts.fingerprint, stacklevel=4)
    counts, steps, pictures = counts_of(config.budgets, rollouts.num_steps), rollouts.num_steps, rollouts.num_pictures
    runs = _runs(counts, steps, pictures, config.effort, config.is_free)
    bar.total = cost_of(counts, [n + config.is_free for n in runs], steps, pictures)
    notes = [f"{pictures} pictures, {bar.total:.1f} full generations in all"]
    blocks, rest = rollouts.seconds
    terms = fitting_terms(rollouts, counts, config.max_cache_bytes)
    search = WholeStepSearch(rollouts, blocks, config.seed, terms, config.tail)
    levels = None if given is None else FreeLevels(search, given)
    crew = rollouts.crew
    try:
        with crew.together():
            for tried in chain(search.run(counts, runs), levels.run(counts) if levels else ()):
                bar.set_postfix_str(f"used {tried.point.used:.2f}: {tried.quality:.1f} dB")
                limit = config.time_limit
                if limit is not None and crew.agree(time.monotonic() - start > limit):
                    notes.append(f"{ENDED_EARLY[0]}{limit:g} s ended it after {len(search.tried)} schedules")
                    break
    except KeyboardInterrupt:
        del search.tried[min(crew.gather([len(search.tried)])) :]  # what all processes have
        if not search.tried:
            raise
        notes.append(f"{ENDED_EARLY[1]}after {len(search.tried)} schedules")
    moved: list[Tried] = []
    if levels is not None:
        moved = levels.kept[: min(crew.gather([len(levels.kept)]))]
        notes.append(f"noise levels moved for {len(moved)} of {len(counts)} budgets")
    points = [tried.point for tried in (*search.tried, *moved)]
    return Front.of(points, (blocks, rest, 0.0), 1 + len(points), notes, config.tail)


def validated(
    points: Sequence[Point], pipe: Any, prompts: Sequence[Any], seeds: Sequence[int] | None, **call: Any
) -> Iterator[Point]:
    """The points with their PSNR on other samples, which are given as to `Rollouts`: nothing is fitted here."""
    rollouts = Rollouts(pipe, prompts, seeds, **call)
    for point in points:
        yield replace(point, held_out=rollouts.run(point.schedule).psnr)


def fitting_terms(rollouts: Rollouts, counts: Sequence[int], max_cache_bytes: int | None) -> int:
    """How many velocities a forecast may combine at most, so that what is stored keeps to this memory.

    Raises:
        BudgetError: not even one.
    """
    widest = skipping(rollouts.fingerprint, range(max(counts)))
    needs = {terms: rollouts.cache_bytes(with_terms_of(widest, Forecast(terms=terms))) for terms in range(TERMS, 0, -1)}
    fitting = [terms for terms, needed in needs.items() if max_cache_bytes is None or needed <= max_cache_bytes]
    if not fitting:
        raise BudgetError(
            f"schedules of whole steps store {needs[1]} bytes at least, more than the {max_cache_bytes} allowed",
            argument="max_cache_bytes",
        )
    return fitting[0]


def first_pictures(
    prompts: Sequence[Any], seeds: Sequence[int] | None, most: int, call: Mapping[str, Any]
) -> tuple[list[Any], list[int] | None]:
    """Prompts and seeds of at most so many pictures; a list of prompts is cut."""
    kept: list[Any] = []
    left = most
    for prompt in prompts:
        if left <= 0:
            break
        each = count_of(prompt[:1], call) if isinstance(prompt, (list, tuple)) and prompt else 1
        one = list(prompt[: max(1, left // each)]) if isinstance(prompt, (list, tuple)) else prompt
        left -= count_of(one, call)
        kept.append(one)
    return kept, None if seeds is None else list(seeds)[: most - left]


def steps_of(pipe: Any, call: Mapping[str, Any]) -> int | None:
    """How many steps a call of the pipeline takes, as far as its arguments say."""
    for name in ("timesteps", "sigmas"):
        if call.get(name) is not None:
            return len(call[name])
    parameter = call_parameters(pipe).get("num_inference_steps")
    steps = call.get("num_inference_steps", None if parameter is None else parameter.default)
    return steps if isinstance(steps, int) and call.get("strength") is None else None
