"""Spectrum: Chebyshev polynomials fitted to all computed steps forecast the skipped ones, further and further apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from layercache._utils.validate import expect
from layercache.errors import MethodError
from layercache.methods.fixed import schedule_of
from layercache.runtime.policy import PlannedMethod, by_name, check_range
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.schedule import Cell, Schedule

LEAST_RIDGE = 1e-6  # below, fits to fewer steps than polynomials are not unique in double precision
LARGEST_DEGREE = 15


def spectrum_steps(
    num_steps: int, window: float = 2.0, growth: float = 0.75, warmup: int = 5, stop: int | None = None
) -> list[int]:
    """The steps that are computed: the first ones, then one at the end of every window, each longer by ``growth``.

    A step is computed where the steps skipped in a row, plus one, are ``floor(window)``, and then the window grows.
    From ``stop`` on all are.
    Source: docs/methods.md, Spectrum.
    """
    computed: list[int] = []
    skipped = 0
    for step in range(num_steps):
        if step < warmup or (stop is not None and step >= stop):
            computed.append(step)
        elif skipped + 1 >= math.floor(window):
            computed.append(step)
            window, skipped = round(window + growth, 3), 0
        else:
            skipped += 1
    return computed


def spectrum_forecast(
    step: int, anchors: Sequence[int], num_steps: int, degree: int = 4, ridge: float = 0.1, blend: float = 0.5
) -> dict[int, float]:
    """Spectrum's forecast as coefficients of the stored tensors, which depend on the step numbers alone.

    ``blend phi(t) (Phi' Phi + ridge I)^-1 Phi' + (1 - blend) (first difference)``, where ``Phi[i, j] = T_j`` at anchor
    i, of steps scaled from ``0..num_steps`` to ``-1..1``. Source: docs/methods.md, Spectrum.

    Args:
        step: the cached step.
        anchors: earlier steps, newest first, one at least.
        num_steps: of the run.
        degree: of the highest polynomial.
        ridge: above 0.
        blend: share of the fit; the rest is the line through the last two anchors.
    """
    columns = np.arange(degree + 1)

    def basis(at: Sequence[int]) -> np.ndarray:
        tau = 2.0 * np.asarray(at, float) / num_steps - 1.0
        return np.asarray(np.cos(columns * np.arccos(np.clip(tau, -1.0, 1.0))[:, None]))

    phi = basis(anchors)
    fit = np.linalg.solve(phi.T @ phi + ridge * np.eye(degree + 1), phi.T)
    weights = blend * (basis([step]) @ fit)[0]
    reach = (step - anchors[0]) / (anchors[0] - anchors[1]) if len(anchors) > 1 else 0.0
    weights[0] += (1.0 - blend) * (1.0 + reach)
    if len(anchors) > 1:
        weights[1] -= (1.0 - blend) * reach
    return {anchor: float(weight) for anchor, weight in zip(anchors, weights, strict=True) if weight}


@by_name
@dataclass(frozen=True, kw_only=True)
class Spectrum(PlannedMethod):
    """Forecasts by Chebyshev polynomials fitted to all computed steps, which lie further and further apart.

    The fit is a ridge regression whose weights depend on no data, so that a skipped step is one linear combination.
    Where a pipeline turns to another transformer (Wan 2.2) it begins anew. Source: docs/methods.md, Spectrum.

    Attributes:
        window: steps from one computed step to the next behind the warm-up; 1 computes everything until it has grown.
        growth: what every computed step adds to the window (alpha).
        warmup: steps at the beginning that are computed.
        degree: of the highest polynomial (m).
        ridge: of the fit (lambda).
        blend: share of the fit in a forecast (w), the rest being the first difference; 1 as in the paper.
        history: newest computed steps that are fitted to, and stored.
        stop: from this step on everything is computed.
        groups: block ranges whose residuals are forecast; by default the velocity is, which stores next to nothing.

    Raises:
        MethodError: on construction, when a setting is out of range.
    """

    window: float = 2.0
    growth: float = 0.75
    warmup: int = 5
    degree: int = 4
    ridge: float = 0.1
    blend: float = 0.5
    history: int = 100
    stop: int | None = None
    groups: tuple[tuple[int, int], ...] | None = None

    name: ClassVar[str] = "spectrum"
    knob: ClassVar[tuple[str, float, float]] = ("growth", 1e-3, 100.0)

    def __post_init__(self) -> None:
        check_range("window", self.window, 1)
        check_range("growth", self.growth, 0)
        check_range("warmup", self.warmup, 1)
        check_range("degree", self.degree, 0, LARGEST_DEGREE)
        check_range("ridge", self.ridge, LEAST_RIDGE)
        check_range("blend", self.blend, 0, 1)
        check_range("history", self.history, 1)
        for name in ("warmup", "degree", "history"):
            if not isinstance(getattr(self, name), int):
                raise MethodError(f"{name} must be a whole number, got {getattr(self, name)!r}", argument=name)

    @property
    def replaces_velocity(self) -> bool:
        return self.groups is None

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        expect("Spectrum.schedule", fingerprint, Fingerprint)
        cells: list[Cell] = [{}] * fingerprint.num_steps
        ends = len(fingerprint.steps) if self.stop is None else self.stop
        for turn in fingerprint.turns:
            stop = ends - fingerprint.steps.index(turn[0])
            for step, cell in zip(turn, self._cells(turn, stop), strict=True):
                cells[step] = cell
        settings = {name: value for name, value in asdict(self).items() if name != "groups" and value is not None}
        return schedule_of(fingerprint, cells, {"method": self.name, **settings}, self.groups)

    def _cells(self, steps: Sequence[int], stop: int) -> list[Cell]:
        """Of the steps that one transformer runs in a row, counted from the first of them."""
        cells: list[Cell] = []
        anchors: list[int] = []  # newest first
        computed = set(spectrum_steps(len(steps), self.window, self.growth, self.warmup, stop))
        for k in range(len(steps)):
            if k in computed:
                anchors = [k, *anchors][: self.history]
                cells.append(None)
            else:
                terms = spectrum_forecast(k, anchors, len(steps), self.degree, self.ridge, self.blend)
                cells.append({steps[anchor]: weight for anchor, weight in terms.items()})
        return cells
