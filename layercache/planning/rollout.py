"""Running schedules on calibration samples: what they give, and the coefficients that make them better."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from layercache.errors import CalibrationError, ScheduleError, UnsupportedModelError
from layercache.models.registry import config_hash, expert_settings, find_transformer, fingerprint_of, spec_for
from layercache.parallel.crew import Crew
from layercache.planning.fit import Forecast
from layercache.planning.full_run import FullRun, FullSample, RunFacts
from layercache.planning.moved import check_moves, given_call, moved_trace
from layercache.planning.rollout_run import Products, RolloutRun
from layercache.planning.sampler import LinearSampler
from layercache.planning.samples import arguments_of, call_of, measured_settings, pictures_in, seeds_of
from layercache.planning.search_files import identity_of
from layercache.planning.stepper import PausableRun, clones, paused_at_steps, run_in_step
from layercache.planning.trace import Trace, together
from layercache.runtime.attachment import attach
from layercache.runtime.groups import ScheduleRouter
from layercache.runtime.router import Router
from layercache.runtime.velocity import VelocityTrack
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.memory_plan import stored_bytes
from layercache.schedule.schedule import Cell, Schedule, Velocity

if TYPE_CHECKING:
    from layercache.planning.search_files import SearchFiles
    from layercache.planning.simulated import Simulated

PSNR_LIMIT = 100.0
OTHER = "another model, or other samples or settings,"
ELEMENTS = 1 << 22
"""That are compared at a time."""


@dataclass(frozen=True)
class Rollout:
    """A schedule as it went on the calibration samples.

    Attributes:
        schedule: with the velocities that were fitted on the way.
        psnr: per picture, in dB, against the full run; at most 100.
        traces: per sample; of a model with several outputs (video and sound) all of them together (`together`).
        products: that each fitted step was solved from, `layercache.planning.fit.products_of` all its pictures; of the
            k-th further output those of step i are at ``k * N + i``.
    """

    schedule: Schedule
    psnr: tuple[float, ...]
    traces: tuple[Trace, ...] = field(repr=False, default=())
    products: Products = field(repr=False, default_factory=dict)

    @property
    def quality(self) -> float:
        return float(np.mean(self.psnr))


class _AlwaysThere(VelocityTrack):
    """Rollouts keep the velocities themselves, so none is ever missing."""

    def begin(self, step: int, shape: Any = None, conditions: tuple[str, ...] = ()) -> None:
        self.step, self.is_complete = step, True


@dataclass(frozen=True)
class Reference:
    """Another pipeline whose full runs are the targets, with a clone per own sample."""

    pipeline: Any
    transformer: Any
    clones: Mapping[int, Any]

    @classmethod
    def of(cls, pipe: Any, like: Any, samples: Sequence[int]) -> Reference:
        """For samples of a transformer ``like`` its own.

        Raises:
            CalibrationError: it has another architecture, or is no pipeline.
        """
        model = find_transformer(pipe)
        if model is pipe or type(model) is not type(like) or config_hash(model) != config_hash(like):
            raise CalibrationError(
                "the reference is a pipeline with a transformer of the same class and architecture, whose weights "
                "alone are others",
                argument="reference",
            )
        return cls(pipe, model, dict(zip(samples, clones(pipe, len(samples)), strict=True)))


class RolloutRouter(ScheduleRouter):
    """Routes one sample; its velocities are paused at, not passed on."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.takes_experts = True

    def new_track(self, before: VelocityTrack | None = None) -> VelocityTrack:
        return _AlwaysThere.of(self.schedule, 1, before)

    @property
    def replaces_velocity(self) -> bool:
        return False

    def has_request_of(self, scheduler: Any) -> bool:
        return True  # all samples' samplers are heard until the end, as they take turns


class Rollouts:
    """Calibration samples of a pipeline, their full runs, and a way to run any schedule on them.

    All samples go through a step together (`layercache.planning.stepper`), so that a coefficient can be fitted to all
    of them before the next step is taken. Each sample is one call of the pipeline and may be a batch.

    The processes of a crew share out the samples: each runs and keeps its own, and what is fitted is solved by all of
    them from the inner products of all samples, in sample order, so that all have the same schedules.

    Args:
        pipe: a diffusers pipeline with a scheduler.
        prompts: one call per entry; an entry may be a list (one call with that batch), or a mapping of arguments of
            the call, such as ``{"prompt": ..., "image": ...}`` or ``{"prompt_embeds": ...}``, for what a picture has
            of its own: an image to begin with, a control image, a negative prompt, a size.
        seeds: one per picture, or one per entry; by default 0, 1, ... over all pictures.
        on_cost: called with every step that is computed, with the full generations that it costs.
        on_memory: called when the first full run is done, with the bytes of host memory that all full runs need.
        files: where full runs are kept, so that a search that was stopped can go on.
        full: the samples' full runs, where they are known; one per entry of ``prompts``, which then are mappings of
            arguments, each with the generator or generators that its call began with.
        crew: processes that share out the samples.
        reference: a pipeline whose full runs are the samples' targets, such as the same one with unquantised weights;
            by default the runs of ``pipe`` itself.
        call: further arguments of every call, such as ``num_inference_steps`` or ``guidance_scale``.

    Attributes:
        own: numbers of this process's samples, in order.
        full: a trace per own sample; of a model with several outputs all of them together.
        outputs: per own sample, the traces of each.
        pictures: of the full runs, per own sample.
        runs: generations of every sample so far.
        seconds: of a step of a full run: in the blocks, and in the rest of the model.
        samplers: per sample, what its steps do; ``None`` where they are not linear in the velocities.
        first: step that the runs begin with; not 0 of runs that begin in the middle (img2img).
        sigmas: N + 1 noise levels of the N steps that are taken, mean over the samples.
        sigmas_given: the ``sigmas=`` of the calls between moved levels (`moved`); else empty.

    Raises:
        CalibrationError: no prompts, seeds that do not match, or more processes than samples.
        CrewError: a process of the crew is gone.
        UnsupportedModelError: the pipeline is of no known kind.
    """

    SOURCE: ClassVar[str] = "make one: layercache.planning.rollout.Rollouts(pipe, prompts)"

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Any],
        seeds: Sequence[int] | None = None,
        on_cost: Callable[[float], object] | None = None,
        files: SearchFiles | None = None,
        full: Sequence[FullSample] | None = None,
        on_memory: Callable[[float], object] | None = None,
        crew: Crew | None = None,
        reference: Any = None,
        **call: Any,
    ):
        self.crew = crew or Crew()
        self.transformer = find_transformer(pipe)
        self.spec = spec_for(self.transformer)
        if self.transformer is pipe or not hasattr(pipe, "scheduler"):
            raise UnsupportedModelError("rollouts need the pipeline, with its scheduler, not a bare transformer")
        if not prompts:
            raise CalibrationError(
                "rollouts need at least one prompt (8 to 24 pictures give a good fit)", argument="prompts"
            )
        self.pipeline, self.on_cost, self.files = pipe, on_cost, files
        self.prompts = list(prompts)
        self.seeds = seeds_of(self.prompts, seeds, call) if full is None else [[0] * len(one.pictures) for one in full]
        self.call = dict(call)
        if "output_type" in inspect.signature(type(pipe).__call__).parameters:
            self.call.setdefault("output_type", "np")
        self.crew.check_samples(len(self.prompts))
        self.own = self.crew.share(range(len(self.prompts)))
        self._clones = dict(zip(self.own, clones(pipe, len(self.own)), strict=True))
        self.reference = None if reference is None else Reference.of(reference, self.transformer, self.own)
        if self.crew.world > 1:
            self.crew.check_same(identity_of(self), OTHER)
        if files is not None:
            files.check(self)
        self.branches: tuple[str, ...] = ()
        self.runs = 0
        self._own_run: FullSample | None = None  # of the first sample, beside a reference
        self.full: tuple[Trace, ...] = ()
        self.outputs: list[tuple[Trace, ...]] = []
        self.pictures: list[np.ndarray] = []
        self._facts: list[RunFacts] = []
        self.seconds = (0.0, 0.0)
        self.first = 0
        self.sigmas: tuple[float, ...] = ()
        self._levels: tuple[float, ...] = ()  # of all steps, mean over the samples
        self._level_range: tuple[tuple[float, float], ...] = ()
        self.sigmas_given: tuple[float, ...] = ()
        self.samplers: tuple[LinearSampler, ...] | None = None
        if full is None:
            own: list[FullSample] = []

            def run_in_full(sample: int) -> RunFacts:
                own.append(self._full_run(sample, on_memory))
                return own[-1].facts

            facts = self.crew.map(run_in_full, range(len(prompts)))
        else:
            own = self.crew.share(full)
            facts = [one.facts for one in full]
        self._take(own, facts)

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def num_pictures(self) -> int:
        return sum(map(len, self.seeds))

    def note_cost(self) -> None:
        """A step of all pictures was computed."""
        self._note(self.num_pictures / self.num_steps)

    def _note(self, generations: float) -> None:
        if self.on_cost is not None:
            self.on_cost(generations)

    @property
    def fingerprint(self) -> Fingerprint:
        steps = range(self.first, self.first + self.num_steps)
        found = fingerprint_of(self.transformer, self._levels, self.branches, steps)
        calls = measured_settings(self.pipeline, *({**self.call, **arguments_of(prompt)} for prompt in self.prompts))
        settings = {**found.settings, **calls, **expert_settings(self.pipeline)}
        return replace(found, settings=settings, sigma_range=self._level_range, sigmas_given=self.sigmas_given)

    def cache_bytes(self, schedule: Schedule) -> int:
        """What a schedule stores while the largest of the samples is generated, all branches together."""
        return max(
            stored_bytes(schedule, one.branches, one.latent_bytes[0], self.spec.text_leaves, one.latent_bytes[1:])
            for one in self._facts
        )

    def moved(self, sigmas: Sequence[float], given: Sequence[float]) -> Rollouts:
        """The same samples between other noise levels, on the way that their full runs took by Euler steps.

        Their full runs there pass through the same latents, see `layercache.planning.moved.polygon`, and give the same
        pictures. Nothing is kept in the files of a search.

        Args:
            sigmas: noise levels and the last one, from the first to the last of these; any number.
            given: the ``sigmas=`` of the pipeline's call that give them.

        Raises:
            MethodError: the full runs took no Euler steps, have several noise levels, or began in the middle.
        """
        check_moves(self.samplers, self.sigmas, is_whole=not (self.first or self._level_range))
        found = copy.copy(self)
        found.call = {**self.call, **given_call(self.pipeline, given)}
        found.files, found.sigmas_given = None, tuple(given)
        sampler = LinearSampler.euler(sigmas)
        facts = [
            replace(one, num_steps=sampler.num_steps, sigmas=tuple(sigmas), sampler=sampler) for one in self._facts
        ]
        own = [
            FullSample(first, pictures, {}, self.seconds, tuple(sigmas), sampler, tuple(further))
            for (first, *further), pictures in zip(
                ([moved_trace(trace, self.sigmas, sigmas) for trace in traces] for traces in self.outputs),
                self.pictures,
                strict=True,
            )
        ]
        found._take(own, facts)
        return found

    def run(
        self,
        schedule: Schedule,
        forecast: Forecast | None = None,
        more: Products | None = None,
        beside: Simulated | None = None,
    ) -> Rollout:
        """Runs a schedule on all samples.

        Args:
            schedule: its velocities are taken as they are, unless they are to be fitted. One with noise levels of its
                own runs between these (`moved`).
            forecast: fit the velocities while the samples run; those of the schedule are ignored.
            more: of other pictures on which the same steps were fitted (`Rollout.products`), which count as these do.
            beside: other pictures, simulated as these run, which count as these do; of a model with one output.

        Raises:
            CalibrationError: something is not finite, or ``"steer"`` was asked of a sampler whose steps are not linear.
        """
        prints = schedule.fingerprint
        if prints.sigmas_given and prints.sigmas_given != self.sigmas_given:
            return self.moved(prints.sigmas, prints.sigmas_given).run(schedule, forecast, more, beside)
        if forecast is not None and forecast.target == "steer" and self.samplers is None:
            raise CalibrationError(
                "velocities can only be steered where the sampler's steps are linear in them, without noise of their "
                "own; fit to 'teacher' instead"
            )
        run = RolloutRun(self, schedule, forecast, more or {}, beside)
        clones = self._clones.values()
        routers = [RolloutRouter(self.transformer, self.spec, schedule, clone.scheduler) for clone in clones]
        with self.crew.together():
            pictures = self._perform(routers, run.answer, self.own)
            psnr = [psnr_of(a, b) for a, b in zip(self.pictures, pictures, strict=True)]
        self.runs += 1
        return self._rollout_of(run, [value for of_sample in self.crew.gather(psnr) for value in of_sample])

    def _rollout_of(self, run: RolloutRun, psnr: Sequence[float]) -> Rollout:
        first, *further = (
            (*[None] * self.first, *(velocity and velocity.shifted(self.first) for velocity in of_output))
            for of_output in run.velocities
        )
        if not any(any(of_output) for of_output in (first, *further)):
            first, further = (), []
        schedule = replace(run.schedule, velocities=first, further_velocities=tuple(further))
        return Rollout(schedule, tuple(psnr), tuple(map(together, zip(*run.traces, strict=True))), run.products)

    def _take(self, own: Sequence[FullSample], facts: Sequence[RunFacts]) -> None:
        """Keeps the full runs of this process's samples, and what is known of all."""
        self.runs += 1
        first = facts[0]
        levels = np.array([one.sigmas for one in facts if len(one.sigmas) == len(first.sigmas)])
        low, high = levels.min(axis=0), levels.max(axis=0)
        # other sizes may have other noise levels
        self._levels = first.sigmas if (low == high).all() else tuple(levels.mean(axis=0).tolist())
        self._level_range = () if (low == high).all() else tuple(zip(low.tolist(), high.tolist(), strict=True))
        self.first = len(self._levels) - 1 - first.num_steps
        self.sigmas = self._levels[self.first :]
        if len(levels) < len(facts) or any(one.num_steps != first.num_steps for one in facts):
            raise CalibrationError(
                f"the samples take {', '.join(str(one.num_steps) for one in facts)} steps; a schedule is for one number"
            )
        self.outputs = [one.traces for one in own]
        self.full, self.pictures = tuple(map(together, self.outputs)), [one.pictures for one in own]
        self.branches = tuple(dict.fromkeys(name for one in facts for name in one.branches))
        self._facts = list(facts)
        self.seconds = (median(one.seconds[0] for one in facts), median(one.seconds[1] for one in facts))
        samplers = tuple(one.sampler for one in facts if one.sampler is not None)
        self.samplers = samplers if len(samplers) == len(facts) else None

    def _full_run(self, sample: int, on_memory: Callable[[float], object] | None) -> FullSample:
        """The full run of a sample: from the files of a search that was stopped, or made now."""
        found = self.files.sample(sample) if self.files is not None else None
        if found is not None:
            self._note(len(self.seeds[sample]))
        else:
            found = self._new_full_run(sample)
        if sample == 0 and on_memory is not None:
            on_memory(found.nbytes * self.num_pictures / len(self.seeds[0]))
        return found

    def _new_full_run(self, sample: int) -> FullSample:
        if self.reference is None:
            found = self._watched(sample)
        else:
            if self._own_run is None:
                self._own_run = self._watched(sample)
            # the bytes and seconds are those of the model that will run
            facts = {name: getattr(self._own_run, name) for name in ("branches", "seconds")}
            found = replace(self._watched(sample, self.reference), **facts)
        if self.files is not None:
            self.files.keep_sample(sample, found)
        return found

    def _watched(self, sample: int, reference: Reference | None = None) -> FullSample:
        """A full run of the pipeline, or of its reference."""
        model = self.transformer if reference is None else reference.transformer
        scheduler = (self._clones if reference is None else reference.clones)[sample].scheduler
        pictures, watcher = len(self.seeds[sample]), FullRun(model, self.spec, scheduler)

        def answer(step: int, items: list[tuple[Any, ...]]) -> list[Any]:
            ((velocity, latents, *output),) = items
            watcher.note_step(velocity, latents, *output)
            if watcher.sigmas and not output:
                self._note(pictures / (len(watcher.sigmas) - 1 - watcher.first))
            return [velocity]

        (found_pictures,) = self._perform([watcher], answer, [sample], reference)
        return watcher.sample(found_pictures)

    def _perform(
        self,
        routers: Sequence[Router],
        answer: Callable[[int, list[Any]], list[Any]],
        samples: Sequence[int],
        reference: Reference | None = None,
    ) -> list[np.ndarray]:
        """Generations of samples side by side, each by its own router; ``answer`` says which velocities are taken."""
        outputs = len(self.spec.leaves)
        calls = [call_of(self.prompts[k], self.seeds[k], self.call) for k in samples]
        pipeline, by_sample = (
            (self.pipeline, self._clones) if reference is None else (reference.pipeline, reference.clones)
        )
        attachment = attach(pipeline, routers[0])
        runs = [_pausable(by_sample[k], call, outputs) for k, call in zip(samples, calls, strict=True)]
        try:
            results = run_in_step(runs, lambda k: attachment.switch(routers[k]), answer)
        finally:
            attachment.detach()
        return [pictures_in(result, len(self.seeds[k])) for result, k in zip(results, samples, strict=True)]


def skipping(fingerprint: Fingerprint, computed: Sequence[int], seconds: float = 1.0) -> Schedule:
    """A schedule that computes these steps whole and skips the others, holding the newest velocity.

    Args:
        fingerprint: of the model and run.
        computed: steps, ascending, counted from the first one that is run, which is 0 and among them.
        seconds: of computing all blocks once, as calibration measured them; 1 where nobody did.

    Raises:
        ScheduleError: step 0 is not computed.
    """
    if not computed or computed[0] != 0:
        raise ScheduleError("step 0 must be computed")
    run: tuple[Cell, ...] = (None,)
    skip: tuple[Cell, ...] = ({},)
    chosen = {fingerprint.steps[place] for place in computed}
    cells = [run if step in chosen else skip for step in range(fingerprint.num_steps)]
    velocities = tuple(_placeholders(cells, fingerprint.steps))
    return Schedule(fingerprint, ((0, fingerprint.num_blocks),), tuple(cells), (seconds,), velocities=velocities)


def with_terms_of(schedule: Schedule, forecast: Forecast) -> Schedule:
    """The schedule with the terms that a fit would give it, newest first, and coefficients that hold the newest."""
    velocities: list[Velocity | None] = []
    raw: list[int] = []
    steps = schedule.fingerprint.steps
    for step in range(schedule.num_steps):
        runs = not schedule.is_skipped(step)
        raw = [step, *raw] if runs else raw
        corrects = step > steps[0] and forecast.target == "steer" and forecast.everywhere
        if step not in steps or (runs and not corrects):
            velocities.append(None)
            continue
        velocities.append(Velocity({source: float(source == raw[0]) for source in raw[: forecast.terms]}))
    return replace(schedule, velocities=tuple(velocities))


def _placeholders(cells: Sequence[Sequence[Cell]], steps: Sequence[int]) -> list[Velocity | None]:
    """The newest velocity held where a step is skipped; something has to be there for the schedule to be whole."""
    newest, velocities = steps[0], list[Velocity | None]()
    for step, row in enumerate(cells):
        if step in steps and all(cell is not None and not cell for cell in row):
            velocities.append(Velocity({newest: 1.0}))
        else:
            newest = step
            velocities.append(None)
    return velocities


def _pausable(clone: Any, call: dict[str, Any], outputs: int) -> PausableRun:
    def generate() -> Any:
        with paused_at_steps(clone.scheduler, pausable, outputs):
            return clone(**call)

    pausable = PausableRun(generate)
    return pausable


def psnr_of(reference: np.ndarray, pictures: np.ndarray) -> list[float]:
    """PSNR in dB of every picture (of a video: over all its frames), at most 100.

    Args:
        reference, pictures: of one shape ``[B, ...]``, in 0..1, or of 8 bit.

    Raises:
        CalibrationError: they differ in shape, or something is not finite.
    """
    if reference.shape != pictures.shape:
        raise CalibrationError(f"pictures of {list(pictures.shape)} cannot be compared with {list(reference.shape)}")
    errors = [_mean_square(a.reshape(-1), b.reshape(-1)) for a, b in zip(reference, pictures, strict=True)]
    if not np.isfinite(errors).all():
        raise CalibrationError("a picture of the rollouts holds NaN or infinity")
    return [float(value) for value in -10 * np.log10(np.maximum(errors, 10 ** (-PSNR_LIMIT / 10)))]


def _mean_square(a: np.ndarray, b: np.ndarray) -> float:
    """Of a difference, in float64, a part at a time: a video has as many numbers as thousands of pictures."""
    parts = [slice(lo, lo + ELEMENTS) for lo in range(0, len(a), ELEMENTS)]
    return sum(float(np.square(_shares(a[part]) - _shares(b[part])).sum()) for part in parts) / len(a)


def _shares(values: np.ndarray) -> np.ndarray:
    return values / 255.0 if values.dtype == np.uint8 else values.astype(np.float64)
