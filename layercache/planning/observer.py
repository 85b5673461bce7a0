"""The router that measures a full run."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from layercache import ops
from layercache._utils.timer import Timer
from layercache.errors import CalibrationError
from layercache.models.registry import fingerprint_of, first_tensor
from layercache.models.spec import ModelSpec, Streams
from layercache.planning.profile import StabilityProfile, readable
from layercache.planning.sample_statistics import SampleStatistics
from layercache.runtime.blocks import BlockPass
from layercache.runtime.forward import Forward
from layercache.runtime.identity import Identity
from layercache.runtime.router import Router
from layercache.runtime.velocity import as_rows
from layercache.schedule.forecast import secant_coefficients
from layercache.schedule.memory_plan import CAPTURE, COMPUTE, REUSE, GroupAction

OTHER_LEVELS = "the samples do not share one noise schedule; use one step count and resolution"
NOISE = 0.01  # of a random change, relative to the residual


class ObservedPass(BlockPass):
    """Marks where a group begins and ends in time."""

    router: Observer
    watches = True

    def opened(self, group: int) -> None:
        self.router.clock.mark(("group", group, self.router.place.step))

    def computed(self, group: int) -> None:
        self.router.clock.mark(("statistics", self.router.place.step))

    def captured(self, group: int) -> None:
        self.router.clock.mark(("rest", self.router.place.step))


class _Branch:
    """Residuals of one branch that forecasts still need, and the statistics found so far.

    Attributes:
        windows: per group the residuals of the present step and of those before it, newest first; ``None`` for steps at
            which the branch was not called, or had other shapes.
        sets: per step the forecasts that could be made.
        steps: calls so far, those left out among them.
    """

    def __init__(self, num_groups: int, window: int):
        self.windows: list[deque[Any]] = [deque(maxlen=window) for _ in range(num_groups)]
        self.sets: dict[int, list[tuple[int, int, dict[int, float]]]] = {}
        self.statistics: dict[tuple[int, int, str], torch.Tensor] = {}
        self.responses: dict[tuple[int, int], torch.Tensor] = {}
        self.grams: dict[tuple[int, int], torch.Tensor] = {}
        self.anchors: dict[tuple[int, int], tuple[int, ...]] = {}
        self.reuse: dict[int, float] = {}
        self.stream_bytes = (0, 0)
        self.steps = 0

    def advance(self, step: int) -> None:
        """The branch is called at ``step``; the pipeline may have left it out since the last call."""
        for _ in range(step - self.steps):
            for window in self.windows:
                window.appendleft(None)
        self.steps = step + 1

    def add(self, group: int, residuals: list[torch.Tensor]) -> list[list[torch.Tensor] | None]:
        """The group's residuals at this step; gives the older ones, newest first."""
        window = self.windows[group]
        if any(entry is not None and entry[0].shape != residuals[0].shape for entry in window):
            window = self.windows[group] = deque([None] * len(window), window.maxlen)  # those are of no use any more
        window.appendleft(residuals)
        return list(window)[1:]


class Observer(Router):
    """Computes everything, and compares each residual with its forecasts."""

    def __init__(
        self,
        transformer: nn.Module,
        spec: ModelSpec,
        groups: Sequence[tuple[int, int]],
        max_distance: int,
        max_span: int,
        sensitivity: str | None = None,
        *,
        sigmas: Sequence[float] | None,
        scheduler: Any,
        eta: float,
        group: Any = None,
    ):
        super().__init__(transformer, spec, groups)
        self.groups = tuple(groups)
        self.max_distance, self.max_span, self.eta = max_distance, max_span, eta
        self.sigmas = tuple(float(s) for s in sigmas or ())
        self.identity = Identity(spec, scheduler, self.sigmas or None, self._take_sigmas)
        self.on_step: Callable[[int, int], None] = lambda step, total: None
        self._actions = (GroupAction(CAPTURE, text=True),) * len(self.groups)
        self._branches: dict[str, _Branch] = {}
        self._sensitivity, self._group = sensitivity, group
        self._substitutes: list[list[torch.Tensor]] | None = None

    def _take_sigmas(self, sigmas: Sequence[float]) -> None:
        if not self.sigmas:
            self.sigmas = tuple(sigmas)
        elif tuple(sigmas) != self.sigmas:
            raise CalibrationError(OTHER_LEVELS)

    def new_pass(self) -> BlockPass:
        return ObservedPass(self) if self._substitutes is None else super().new_pass()

    def start_sample(self) -> None:
        self._branches = {}
        self.reset()
        self.clock = Timer(next(self.transformer.parameters()).device)

    def begin(self, forward: Forward) -> None:
        self.place = self.place_of(forward)
        if not self.sigmas:
            raise CalibrationError("the noise levels are not known: the scheduler has no sigmas; give sigmas=")
        self.clock.mark(("rest", self.place.step))
        seen = self._branches.get(self.place.branch)
        if seen is None:
            window = 1 + self.max_distance + self.max_span
            seen = self._branches[self.place.branch] = _Branch(len(self.groups), window)
        if self.place.step < seen.steps:
            raise CalibrationError(
                f"branch {self.place.branch} was called at step {self.place.step} after step {seen.steps - 1}; "
                "calibration needs full runs that call the transformer at most once per branch and step"
            )
        seen.advance(self.place.step)
        self.on_step(self.place.step, len(self.sigmas) - 1)
        self.open(self._actions)

    def capture(self, group: int, image_in: Any, text_in: Any, image_out: Any, text_out: Any) -> None:
        step, seen = self.place.step, self._branches[self.place.branch]
        inputs, outputs = [image_in], [image_out]
        if text_in is not None and text_out is not None:  # the last block may give no text
            inputs, outputs = [image_in, text_in], [image_out, text_out]
        seen.stream_bytes = (image_out.nbytes, 0 if text_out is None else text_out.nbytes)
        residuals = [torch.empty(o.shape, dtype=o.dtype, device=o.device) for o in outputs]
        ops.capture(outputs, inputs, residuals, None)
        older = {step - k: entry for k, entry in enumerate(seen.add(group, residuals), 1) if entry is not None}
        seen.anchors[step, group] = tuple(older)
        seen.grams[step, group] = ops.gram([residuals[0], *(entry[0] for entry in older.values())])
        sets = coefficient_sets(self.sigmas, step, self.max_distance, self.max_span, self.eta)
        seen.sets[step] = sets = [found for found in sets if set(found[2]) <= set(older)]
        for stream, name in enumerate(("image", "text")[: len(residuals)]):
            if sets:
                matrix = np.array([[terms.get(anchor, 0.0) for anchor in older] for _, _, terms in sets])
                terms = [entry[stream] for entry in older.values()]
                statistics = ops.combination_error(residuals[stream], terms, matrix)
            else:
                zero = residuals[stream]
                statistics = ops.combination_error(zero, [zero], np.zeros((1, 1)))
            seen.statistics[step, group, name] = statistics
        if group not in seen.reuse and step >= 1:
            seen.reuse[group] = _time_reuse(outputs, residuals)

    def after(self, output: Any, rerun: Callable[[], Any]) -> None:
        """With another residual in a group's place, what becomes of the velocity?"""
        step, seen = self.place.step, self._branches[self.place.branch]
        if not self._sensitivity or step == 0:
            return
        if self._sensitivity == "substitution" and any(window[1] is None for window in seen.windows):
            return
        self.clock.mark(("sensitivity", step))
        velocity = first_tensor(output)
        here = [window[0] for window in seen.windows]
        try:
            for group in range(len(self.groups)):
                # this step's residuals of the groups in front lead to the group's own input again
                other = seen.windows[group][1] if self._sensitivity == "substitution" else _disturbed(here[group], step)
                self._substitutes = [*here[:group], other]
                every = self.spec.needs_every_output
                ahead = [GroupAction(REUSE, text=True, ends_run=every or k == group) for k in range(group + 1)]
                self.open((*ahead, *[GroupAction(COMPUTE)] * (len(self.groups) - group - 1)))
                changed = first_tensor(rerun())
                pairs = [(changed, velocity), (other[0], here[group][0])]
                seen.responses[step, group] = torch.cat(
                    [ops.pair_statistics([as_rows(a)], [as_rows(b)]) for a, b in pairs]
                )
        finally:
            self._substitutes = None
        self.clock.mark(("rest", step))

    def reuse(self, group: int, image: Any, text: Any, results: Streams | None = None) -> Streams:
        run = self._substitutes or ()
        for residuals in run[group : group + 1] if self.spec.needs_every_output else run:
            streams = [image] if text is None else [image, text]
            changed = ops.linear_combination(streams[: len(residuals)], [[r] for r in residuals], (1.0,))
            image, text = changed[0], changed[1] if len(changed) == 2 else text
        return image, text

    def end_sample(self, name: str) -> SampleStatistics:
        """Fetches a finished sample's statistics from the device."""
        num_steps = self._check_complete(name)
        self._add_up()
        seconds = self.clock.totals()
        every, groups = range(num_steps), range(len(self.groups))
        shape = (len(self._branches), num_steps, len(self.groups))
        wide = (*shape, self.max_distance + 1, self.max_span + 1)
        tables: dict[str, np.ndarray] = {}
        for stream in ("image", "text"):
            errors, norms = np.zeros((2, *wide)), np.zeros((2, *shape))
            for b, seen in enumerate(self._branches.values()):
                self._fill(errors[:, b], norms[:, b], seen, stream)
            tables |= {f"{stream}_errors": errors, f"{stream}_norms": norms}
        branches = list(self._branches.values())
        found = SampleStatistics(
            sigmas=self.sigmas,
            branches=tuple(self._branches),
            steps=tuple(sorted({step for seen in branches for step in seen.sets})),
            stream_bytes=tuple(seen.stream_bytes for seen in branches),
            **tables,
            responses=np.stack([self._responses(seen) for seen in branches]),
            seen=np.stack([self._forecasts(seen) for seen in branches]),
            grams=np.stack([self._grams(seen) for seen in branches]),
            reuse_seconds=np.array([[seen.reuse.get(g, 0.0) for g in groups] for seen in branches]),
            group_seconds=np.array([[seconds.get(("group", g, i), 0.0) for g in groups] for i in every]),
            fixed_seconds=np.array([seconds.get(("rest", i), 0.0) for i in every]),
        )
        self._branches = {}
        return found

    def _add_up(self) -> None:
        """Sums of this process's tokens become those of all processes' tokens, in one collective."""
        if self._group is None:
            return
        kept: list[dict[Any, torch.Tensor]] = []
        for seen in self._branches.values():
            kept += [seen.statistics, seen.responses, seen.grams]
        places = [(sums, key) for sums in kept for key in sums]
        flat = torch.cat([sums[key].double().flatten() for sums, key in places])
        torch.distributed.all_reduce(flat, group=self._group)
        for (sums, key), total in zip(places, flat.split([sums[key].numel() for sums, key in places]), strict=True):
            sums[key] = total.view(sums[key].shape)

    def _shared(self, seconds: Sequence[float], sizes: Sequence[tuple[int, int]]) -> tuple[list[float], list[int]]:
        """Means of the seconds, and sums of the sizes, over the processes."""
        flat = [size for pair in sizes for size in pair]
        if self._group is None:
            return list(seconds), flat
        device = next(self.transformer.parameters()).device
        both = torch.tensor([*seconds, *flat], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(both, group=self._group)
        totals = both.tolist()
        count = torch.distributed.get_world_size(self._group)
        return [total / count for total in totals[: len(seconds)]], [round(size) for size in totals[len(seconds) :]]

    def _check_complete(self, name: str) -> int:
        """The number of steps of a run that went to its end, whoever ran the last of them."""
        if not self._branches:
            raise CalibrationError(f"sample '{name}' is incomplete: the transformer to calibrate was never called")
        num_steps = len(self.sigmas) - 1
        counts = {branch: seen.steps for branch, seen in self._branches.items()}
        if num_steps not in (*counts.values(), self.identity.taken):
            raise CalibrationError(f"sample '{name}' is incomplete: {num_steps} steps were due, branches saw {counts}")
        return num_steps

    def _grams(self, seen: _Branch) -> np.ndarray:
        """Inner products of the residuals of a step and those before it, ``[N, G, W, W]``; 0 where there is none."""
        width = 1 + self.max_distance + self.max_span
        table = np.zeros((len(self.sigmas) - 1, len(self.groups), width, width))
        for (step, group), gram in seen.grams.items():
            at = [0, *(step - anchor for anchor in seen.anchors[step, group])]
            table[step, group][np.ix_(at, at)] = gram.double().cpu().numpy()
        return table

    def _forecasts(self, seen: _Branch) -> np.ndarray:
        """1 for the forecasts that could be made, ``[N, M+1, K+1]``."""
        table = np.zeros((len(self.sigmas) - 1, self.max_distance + 1, self.max_span + 1))
        for step, sets in seen.sets.items():
            for distance, span, _ in sets:
                table[step, distance, span] = 1.0
        return table

    def _responses(self, seen: _Branch) -> np.ndarray:
        """Relative L1 changes of velocity and residual, ``[2, N, G]``; 0 at step 0."""
        table = np.zeros((2, len(self.sigmas) - 1, len(self.groups)))
        for (step, group), sums in seen.responses.items():
            for kind, (change, _, norm) in enumerate(sums[:, :3].double().cpu().tolist()):
                table[kind, step, group] = change / norm if norm > 0 else math.inf
        return table

    def _fill(self, errors: np.ndarray, norms: np.ndarray, seen: _Branch, stream: str) -> None:
        keys = [key for key in seen.statistics if key[2] == stream]
        if not keys:
            return
        flat = torch.cat([seen.statistics[key] for key in keys]).double().cpu().numpy()
        row = 0
        for step, group, _ in keys:
            sets = seen.sets[step]
            norms[:, step, group] = flat[row, 2], np.sqrt(flat[row, 3])
            for distance, span, _ in sets:
                errors[:, step, group, distance, span] = flat[row, 0], np.sqrt(flat[row, 1])
                row += 1
            row += not sets

    def profile(self, results: Sequence[SampleStatistics], samples: Sequence[str]) -> StabilityProfile:
        """Puts the samples together."""
        branches, self.sigmas = results[0].branches, results[0].sigmas
        if any(result.branches != branches for result in results):
            raise CalibrationError("the samples do not share the same guidance branches; use one guidance setting")
        if any(result.sigmas != self.sigmas for result in results):
            raise CalibrationError(OTHER_LEVELS)

        def stack(name: str, kind: int) -> np.ndarray:
            return np.stack([getattr(result, name)[kind] for result in results])

        tables = {
            "image_error_l1": stack("image_errors", 0),
            "image_error_l2": stack("image_errors", 1),
            "text_error_l1": stack("text_errors", 0),
            "image_norm_l1": stack("image_norms", 0),
            "image_norm_l2": stack("image_norms", 1),
            "text_norm_l1": stack("text_norms", 0),
        }
        tables["image_gram"] = np.stack([result.grams for result in results])
        seen = np.stack([result.seen for result in results])
        if (seen != readable(len(self.sigmas) - 1, self.max_distance, self.max_span)).any():
            tables["forecast_seen"] = seen
        if self._sensitivity:
            responses = np.stack([result.responses for result in results])
            tables["velocity_response"], tables["substitute_error"] = responses[:, :, 0], responses[:, :, 1]
        every = [(result, step) for result in results for step in result.steps]
        reuse = np.median(np.array([result.reuse_seconds for result in results]).sum(axis=1), axis=0)
        computing = np.median([result.group_seconds[step] for result, step in every], axis=0)
        fixed = float(np.median([result.fixed_seconds[step] for result, step in every]))
        largest = max((result.stream_bytes for result in results), key=sum_of_pairs)
        seconds, sizes = self._shared([*computing.tolist(), *reuse.tolist(), fixed], largest)
        return StabilityProfile(
            fingerprint=fingerprint_of(self.transformer, self.sigmas, branches, sorted({step for _, step in every})),
            groups=self.groups,
            group_seconds=tuple(seconds[: len(self.groups)]),
            reuse_seconds=tuple(seconds[len(self.groups) : -1]),
            fixed_seconds=seconds[-1],
            samples=tuple(samples),
            tables=tables,
            eta=self.eta,
            stream_bytes=tuple(zip(sizes[::2], sizes[1::2], strict=True)),
        )


def _disturbed(residuals: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Residuals with Gaussian noise of a hundredth of their root mean square added, the same for every call."""
    found = []
    for residual in residuals:
        generator = torch.Generator(residual.device).manual_seed(seed)
        noise = torch.randn(residual.shape, generator=generator, device=residual.device, dtype=torch.float32)
        size = NOISE * residual.float().pow(2).mean().sqrt()
        found.append((residual.float() + size * noise).to(residual.dtype))
    return found


def sum_of_pairs(pairs: Sequence[tuple[int, int]]) -> int:
    return sum(image + text for image, text in pairs)


def coefficient_sets(
    sigmas: Sequence[float], step: int, max_distance: int, max_span: int, eta: float
) -> list[tuple[int, int, dict[int, float]]]:
    """Every forecast of ``step`` that can be made: ``(distance, span, coefficients by step)``."""
    sets = []
    for distance in range(1, min(max_distance, step) + 1):
        anchor = step - distance
        for span in range(min(max_span, anchor) + 1):
            base = anchor - span if span else None
            sets.append((distance, span, secant_coefficients(sigmas, step, anchor, base, eta)))
    return sets


def _time_reuse(bases: list[torch.Tensor], residuals: list[torch.Tensor], repeats: int = 5) -> float:
    """Median seconds of reusing a group: one linear combination of two anchors over all streams."""
    on_gpu = bases[0].device.type == "cuda"
    seconds = []
    for _ in range(repeats + 1):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        ops.linear_combination(bases, [[r, r] for r in residuals], (2.0, -1.0))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])
