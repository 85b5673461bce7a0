"""MeanCache (arXiv 2601.19961): whole steps skipped, velocities extended by an average-velocity JVP.

Everything it caches is a velocity after guidance, and everything it computes from them is linear, so its forecasts
are coefficients of the velocities the model gave: no latents are logged. Source: docs/methods.md, MeanCache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch

from layercache._utils.validate import expect, expect_table
from layercache.errors import ArgumentError, BudgetError, ScheduleError
from layercache.runtime.policy import PlannedMethod, check_length, warn_of_length
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.schedule import Schedule, Velocity

FORMS = ("recursive", "one-shot")
SPANS = (1, 2, 3, 4, 5, 6)

# Released schedules for 50 steps, by model and evaluations: computed steps, "a-b" one after the other, "K:s" step s
# behind an interval with span K (docs/methods.md, MeanCache).
PRESETS: dict[str, dict[int, str]] = {
    "qwen-image": {
        25: "0-16 1:24 1:32 1:40 5:43 5:45 5:47 48-49",
        17: "0-8 2:10 1:17 1:24 1:31 1:38 1:45 4:48 49",
        10: "0-1 2:3 1:7 1:14 1:21 1:28 1:35 1:42 4:49",
    },
    "qwen-image-2512": {
        25: "0-15 2:23 2:31 2:37 1:44 45-49",
        17: "0-9 2:11 1:19 1:27 1:35 1:43 5:47 5:49",
        10: "0 1:2 3:4 1:7 1:14 1:21 1:28 1:35 1:42 4:49",
    },
    "z-image": {
        25: "0-6 2:8 2:10 11-13 2:15 16-18 5:20 5:22 1:29 1:37 1:42 5:45 5:47 48-49",
        20: "0-4 2:6 2:8 2:10 2:12 2:14 5:16 4:18 5:20 5:22 1:30 1:38 1:43 5:46 2:48 49",
        17: "0-4 2:6 2:8 2:10 2:12 2:14 1:19 1:27 1:35 1:43 5:46 2:48 49",
        15: "0-3 2:5 2:7 2:10 2:12 1:17 1:25 1:33 1:41 5:45 4:48 49",
        13: "0-3 2:5 1:9 1:15 1:22 1:29 1:36 1:43 5:47 2:49",
    },
}

Linear = dict[int, float]
"""Coefficients of the model's velocities, by step."""


@dataclass(frozen=True)
class MeanCache(PlannedMethod):
    """Computes some steps and extrapolates between them by an average-velocity JVP.

    Source: docs/methods.md, MeanCache.

    Attributes:
        computed: the steps the network is called at, ascending, step 0 first.
        spans: K of every interval from one computed step to the next, the last ending behind the last step;
            K = 1 is plain reuse.
        form: ``"recursive"``: every cached step extends the velocity of the step before it, which may itself be
            extrapolated, as in the released code; ``"one-shot"``: one average velocity for a whole interval, the
            computed step included, as in the paper.
        released: model and number of evaluations of a released schedule, for the record.
        num_steps: of the runs that it is for; others are refused. ``None``: not known.

    Raises:
        ScheduleError: on construction, for an unknown form, or steps and spans that do not match.
    """

    computed: tuple[int, ...]
    spans: tuple[int, ...]
    form: str = "recursive"
    released: str = ""
    num_steps: int | None = None

    name: ClassVar[str] = "meancache"

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", tuple(map(int, self.computed)))
        object.__setattr__(self, "spans", tuple(map(int, self.spans)))
        if self.form not in FORMS:
            raise ScheduleError(f"unknown form {self.form!r} of MeanCache; choose {' or '.join(FORMS)}")
        if self.computed[:1] != (0,) or any(b <= a for a, b in pairwise(self.computed)):
            raise ScheduleError(f"computed steps must ascend from 0, got {list(self.computed)}")
        if len(self.spans) != len(self.computed) or min(self.spans) < 1:
            raise ScheduleError(
                f"give one span K >= 1 for each of the {len(self.computed)} intervals, got {list(self.spans)}"
            )

    @classmethod
    def preset(cls, name: str, evaluations: int) -> MeanCache:
        """A released schedule for 50 steps (`PRESETS`), in the recursive form it was made for.

        Source: docs/methods.md, MeanCache.

        Raises:
            ScheduleError: unknown name or number of evaluations.
        """
        known = PRESETS.get(name, {})
        if evaluations not in known:
            choices = "; ".join(f"{model}: {', '.join(map(str, budgets))}" for model, budgets in PRESETS.items())
            raise ScheduleError(
                f"no schedule is released for {name!r} with {evaluations} evaluations; there are {choices}"
            )
        computed, spans = _parse_preset(known[evaluations])
        return cls(tuple(computed), tuple(spans), released=f"{name} {evaluations}", num_steps=50)

    def schedule_of_run(self, fingerprint: Fingerprint, scheduler: Any, first: int) -> Schedule:
        warn_of_length("MeanCache", self.num_steps)
        return self.schedule(fingerprint)  # computed steps are those of a whole run

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        expect("MeanCache.schedule", fingerprint, Fingerprint)
        num_steps = fingerprint.num_steps
        check_length("MeanCache", self.computed, self.num_steps, num_steps)
        extend = _recursive if self.form == "recursive" else _one_shot
        log: list[Linear] = []
        for start, end, span in zip(self.computed, [*self.computed[1:], num_steps], self.spans, strict=True):
            extend(log, fingerprint.sigmas, start, end, span)
        velocities = [
            None if terms == {step: 1.0} else Velocity({s: c for s, c in sorted(terms.items(), reverse=True) if c})
            for step, terms in enumerate(log)
        ]
        metadata = {"method": self.name, "form": self.form, "spans": list(self.spans)}
        return Schedule(
            fingerprint,
            ((0, fingerprint.num_blocks),),
            tuple((None,) if step in self.computed else ({},) for step in range(num_steps)),
            (1.0,),
            metadata | ({"preset": self.released} if self.released else {}),
            tuple(velocities),
        )


def _parse_preset(text: str) -> tuple[list[int], list[int]]:
    computed, spans = list[int](), list[int]()
    for word in text.split():
        span, _, steps = word.rpartition(":")
        first, _, last = steps.partition("-")
        # the span belongs to the interval in front of the step
        spans += [int(span or 1)] * bool(computed) + [1] * (int(last or first) - int(first))
        computed += range(int(first), int(last or first) + 1)
    return computed, [*spans, 1]


def lexicographic_steps(errors: np.ndarray, budget: int) -> list[int]:
    """LeMiCa's choice: the path whose largest edge is least, then the next largest, with plain reuse on every edge.

    Args:
        errors: ``[N, max_length + 1]``, of reusing step t's velocity up to step ``t + n``; infinite where not allowed.
        budget: network evaluations.

    Source: docs/methods.md, LeMiCa.

    Raises:
        ArgumentError: no such table.
        BudgetError: no path has so few evaluations.
    """
    import layercache._core as core

    source = "stability_deviation(velocities, sigmas, spans=(1,))[..., 0] is one"
    errors = expect_table("meancache.lexicographic_steps", errors, ("N", "max_length + 1"), source)
    path = core.shortest_path(np.ascontiguousarray(errors[..., None]), budget, mode="lexicographic")
    if not path.feasible:
        raise BudgetError(f"{budget} evaluations are too few for intervals of at most {errors.shape[1] - 1} steps")
    return list(path.steps)


def _recursive(log: list[Linear], sigmas: Sequence[float], start: int, end: int, span: int) -> None:
    """``v[i] = v[i-1] + JVP * (sigma[i+1] - sigma[i])``, the JVP over the last ``span`` steps of the log."""
    log.append({start: 1.0})
    for step in range(start + 1, end):
        if span == 1:
            log.append(dict(log[-1]))
            continue
        older = step - min(span, step)
        gap = sigmas[step] - sigmas[older]
        jvp = _scaled(_sum(_average(log, sigmas, older, step), _scaled(log[older], -1.0)), 1.0 / gap)
        log.append(_sum(log[-1], _scaled(jvp, sigmas[step + 1] - sigmas[step])))


def _one_shot(log: list[Linear], sigmas: Sequence[float], start: int, end: int, span: int) -> None:
    """``v = v[t] + (s - t) * JVP`` for the whole interval, the JVP over the ``span`` steps before it."""
    velocity: Linear = {start: 1.0}
    older = start - min(span, start)
    if span > 1 and older < start and end > start + 1:
        gap = sigmas[start] - sigmas[older]
        jvp = _scaled(_sum(_average(log, sigmas, older, start), _scaled(log[older], -1.0)), 1.0 / gap)
        velocity = _sum(velocity, _scaled(jvp, sigmas[end] - sigmas[start]))
    log += [dict(velocity) for _ in range(start, end)]


def _average(log: Sequence[Linear], sigmas: Sequence[float], start: int, end: int) -> Linear:
    """Average velocity from one step to another: displacement over time, with the velocities that were taken."""
    total: Linear = {}
    for step in range(start, end):
        total = _sum(total, _scaled(log[step], sigmas[step + 1] - sigmas[step]))
    return _scaled(total, 1.0 / (sigmas[end] - sigmas[start]))


def _sum(a: Linear, b: Linear) -> Linear:
    return {step: a.get(step, 0.0) + b.get(step, 0.0) for step in {**a, **b}}


def _scaled(a: Linear, factor: float) -> Linear:
    return {step: factor * value for step, value in a.items()}


def stability_deviation(
    velocities: Sequence[Sequence[torch.Tensor]],
    sigmas: Sequence[float],
    max_length: int = 9,
    spans: Sequence[int] = SPANS,
) -> np.ndarray:
    """``L_K(t, s) = mean |u(t, s) - (v[t] + (s - t) JVP_K)|`` of full runs, ``[N, max_length + 1, len(spans)]``.

    Entry ``[t, n]`` is the interval from step t to step t + n (at most N); 0 where n = 1, infinite where the interval
    or the span does not exist. Averaged over the samples. Source: docs/methods.md, MeanCache.

    Args:
        velocities: per sample, of every step.
        sigmas: N + 1 noise levels.

    Raises:
        ArgumentError: no such velocities.
    """
    num_steps = len(sigmas) - 1
    _check_velocities(velocities, num_steps)
    table = np.full((num_steps, max_length + 1, len(spans)), np.inf)
    table[:, 1] = 0.0
    for start in range(num_steps):
        for length in range(2, min(max_length, num_steps - start) + 1):
            for k, span in enumerate(spans):
                if span == 1 or span <= start:
                    errors = [_deviation(v, sigmas, start, start + length, span) for v in velocities]
                    table[start, length, k] = np.mean(errors)
    return table


def _check_velocities(velocities: Any, num_steps: int) -> None:
    samples = list(velocities) if isinstance(velocities, Sequence) else []
    whole = [isinstance(steps, Sequence) and len(steps) == num_steps for steps in samples]
    if not all(whole) or not samples or not all(isinstance(v, torch.Tensor) for steps in samples for v in steps):
        raise ArgumentError(
            f"meancache.stability_deviation expects {num_steps} velocities per sample, one for every step, got "
            f"{type(velocities).__name__}; rollouts has them: [trace.taken for trace in rollouts.full]"
        )


def _deviation(v: Sequence[torch.Tensor], sigmas: Sequence[float], start: int, end: int, span: int) -> float:
    log: list[Linear] = [{step: 1.0} for step in range(start)]
    _one_shot(log, sigmas, start, end, span)
    truth = _average([{step: 1.0} for step in range(end)], sigmas, start, end)
    difference = _sum(truth, _scaled(log[start], -1.0))
    return float(sum(c * v[step].double() for step, c in difference.items()).abs().mean())  # type: ignore[union-attr]


def plan_steps(
    deviation: np.ndarray, budget: int, spans: Sequence[int] = SPANS, gamma: float = 5.0
) -> tuple[list[int], list[int]]:
    """Computed steps and the span of every interval: the peak-suppressed shortest path within ``budget`` evaluations.

    Args:
        deviation: from `stability_deviation`.
        budget: network evaluations.
        gamma: every deviation counts with this power; large values avoid single bad intervals.

    Source: docs/methods.md, MeanCache.

    Raises:
        ArgumentError: no such table.
        BudgetError: no path has so few evaluations.
    """
    import layercache._core as core

    dims = ("N", "max_length + 1", "spans")
    source = "stability_deviation(velocities, sigmas) makes one"
    deviation = expect_table("meancache.plan_steps", deviation, dims, source)
    path = core.shortest_path(deviation, budget, gamma=gamma)
    if not path.feasible:
        raise BudgetError(f"{budget} evaluations are too few for intervals of at most {deviation.shape[1] - 1} steps")
    return list(path.steps), [spans[k] for k in path.choice]


# The functions of version 0.1, which the class took the place of.


def build_schedule(
    fingerprint: Fingerprint, computed: Sequence[int], spans: Sequence[int], form: str = "recursive"
) -> Schedule:
    """`MeanCache` as a schedule."""
    return MeanCache(computed=tuple(computed), spans=tuple(spans), form=form).schedule(fingerprint)


def preset(fingerprint: Fingerprint, name: str, evaluations: int) -> Schedule:
    """`MeanCache.preset` as a schedule."""
    return MeanCache.preset(name, evaluations).schedule(fingerprint)
