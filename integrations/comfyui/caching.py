"""Sampling by a schedule: some steps or groups of layers are computed, the others forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from layercache.errors import LayerCacheError, MethodError, ScheduleError, ScheduleMismatchError
from layercache.planning.universal import Universal
from layercache.runtime.velocity import VelocityTrack
from layercache.schedule import Fingerprint, Schedule

from . import engine
from .engine import Sampling, warn_once
from .families import check_family, family_of, lengths_of, parts_of
from .groups import Groups
from .sampling import Attached, Steps, as_levels, check_sampler, is_close, is_like, linear_steps

REFUSE, RUN_UNCACHED = "stop with an error", "run without cache"
FOREIGN = "easycache"
"""Of ComfyUI's own EasyCache and LazyCache, among the ``transformer_options``."""


class CachedRun:
    """One sampling by a schedule.

    The velocity is ``v = (x - x0) / sigma``, x0 the denoised latents behind guidance, so that there is one per step
    whatever branches and batches it was made of; a forecast one gives ``x0 = x - sigma v``.

    Args:
        schedule: what is followed.
        first: the step of the schedule that the sampling begins with.
        sigmas: N + 1 noise levels of the sampling.
        groups: of a schedule that reuses groups of layers.
        patch: ComfyUI's ``set_model_options_patch_replace``, for these.
    """

    def __init__(
        self,
        schedule: Schedule,
        first: int,
        sigmas: tuple[float, ...],
        groups: Groups | None = None,
        patch: Callable[..., dict[str, Any]] | None = None,
    ):
        self.schedule, self.first, self.steps = schedule, first, Steps(sigmas)
        self.track = VelocityTrack.of(schedule, 1)
        self.groups, self._patch = groups, patch
        self.forecast = self.computed = 0
        self.is_whole = False

    def options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.groups is None or self._patch is None:
            return options
        return self.groups.install(dict(options), self._patch)

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        step = self.steps.next(sigma)
        if self.groups is not None:
            self.groups.step = None if step is None else self.first + step
        if step is None or not self.track.layouts:
            self.computed += 1
            return compute()
        self.track.begin(self.first + step, x.shape)
        layout = self.track.layouts[self.first + step]
        level = as_levels(sigma, x)
        if layout.changes and layout.fresh is None and self.track.is_complete:
            self.forecast += 1
            return x - level * self.track.replace_velocity(x, x)  # of x, shape and number format alone are used
        self.computed += 1
        denoised = compute()
        if not is_like(denoised, x):
            self.steps.is_lost = True
            return denoised
        if layout.capture is None and not layout.changes:
            return denoised
        own = (x - denoised) / level
        velocity = self.track.replace_velocity(own, x)
        return denoised if velocity is own else x - level * velocity

    def drop(self) -> int:
        """Frees what is stored, and gives how many bytes it was at the most."""
        stored = self.track.nbytes + (self.groups.largest if self.groups else 0)
        self.track.reset()
        self.track.slots[:] = [None] * len(self.track.slots)
        if self.groups is not None:
            self.groups.drop()
        return stored

    @property
    def used(self) -> float:
        """Share of the blocks of all steps that were computed; 1 before a run."""
        groups, steps = self.groups, self.computed + self.forecast
        blocks = groups.computed + groups.reused if groups else 0
        share = groups.computed / blocks if groups and blocks else 1.0
        return share * self.computed / steps if steps else 1.0

    def report(self, stored: int) -> str:
        """What it did.

        Args:
            stored: bytes.
        """
        total, groups = self.computed + self.forecast, self.groups
        lines = [f"{total} steps: {self.computed} computed, {self.forecast} forecast; {self.used:.0%} of the blocks"]
        if groups is not None:
            blocks = groups.computed + groups.reused
            lines.append(f"{blocks} blocks of {groups.forwards} forwards: {groups.reused} reused")
            if groups.fallbacks:
                lines.append(
                    f"{groups.fallbacks} times in full, because residuals that the schedule reads were not computed in "
                    "this run: it began in the middle, a shape changed, or conditionings came twice in a step (windows)"
                )
            if groups.foreign:
                lines.append(f"{groups.foreign} forwards in full, because another node replaces blocks in them")
            if groups.is_lost:
                lines.append("blocks were not passed as they are known, or not said whose they are; in full from there")
        lines.append(f"stored: {stored / 2**20:.1f} MiB")
        if self.track.fallbacks:
            lines.append(
                f"{self.track.fallbacks} steps in full, or as the model gave them, because velocities that the "
                "schedule reads were not computed in this run: it began in the middle, or its latents changed shape"
            )
        if self.steps.is_lost:
            lines.append("the sampler asked the model at other noise levels than its steps have; from there on in full")
        if not self.is_whole:
            lines.append("the run was interrupted")
        return "\n".join(lines)


class Caching(Attached):
    """Follows a schedule in every sampling of a model.

    Args:
        schedule: `check_outputs` holds; ``None`` makes one for each run, from other models' full runs.
        budget: largest share of the steps that is computed, where there is no schedule.
        on_mismatch: what is done where it does not fit a run, `REFUSE` or `RUN_UNCACHED`.
    """

    def __init__(self, schedule: Schedule | None, budget: float = 0.5, on_mismatch: str = REFUSE):
        super().__init__()
        if schedule is not None:
            check_outputs(schedule)
        self.schedule, self.budget, self.on_mismatch = schedule, budget, on_mismatch
        self._made: dict[Any, Schedule] = {}
        self.reports: list[str] = []

    def begin(self, sampling: Sampling) -> CachedRun | None:
        try:
            if FOREIGN in sampling.options.get("transformer_options", {}):
                raise MethodError("EasyCache or LazyCache is on the same model; remove one of the two")
            check_sampler(sampling)
            schedule = self._made_for(sampling) if self.schedule is None else self.schedule
            return run_of(schedule, sampling)
        except SeamError as error:
            self.reports = [f"in full: {error}"]
            return None
        except LayerCacheError as error:
            if self.on_mismatch == REFUSE:
                raise
            warn_once(f"{error}; this sampling runs without cache")
            self.reports = [f"in full: {error}"]
            return None

    @property
    def is_of_whole_steps(self) -> bool:
        """Whether no blocks are replaced in any of its samplings."""
        return self.schedule is None or is_of_whole_steps(self.schedule)

    def _made_for(self, sampling: Sampling) -> Schedule:
        key = (sampling.fingerprint.config_hash, sampling.sigmas, sampling.sampler_name)
        if key not in self._made:
            sampler = linear_steps(sampling)
            if sampler is None:
                raise MethodError(
                    f"without a schedule file one is made for samplers that add no noise, and "
                    f"{sampling.sampler_name.removeprefix('sample_')} does, or is not linear; choose euler, or a file"
                )
            self._made[key] = Universal(budget=self.budget).schedule_for(sampling.fingerprint, sampler)
        return self._made[key]

    def end(self, run: CachedRun) -> None:
        if run.is_whole and not run.steps.calls:
            engine.changed_seam("no wrappers of a step")
        elif run.is_whole and not run.steps.are_complete:
            warn_once("the sampler did not ask the model once per step; the report says more")
        elif run.is_whole and run.groups is not None and not run.groups.forwards:
            engine.changed_seam("no wrappers of a forward")
        stored = run.drop()
        self.reports = [*self.reports[-7:], run.report(stored)]

    def __str__(self) -> str:
        what = f"made from other models' runs, at most {self.budget:.0%} of the steps"
        what = str(self.schedule) if self.schedule is not None else what
        return "\n\n".join([what, *(self.reports[-1:] or ["no sampling has run yet"])])


class SeamError(Exception):
    """This ComfyUI is not as the nodes know it; it was warned of."""


def run_of(schedule: Schedule, sampling: Sampling) -> CachedRun:
    """The state of a sampling by a schedule.

    Raises:
        ScheduleMismatchError: the schedule is not of this model, these noise levels, or reuses groups of layers of a
            model whose blocks cannot be replaced.
        SeamError: ComfyUI has changed.
    """
    network, whole = sampling.model.diffusion_model, is_of_whole_steps(schedule)
    family = family_of(network)
    lengths = lengths_of(network, family) if family else None
    if family is not None and lengths is None and (schedule.fingerprint.architecture or not whole):
        engine.changed_seam(f"no {' and '.join(name for name, _ in family.lists)} in {type(network).__name__}")
        raise SeamError("this ComfyUI names the blocks of the model otherwise")
    check_model(schedule, sampling.fingerprint)
    if family is not None and lengths is not None and schedule.fingerprint.architecture:
        check_family(schedule, network, family, lengths)
    first = first_step(schedule, sampling.sigmas)
    if whole:
        return CachedRun(schedule, first, sampling.sigmas)
    if family is None or lengths is None:
        raise ScheduleMismatchError(
            f"this schedule reuses groups of layers, and ComfyUI lets no node replace the blocks of a "
            f"{type(network).__name__}; choose a schedule of whole steps, which layercache.search and the node "
            "LayerCache Make Schedule give"
        )
    patch = engine.block_patcher()
    if patch is None:
        raise SeamError("this ComfyUI replaces blocks otherwise")
    return CachedRun(
        schedule, first, sampling.sigmas, Groups(schedule, parts_of(schedule.groups, family, lengths)), patch
    )


def is_of_whole_steps(schedule: Schedule) -> bool:
    """Whether a schedule reuses no groups of layers."""
    every = (schedule.cells, *schedule.branch_cells.values())
    return not any(cell for cells in every for row in cells for cell in row)


def check_outputs(schedule: Schedule) -> None:
    """Raises `ScheduleError` for schedules of models with several outputs."""
    if any(any(velocities) for velocities in schedule.further_velocities):
        raise ScheduleError("this schedule is of a model with several outputs, which these nodes do not take apart")


def check_model(schedule: Schedule, here: Fingerprint) -> None:
    """Raises `ScheduleMismatchError` where a schedule is of another model, as far as ComfyUI tells.

    Class and configuration where it was made in ComfyUI; where it was made with diffusers, whose classes and
    configurations are others, the number of blocks (and what `check_family` knows).
    """
    prints = schedule.fingerprint
    if prints.model_class == here.model_class and not prints.architecture:
        is_same = (prints.config_hash, prints.num_blocks) == (here.config_hash, here.num_blocks)
    else:
        is_same = bool(prints.architecture) and prints.num_blocks == here.num_blocks
    if not is_same:
        raise ScheduleMismatchError(
            f"this schedule was made for {prints.model_class} with {prints.num_blocks} blocks, configuration "
            f"{prints.config_hash}; the model is {here.model_class} with {here.num_blocks} blocks, configuration "
            f"{here.config_hash}: choose its schedule, or record runs of this model and make one"
        )


def first_step(schedule: Schedule, sigmas: tuple[float, ...]) -> int:
    """The step of a schedule that a sampling begins with, by its noise levels: 0, or later (denoise, start at step).

    The last noise level is not looked at: it is 0 where a part of the steps has to return a picture without noise.

    Raises:
        ScheduleMismatchError: there is none from which on the noise levels are those of the sampling.
    """
    prints, steps = schedule.fingerprint, len(sigmas) - 1
    if steps < 1 or min(sigmas[:-1]) <= 0:
        raise ScheduleMismatchError(f"noise levels of a sampling are above 0 but for the last, and these are {sigmas}")
    ranges = prints.sigma_range or tuple((sigma, sigma) for sigma in prints.sigmas)
    for first in range(prints.num_steps - steps + 1):
        if all(
            low <= sigma <= high or is_close(sigma, low) or is_close(sigma, high)
            for sigma, (low, high) in zip(sigmas[:-1], ranges[first:], strict=False)
        ):
            return first
    raise ScheduleMismatchError(
        f"this schedule is of {prints.num_steps} steps from noise level {prints.sigmas[0]:.4g} to "
        f"{prints.sigmas[-2]:.4g}, and the sampler runs {steps} from {sigmas[0]:.4g} to {sigmas[-2]:.4g}, which are "
        "none of its own: set steps, scheduler, shift and denoise as they were, or record runs with these and make "
        "another"
    )
