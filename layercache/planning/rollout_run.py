"""One run of a schedule on calibration samples, and the fits of its forecasts on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layercache.errors import CalibrationError
from layercache.planning.fit import Forecast, products_of, solve_velocity
from layercache.planning.trace import Trace, near
from layercache.schedule.schedule import Schedule, Velocity

if TYPE_CHECKING:
    from layercache.planning.rollout import Rollouts
    from layercache.planning.simulated import Simulated

SAME_BEGINNING = 0.02
"""Share of their norm by which latents may differ that are the same, but for an encoder's rounding."""
Products = Mapping[int, np.ndarray]


class RolloutRun:
    """One run of a schedule on all samples: takes the velocities, fits them where that is asked for.

    Traces, and what is fitted, count steps from the first that the runs take.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        schedule: Schedule,
        forecast: Forecast | None,
        more: Products,
        beside: Simulated | None = None,
    ):
        self.crew, self.note_cost, self.num_steps = rollouts.crew, rollouts.note_cost, rollouts.num_steps
        self.samplers, self.numbers = self.crew.share(rollouts.samplers or ()), rollouts.own
        self.schedule, self.forecast, self.first = schedule, forecast, rollouts.first
        # of every output, each sample's
        self.full = list(zip(*rollouts.outputs, strict=True))
        self.traces = [tuple(Trace() for _ in rollouts.own) for _ in self.full]
        self.velocities: list[list[Velocity | None]] = [[] for _ in self.full]
        self.is_moved = bool(rollouts.sigmas_given)  # velocities are none that the model has given
        self.more, self.beside, self.products = more, beside, dict[int, np.ndarray]()

    def answer(self, step: int, items: list[tuple[Any, ...]]) -> list[Any]:
        runs, output = not self.schedule.is_skipped(step), items[0][2] if len(items[0]) > 2 else 0
        if runs and not output:
            self.note_cost()
        traces = self.traces[output]
        for trace, (velocity, latents, *_) in zip(traces, items, strict=True):
            trace.add(latents, velocity.clone() if runs else None)
        at = step - self.first
        if at == 0:
            self._check_beginnings(output)
        if runs and self.beside is not None:
            self.beside.compute(at)
        if self.forecast is None:
            planned = self.schedule.velocity(step, output)
            rule = None if planned is None else planned.shifted(-self.first)
        else:
            rule = self._fit(at, self.forecast, output)
        self.velocities[output].append(rule)
        if self.beside is not None:
            self.beside.take(at, rule)
        for trace in traces:
            trace.taken.append(trace.combined(rule, at))
        return [trace.taken[at] for trace in traces]

    def _check_beginnings(self, output: int) -> None:
        """Raises `CalibrationError` where a sample does not begin with the latents of its full run."""
        for number, trace, full in zip(self.numbers, self.traces[output], self.full[output], strict=True):
            here = trace.latents[0].float()
            if not (near(full.latents[0], here).float() - here).norm() <= SAME_BEGINNING * here.norm():
                raise CalibrationError(
                    f"sample {number} did not begin with the latents of its full run: the pipeline takes its noise "
                    "from something else than its generator"
                )

    def _fit(self, step: int, forecast: Forecast, output: int) -> Velocity | None:
        own, full = self.traces[output], self.full[output]
        runs = own[0].raw[step] is not None
        if runs and not (forecast.target == "steer" and forecast.everywhere and self._may_have_drifted(step, output)):
            return None
        sources = [k for k in range(step, -1, -1) if own[0].raw[k] is not None][: forecast.terms]
        if forecast.target == "none":
            return Velocity({sources[0]: 1.0})
        among = full if forecast.target == "open" else own
        features = [[trace.raw[k] for k in sources] for trace in among]
        latents = [trace.latents[step] for trace in among]
        if forecast.target == "steer":
            triples = zip(self.samplers, own, full, strict=True)
            targets = [sampler.wanted(trace, one, step) for sampler, trace, one in triples]
        else:
            targets = [near(one.taken[step], x) for one, x in zip(full, latents, strict=True)]
        found = products_of(step, features, latents, targets)  # type: ignore[arg-type]
        flags = self._drifted(step, output) if runs and not self.is_moved else [True] * len(found)
        drifted, terms = zip(*self.crew.gather(list(zip(flags, found, strict=True))), strict=True)
        if runs and not any(drifted):
            return None
        products = np.concatenate(terms)
        place = output * self.num_steps + step
        if place in self.more:
            products = np.concatenate([self.more[place], products])
        if self.beside is not None:
            products = np.concatenate([products, self.beside.products(step, sources)])
        self.products[place] = products
        return solve_velocity(forecast, sources, products)

    def _may_have_drifted(self, step: int, output: int) -> bool:
        """Whether a sample has left its full run; one that skipped a step is looked at when its terms are gathered."""
        if self.is_moved or any(raw is None for raw in self.traces[output][0].raw[:step]):
            return True
        return any(self.crew.gather(self._drifted(step, output)))

    def _drifted(self, step: int, output: int) -> list[bool]:
        pairs = zip(self.traces[output], self.full[output], strict=True)
        return [
            not torch.equal(trace.latents[step], near(full.latents[step], trace.latents[step])) for trace, full in pairs
        ]
