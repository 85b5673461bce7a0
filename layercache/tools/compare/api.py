"""`layercache.compare`: caching methods, those of one's own among them, on one pipeline."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from layercache._utils.text import shown
from layercache.errors import ArgumentError
from layercache.parallel.crew import Crew
from layercache.planning.search import EFFORTS
from layercache.tools.compare.calls import batched, batches_of, check_pipeline, samples_of
from layercache.tools.compare.categories import in_turn, split_categories
from layercache.tools.compare.entries import Method, methods_of
from layercache.tools.compare.files import ComparisonFiles
from layercache.tools.compare.model import CalibratedModel
from layercache.tools.compare.run import REPEATS, Comparison
from layercache.tools.compare.scores import scorer_of
from layercache.tools.compare.table import ComparisonTable
from layercache.tools.compare.transfer import Setting, Transfer, settings_of

BUDGETS = (0.6, 0.5, 0.4)


def compare(
    pipe: Any,
    methods: str | Sequence[str] | Mapping[str, Any] = "ours",
    prompts: Any = None,
    budgets: Sequence[float] = BUDGETS,
    *,
    seeds: Sequence[int] | int | None = None,
    calibration: int = 8,
    calibration_prompts: Sequence[Any] | None = None,
    effort: str = "normal",
    batch: int = 1,
    repeats: int = REPEATS,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    crew: Crew | None = None,
    lpips: bool | str | os.PathLike[str] | None = None,
    clip: str | os.PathLike[str] | None = None,
    transfer: Sequence[Mapping[str, Any]] = (),
    **call: Any,
) -> ComparisonTable:
    """Runs caching methods on the same prompts and seeds, each as close to each budget as it can be tuned.

    Every picture is compared with the full run of its seed. Speedups are of whole calls, full and cached runs in turns.
    A method that fails leaves its reason in its row; what is no method is refused before anything runs.

    Args:
        pipe: a diffusers pipeline, with no cache enabled.
        methods: ``"ours"``, ``"peers"`` (caches of other packages), ``"all"``, a list of names, or a mapping from
            names in the table to: one of these names; a `Schedule` or `ModuleSchedule`, or a config of
            `layercache.methods`, which run as they are; a `Front` or `StabilityProfile`, which gives the schedule for
            each budget; a config class with a ``knob``, which is tuned to each budget; a function ``(model, budget)``
            that returns one of these plans, or ``(plan, text of its setting)``, ``model`` being a
            `layercache.tools.compare.model.CalibratedModel`; or a function ``()`` or ``(pipe)`` that returns a context
            manager within which another package's cache is on (its share is counted in calls of the blocks).
            Methods of packages with an entry point in the group ``layercache.methods`` go by its name.
        prompts: texts, or mappings of the call's arguments, and of a ``"category"`` by which figures are grouped; a
            list among them is one call. The bundled model needs none.
        budgets: shares of the block time, above 0 and at most 1.
        seeds: one per picture, the prompts in turn; a number: so many, from 0 on. By default a picture per prompt.
        calibration: pictures to fit and tune on, with seeds behind those of the others.
        calibration_prompts: their prompts, in turn; by default the same as those that are compared.
        effort: of the search, for the method ``"layercache"``.
        batch: pictures per call.
        repeats: pairs of full and cached runs that a speedup is the median of.
        folder: of outcomes and pictures, in which a comparison goes on that was stopped, or is asked for more; by
            default they last as long as the table.
        progress: show a progress bar.
        crew: processes that share out calls and tuning, each with the whole pipeline. All get the table; its pictures
            and the folder are the leader's.
        lpips, clip: see `layercache.tools.compare.scores.scorer_of`; by default LPIPS where it is available.
        transfer: other settings that the same plans are run with, see `layercache.tools.compare.transfer.settings_of`;
            what they give, and what was refused, is the table's ``transfer``.
        call: further arguments of every call, such as ``num_inference_steps`` or ``guidance_scale``.

    Raises:
        ArgumentError: prompts, seeds, effort, a setting or an argument is not usable; weights of LPIPS or CLIP were
            asked for and are not here.
        BudgetError: a budget is out of range.
        CacheStateError: a cache is enabled on the pipeline.
        CalibrationError, CrewError: there are more processes than calls; one of them is gone.
        FileFormatError, OutputError, ScheduleMismatchError: the folder cannot be written, or belongs to another model
            or other settings.
        MethodError: a method is unknown, or is none.
        MissingExtraError: scikit-image is not installed, or what LPIPS or CLIP need where that was asked for.
        UnsupportedModelError: the pipeline's transformer is of an unknown class.
    """
    check_pipeline(pipe, call)
    wanted, settings = methods_of(methods), settings_of(transfer, pipe)
    _check_numbers(budgets, calibration, repeats, effort)
    given, names = split_categories(_prompts_for(pipe, prompts))
    calls, numbers = samples_of(given, seeds, batch)
    tuned_on = _calibration_calls(calls, calibration_prompts, calibration, batch)
    more = {"categories": in_turn(names, len(numbers)), "scorer": scorer_of(lpips, clip), "crew": crew or Crew()}
    owner = tempfile.TemporaryDirectory(prefix="layercache-") if folder is None else None
    place = Path(owner.name if owner is not None else os.fspath(folder or ""))
    behind = list(range(max(numbers) + 1, max(numbers) + 1 + calibration))
    searched = None if owner is not None else place / "search"
    model = CalibratedModel(pipe, tuned_on, behind, call, tuple(map(float, budgets)), effort, searched)
    comparison = Comparison(model, calls, numbers, place, repeats=repeats, **more)  # type: ignore[arg-type]
    return _run(comparison, wanted, settings, _title(pipe, call, len(numbers)), owner, progress)


def _run(
    comparison: Comparison, methods: Sequence[Method], settings: Sequence[Setting], title: str, owner: Any, shows: bool
) -> ComparisonTable:
    """Runs all methods, with other settings too, under a bar where it is to be shown."""
    leads, place = comparison.crew.leads, comparison.folder
    count = comparison.count_jobs(methods) * (1 + len(settings))
    with tqdm(disable=not (shows and leads), total=count, unit="run") as bar:
        said = (lambda text: bar.set_description_str(shown(text)), bar.update)
        outcomes = comparison.run(methods, *said)
        others = Transfer(comparison, methods, settings).run(*said, title=title) if settings else None
    # read again, so that the table does not hold the model
    files = ComparisonFiles.read(place) if leads else ComparisonFiles(place)
    return ComparisonTable(files, outcomes, title, owner, others)


def _calibration_calls(calls: Sequence[Sequence[Any]], own: Any, count: int, batch: int) -> list[Any]:
    """Calls of the calibration: of prompts of its own, or of those behind the compared ones, in turn."""
    own = split_categories(own)[0] if own is not None else None
    given = calls if own is None else batches_of([own] if isinstance(own, (str, Mapping)) else own)
    prompts = [prompt for one in given for prompt in one]
    if not prompts:
        raise ArgumentError("give at least one calibration prompt", argument="calibration_prompts")
    found = batched(prompts, len(prompts) if own is None else 0, count, batch)
    return [one[0] if len(one) == 1 else one for one in found]


def _check_numbers(budgets: Sequence[float], calibration: int, repeats: int, effort: str) -> None:
    if isinstance(budgets, str) or not isinstance(budgets, Sequence) or not budgets:
        raise ArgumentError("budgets are shares of the block time, such as (0.6, 0.4)", argument="budgets")
    if not all(isinstance(budget, (int, float)) for budget in budgets):
        raise ArgumentError(f"budgets are numbers, got {list(budgets)}", argument="budgets")
    for name, value in {"calibration": calibration, "repeats": repeats}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} is a number of at least 1, got {value!r}", argument=name)
    if effort not in EFFORTS:
        raise ArgumentError(f"unknown effort {effort!r}; choose {', '.join(EFFORTS)}", argument="effort")


def _prompts_for(pipe: Any, prompts: Any) -> Any:
    """The prompts; the bundled model draws a picture of each of its classes where there are none."""
    if prompts is not None:
        return prompts
    from layercache.demo.pipeline import CLASS_NAMES, DemoPipeline

    if isinstance(pipe, DemoPipeline):
        return list(CLASS_NAMES)
    raise ArgumentError("give prompts=[...], a picture is made for each", argument="prompts")


def _title(pipe: Any, call: Mapping[str, Any], pictures: int) -> str:
    steps = call.get("num_inference_steps")
    parts = [type(pipe).__name__, *([f"{steps} steps"] if steps else [])]
    return ", ".join([*parts, f"{pictures} {'picture' if pictures == 1 else 'pictures'}"])
