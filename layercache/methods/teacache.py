"""TeaCache and SpectralCache: the change of the first block's modulated input, added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from layercache import ops
from layercache.errors import MethodError
from layercache.runtime.policy import Decider, DynamicMethod, Observation, Run, by_name, check_range, ratio

# degree 4, highest power first, as published (docs/methods.md, TeaCache)
COEFFICIENTS = {
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "lumina2": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "lumina2-alternative": (
        225.7042019806413,
        -608.8453716535591,
        304.1869942338369,
        124.21267720116742,
        -1.4089066892956552,
    ),
    "hidream-i1": (-31360.5009, -712.425503, 49.1363285, 8.2651549, 0.108053901),
    "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    "ltx-video": (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
    "cosmos": (271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633),
    "cogvideox-2b": (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "cogvideox-5b": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "latte": (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402),
    "open-sora": (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624),
    "open-sora-plan": (205943.668, -14875.9286, 306.085986, 1.3141808, 0.00239658469),
    # fitted to the change of a time embedding, not of the modulated input
    "wan2.1-t2v-1.3b-ret": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "wan2.1-t2v-14b-ret": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
    "wan2.1-t2v-1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan2.1-t2v-14b": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "wan2.1-i2v-480p-ret": (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
    "wan2.1-i2v-720p-ret": (8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
    "wan2.1-i2v-480p": (-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    "wan2.1-i2v-720p": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
}
MODELS = {"FluxTransformer2DModel": "flux", "HunyuanVideoTransformer3DModel": "hunyuan-video"}
IDENTITY = (1.0, 0.0)


class _ModulatedDecider(Decider):
    """``A += poly(d)``, d the relative L1 change of the modulated input since the step before."""

    def __init__(self, method: TeaCache, run: Run):
        super().__init__(method, run)
        self.accumulated = 0.0
        self.consecutive = 0
        self._has_previous = False

    def must_compute(self, step: int) -> bool:
        method = self.method
        return step < max(1, method.warmup) or (
            self.run.num_steps is not None and step >= self.run.num_steps - method.cooldown
        )

    def observe(self, step: int, observation: Observation) -> torch.Tensor | None:
        scale, shift, eps = observation.modulation()
        modulated = self.memory("modulated", observation.start)
        previous = modulated if self._has_previous else None
        self._has_previous = True
        segments = self.method.segments(observation.start.shape[-1])
        _, statistics = ops.modulate(
            observation.start, scale, shift, eps=eps, previous=previous, segments=segments, result=modulated
        )
        return statistics

    def change(self, rows: Sequence[Sequence[float]]) -> float:
        return ratio(sum(row[0] for row in rows), sum(row[2] for row in rows))

    def may_reuse(self, step: int, numbers: Sequence[float]) -> bool:
        self.accumulated += self.method.rescaled(self.change([numbers]))
        return self.accumulated < self.method.threshold

    def record(self, step: int, computed: bool) -> None:
        self.consecutive = 0 if computed else self.consecutive + 1
        if computed:
            self.accumulated = 0.0


@by_name
@dataclass(frozen=True, kw_only=True)
class TeaCache(DynamicMethod):
    """Reuses the residual of all blocks until the changes of the modulated input add up to ``threshold``.

    Source: docs/methods.md, TeaCache.

    Attributes:
        threshold: of the sum.
        coefficients: polynomial that turns the change of the input into that of the output, highest power first; the
            name of a published one (`COEFFICIENTS`); or ``"auto"``: the published one of the model's class. `fit`
            makes one for any model.
        warmup, cooldown: steps at the beginning and at the end that are computed.
    """

    threshold: float = 0.25
    coefficients: str | tuple[float, ...] = "auto"
    warmup: int = 1
    cooldown: int = 1

    name: ClassVar[str] = "teacache"
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 1e-3, 10.0)
    needs_num_steps: ClassVar[bool] = True
    needs_modulation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold", self.threshold, 0)
        check_range("warmup", self.warmup, 0)
        check_range("cooldown", self.cooldown, 0)
        given = self.coefficients
        if isinstance(given, str):
            if given != "auto" and given not in COEFFICIENTS:
                raise MethodError(
                    f"no coefficients are known as {given!r}; choose {', '.join(COEFFICIENTS)} or fit some"
                )
        elif not given or not all(math.isfinite(c) for c in given):
            raise MethodError(f"coefficients must be finite numbers, highest power first, got {given}")

    def for_model(self, model_class: str) -> TeaCache:
        """With the numbers in the place of a name.

        Raises:
            MethodError: none are published for this class.
        """
        from dataclasses import replace

        name = self.coefficients
        if not isinstance(name, str):
            return self
        if name == "auto":
            if model_class not in MODELS:
                raise MethodError(
                    f"no TeaCache coefficients are published for {model_class}: measure them, coefficients, _ = "
                    "layercache.methods.teacache.fit(pipe, prompts), and give TeaCache(coefficients=coefficients), or "
                    f"name one of {', '.join(COEFFICIENTS)}"
                )
            name = MODELS[model_class]
        return replace(self, coefficients=COEFFICIENTS[name])

    def rescaled(self, change: float) -> float:
        """The polynomial; negative values, which it has outside the range it was fitted in, count as 0."""
        assert not isinstance(self.coefficients, str)
        return max(0.0, float(np.polyval(self.coefficients, change)))

    def segments(self, channels: int) -> tuple[int, ...]:
        """Inner bounds of the channel ranges whose changes are looked at apart."""
        return ()

    def decider(self, run: Run) -> Decider:
        return _ModulatedDecider(self, run)


class _SpectralDecider(_ModulatedDecider):
    method: SpectralCache

    def may_reuse(self, step: int, numbers: Sequence[float]) -> bool:
        low, high = numbers[:8], numbers[8:]
        self.accumulated += self.method.rescaled(self.change([low, high]))
        threshold = self.method.threshold_at(step, self.run.num_steps or 1)
        return (
            self.accumulated < threshold
            and self.consecutive < self.method.max_consecutive
            and self.change([low]) <= 0.8 * threshold
            and self.change([high]) <= 1.5 * threshold
        )


@by_name
@dataclass(frozen=True, kw_only=True)
class SpectralCache(TeaCache):
    """TeaCache with a threshold that is strict at both ends, a limit of skips in a row, and two channel ranges.

    Source: docs/methods.md, SpectralCache.

    Attributes:
        least, most: the threshold is multiplied by ``least`` at the ends and by ``most`` in the middle of the run.
        max_consecutive: most reused steps in a row.
        low_share: share of the channels in the first range.
    """

    threshold: float = 0.6
    least: float = 0.5
    most: float = 1.5
    max_consecutive: int = 2
    low_share: float = 0.5

    name: ClassVar[str] = "spectralcache"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("least", self.least, 0)
        check_range("most", self.most, self.least)
        check_range("max_consecutive", self.max_consecutive, 1)
        if not 0 < self.low_share < 1:
            raise MethodError(f"low_share must lie between 0 and 1, got {self.low_share}")

    def threshold_at(self, step: int, num_steps: int) -> float:
        swing = (1 - math.cos(2 * math.pi * step / num_steps)) / 2
        return self.threshold * (self.least + (self.most - self.least) * swing)

    def segments(self, channels: int) -> tuple[int, ...]:
        return (min(channels - 1, max(1, int(self.low_share * channels))),)

    def decider(self, run: Run) -> Decider:
        return _SpectralDecider(self, run)


def fit(pipe: Any, prompts: Sequence[Any], seeds: Sequence[int] | None = None, degree: int = 4, **call: Any) -> Any:
    """TeaCache's coefficients for a model, from full runs: ``(coefficients, pairs [n, 2])``.

    A least-squares polynomial from the relative L1 change of the modulated input to that of the image stream behind
    the last block, over steps, branches and prompts. Source: docs/methods.md, TeaCache.

    Args:
        pipe: a diffusers pipeline.
        prompts, seeds, call: full runs, see `layercache.calibrate`.
        degree: of the polynomial.

    Raises:
        MethodError: too few steps for the degree, or the model does not show its modulation.
        UnsupportedModelError: no pipeline.
    """
    from layercache.methods.full_runs import input_output_changes

    pairs = input_output_changes(pipe, prompts, seeds, **call)
    if len(pairs) <= degree:
        raise MethodError(f"{len(pairs)} changes are too few for a polynomial of degree {degree}; take more prompts")
    coefficients = np.polynomial.Polynomial.fit(pairs[:, 0], pairs[:, 1], degree).convert(domain=(-1, 1)).coef
    return tuple(float(c) for c in coefficients[::-1]), pairs
