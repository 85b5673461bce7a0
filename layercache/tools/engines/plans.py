"""What a serving engine was asked to run: schedules by their number of steps, or a method."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercache._utils.compat import scheduler_sigmas, unwrap_compiled
from layercache._utils.formats import SCHEDULE, format_of
from layercache._version import __version__
from layercache.errors import ArgumentError, MethodError, ScheduleMismatchError, UnsupportedModelError
from layercache.models.registry import count_blocks
from layercache.runtime.policy import PlannedMethod
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.schedule import Schedule

MOST_SCHEDULES = 8  # of a method, for runs with other noise levels


@dataclass
class Plans:
    """One plan for every run, or schedules of which a run's number of steps chooses one.

    Attributes:
        schedules: by number of steps.
        method: of `layercache.methods`, for runs of any number of steps; then there are no schedules.
    """

    schedules: Mapping[int, Schedule] = field(default_factory=dict)
    method: Any = None
    _made: dict[Any, Schedule] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, given: str | Sequence[str]) -> Plans:
        """From paths of schedules or folders of them, or a method as in Python: ``"TeaCache(threshold=0.1)"``.

        Args:
            given: one, several, or several in one text, as in ``PATH``.

        Raises:
            ArgumentError: there is no such file or method, or two schedules have as many steps.
            LayerCacheError: a file is damaged, or the method refuses its settings.
        """
        texts = [given] if isinstance(given, str) else list(given)
        if len(texts) == 1 and not Path(texts[0]).exists():
            if (method := _method(texts[0])) is not None:
                return cls(method=method)
            texts = [text for text in texts[0].split(os.pathsep) if text]
        found: dict[int, Schedule] = {}
        for path in [file for text in texts for file in _files(Path(text))]:
            schedule = Schedule.load(path)
            if schedule.num_steps in found:
                raise ArgumentError(f"{path} is the second schedule of {schedule.num_steps} steps; give one of them")
            found[schedule.num_steps] = schedule
        if not found:
            raise ArgumentError(f"there is no schedule in {given!r}")
        return cls(found)

    def for_steps(self, steps: int | None) -> Any:
        """The plan of a run of so many steps, or of any where that is not known.

        Raises:
            ScheduleMismatchError: there is none.
        """
        if self.method is not None:
            return self.method
        if steps is None:
            return next(iter(self.schedules.values()))
        if steps not in self.schedules:
            known = " and ".join(map(str, sorted(self.schedules)))
            raise ScheduleMismatchError(f"a run has {steps} steps, and there are schedules of {known}")
        return self.schedules[steps]

    def for_run(self, transformer: Any, scheduler: Any) -> Schedule:
        """A schedule of whole steps for a run of an engine's own model, at whose beginning its sampler is.

        The engine's model is known by the name of its class and its number of blocks alone.

        Raises:
            LayerCacheError: there is none for its steps, its noise levels or its model, or it is not of whole steps.
        """
        sigmas = scheduler_sigmas(scheduler)
        if not sigmas or len(sigmas) < 2:
            raise ScheduleMismatchError(f"the sampler {type(scheduler).__name__} does not tell its noise levels")
        model = unwrap_compiled(transformer)
        name, blocks = type(model).__name__, _blocks_of(model)
        plan = self.for_steps(len(sigmas) - 1)
        if isinstance(plan, Schedule):
            prints = plan.fingerprint
            if any(cls.__name__ == prints.model_class for cls in type(model).__mro__):
                name = prints.model_class
            prints.check_model(name, prints.config_hash, prints.num_blocks if blocks is None else blocks)
            prints.check_sigmas(sigmas)
            return _whole(plan)
        if not isinstance(plan, PlannedMethod) or not plan.replaces_velocity:
            raise MethodError(
                f"{type(plan).__name__} looks into blocks, and the engine's own models run schedules and methods of "
                "whole steps: a schedule of layercache.search, or Universal(budget=0.5)"
            )
        key = name, blocks, sigmas, type(scheduler)
        if key not in self._made:
            fingerprint = Fingerprint(name, "", blocks or 1, sigmas, (), __version__)
            self._made[key] = _whole(plan.schedule_of_run(fingerprint, scheduler, 0))
            if len(self._made) > MOST_SCHEDULES:
                del self._made[next(iter(self._made))]
        return self._made[key]


def _whole(schedule: Schedule) -> Schedule:
    """The schedule, where it computes or skips every step of the run as a whole."""
    rows = [row for cells in (schedule.cells, *schedule.branch_cells.values()) for row in cells]
    if any(cell for row in rows for cell in row):
        raise MethodError(
            "this schedule reuses groups of blocks, and the engine's own models run schedules of whole steps: take one "
            "of layercache.search"
        )
    if schedule.fingerprint.steps_run and not schedule.takes_experts:
        raise MethodError("this schedule is of one of two transformers: take one of the whole pipeline")
    if schedule.further_velocities:
        raise MethodError("this schedule is of a model with two outputs, which only diffusers' pipelines run with it")
    return schedule


def _blocks_of(transformer: Any) -> int | None:
    """How many blocks a model has in the lists that diffusers' class of its name has; ``None`` where it has others."""
    try:
        return count_blocks(transformer)
    except (UnsupportedModelError, AttributeError, TypeError):
        return None


def _files(path: Path) -> list[Path]:
    """Schedules in a folder, or the file itself."""
    if path.is_dir():
        return [file for file in sorted(path.glob("*.json")) if format_of(file) == SCHEDULE]
    if not path.exists():
        raise ArgumentError(f"{path} is no file, and no method of layercache.methods")
    return [path]


def _method(text: str) -> Any:
    """The method that a text such as ``"Universal(budget=0.5)"`` names; ``None`` where it names none."""
    from layercache import methods

    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return None
    name = call.func if isinstance(call, ast.Call) else call
    if not isinstance(name, ast.Name) or name.id in ("installed", "ENTRY_POINTS") or name.id not in methods.__all__:
        return None
    if isinstance(call, ast.Call):
        try:
            settings = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords if one.arg}
        except ValueError as error:
            raise ArgumentError(f"the settings of a method are plain values, such as {name.id}(...=0.5)") from error
        if call.args or len(settings) < len(call.keywords):
            raise ArgumentError(f"give the settings of {name.id} by name")
    else:
        settings = {}
    try:
        return getattr(methods, name.id)(**settings)
    except TypeError as error:
        raise ArgumentError(f"{text}: {error}") from error
