"""Measuring how well each group's residual is forecast, and what the groups cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from layercache._utils.compat import has_foreign_cache, progress_bar_settings, splits_tokens, unwrap_compiled
from layercache.errors import CacheStateError, CalibrationError
from layercache.models.registry import experts_of, find_transformer, spec_for
from layercache.planning.observer import Observer
from layercache.planning.profile import StabilityProfile
from layercache.planning.samples import Sample, measured_settings, samples_of
from layercache.runtime.attachment import attach, attachment_of
from layercache.schedule.partition import Partition, cut, cut_by_curves

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
        call: further arguments of the pipeline's call, such as ``guidance_scale`` or ``height``.

    Raises:
        CalibrationError: no samples, an incomplete run, or a statistic that is not finite (names the cell).
        UnsupportedModelError: the transformer is of an unknown class, or there is none of this name.
        CacheStateError: a cache is enabled on the pipeline, or tokens are split over processes without a process group.
    """
    if max_distance < 1 or max_span < 0:
        raise CalibrationError(f"max_distance must be at least 1 and max_span at least 0: {max_distance}, {max_span}")
    if sensitivity not in (None, *SENSITIVITIES):
        raise CalibrationError(
            f"unknown sensitivity {sensitivity!r}; choose {' or '.join(SENSITIVITIES)}", argument="sensitivity"
        )
    model = find_transformer(pipe, transformer)
    spec = spec_for(model)
    _check_uncached(pipe, transformer)
    if process_group is None and splits_tokens(model):
        raise CacheStateError(
            "the tokens are split over several processes (context parallelism), of which each sees its own alone; give "
            "calibrate(..., process_group=torch.distributed.group.WORLD)"
        )
    todo = samples_of(pipe, prompts, run, samples, sigmas, seeds, num_inference_steps, call)
    lengths = [len(blocks) for blocks in spec.block_modules(model)]
    scheduler = getattr(pipe, "scheduler", None)
    if partition == "measured":
        blocks = [(k, k + 1) for k in range(sum(lengths))]
        observer = Observer(model, spec, blocks, sigmas, scheduler, 1, 0, eta, group=process_group)
        curves = _observe(pipe, observer, todo, progress, "measuring blocks").stability()
        partition = cut_by_curves(curves[~np.isnan(curves).any(axis=1)], num_groups)
    groups = cut(partition, lengths)
    observer = Observer(model, spec, groups, sigmas, scheduler, max_distance, max_span, eta, sensitivity, process_group)
    profile = _observe(pipe, observer, todo, progress, "calibrating")
    settings = {**profile.fingerprint.settings, **measured_settings(pipe, call)}
    return replace(profile, fingerprint=replace(profile.fingerprint, settings=settings))


def _check_uncached(pipe: Any, name: str) -> None:
    """What the other transformers of a pipeline give must be that of full runs too."""
    for other, module in experts_of(pipe).items():
        inner = unwrap_compiled(module)
        if other != name and (attachment_of(inner) is not None or has_foreign_cache(inner)):
            raise CacheStateError(f"a cache is enabled on {other}; disable it first, calibration needs full runs")


def _observe(pipe: Any, observer: Observer, todo: list[Sample], progress: bool, title: str) -> StabilityProfile:
    """Runs the samples with the observer attached and collects what it saw."""
    attachment = attach(pipe, observer)
    pipeline_bar = progress_bar_settings(pipe)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(**{**pipeline_bar, "disable": True})
    results = []
    try:
        with tqdm(total=len(todo), desc=title, unit="sample", disable=not progress) as bar, torch.no_grad():
            observer.on_step = lambda step, total: bar.set_postfix_str(f"step {step + 1}/{total}", refresh=False)
            for name, generate in todo:
                observer.start_sample()
                generate()
                results.append(observer.end_sample(name))
                bar.update()
    finally:
        attachment.detach()
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(**{"disable": False, **pipeline_bar})
    return observer.profile(results, [name for name, _ in todo])
