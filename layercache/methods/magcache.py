"""MagCache: residuals shrink and grow along a curve that one run shows; skips while that error is small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from layercache._utils.validate import expect
from layercache.errors import MethodError
from layercache.runtime.policy import PlannedMethod, by_name, check_range
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.schedule import Cell, Schedule

# published ratios of the residual's magnitude to that of the step before, step 0 first (docs/methods.md, MagCache)
FLUX_28 = (
    *(1, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1, 1.00781, 1, 1.00781, 1, 1, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062),
)
QWEN_IMAGE_50 = (
    *(1, 1.64062, 1.45312, 1.1875, 1.17188, 1.05469, 1.21094, 1.10938, 1.11719, 1.13281, 1.11719, 1.07812, 1.07031),
    *(1.08594, 1.08594, 1.07812, 1.03906, 1.04688, 1.07812, 1.07031, 1.03125, 1.07812, 1.04688, 1.04688, 1.04688),
    *(1.03906, 1.01562, 1.03125, 1.02344, 1.02344, 1.02344, 1.03906, 1.0, 1.01562, 1.0, 0.99219, 1.00781, 0.98047),
    *(0.95703, 0.96875, 0.99219, 0.92578, 0.92578, 0.90625, 0.85938, 0.80469, 0.87891, 0.75, 0.60938, 0.55078),
)
RATIOS = {"flux": FLUX_28, "qwen-image": QWEN_IMAGE_50}
MODELS = {"FluxTransformer2DModel": "flux", "QwenImageTransformer2DModel": "qwen-image"}

Ratios = str | Sequence[float] | Mapping[str, Sequence[float]]


@by_name
@dataclass(frozen=True, kw_only=True)
class MagCache(PlannedMethod):
    """Decides from ratios of magnitude alone, ahead of the run and per guidance branch.

    While skipping, ``P`` is the product of the ratios since the last computed step and the error grows by ``|1 - P|``.
    Source: docs/methods.md, MagCache.

    Attributes:
        ratios: of every step; by branch, one list for all, the name of published ones (`RATIOS`), or ``"auto"``: those
            published for the model's class. Lists of another length are read at the nearest steps. Your own come from
            `layercache.methods.full_runs.magnitude_ratios`.
        threshold: most error added up before a step is computed.
        max_consecutive: most skipped steps in a row.
        retention: share of the steps at the beginning that is computed.

    Raises:
        MethodError: on construction, when a setting is out of range.
    """

    ratios: Ratios = "auto"
    threshold: float = 0.06
    max_consecutive: int = 3
    retention: float = 0.2

    name: ClassVar[str] = "magcache"

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0)
        check_range("max_consecutive", self.max_consecutive, 1)
        check_range("retention", self.retention, 0, 1)

    @property
    def replaces_velocity(self) -> bool:
        return False

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        expect("MagCache.schedule", fingerprint, Fingerprint)
        cells = {
            branch: tuple(
                (cell,)
                for cell in _cells(values, fingerprint.steps, self.threshold, self.max_consecutive, self.retention)
            )
            for branch, values in _by_branch(fingerprint, self.ratios).items()
        }
        shared = next(iter(cells.values()))
        settings = {name: getattr(self, name) for name in ("threshold", "max_consecutive", "retention")}
        return Schedule(
            fingerprint,
            ((0, fingerprint.num_blocks),),
            shared,
            (1.0,),
            {"method": self.name, **settings},
            branch_cells={branch: rows for branch, rows in cells.items() if rows != shared},
        )


def _by_branch(fingerprint: Fingerprint, ratios: Ratios) -> dict[str, list[float]]:
    if isinstance(ratios, str):
        name = MODELS.get(fingerprint.model_class, "") if ratios == "auto" else ratios
        if name not in RATIOS:
            wanted = fingerprint.model_class if ratios == "auto" else ratios
            raise MethodError(
                f"no MagCache ratios are published for {wanted}: measure them with "
                "layercache.methods.full_runs.magnitude_ratios(pipe, prompt)"
            )
        ratios = RATIOS[name]
    branches = fingerprint.branches or ("all",)
    given = ratios if isinstance(ratios, Mapping) else dict.fromkeys(branches, ratios)
    missing = [branch for branch in branches if branch not in given]
    if missing:
        raise MethodError(f"there are no ratios for branch {', '.join(missing)}; given: {', '.join(given)}")
    return {branch: _at_steps(given[branch], fingerprint.num_steps) for branch in branches}


def _at_steps(values: Sequence[float], num_steps: int) -> list[float]:
    """The nearest given value of every step."""
    if not len(values) or not all(np.isfinite(values)) or min(values) <= 0:
        raise MethodError("ratios must be positive numbers, one per step")
    at = np.round(np.linspace(0, len(values) - 1, num_steps)).astype(int)
    return [float(values[k]) for k in at]


def _cells(
    ratios: Sequence[float], steps: Sequence[int], threshold: float, max_consecutive: int, retention: float
) -> list[Cell]:
    """For every step, an empty one where the transformer does not run."""
    product, count, error, anchor = 1.0, 0, 0.0, 0
    cells: list[Cell] = []
    first, run = steps[0] + max(1, int(retention * len(steps) + 0.5)), frozenset(steps)
    for step, gamma in enumerate(ratios):
        if step not in run:
            cells.append({})
            continue
        if step >= first:
            product, count = product * gamma, count + 1
            error += abs(1.0 - product)
            if error <= threshold and count <= max_consecutive:
                cells.append({anchor: 1.0})
                continue
            product, count, error = 1.0, 0, 0.0
        anchor = step
        cells.append(None)
    return cells


def build_schedule(
    fingerprint: Fingerprint,
    ratios: Ratios = "auto",
    threshold: float = 0.06,
    max_consecutive: int = 3,
    retention: float = 0.2,
) -> Schedule:
    """`MagCache` as a schedule: the function of version 0.1, which the class took the place of."""
    method = MagCache(ratios=ratios, threshold=threshold, max_consecutive=max_consecutive, retention=retention)
    return method.schedule(fingerprint)
