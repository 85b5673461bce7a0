"""PreciseCache: a trial on a smaller picture says which steps to skip, what blocks add says which of them to skip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from layercache import ops
from layercache.errors import MethodError
from layercache.runtime.policy import RowDecider, RowMethod, Run, by_name, check_range

# alpha, and the share of the blocks that are cached
PRESETS: dict[str, tuple[float, float]] = {"base": (0.5, 0.0), "turbo": (0.7, 0.0), "flash": (0.7, 0.4)}


@by_name
@dataclass(frozen=True, kw_only=True)
class PreciseCache(RowMethod):
    """Skips steps by the low frequencies of a trial's output, and in the others the blocks that add least.

    Every step runs the model on a picture of fewer tokens; d is the L2 distance of the low frequencies of its output
    from those of the step before. A step is skipped while the sum of d since the last computed step is below
    ``alpha`` times the largest d so far. After a step that computed every block, the next ``window`` computed steps
    leave out the ``cached_blocks`` whose residuals were smallest. All branches follow the one that runs first.
    Source: docs/methods.md, PreciseCache.

    Attributes:
        alpha: larger values skip more steps.
        cached_blocks: share of the blocks that are left out in computed steps; 0 for none.
        window: computed steps from one with all blocks to the next, not counting these.
        shrink: by which time, and height and width, are divided for the trial.
        radius: of the low frequencies, as a share of the shorter side.
    """

    alpha: float = 0.7
    cached_blocks: float = 0.4
    window: int = 3
    shrink: tuple[int, int] = (2, 4)
    radius: float = 0.2

    name: ClassVar[str] = "precisecache"
    knob: ClassVar[tuple[str, float, float]] = ("alpha", 1e-3, 100.0)

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("cached_blocks", self.cached_blocks, 0, 1)
        check_range("window", self.window, 0)
        check_range("radius", self.radius, 0)
        sides = tuple(self.shrink)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise MethodError(
                f"shrink is a whole number for time and one for height and width, got {self.shrink!r}",
                argument="shrink",
            )
        object.__setattr__(self, "shrink", sides)

    @classmethod
    def preset(cls, name: str) -> PreciseCache:
        """The paper's ``"base"`` and ``"turbo"``, which skip steps alone, or ``"flash"``.

        Raises:
            MethodError: another name.
        """
        if name not in PRESETS:
            raise MethodError(f"no preset {name!r} of PreciseCache; choose {', '.join(PRESETS)}")
        alpha, cached = PRESETS[name]
        return cls(alpha=alpha, cached_blocks=cached)

    @property
    def trial(self) -> tuple[int, int]:
        return self.shrink

    def groups(self, num_blocks: int) -> tuple[tuple[int, int], ...]:
        return super().groups(num_blocks) if self.cached_blocks and self.window else ((0, num_blocks),)

    def decider(self, run: Run, num_groups: int) -> RowDecider:
        return _Decider(self, run, num_groups)


class _Decider(RowDecider):
    """The sum of changes since the last computed step, the largest one, and the blocks that are left out."""

    def __init__(self, method: PreciseCache, run: Run, num_groups: int):
        self.method, self.run, self.num_groups = method, run, num_groups
        self.accumulated = self.largest = 0.0
        self.since_refresh = method.window  # computed steps that left blocks out
        self.pivotal: tuple[bool, ...] | None = None
        self._refreshes = self._has_previous = False
        self._low: torch.Tensor | None = None
        self._sizes = 0

    def wants_trial(self, step: int) -> bool:
        return True

    def wants_sizes(self, step: int) -> bool:
        return self._refreshes

    def observe(self, step: int, trial: torch.Tensor | None, sizes: torch.Tensor | None) -> torch.Tensor | None:
        assert trial is not None
        fresh, before = low_frequencies(trial, self.method.radius), self._low
        self._low = fresh
        self._has_previous = before is not None and before.shape == fresh.shape
        parts = [ops.pair_statistics([fresh], [before])[0, 3:4]] if self._has_previous and before is not None else []
        self._sizes = 0 if sizes is None else len(sizes)
        if sizes is not None:
            parts.append(sizes.to(fresh.device))
        return torch.cat(parts) if parts else None

    def choose(self, step: int, numbers: Sequence[float] | None) -> tuple[bool, ...]:
        numbers = [] if numbers is None else list(numbers)
        if self._sizes:
            self.pivotal = _largest(numbers[-self._sizes :], self.method.cached_blocks)
        if self._has_previous:
            change = math.sqrt(numbers[0]) if numbers[0] >= 0 else math.inf
            self.accumulated += change
            if math.isfinite(change):
                self.largest = max(self.largest, change)
            if self.accumulated < self.method.alpha * self.largest:
                self._refreshes = False
                return (False,) * self.num_groups
        self.accumulated = 0.0
        return self._blocks()

    def _blocks(self) -> tuple[bool, ...]:
        """The blocks of a computed step."""
        everything = (True,) * self.num_groups
        if not (self.method.cached_blocks and self.method.window):
            return everything
        self._refreshes = self.since_refresh >= self.method.window or self.pivotal is None
        if self._refreshes:
            self.since_refresh, self.pivotal = 0, None
            return everything
        self.since_refresh += 1
        assert self.pivotal is not None
        return self.pivotal

    @property
    def nbytes(self) -> int:
        return 0 if self._low is None else self._low.numel() * self._low.element_size()


def _largest(sizes: Sequence[float], cached: float) -> tuple[bool, ...]:
    """Per block whether it is none of the share that adds least; sizes that are not finite count as largest."""
    order = sorted(range(len(sizes)), key=lambda block: sizes[block] if math.isfinite(sizes[block]) else math.inf)
    left_out = set(order[: min(round(cached * len(sizes)), len(sizes) - 1)])
    return tuple(block not in left_out for block in range(len(sizes)))


def low_frequencies(output: torch.Tensor, radius: float) -> torch.Tensor:
    """What of ``[B, ..., C]`` lies within a radius in the spectrum over the last two axes of the picture.

    Args:
        radius: as a share of the shorter of these sides.

    Returns:
        fp32 ``[B, rows, C]``.
    """
    axes = tuple(range(max(1, output.dim() - 3), output.dim() - 1))
    spectrum = torch.fft.rfftn(output.float(), dim=axes)
    sides: list[Any] = [output.shape[axis] for axis in axes]
    distance: Any = 0.0
    for axis, side in zip(axes, sides, strict=True):
        places = torch.fft.fftfreq(side, 1 / side, device=output.device)[: spectrum.shape[axis]].abs()
        distance = distance + (places**2).view([-1 if k == axis else 1 for k in range(output.dim())])
    kept = spectrum * (distance <= (radius * min(sides)) ** 2)
    return torch.fft.irfftn(kept, s=sides, dim=axes).contiguous().flatten(1, -2)
