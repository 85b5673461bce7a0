"""Measuring how well each group's residual is forecast, and what the groups cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from layercache._utils.compat import has_foreign_cache, progress_bar_settings, splits_tokens, unwrap_compiled
from layercache.errors import CacheStateError, CalibrationError
from layercache.models.registry import experts_of, find_transformer, spec_for
from layercache.parallel.crew import Crew
from layercache.planning.observer import Observer
from layercache.planning.profile import StabilityProfile
from layercache.planning.rollout import OTHER
from layercache.planning.sample_statistics import CalibrationFiles, SampleStatistics
from layercache.planning.samples import Sample, arguments_of, measured_settings, samples_of
from layercache.planning.search_files import digest_of, model_identity
from layercache.runtime.attachment import attach, attachment_of
from layercache.schedule.partition import Partition, cut, cut_behind_skips, cut_by_curves

SENSITIVITIES = ("substitution", "random")


def calibrate(
    pipe: Any,
    prompts: Sequence[Any] | None = None,
    *,
    run: Callable[[int], object] | None = None,
    samples: int | None = None,
    sigmas: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    partition: Partition = "thirds",
    num_groups: int = 3,
    max_distance: int = 8,
    max_span: int = 9,
    eta: float = 1.0,
    sensitivity: str | None = None,
    transformer: str = "transformer",
    process_group: Any = None,
    progress: bool = True,
    crew: Crew | None = None,
    resume: str | os.PathLike[str] | None = None,
    **call: Any,
) -> StabilityProfile:
    """Runs full generations and measures every group's residual against forecasts from older ones.

    One sample is one call. Residuals of the last ``max_distance + max_span`` steps are kept per branch
    and group, no more; the statistics stay on the device until a sample ends (docs/methods.md, Errors of a forecast).

    Args:
        pipe: a diffusers pipeline, or a transformer.
        prompts: for a pipeline, one call per entry: a prompt, a list (a batch), or a mapping of the call's arguments.
        run: for a transformer, ``run(k)`` does the k-th full generation with it (give ``samples`` and ``sigmas``).
        samples: number of calls of ``run``.
        sigmas: noise levels of ``run``, one more than steps.
        seeds: one per prompt; ``0, 1, ...`` by default.
        num_inference_steps: passed to the pipeline.
        partition: ``"thirds"``, ``"sixth"``, ``"measured"``, ``"whole"`` or block ranges.
        num_groups: groups of ``"measured"``.
        max_distance: longest distance to the anchor that is measured.
        max_span: longest distance between the two anchors that is measured.
        eta: damping of the secant.
        sensitivity: also measure what a group's error does to the velocity, by changing its residual and running the
            groups behind it, about one more full run per sample: ``"substitution"`` puts the residual of the step
            before in its place, ``"random"`` adds noise of a hundredth of its size.
        transformer: of a pipeline with several, the component to measure (Wan 2.2: ``"transformer_2"`` runs the later
            steps). The profile says at which steps it runs; the others run undisturbed.
        process_group: processes that run the generations together (context parallelism): the sums and the sizes are
            added up over them, seconds are their mean, and all get the same profile.
        progress: show a progress bar.
        crew: processes that share out the samples, each with the whole pipeline; all of them get the same profile, in
            which only seconds depend on how many there are.
        resume: a folder that keeps what was measured on every sample; a calibration that was stopped, or killed, goes
            on from it. Of ``run`` it is not known what it does: name another folder where that changed.
        call: further arguments of the pipeline's call, such as ``guidance_scale`` or ``height``.

    Raises:
        CalibrationError: no samples, fewer than processes, an incomplete run, or a statistic that is not finite.
        UnsupportedModelError: the transformer is of an unknown class, or there is none of this name.
        CacheStateError: a cache is enabled on the pipeline, or tokens are split over processes without a process group.
        CrewError: a process of the crew is gone.
        FileFormatError: a file of ``resume`` is damaged.
        OutputError: no files can be made in ``resume``.
        ScheduleMismatchError: ``resume`` belongs to another calibration.
    """
    model = _checked(pipe, transformer, process_group, (max_distance, max_span), sensitivity)
    todo = samples_of(pipe, prompts, run, samples, sigmas, seeds, num_inference_steps, call)
    (crew := crew or Crew()).check_samples(len(todo))
    given = [partition, num_groups, max_distance, max_span, eta, sensitivity, transformer, sigmas]
    about = [given, [name for name, _ in todo], prompts, num_inference_steps, dict(sorted(call.items()))]
    files = _files(resume, pipe, about, crew)
    passes, spec = _Passes(pipe, todo, progress, crew, files), spec_for(model)
    of_all = {"sigmas": sigmas, "scheduler": getattr(pipe, "scheduler", None), "eta": eta, "group": process_group}
    observer_of: Callable[..., Observer] = partial(Observer, model, spec, **of_all)
    lengths = [len(blocks) for blocks in spec.block_modules(model)]
    groups = _groups(passes, observer_of, lengths, partition, num_groups)
    groups = cut_behind_skips(groups, spec.skip_pairs(sum(lengths)))
    profile = passes.observe(observer_of(groups, max_distance, max_span, sensitivity), "groups", "calibrating")
    each = [prompts] if isinstance(prompts, str) else prompts or [{}]
    measured = measured_settings(pipe, *({**call, **arguments_of(prompt)} for prompt in each))
    settings = {**profile.fingerprint.settings, **measured}
    return replace(profile, fingerprint=replace(profile.fingerprint, settings=settings))


def _checked(
    pipe: Any, transformer: str, group: Any, reach: tuple[int, int], sensitivity: str | None
) -> torch.nn.Module:
    """The model; refuses settings that nothing can be measured with, and a model that is cached or split."""
    if reach[0] < 1 or reach[1] < 0:
        raise CalibrationError(f"max_distance must be at least 1 and max_span at least 0: {reach[0]}, {reach[1]}")
    if sensitivity not in (None, *SENSITIVITIES):
        raise CalibrationError(
            f"unknown sensitivity {sensitivity!r}; choose {' or '.join(SENSITIVITIES)}", argument="sensitivity"
        )
    model = find_transformer(pipe, transformer)
    spec_for(model)
    _check_uncached(pipe, transformer)
    if group is None and splits_tokens(model):
        raise CacheStateError(
            "the tokens are split over several processes (context parallelism), of which each sees its own alone; give "
            "calibrate(..., process_group=torch.distributed.group.WORLD)"
        )
    return model


def _groups(
    passes: _Passes, observer_of: Callable[..., Observer], lengths: list[int], partition: Partition, num_groups: int
) -> tuple[tuple[int, int], ...]:
    """Groups of the blocks, whose lists are of these lengths; by ``"measured"`` from a pass of its own."""
    if partition == "measured":
        observer = observer_of([(k, k + 1) for k in range(sum(lengths))], 1, 0)
        curves = passes.observe(observer, "blocks", "measuring blocks").stability()
        partition = cut_by_curves(curves[~np.isnan(curves).any(axis=1)], num_groups)
    return cut(partition, lengths)


def _files(resume: str | os.PathLike[str] | None, pipe: Any, about: list[Any], crew: Crew) -> CalibrationFiles | None:
    """Files of a calibration that can be stopped, for the leader; ``about``, the model and its weights identify it."""
    if resume is None and crew.world == 1:
        return None
    with crew.together():
        identity = digest_of([model_identity(pipe), *about])
        crew.check_same(identity, OTHER)
        return CalibrationFiles(resume, identity) if resume is not None and crew.leads else None


def _check_uncached(pipe: Any, name: str) -> None:
    """What the other transformers of a pipeline give must be that of full runs too."""
    for other, module in experts_of(pipe).items():
        inner = unwrap_compiled(module)
        if other != name and (attachment_of(inner) is not None or has_foreign_cache(inner)):
            raise CacheStateError(f"a cache is enabled on {other}; disable it first, calibration needs full runs")


@dataclass(frozen=True)
class _Passes:
    """Runs of all samples; what was measured on them is kept in files, by the leader of the crew."""

    pipe: Any
    todo: list[Sample]
    progress: bool
    crew: Crew
    files: CalibrationFiles | None

    def observe(self, observer: Observer, measured: str, title: str) -> StabilityProfile:
        """Runs the samples that no file is of with the observer attached, and collects what it saw."""
        crew, files = self.crew, self.files
        found: dict[int, SampleStatistics] = {}
        with crew.together():
            if files is not None:
                kept = {number: files.sample(measured, number) for number in range(len(self.todo))}
                found = {number: sample for number, sample in kept.items() if sample is not None}
        found = crew.agree(found)
        left = [number for number in range(len(self.todo)) if number not in found]
        shows = self.progress and crew.leads
        with tqdm(total=len(self.todo), initial=len(found), desc=title, unit="sample", disable=not shows) as bar:
            observer.on_step = lambda step, total: bar.set_postfix_str(f"step {step + 1}/{total}", refresh=False)

            def measure(number: int) -> SampleStatistics:
                name, generate = self.todo[number]
                observer.start_sample()
                generate()
                return observer.end_sample(name)

            def done(number: int, statistics: SampleStatistics) -> None:
                if files is not None:
                    files.keep(measured, number, statistics)
                bar.update()

            with self._attached(observer):
                found |= dict(zip(left, crew.map(measure, left, done), strict=True))
        with crew.together():
            return observer.profile([found[number] for number in range(len(found))], [name for name, _ in self.todo])

    @contextmanager
    def _attached(self, observer: Observer) -> Iterator[None]:
        """Context in which the pipeline's forwards are observed, without a progress bar of its own."""
        attachment = attach(self.pipe, observer)
        pipeline_bar = progress_bar_settings(self.pipe)
        if hasattr(self.pipe, "set_progress_bar_config"):
            self.pipe.set_progress_bar_config(**{**pipeline_bar, "disable": True})
        try:
            with torch.no_grad():
                yield
        finally:
            attachment.detach()
            if hasattr(self.pipe, "set_progress_bar_config"):
                self.pipe.set_progress_bar_config(**{"disable": False, **pipeline_bar})
