"""`layercache.measure`: one plan against the full run of the same seeds."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

import numpy as np

import layercache
from layercache._utils.metrics import Summary, summarise
from layercache._utils.text import shown
from layercache.errors import ArgumentError, MethodError
from layercache.models.registry import find_transformer
from layercache.runtime.attachment import attach
from layercache.runtime.enable import Setting, make_router
from layercache.runtime.report import CacheReport
from layercache.schedule.schedule import call_arguments
from layercache.tools.compare.calls import PictureCalls, check_pipeline, quiet, samples_of
from layercache.tools.compare.categories import NONE, in_turn, mean, split_categories
from layercache.tools.compare.fewer import CallArguments
from layercache.tools.compare.own import described_plan, is_plan
from layercache.tools.compare.rows import html_table
from layercache.tools.compare.run import REPEATS
from layercache.tools.compare.scores import Curves, Fidelity, scorer_of
from layercache.tools.compare.trial import Trial, run_trial
from layercache.tools.report import machine

MOST_WARM_UPS = 8


@dataclass(frozen=True)
class Measurement:
    """What a plan gives, against full runs of the same seeds.

    Attributes:
        plan: in a line.
        used: share of the blocks' time that was computed, over all pictures.
        speedup: of whole calls against full runs beside them, the median of the repeats.
        speedups: of every repeat.
        seconds, full_seconds: of a call, the medians of the repeats, cached and full.
        psnr, ssim, lpips: of every picture (a video is one, its PSNR is over all frames); ``lpips`` is empty where its
            weights are not there.
        cache_bytes: of what was stored at most.
        fallback_rows: forwards that computed everything since something they would have read was not there.
        unidentified: forwards that were computed in full since nothing said their step or branch.
        forwards: of the transformer, in all cached runs.
        report: of the cache, of its last run.
        clip, full_clip: CLIP scores of the cached and of the full pictures; empty where there is no CLIP model.
        frame_psnr, frame_ssim: of every frame of every video; empty of pictures.
        temporal_psnr: of the changes from frame to frame, per video; see docs/guides/comparing.md.
        categories: of the pictures; empty where the prompts have none.
    """

    plan: str
    used: float
    speedup: float
    speedups: tuple[float, ...]
    seconds: float
    full_seconds: float
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    lpips: tuple[float, ...]
    cache_bytes: int
    fallback_rows: int
    unidentified: int
    forwards: int
    report: CacheReport = field(repr=False)
    clip: tuple[float, ...] = ()
    full_clip: tuple[float, ...] = ()
    frame_psnr: Curves = ()
    frame_ssim: Curves = ()
    temporal_psnr: tuple[float, ...] = ()
    categories: tuple[str, ...] = ()

    @property
    def by_category(self) -> dict[str, Summary]:
        """Summary of the PSNR of every category of prompts."""
        pairs = list(zip(self.categories, self.psnr, strict=False))
        return {name: summarise(psnr for one, psnr in pairs if one == name) for name in dict.fromkeys(self.categories)}

    @property
    def speedup_range(self) -> tuple[float, float]:
        """The lowest and the highest of the repeats."""
        return min(self.speedups), max(self.speedups)

    @property
    def psnr_summary(self) -> Summary:
        """Mean, median and 10 % quantile of the PSNR."""
        return summarise(self.psnr)

    @property
    def ssim_summary(self) -> Summary:
        """Mean, median and 10 % quantile of the SSIM."""
        return summarise(self.ssim)

    @property
    def computed_in_full(self) -> list[str]:
        """A sentence for every reason for which forwards were computed in full that the plan would not have."""
        reasons = {
            "a residual or velocity that they would have read was not there": self.fallback_rows,
            "nothing said their step or guidance branch": self.unidentified,
        }
        return [
            f"{count} of {self.forwards} forwards were computed in full because {reason}"
            for reason, count in reasons.items()
            if count
        ]

    def to_json(self) -> str:
        """All figures as JSON, with the machine that the times are of."""
        psnr, ssim = asdict(self.psnr_summary), asdict(self.ssim_summary)
        return machine.json_text(
            {**asdict(self), "psnr_summary": psnr, "ssim_summary": ssim, "machine": machine.machine_info()}
        )

    def _lines(self) -> list[tuple[str, str]]:
        psnr, ssim = self.psnr_summary, self.ssim_summary
        low, high = self.speedup_range
        quality = (
            f"PSNR {psnr.mean:.2f} dB (10 % {psnr.quantile10:.2f}, worst {min(self.psnr):.2f}), SSIM {ssim.mean:.4f}"
        )
        more = f", LPIPS {mean(self.lpips):.4f}" if self.lpips else ""
        more += f", CLIP {mean(self.clip):.2f} instead of {mean(self.full_clip):.2f}" if self.clip else ""
        return [
            ("computed", f"{self.used:.3f} of the block time, {self.cache_bytes / 2**20:.1f} MiB stored"),
            (
                "speedup",
                f"{self.speedup:.2f}x ({low:.2f}-{high:.2f} in {len(self.speedups)} repeats): {self.seconds:.3g} s "
                f"instead of {self.full_seconds:.3g} s",
            ),
            ("quality", f"{quality}{more}; {len(self.psnr)} {'picture' if len(self.psnr) == 1 else 'pictures'}"),
            *self._frames(),
            *(
                (shown(name or NONE), f"PSNR {one.mean:.2f} dB (10 % {one.quantile10:.2f}), {one.count} pictures")
                for name, one in self.by_category.items()
            ),
            *(("in full", reason) for reason in self.computed_in_full),
        ]

    def _frames(self) -> list[tuple[str, str]]:
        """Of videos: the worst frame, and the changes from frame to frame."""
        if not self.frame_psnr:
            return []
        psnr, ssim = (
            min(value for curve in curves for value in curve) for curves in (self.frame_psnr, self.frame_ssim)
        )
        temporal = summarise(self.temporal_psnr).mean
        return [("frames", f"worst PSNR {psnr:.2f} dB, SSIM {ssim:.4f}; from frame to frame {temporal:.2f} dB")]

    def __str__(self) -> str:
        return "\n".join([shown(self.plan), *(f"{name:<8}  {text}" for name, text in self._lines())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table([shown(self.plan), ""], self._lines(), "") if self._lines() else html.escape(self.plan)


def measure(
    pipe: Any,
    plan: Any = None,
    prompts: Any = None,
    *,
    budget: float | None = None,
    speedup: float | None = None,
    min_psnr: float | None = None,
    seeds: Sequence[int] | int | None = None,
    batch: int = 1,
    repeats: int = REPEATS,
    lpips: bool | str | os.PathLike[str] | None = None,
    clip: str | os.PathLike[str] | None = None,
    **call: Any,
) -> Measurement:
    """Runs one plan and full runs of the same prompts and seeds in turns.

    Args:
        pipe: a diffusers pipeline, with no cache enabled.
        plan: what `layercache.enable` takes: a schedule, or a method of `layercache.methods`. Without one, what it runs
            by for a target; what has to be learnt for that is learnt first, from generations with other seeds.
        prompts, seeds, batch, lpips, clip: see `layercache.tools.compare.api.compare`.
        budget, speedup, min_psnr: targets in the place of a plan, see `layercache.enable`.
        repeats: pairs of full and cached runs that the speedup is the median of.
        call: further arguments of every call, such as ``num_inference_steps`` or ``guidance_scale``.

    Raises:
        ArgumentError: prompts, seeds or an argument of the call is not usable.
        BudgetError: a plan and a target, or several targets.
        CacheStateError: a cache is enabled on the pipeline.
        MethodError: ``plan`` is no plan.
        MissingExtraError: scikit-image is not installed.
        ScheduleMismatchError: the schedule was made for another model.
        UnsupportedModelError: the pipeline's transformer is of an unknown class.
    """
    check_pipeline(pipe, call)
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ArgumentError(f"repeats is a number of at least 1, got {repeats!r}", argument="repeats")
    if isinstance(plan, list):
        raise MethodError("expected a plan, got a list; the prompts come behind it: measure(pipe, plan, prompts)")
    if plan is not None and (isinstance(plan, CallArguments) or not is_plan(plan)):
        make_router(plan, Setting(pipe, find_transformer(pipe)))  # raises, and says what to do
    if prompts is None:
        raise ArgumentError("give prompts=[...], a picture is made for each", argument="prompts")
    targets = {"budget": budget, "speedup": speedup, "min_psnr": min_psnr}
    given: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
    # enabled once, so that a plan that does not fit is refused before anything runs
    with layercache.enabled(pipe, plan, **given) as cache:
        pass
    own, categories = split_categories(prompts)
    pictures = PictureCalls(pipe, *samples_of(own, seeds, batch), call)
    scorer, given_prompts = scorer_of(lpips, clip), [prompt for one in pictures.prompts for prompt in one]
    with quiet(pipe):
        if plan is None:
            _learn(pictures, cache)
        full, _ = pictures.run_all()
        again = _again(pipe, cache) if plan is None else lambda: layercache.enabled(pipe, plan)
        trial = run_trial(pictures, again, repeats, changed=call_arguments(plan))
        assert trial is not None  # there is no other process
    text = described_plan(plan) if plan is not None else ", ".join(f"{name} {value:g}" for name, value in given.items())
    close = scorer.fidelity(full, np.concatenate(trial.looks), given_prompts)
    more: dict[str, Any] = {"categories": tuple(in_turn(categories, len(full)))}
    more["full_clip"] = scorer.clip_scores(full, given_prompts)
    return _measurement(text or "what enable(pipe) takes", trial, close, more)


def _measurement(text: str, trial: Trial, close: Fidelity, more: Mapping[str, Any]) -> Measurement:
    reports = trial.reports
    return Measurement(
        plan=text,
        used=trial.used,
        speedup=trial.speedup,
        speedups=trial.speedups,
        seconds=median(cached for _, cached in trial.pairs),
        full_seconds=median(full for full, _ in trial.pairs),
        cache_bytes=trial.cache_bytes or 0,
        fallback_rows=sum(report.fallback_rows for report in reports),
        unidentified=sum(report.unidentified for report in reports),
        forwards=sum(report.forwards for report in reports),
        report=reports[-1],
        **{one.name: getattr(close, one.name) for one in fields(close)},
        **more,
    )


def _again(pipe: Any, router: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Enables the same cache once more, with what it has learnt."""

    @contextmanager
    def enabled() -> Iterator[Any]:
        attachment = attach(pipe, router)
        try:
            yield router
        finally:
            attachment.detach()

    return enabled


def _learn(pictures: PictureCalls, router: Any) -> None:
    """Generations with other seeds, until the cache reuses something."""
    first, prompts = max(pictures.seeds) + 1, [prompt for batch in pictures.prompts for prompt in batch]
    with _again(pictures.pipeline, router)():
        for number in range(MOST_WARM_UPS):
            prompt = prompts[number % len(prompts)]
            PictureCalls(pictures.pipeline, [prompt], [first + number], pictures.call).run(0)
            if router.report().cached_cells:
                return
