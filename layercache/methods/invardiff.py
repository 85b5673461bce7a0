"""InvarDiff: where features change by a nearly constant rate, on a few runs, fixes one plan (arXiv 2512.05134)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from layercache import ops
from layercache._utils.timer import Timer
from layercache._utils.validate import expect
from layercache.errors import MethodError
from layercache.methods.full_runs import generate_once, transformer_of
from layercache.models.registry import fingerprint_of, spec_for
from layercache.runtime.attachment import attach
from layercache.runtime.modules import ModuleRouter, Output, as_rows, copy_of, sigmas_of, tensors_of
from layercache.runtime.policy import check_range
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.memory_plan import CAPTURE, GroupAction
from layercache.schedule.module_schedule import ModuleSchedule

TINY = 1e-8

# quantiles of FLUX.1-dev at 28 steps, and of DiT-XL/2 and Wan 2.1 at 50 (docs/methods.md, InvarDiff)
PROFILES: dict[str, dict[str, Any]] = {
    "flux-fast": {"nonskip": 0.10, "step_quantile": 0.70, "module_quantiles": 0.68},
    "flux-medium-1": {
        "nonskip": 0.10,
        "step_quantile": 0.70,
        "module_quantiles": {
            "transformer_blocks.attn": 0.68,
            "transformer_blocks.ff": 0.0,
            "transformer_blocks.ff_context": 0.0,
            "single_transformer_blocks.attn": 0.68,
            "single_transformer_blocks.proj_mlp+act_mlp": 0.0,
        },
    },
    "flux-medium-2": {
        "nonskip": 0.15,
        "step_quantile": 0.70,
        "module_quantiles": {
            "transformer_blocks.attn": 0.68,
            "transformer_blocks.ff": 0.0,
            "transformer_blocks.ff_context": 0.0,
            "single_transformer_blocks.attn": 0.70,
            "single_transformer_blocks.proj_mlp+act_mlp": 0.0,
        },
    },
    "flux-slow": {
        "nonskip": 0.22,
        "step_quantile": 0.72,
        "module_quantiles": {
            "transformer_blocks.attn": 0.68,
            "transformer_blocks.ff": 0.66,
            "transformer_blocks.ff_context": 0.0,
            "single_transformer_blocks.attn": 0.68,
            "single_transformer_blocks.proj_mlp+act_mlp": 0.62,
        },
    },
    "dit-fast": {"nonskip": 0.0, "step_quantile": 0.63, "module_quantiles": 0.22},
    "dit-slow": {"nonskip": 0.0, "step_quantile": 0.61, "module_quantiles": 0.20},
    "wan-steps": {
        "nonskip": 0.04,
        "step_quantile": 0.63,
        "module_quantiles": {"blocks.attn1": 0.82, "blocks.attn2": 1.0, "blocks.ffn": 0.82},
    },
    "wan-modules": {
        "nonskip": 0.04,
        "step_quantile": 0.0,
        "module_quantiles": {"blocks.attn1": 0.50, "blocks.attn2": 0.35, "blocks.ffn": 0.20},
    },
}


@dataclass(frozen=True)
class Rates:
    """Rates of change on full runs: mean over prompts and branches.

    Attributes:
        fingerprint: of the model and run.
        units: names of the modules.
        kinds: of each, what shares a quantile.
        steps: ``rho[t]`` of the final hidden state, ``[N]``; 1 at both ends, and where the transformer does not run.
        modules: ``rho[t, unit]``, ``[N, U]``.
        seconds: of each module.
    """

    SOURCE: ClassVar[str] = "layercache.methods.invardiff.measure(pipe, prompts) gives them"

    fingerprint: Fingerprint
    units: tuple[str, ...]
    kinds: tuple[str, ...]
    steps: np.ndarray
    modules: np.ndarray
    seconds: tuple[float, ...] = ()


@dataclass
class _Track:
    """The newest accepted output of one unit in one branch, and how far it had moved."""

    reference: Output = None
    moved: torch.Tensor | None = None
    flagged: bool = False
    sums: list[torch.Tensor] = field(default_factory=list)


class _RateRouter(ModuleRouter):
    """Computes everything; per branch and unit, ``|Z_k - ref|`` over that of the step before.

    ``is_cached(step, unit)`` tells which outputs are taken to be reused in the second phase, unit -1 being the final
    hidden state.
    """

    def __init__(self, transformer: Any, spec: Any, scheduler: Any, is_cached: Callable[[int, int], bool] | None):
        super().__init__(transformer, spec, scheduler)
        self.is_cached = is_cached
        self.tracks: dict[tuple[str, int], _Track] = {}
        self.ratios: dict[tuple[str, int], list[tuple[int, torch.Tensor]]] = {}
        self.branches: list[str] = []
        self.clock = Timer(next(transformer.parameters()).device)
        self.sigmas: tuple[float, ...] = ()
        self.steps_run: set[int] = set()

    def announce(self, arguments: Mapping[str, Any]) -> None:
        self.require_one_shape(arguments)
        if self.branch not in self.branches:
            self.branches.append(self.branch)
        if self.starts:
            self.sigmas = sigmas_of(self.identity.scheduler)
            self.tracks = {key: track for key, track in self.tracks.items() if key[0] != self.branch}
        self.steps_run.add(self.step_index)
        self.open((GroupAction(CAPTURE),))

    def through(self, number: int, compute: Callable[[], Output]) -> Output:
        self.clock.mark(number)
        output = compute()
        self.clock.mark(None)
        self._follow(number, output)
        return output

    def capture(self, group: int, image_in: Any, text_in: Any, image_out: Any, text_out: Any) -> None:
        self._follow(-1, self.leaving(image_out, text_out))

    def _follow(self, number: int, output: Output) -> None:
        step, position = self.step_index, self.step_index - self.first_step
        track = self.tracks.setdefault((self.branch, number), _Track())
        if position == 0:
            track.reference = copy_of(output, track.reference)
            return
        pairs = [list(tensors_of(value)) for value in (output, track.reference)]
        moved = sum(ops.pair_statistics([as_rows(a)], [as_rows(b)])[0, 0].double() for a, b in zip(*pairs, strict=True))
        count = sum(t.numel() for t in pairs[0])
        moved = torch.clamp(moved, min=TINY * count)  # type: ignore[arg-type]
        if position >= 2 and track.moved is not None:
            self.ratios.setdefault((self.branch, number), []).append((step - 1, moved / track.moved))
        keeps = False
        if position >= 2 and self.is_cached is not None and self.is_cached(step - 1, number):
            # of consecutive cached steps only the first moves the reference
            keeps, track.flagged = track.flagged, True
        else:
            track.flagged = False
        if not keeps:
            track.moved = moved
            track.reference = copy_of(output, track.reference)

    def mean_ratios(self, number: int, num_steps: int) -> np.ndarray:
        rho = np.ones(num_steps)
        values: dict[int, list[float]] = {}
        for (_, unit), found in self.ratios.items():
            if unit == number:
                for step, ratio in found:
                    values.setdefault(step, []).append(float(ratio))
        for step, own in values.items():
            rho[step] = np.mean(own)
        return rho


def measure(
    pipe: Any,
    prompts: Sequence[Any],
    seeds: Sequence[int] | None = None,
    cached: tuple[np.ndarray, np.ndarray] | None = None,
    transformer: str = "transformer",
    **call: Any,
) -> Rates:
    """Rates of change of every module and of the final hidden state, on full runs.

    Args:
        pipe: a diffusers pipeline.
        prompts, seeds, call: the runs (the paper takes 5 prompts); see `layercache.calibrate`.
        cached: of a first phase, which steps ``[N]`` and modules ``[N, U]`` would be reused: distances are then taken
            from what would be there (the resampling correction).
        transformer: of a pipeline with several, the component to measure (Wan 2.2: ``"transformer_2"`` runs the later
            steps); the rates say at which steps it runs.

    Source: docs/methods.md, InvarDiff.

    Raises:
        MethodError: no prompts, seeds that do not match, or a transformer that never runs.
        UnsupportedModelError: no pipeline.
    """
    model = transformer_of(pipe, transformer)
    if not prompts:
        raise MethodError("InvarDiff measures at least one full run; give a prompt")
    given = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(given) != len(prompts):
        raise MethodError(f"give one seed per prompt: {len(prompts)} prompts, {len(given)} seeds")

    def reuses(step: int, unit: int) -> bool:
        assert cached is not None
        return bool(cached[0][step] if unit < 0 else cached[1][step, unit])

    is_cached = None if cached is None else reuses
    router = _RateRouter(model, spec_for(model), getattr(pipe, "scheduler", None), is_cached)
    attachment = attach(pipe, router)
    try:
        for prompt, seed in zip(prompts, given, strict=True):
            generate_once(pipe, prompt, seed, call)
    finally:
        attachment.detach()
    if not router.steps_run:
        raise MethodError(f"{transformer} ran at no step of these runs", argument="transformer")
    steps, own = len(router.sigmas) - 1, sorted(router.steps_run)
    totals = router.clock.totals()
    seconds = [totals.get(unit, 0.0) / len(own) for unit in range(len(router.units))]
    return Rates(
        fingerprint_of(model, router.sigmas, router.branches, own),
        tuple(unit.name for unit in router.units),
        tuple(unit.kind for unit in router.units),
        router.mean_ratios(-1, steps),
        np.stack([router.mean_ratios(unit, steps) for unit in range(len(router.units))], axis=1),
        tuple(seconds),
    )


@dataclass(frozen=True)
class InvarDiff:
    """Reuses steps and modules whose rate of change lies below a quantile.

    Source: docs/methods.md, InvarDiff.

    Attributes:
        step_quantile: share of the steps, about, whose final hidden state is reused.
        module_quantiles: the same for modules; one number for all, or by kind (`Rates.kinds`).
        nonskip: share of the steps at the beginning that is computed.
        cooldown: steps at the end that are computed; the last one always is.

    Raises:
        MethodError: on construction, when a setting is out of range.
    """

    SOURCE: ClassVar[str] = "the class is in the same module"

    step_quantile: float = 0.5
    module_quantiles: float | Mapping[str, float] = 0.3
    nonskip: float = 0.1
    cooldown: int = 1

    name: ClassVar[str] = "invardiff"

    def __post_init__(self) -> None:
        check_range("step_quantile", self.step_quantile, 0, 1)
        check_range("nonskip", self.nonskip, 0, 1)
        check_range("cooldown", self.cooldown, 1)
        given = self.module_quantiles
        for kind, value in given.items() if isinstance(given, Mapping) else [("all", given)]:
            check_range(f"module_quantiles of {kind}", value, 0, 1)

    def quantile_of(self, kind: str) -> float:
        given = self.module_quantiles
        if not isinstance(given, Mapping):
            return float(given)
        if kind not in given:
            raise MethodError(f"module_quantiles has no entry for {kind}; it has {', '.join(given)}")
        return float(given[kind])

    def first(self, num_steps: int) -> int:
        return max(1, int(self.nonskip * num_steps))

    @classmethod
    def preset(cls, name: str) -> InvarDiff:
        """The published settings of a model (`PROFILES`); raises `MethodError` for another name."""
        if name not in PROFILES:
            raise MethodError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
        return cls(**PROFILES[name])

    def schedule(
        self,
        pipe: Any,
        prompts: Sequence[Any],
        seeds: Sequence[int] | None = None,
        transformer: str = "transformer",
        **call: Any,
    ) -> ModuleSchedule:
        """Both phases: full runs, a first plan, the same runs with distances from what it would reuse, the final plan.

        Args:
            pipe: a diffusers pipeline.
            prompts, seeds, transformer, call: the runs (`measure`).

        Raises:
            MethodError: the settings do not fit the model.
            UnsupportedModelError: no pipeline.
        """
        rates = measure(pipe, prompts, seeds, transformer=transformer, **call)
        corrected = measure(pipe, prompts, seeds, first_phase(rates, self), transformer, **call)
        return plan(rates, corrected, self)


def below_quantile(rho: np.ndarray, quantile: float, first: int, last: int = 1) -> np.ndarray:
    """Which entries of ``rho [N, ...]`` lie below the quantile of all inner steps; none of the first and last steps.

    Source: docs/methods.md, InvarDiff.
    """
    inner = rho[1:-1]
    if quantile <= 0 or not inner.size:
        return np.zeros(rho.shape, dtype=bool)
    found = rho < np.quantile(inner, quantile)
    found[:first] = False
    found[max(0, len(found) - last) :] = False
    return found


def first_phase(rates: Rates, settings: InvarDiff) -> tuple[np.ndarray, np.ndarray]:
    """Reused steps ``[N]`` and modules ``[N, U]`` of uncorrected rates.

    Raises:
        ArgumentError: no rates, or no settings.
    """
    _check_kinds("invardiff.first_phase", [rates], settings)
    return _steps(rates, settings), _modules(rates, settings, 1)


def _check_kinds(by: str, rates: Sequence[Any], settings: Any) -> None:
    for one in rates:
        expect(by, one, Rates)
    expect(by, settings, InvarDiff)


def _steps(rates: Rates, settings: InvarDiff) -> np.ndarray:
    own = list(rates.fingerprint.steps)
    cached = np.zeros(len(rates.steps), dtype=bool)
    first = settings.first(len(own))
    cached[own] = below_quantile(rates.steps[own], settings.step_quantile, first, settings.cooldown)
    return cached


def _modules(rates: Rates, settings: InvarDiff, first: int) -> np.ndarray:
    own = list(rates.fingerprint.steps)
    cached = np.zeros(rates.modules.shape, dtype=bool)
    for kind in dict.fromkeys(rates.kinds):
        columns = [unit for unit, name in enumerate(rates.kinds) if name == kind]
        # all layers of a kind share one threshold
        cells = np.ix_(own, columns)
        cached[cells] = below_quantile(rates.modules[cells], settings.quantile_of(kind), first, settings.cooldown)
    return cached


def plan(rates: Rates, corrected: Rates, settings: InvarDiff) -> ModuleSchedule:
    """The final plan: steps of the first phase, modules of the corrected rates; after a reused step all are computed.

    Source: docs/methods.md, InvarDiff.

    Raises:
        ArgumentError: no rates, or no settings.
    """
    _check_kinds("invardiff.plan", [rates, corrected], settings)
    num_steps = len(rates.steps)
    steps = _steps(rates, settings)
    modules = _modules(corrected, settings, settings.first(len(rates.fingerprint.steps)))
    for step in range(num_steps):
        if steps[step]:
            modules[step] = True
            if step + 1 < num_steps:
                modules[step + 1] = False
    return ModuleSchedule(
        rates.fingerprint,
        rates.units,
        tuple(tuple(not c for c in row) for row in modules.tolist()),
        frozenset(np.flatnonzero(steps).tolist()),
        rates.seconds,
        {
            "method": "invardiff",
            "step_quantile": settings.step_quantile,
            "module_quantiles": dict(settings.module_quantiles)
            if isinstance(settings.module_quantiles, Mapping)
            else settings.module_quantiles,
            "nonskip": settings.nonskip,
            "cooldown": settings.cooldown,
        },
    )


# Names of version 0.1, which the class took the place of.
Settings = InvarDiff


def build_schedule(
    pipe: Any,
    prompts: Sequence[Any],
    seeds: Sequence[int] | None = None,
    settings: InvarDiff | str | None = None,
    **call: Any,
) -> ModuleSchedule:
    """`InvarDiff.schedule` of these settings, or of a preset's name."""
    method = InvarDiff.preset(settings) if isinstance(settings, str) else settings or InvarDiff()
    return method.schedule(pipe, prompts, seeds, **call)
