"""SeaCache: the change of what a filter for the picture at this noise level leaves of the input, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from layercache import ops
from layercache.errors import MethodError
from layercache.models.positions import spread
from layercache.runtime.policy import Decider, DynamicMethod, Observation, Run, by_name, check_range, ratio

INDICATORS = ("modulated", "latents")
_LEAST_LEVEL = 1e-6
_LEAST_POWER = 1e-16


@by_name
@dataclass(frozen=True, kw_only=True)
class SeaCache(DynamicMethod):
    """Reuses the residual of all blocks until the changes of the filtered input add up to ``threshold``.

    Per frequency the filter is that of the best linear denoiser for pictures whose power falls as ``|f|^-power``:
    ``g(f) = (1 - sigma) S / ((1 - sigma)^2 S + sigma^2)``, ``S = |f|^-power``, one factor per axis, over its mean.
    Source: docs/methods.md, SeaCache.

    ``SeaCache(indicator="latents", threshold=0.25, order=1, max_consecutive=2)`` is what diffusers has under this name.

    Attributes:
        threshold: of the sum of relative L1 changes from step to step.
        indicator: ``"modulated"``: the modulated input of the first block is filtered, over its tokens;
            ``"latents"``: what the transformer is given, which every model shows.
        power: by default 2 for a picture and 3 for a video.
        warmup, cooldown: steps at the beginning and at the end that are computed.
        max_consecutive: most reused steps in a row; -1 for no limit.
    """

    threshold: float = 0.3
    indicator: str = "modulated"
    power: float | None = None
    warmup: int = 1
    cooldown: int = 1
    max_consecutive: int = -1

    name: ClassVar[str] = "seacache"
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 1e-3, 10.0)
    needs_num_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold", self.threshold, 0)
        check_range("warmup", self.warmup, 0)
        check_range("cooldown", self.cooldown, 0)
        check_range("max_consecutive", self.max_consecutive, -1)
        if self.indicator not in INDICATORS:
            raise MethodError(f"unknown indicator {self.indicator!r} of SeaCache; choose {' or '.join(INDICATORS)}")
        if self.power is not None and not 0 < self.power < float("inf"):
            raise MethodError(f"power must be above 0, got {self.power!r}", argument="power")

    @property
    def needs_modulation(self) -> bool:  # type: ignore[override]
        return self.indicator == "modulated"

    def decider(self, run: Run) -> Decider:
        return _FilteredDecider(self, run)


class _FilteredDecider(Decider):
    """``A += mean over samples of |z - z_before| / |z_before|``, z the filtered input."""

    def __init__(self, method: SeaCache, run: Run):
        super().__init__(method, run)
        self.accumulated = 0.0
        self.consecutive = 0
        self._has_previous = False

    def must_compute(self, step: int) -> bool:
        method, run = self.method, self.run
        if run.num_steps is None or run.sigmas is None:
            return True  # nothing says the noise level to filter for
        capped = 0 <= method.max_consecutive <= self.consecutive
        return step < max(1, method.warmup) or step >= run.num_steps - method.cooldown or capped

    def observe(self, step: int, observation: Observation) -> torch.Tensor | None:
        if self.run.sigmas is None:
            return None
        seen = self._input(observation)
        sides = seen.shape[1:-1]
        power = self.method.power or (3.0 if len(sides) > 2 and sides[0] > 1 else 2.0)
        fresh = filtered(seen, noise_to_signal(step, self.run.sigmas), power).flatten(1, -2)
        kept = self.memory("filtered", fresh)
        found = ops.pair_statistics([fresh], [kept], per_sample=True).flatten() if self._has_previous else None
        kept.copy_(fresh)
        self._has_previous = True
        return found

    def _input(self, observation: Observation) -> torch.Tensor:
        """``[B, ..., C]`` with the axes of the picture between."""
        assert observation.latents is not None and observation.grid is not None
        if self.method.indicator == "latents":
            return observation.latents()
        scale, shift, eps = observation.modulation()
        return spread(ops.modulate(observation.start, scale, shift, eps=eps)[0], observation.grid())

    def may_reuse(self, step: int, numbers: Sequence[float]) -> bool:
        # a sample that is left out of the batch is 0 before and now
        rows = [(numbers[k], numbers[k + 2]) for k in range(0, len(numbers), 8) if numbers[k] or numbers[k + 2]]
        self.accumulated += sum(ratio(*row) for row in rows) / len(rows) if rows else float("inf")
        return self.accumulated < self.method.threshold

    def record(self, step: int, computed: bool) -> None:
        self.consecutive = 0 if computed else self.consecutive + 1
        if computed:
            self.accumulated = 0.0


def noise_to_signal(step: int, sigmas: Sequence[float]) -> float:
    """Amplitude of the noise over that of the picture at a step.

    Noise levels of flow matching mix ``(1 - sigma) x + sigma n``; where they rise (Mochi), it is the other way round,
    and levels above 1 are of ``x + sigma n``.
    """
    sigma = 1 - sigmas[step] if sigmas[0] < sigmas[-1] else sigmas[step]
    if max(sigmas) > 1:
        return min(max(sigma, _LEAST_LEVEL), 1 / _LEAST_LEVEL)
    sigma = min(max(sigma, _LEAST_LEVEL), 1 - _LEAST_LEVEL)
    return sigma / (1 - sigma)


def filtered(seen: torch.Tensor, noise: float, power: float) -> torch.Tensor:
    """What SeaCache's filter leaves of ``[B, ..., C]``, over the axes between; in fp32, rounded at the end.

    Args:
        noise: amplitude of the noise over that of the picture (`noise_to_signal`).
        power: exponent of the power that pictures are assumed to have.
    """
    axes = tuple(range(1, seen.dim() - 1))
    spectrum = torch.fft.rfftn(seen.float(), dim=axes)
    for axis in axes:
        side, shape = seen.shape[axis], [1] * seen.dim()
        gain = _gain(side, noise, power, seen.device)[: spectrum.shape[axis]]  # half the last axis: the input is real
        shape[axis] = len(gain)
        spectrum *= gain.view(shape)
    sides: Any = [seen.shape[axis] for axis in axes]
    return torch.fft.irfftn(spectrum, s=sides, dim=axes).to(seen.dtype).contiguous()


def _gain(side: int, noise: float, power: float, device: torch.device) -> torch.Tensor:
    """The filter along one axis, of mean 1; fp32 ``[side]``."""
    frequencies = torch.fft.fftfreq(side, device=device, dtype=torch.float64).abs()
    signal = 1 / (frequencies**power + _LEAST_POWER)
    gain = signal / (signal + noise**2)
    return (gain / gain.mean()).float()
