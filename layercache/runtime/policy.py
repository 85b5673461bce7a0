"""What a method whose decisions depend on what it sees has to say: its settings, and a `Decider` per branch."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch

from layercache.errors import LayerCacheWarning, MethodError, ScheduleError
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.forecast import taylor_forecast
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.schedule import Schedule, Velocity

SYNCS = ("step", "lagged")

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """The generation that a method decides for.

    Attributes:
        num_steps: ``None`` where nobody knows (a bare transformer without a scheduler).
        sigmas: noise levels, ``num_steps + 1`` values, or ``None``.
    """

    num_steps: int | None = None
    sigmas: tuple[float, ...] | None = None


@dataclass
class Observation:
    """What can be looked at in front of the blocks that may be skipped.

    Attributes:
        start: image stream in front of the first block, ``[B, S, D]``.
        probe: behind the probe blocks; ``start`` where there are none.
        modulation: gives scale, shift and eps of the first block's modulated input (`ModelSpec.modulation`).
        latents: gives the transformer's first argument with its channels last, ``[B, ..., C]``
            (`layercache.models.positions.on_grid`).
        grid: gives the tokens of the picture along time, height and width (`layercache.models.positions.token_grid`).
        timestep: that the transformer is given, in its own unit; ``None`` where it is given none.
    """

    start: torch.Tensor
    probe: torch.Tensor
    modulation: Callable[[], tuple[torch.Tensor, torch.Tensor, float]]
    latents: Callable[[], torch.Tensor] | None = None
    grid: Callable[[], tuple[int, ...]] | None = None
    timestep: torch.Tensor | None = None


class Decider(ABC):
    """Decisions of one branch in one generation. The arithmetic is on the host, the statistics come from one launch."""

    def __init__(self, method: Any, run: Run):
        self.method, self.run = method, run
        self._memory: dict[str, torch.Tensor] = {}

    def memory(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor of its own, kept between steps; what it holds is not cleared."""
        found = self._memory.get(name)
        if found is None:
            found = self._memory[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return found

    def swap(self, a: str, b: str) -> None:
        self._memory[a], self._memory[b] = self._memory.get(b), self._memory[a]  # type: ignore[assignment]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._memory.values() if t is not None)

    def clear(self, excluded: Any) -> None:
        """Forgets samples of the batch that turned out to be NaN (`layercache.runtime.samples.Excluded`)."""
        excluded.clear([t for t in self._memory.values() if t is not None])

    def is_last(self, step: int) -> bool:
        return self.run.num_steps is not None and step == self.run.num_steps - 1

    @abstractmethod
    def must_compute(self, step: int) -> bool:
        """Whether the step is computed whatever is seen."""

    @abstractmethod
    def observe(self, step: int, observation: Observation) -> torch.Tensor | None:
        """Remembers what is seen; fp32 statistics against what was, or ``None`` where there is nothing to compare."""

    @abstractmethod
    def may_reuse(self, step: int, numbers: Sequence[float]) -> bool:
        """The published rule on the numbers of `observe`; NaN never counts as a small change."""

    @abstractmethod
    def record(self, step: int, computed: bool) -> None:
        """The decision was made; references that belong to computed steps move here."""

    def terms(self, step: int, anchors: Sequence[int]) -> dict[int, float]:
        """Coefficients of the stored residuals, by the step that stored them; ``anchors`` newest first."""
        return taylor_forecast(step, anchors, self.method.order)


class StepDecider(ABC):
    """Decisions about whole steps of one generation, for all branches together."""

    @abstractmethod
    def observe(self, inputs: torch.Tensor) -> None:
        """The latents that the transformer is given at a step, whatever is decided then."""

    @abstractmethod
    def must_compute(self, step: int) -> bool:
        """Whether the step is computed whatever was observed."""

    @abstractmethod
    def numbers(self) -> list[float]:
        """The statistics that `may_reuse` decides by; the one transfer of a step."""

    @abstractmethod
    def may_reuse(self, numbers: Sequence[float]) -> bool:
        """The published rule; NaN never counts as a small change."""

    @abstractmethod
    def velocity(self, step: int) -> Velocity:
        """What the sampler gets at a skipped step."""

    @abstractmethod
    def record(self, step: int, velocity: torch.Tensor) -> None:
        """The model gave a velocity for the inputs last observed."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of what is kept between steps."""


class StepMethod(ABC):
    """Settings of a method that decides about whole steps before they run; attributes as of `DynamicMethod`."""

    name: ClassVar[str] = ""
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 1e-3, 3.0)

    @abstractmethod
    def decider(self, run: Run) -> StepDecider:
        """A new one, for one generation."""


class RowDecider(ABC):
    """Decisions of one generation about groups of blocks, before a step runs, for all branches together."""

    @abstractmethod
    def wants_trial(self, step: int) -> bool:
        """Whether the forward on a smaller picture is to be run at this step."""

    @abstractmethod
    def wants_sizes(self, step: int) -> bool:
        """Whether what the groups add to the picture is measured at this step; asked once it was decided."""

    @abstractmethod
    def observe(self, step: int, trial: torch.Tensor | None, sizes: torch.Tensor | None) -> torch.Tensor | None:
        """Statistics to decide by, fp32; ``None`` where there is nothing to compare.

        Args:
            trial: the model's output on the smaller picture, ``[B, ..., C]``.
            sizes: per group the sum of squares of what it last added to the picture, once after it was measured.
        """

    @abstractmethod
    def choose(self, step: int, numbers: Sequence[float] | None) -> tuple[bool, ...]:
        """Per group whether it is computed, by the numbers of `observe`; NaN never counts as a small change."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of what is kept between steps."""


class RowMethod(ABC):
    """Settings of a method that decides before a step runs which groups of blocks it computes.

    A group that is not computed adds the residual of the newest step that computed it. Attributes as of
    `DynamicMethod`.
    """

    name: ClassVar[str] = ""
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 1e-3, 3.0)
    needs_num_steps: ClassVar[bool] = False

    @property
    def trial(self) -> tuple[int, int] | None:
        """By which time, and height and width, are divided for the forward on a smaller picture, if there is one."""
        return None

    def groups(self, num_blocks: int) -> tuple[tuple[int, int], ...]:
        """Block ranges that are decided about; by default every block for itself."""
        return tuple((block, block + 1) for block in range(num_blocks))

    @abstractmethod
    def decider(self, run: Run, num_groups: int) -> RowDecider:
        """A new one, for one generation."""


class PlannedMethod(ABC):
    """Settings of a method whose schedule follows from the steps of a run alone.

    Enabled on a pipeline, it makes the schedule of the run that the pipeline is at.
    """

    name: ClassVar[str] = ""

    @property
    def replaces_velocity(self) -> bool:
        """Whether its schedules replace velocities, as those do that skip whole steps."""
        return True

    @abstractmethod
    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        """The schedule for this model and run.

        Raises:
            ArgumentError: no fingerprint.
            MethodError: the settings do not fit the model or the run.
        """

    def schedule_of_run(self, fingerprint: Fingerprint, scheduler: Any, first: int) -> Schedule:
        """The schedule of a run that is about to begin with step ``first``, for methods that look at the sampler too.

        By default that of the steps that run. A method whose settings name steps of the whole run gives that of it:
        what it would read of steps that are not run is computed instead.
        """
        return self.schedule(fingerprint.starting_at(first))


class PlannedModules(PlannedMethod):
    """Settings of a method whose schedule of modules follows from the steps of a run alone."""

    @property
    def replaces_velocity(self) -> bool:
        return False

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        """Raises `MethodError`: its schedule is of modules, which a fingerprint does not name."""
        raise MethodError(
            f"the schedule of {type(self).__name__} is of single modules: enable the method itself, or take "
            "module_schedule(fingerprint, units)"
        )

    @abstractmethod
    def module_schedule(
        self, fingerprint: Fingerprint, units: Sequence[str], seconds: Sequence[float] = ()
    ) -> ModuleSchedule:
        """The schedule for this model and run.

        Args:
            fingerprint: of model and run.
            units: names of the model's modules (`layercache.runtime.modules.module_units`).
            seconds: measured, of each; equal without.
        """


def check_length(method: str, computed: Sequence[int], planned: int | None, steps: int) -> None:
    """Refuses a plan of computed steps for a run of another number of steps than it is of.

    Args:
        method: its name.
        computed: ascending.
        planned: steps of the run that it is of; ``None`` where that is not known.
        steps: of the run.

    Raises:
        ScheduleError: it is of another number, or computes steps behind the last one.
    """
    if planned not in (None, steps):
        raise ScheduleError(
            f"this plan of {method} is for runs of {planned} steps, this run has {steps}; plan for {steps} steps, or "
            f"call the pipeline with {planned}"
        )
    if computed[-1] >= steps:
        raise ScheduleError(
            f"computed steps must lie below {steps}, got {list(computed)}; plan them for this number of steps"
        )


def warn_of_length(method: str, planned: int | None) -> None:
    """Warns of a plan that a pipeline runs, and that does not say of how many steps it is."""
    if planned is None:
        warnings.warn(
            f"this plan of {method} names computed steps, and not of how many: a run of another number of steps gives "
            f"other pictures, and nothing notices; give num_steps= to {method}",
            LayerCacheWarning,
            stacklevel=2,
        )


def by_name(method: type[T]) -> type[T]:
    """A dataclass of settings that says how to name them where they are given by position.

    Raises:
        MethodError: of the class's construction, for a setting without its name.
    """
    make = method.__init__

    @functools.wraps(make)
    def named(self: Any, *unnamed: Any, **settings: Any) -> None:
        if unnamed:
            raise MethodError(_unnamed(method, unnamed[0]))
        make(self, **settings)

    method.__init__ = named  # type: ignore[method-assign]
    return method


def _unnamed(method: Any, value: Any) -> str:
    own = [field for field in fields(method) if field.name in method.__annotations__]
    names = [field.name for field in own] + [field.name for field in fields(method) if field not in own]
    shown = value if type(value) in (int, float) else own[0].default
    example = f"{method.__name__}({names[0]}={shown!r})"
    return f"give the settings of {method.__name__} by name, such as {example}; there are {', '.join(names)}"


@dataclass(frozen=True, kw_only=True)
class DynamicMethod(ABC):
    """Settings of a method that decides as it runs. Blocks ``[skip_from, L - tail)`` are reused or computed.

    Settings are given by name: those of every method, here, would come before those of its own.

    Attributes:
        order: 0 reuses the newest residual; above, it is extended by so many finite differences (docs/methods.md,
            SeaCache).
        sync: ``"step"`` decides from what is seen in the same step: one small transfer from the device per decision.
            ``"lagged"`` decides from what was seen a step before and never waits for the device.
        per_branch: every guidance branch decides for itself; otherwise all follow the first.
        name: what the method is called in reports and by `layercache compare`.
        knob: the setting that is tuned to a budget, and its range; larger values reuse more.
        needs_num_steps: whether it must know how many steps a run has.
        needs_modulation: whether it looks at the modulated input of the first block.

    Raises:
        MethodError: on construction, when a setting is out of range.
    """

    order: int = 0
    sync: str = "step"
    per_branch: bool = True

    name: ClassVar[str] = ""
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 1e-3, 3.0)
    needs_num_steps: ClassVar[bool] = False
    needs_modulation: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("order", self.order, 0, 3)
        if not isinstance(self.order, int):
            raise MethodError(f"order must be a whole number, got {self.order!r}")
        if self.sync not in SYNCS:
            raise MethodError(f"sync is {' or '.join(SYNCS)}, got {self.sync!r}")

    @property
    def probe(self) -> int:
        """Blocks that run at every step before the decision."""
        return 0

    @property
    def skip_from(self) -> int:
        """The first block whose work a stored residual stands for; at most `probe`."""
        return self.probe

    @property
    def tail(self) -> int:
        """Blocks at the end that run at every step."""
        return 0

    @property
    def depth(self) -> int:
        """Residuals kept."""
        return self.order + 1

    @abstractmethod
    def decider(self, run: Run) -> Decider:
        """A new one, for one branch of one generation."""

    def check_blocks(self, num_blocks: int) -> None:
        """Raises `MethodError` where nothing is left to skip."""
        if self.probe + self.tail >= num_blocks:
            raise MethodError(
                f"{self.name} always runs {self.probe} blocks in front and {self.tail} at the end, of {num_blocks}: "
                "nothing is left to skip"
            )


def check_range(name: str, value: Any, low: float, high: float | None = None) -> None:
    """Raises `MethodError` unless ``low <= value`` (``<= high``)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= low:
        raise MethodError(f"{name} must be at least {low}, got {value!r}", argument=name)
    if high is not None and value > high:
        raise MethodError(f"{name} must be from {low} to {high}, got {value!r}", argument=name)


def ratio(numerator: float, denominator: float) -> float:
    """A relative change; infinite where nothing was there before, so that it never passes for a small one."""
    return numerator / denominator if denominator > 0 else float("inf")
