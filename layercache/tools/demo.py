"""The demonstration: calibrate, plan, generate with and without a cache, compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

import layercache
from layercache._utils import metrics
from layercache._utils.compat import progress_bar_settings
from layercache._utils.files import check_output_folder
from layercache._utils.text import shown
from layercache._utils.timer import synchronise
from layercache.demo.model import CLASS_NAMES
from layercache.demo.pipeline import DemoPipeline, load_demo_pipeline
from layercache.demo.weights import find_weights
from layercache.errors import BudgetError, CalibrationError
from layercache.planning.plan import SPANS
from layercache.planning.profile import StabilityProfile
from layercache.planning.search import PICTURES
from layercache.runtime.report import CacheReport
from layercache.schedule.schedule import Schedule
from layercache.tools.report import machine, plots, tables
from layercache.tools.report.tables import Measured

FULL, LAYERCACHE, SEARCHED = "full", "LayerCache", "LayerCache, searched"
COMPARISON_COLUMNS = 12
UNSTEADY = 1.5


@dataclass(frozen=True)
class Method:
    """A way of caching that is compared: how the blocks are cut, and which spans a forecast may use."""

    name: str
    partition: str
    spans: tuple[int, ...]


METHODS = (
    Method(LAYERCACHE, "thirds", SPANS),
    Method("whole-step reuse", "whole", ()),
)


@dataclass(frozen=True)
class Settings:
    """What the demonstration runs with; see `run_demo`."""

    steps: int = 30
    budget: float = 0.6
    seeds: int = 24
    batch: int = 8
    calibration_samples: int = 3
    guidance_scale: float = 4.0

    def check(self) -> None:
        """Raises before anything slow is done."""
        if not 0 < self.budget <= 1:
            raise BudgetError(
                f"budget must be a share of the block time above 0 and at most 1, got {self.budget}", argument="budget"
            )
        counts = (self.steps, self.seeds, self.batch, self.calibration_samples)
        if min(counts) < 1:
            raise CalibrationError(f"steps, seeds, batch and calibration samples must be 1 or more, got {counts}")

    def quick(self) -> Settings:
        """No more than ten steps, four pictures and one calibration sample."""
        return replace(
            self,
            steps=min(self.steps, 10),
            seeds=min(self.seeds, 4),
            batch=min(self.batch, 4),
            calibration_samples=1,
        )


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured and wrote.

    Attributes:
        measured: the full run, then every schedule.
        profile, schedule: of LayerCache as planned from its profile.
        figures: content of ``report.json``.
        files: everything that was written, by what it is.
    """

    measured: tuple[Measured, ...]
    profile: StabilityProfile
    schedule: Schedule
    figures: dict[str, Any]
    files: dict[str, Path]

    def __rich__(self) -> RenderableType:
        notes = (tables.identical_note(self.measured), self.figures["timing_note"], self._lpips_line())
        lines = [*(note for note in notes if note), machine.machine_line(self.figures["machine"]), ""]
        lines += [f"{name}: {shown(path)}" for name, path in self.files.items()]
        # Text, not str: a path may hold what rich takes for markup
        return Group(tables.comparison_table(self.measured), *(Text(line) for line in lines))

    def _lpips_line(self) -> str:
        lpips = self.figures["lpips"]
        if lpips["reason"]:
            return f"LPIPS: not computed ({lpips['reason']})."
        means = ", ".join(f"{name} {np.mean(values):.4f}" for name, values in lpips["values"].items())
        return f"LPIPS (mean): {means}"


def run_demo(
    output: Path,
    *,
    steps: int = 30,
    budget: float = 0.6,
    seeds: int = 24,
    batch: int = 8,
    calibration_samples: int = 3,
    guidance_scale: float = 4.0,
    device: str | None = None,
    quick: bool = False,
    console: Console | None = None,
    pipe: DemoPipeline | None = None,
) -> DemoResult:
    """Compares LayerCache, planned and searched, with reusing whole steps at the same budget, on the bundled model.

    The schedules are planned or searched on calibration pictures and judged on other seeds. Every batch is
    generated in full and by each method in turn, in an order that changes from batch to batch, so that
    a machine that slows down or speeds up treats them equally; one untimed batch of each comes first.

    Args:
        output: folder for the pictures, the report, the profile and the schedule.
        steps: denoising steps.
        budget: share of the block time that may be computed.
        seeds: pictures to compare; picture k has seed k and the k-th class, in turn.
        batch: pictures per call.
        calibration_samples: calls of ``batch`` pictures each, with seeds that are not compared.
        guidance_scale: classifier-free guidance.
        device: where the bundled model goes; the GPU if there is one.
        quick: at most ten steps and four pictures, to see that everything works.
        console: where progress is shown; nowhere by default.
        pipe: a pipeline to use instead of loading the bundled one.

    Raises:
        BudgetError: the budget is out of range or cannot be reached.
        MissingExtraError: scikit-image, matplotlib or the weights are not installed.
        OutputError: no file can be made in the folder.
    """
    settings = Settings(steps, budget, seeds, batch, calibration_samples, guidance_scale)
    settings = settings.quick() if quick else settings
    settings.check()
    # whatever could go wrong at the end should do so now
    metrics.check_installed()
    plots.check_installed()
    if pipe is None:
        find_weights()
    output = Path(output)
    check_output_folder(output, "output")
    output.mkdir(parents=True, exist_ok=True)
    pipe = pipe or load_demo_pipeline(device)
    with _progress(console) as progress, _silenced(pipe):
        partitions = dict.fromkeys(method.partition for method in METHODS)
        measured_on = {name: _calibrate(pipe, settings, name, progress) for name in partitions}
        profiles = {method.name: measured_on[method.partition] for method in METHODS}
        planned = {m.name: layercache.plan(profiles[m.name], budget, spans=m.spans) for m in METHODS}
        searched = _search(pipe, settings, progress)
        schedules = {LAYERCACHE: planned.pop(LAYERCACHE), SEARCHED: searched, **planned}
        profiles[SEARCHED] = next(
            (p for p in measured_on.values() if p.groups == searched.groups), profiles[LAYERCACHE]
        )
        runs = _generate(pipe, settings, schedules, progress)
    measured = _measure(runs)
    figures = _figures(settings, pipe, measured, runs, schedules)
    files = _save(output, settings, profiles, schedules, measured, runs, figures)
    return DemoResult(measured, profiles[LAYERCACHE], schedules[LAYERCACHE], figures, files)


@contextmanager
def _progress(console: Console | None) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # few refreshes: drawing takes time from the runs being timed
    with Progress(*columns, console=console, disable=console is None, refresh_per_second=2) as progress:
        yield progress


@contextmanager
def _silenced(pipe: DemoPipeline) -> Iterator[None]:
    """Keeps the pipeline's own progress bar from breaking up ours."""
    before = progress_bar_settings(pipe)
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**{"disable": False, **before})


def _calibrate(pipe: DemoPipeline, settings: Settings, partition: str, progress: Progress) -> StabilityProfile:
    samples, batch = settings.calibration_samples, settings.batch
    task = progress.add_task(f"calibrating, {partition}", total=samples * settings.steps)

    def advance(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        progress.advance(task)
        return values

    return layercache.calibrate(
        pipe,
        [_classes(range(sample * batch, (sample + 1) * batch)) for sample in range(samples)],
        # the seeds after those that are compared
        seeds=range(settings.seeds, settings.seeds + samples),
        num_inference_steps=settings.steps,
        partition=partition,
        guidance_scale=settings.guidance_scale,
        callback_on_step_end=advance,
        progress=False,
    )


def _search(pipe: DemoPipeline, settings: Settings, progress: Progress) -> Schedule:
    """The best schedule found by running candidates, whose forecasts are fitted on the way."""
    task = progress.add_task("searching", total=None)
    pictures = min(PICTURES["quick"], settings.calibration_samples * settings.batch)
    first = settings.seeds  # the seeds after those that are compared
    front = layercache.search(
        pipe,
        [_classes(range(lo, min(lo + settings.batch, pictures))) for lo in range(0, pictures, settings.batch)],
        seeds=range(first, first + pictures),
        budgets=(settings.budget,),
        effort="quick",
        progress=False,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
    )
    progress.update(task, total=1, completed=1)
    return front.choose(settings.budget).schedule


def _classes(numbers: Sequence[int]) -> list[str]:
    return [CLASS_NAMES[number % len(CLASS_NAMES)] for number in numbers]


@dataclass
class _Run:
    """Pictures and seconds of one method, batch by batch."""

    pictures: np.ndarray
    seconds: list[float]
    cache: CacheReport | None


def _generate(
    pipe: DemoPipeline, settings: Settings, schedules: dict[str, Schedule], progress: Progress
) -> dict[str, _Run]:
    """Full run and every method on every batch; the first batch is generated once more beforehand, untimed."""
    names = [FULL, *schedules]
    batches = [range(lo, min(lo + settings.batch, settings.seeds)) for lo in range(0, settings.seeds, settings.batch)]
    task = progress.add_task("generating", total=len(names) * (len(batches) + 1))
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    caches: dict[str, CacheReport | None] = dict.fromkeys(names)
    for turn, numbers in enumerate([batches[0], *batches]):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            images, taken, caches[name] = _generate_batch(pipe, settings, numbers, schedules.get(name))
            progress.advance(task)
            if turn:
                pictures[name].append(images)
                seconds[name].append(taken)
    return {name: _Run(np.concatenate(pictures[name]), seconds[name], caches[name]) for name in names}


def _generate_batch(
    pipe: DemoPipeline, settings: Settings, numbers: Sequence[int], schedule: Schedule | None
) -> tuple[np.ndarray, float, CacheReport | None]:
    def generate() -> np.ndarray:
        return pipe(
            _classes(numbers),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in numbers],
            output_type="np",
            return_dict=False,
        )[0]

    with layercache.enabled(pipe, schedule) if schedule else nullcontext() as cache:
        images, seconds = _timed(pipe.device, generate)
        return images, seconds, cache.report() if cache else None


def _timed(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    """Result and wall-clock seconds; work that a GPU still has queued belongs to the one who queued it."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return result, time.perf_counter() - start


def _measure(runs: dict[str, _Run]) -> tuple[Measured, ...]:
    reference = runs[FULL]
    measured = []
    for name, run in runs.items():
        if run.cache is None:
            measured.append(Measured(name, 1.0, sum(run.seconds)))
            continue
        psnr, ssim = (compare(reference.pictures, run.pictures) for compare in (metrics.psnr, metrics.ssim))
        measured.append(Measured(name, run.cache.used, sum(run.seconds), tuple(psnr), tuple(ssim)))
    return tuple(measured)


def _figures(
    settings: Settings,
    pipe: DemoPipeline,
    measured: tuple[Measured, ...],
    runs: dict[str, _Run],
    schedules: dict[str, Schedule],
) -> dict[str, Any]:
    """Content of ``report.json``."""
    methods = []
    for row in measured:
        entry = row.to_json(measured[0].seconds) | {"seconds_per_batch": runs[row.name].seconds}
        cache = runs[row.name].cache
        if cache is not None:
            entry["cache"] = asdict(cache)
            entry["schedule"] = tables.schedule_figures(schedules[row.name])
        methods.append(entry)
    pictures = [
        {"seed": seed, "class": name}
        | {row.name: {"psnr": row.psnr[seed], "ssim": row.ssim[seed]} for row in measured[1:]}
        for seed, name in enumerate(_classes(range(settings.seeds)))
    ]
    return {
        "settings": vars(settings) | {"device": str(pipe.device), "dtype": str(pipe.transformer.dtype)},
        "machine": machine.machine_info(),
        "methods": methods,
        "timing_note": _timing_note(settings, runs),
        "pictures": pictures,
        "lpips": _lpips(runs),
    }


def _timing_note(settings: Settings, runs: dict[str, _Run]) -> str:
    """A warning when equal batches took unequal time, for then the speedups say more about the machine."""
    full_batches = settings.seeds // settings.batch  # one more may be smaller
    unsteady = []
    for name, run in runs.items():
        seconds = run.seconds[:full_batches]
        if seconds and max(seconds) > UNSTEADY * min(seconds):
            unsteady.append(f"{name} {min(seconds):.2f} to {max(seconds):.2f} s")
    if not unsteady:
        return ""
    return f"The times are not reliable, equal batches took: {', '.join(unsteady)}. Was the machine busy?"


def _lpips(runs: dict[str, _Run]) -> dict[str, Any]:
    reason = metrics.lpips_unavailable()
    if reason:
        return {"values": None, "reason": reason}
    cached = [name for name in runs if name != FULL]
    return {"values": {n: metrics.lpips(runs[FULL].pictures, runs[n].pictures)[0] for n in cached}, "reason": ""}


def _save(
    output: Path,
    settings: Settings,
    profiles: dict[str, StabilityProfile],
    schedules: dict[str, Schedule],
    measured: tuple[Measured, ...],
    runs: dict[str, _Run],
    figures: dict[str, Any],
) -> dict[str, Path]:
    return {
        "pictures": _save_comparison(output / "comparison.png", settings, measured, runs),
        "stability and schedules": _save_maps(output / "stability.png", profiles, schedules),
        "profile": profiles[LAYERCACHE].save(output / "profile.safetensors"),
        "schedule": schedules[LAYERCACHE].save(output / "schedule.json"),
        "searched schedule": schedules[SEARCHED].save(output / "searched.json"),
        "figures": machine.write_json(output / "report.json", figures),
    }


def _save_comparison(path: Path, settings: Settings, measured: tuple[Measured, ...], runs: dict[str, _Run]) -> Path:
    shown = min(settings.seeds, COMPARISON_COLUMNS)
    reference = runs[FULL].pictures[:shown]
    rows = [plots.PictureRow(FULL, reference)]
    for row in measured[1:]:
        pictures = runs[row.name].pictures[:shown]
        captions = [f"{value:.1f} dB" for value in row.psnr[:shown]]
        rows.append(plots.PictureRow(row.name, pictures, captions))
        rows.append(plots.PictureRow(f"|difference| x{plots.DIFFERENCE_GAIN:g}", plots.difference(reference, pictures)))
    title = f"{settings.steps} steps, budget {settings.budget:.2f}; below each picture its PSNR against the full run"
    return plots.save_pictures(path, rows, _classes(range(shown)), title)


def _save_maps(path: Path, profiles: dict[str, StabilityProfile], schedules: dict[str, Schedule]) -> Path:
    panels = []
    for name, schedule in schedules.items():
        title = f"{name}: {schedule.used:.1%} of the block time computed"
        sigmas = schedule.fingerprint.sigmas
        panels.append(plots.MapPanel(title, schedule.groups, sigmas, profiles[name].stability(), schedule))
    return plots.save_maps(path, panels)
