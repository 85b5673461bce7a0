"""Files of layercache that commands read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from layercache.planning.front import Front
    from layercache.planning.profile import StabilityProfile
    from layercache.schedule.module_schedule import ModuleSchedule
    from layercache.schedule.schedule import Schedule

    Content = Schedule | ModuleSchedule | StabilityProfile | Front


def load(path: Path, *expected: str) -> Content:
    """The content of a file of one of these formats (`layercache._utils.formats.KINDS`); by default of any.

    Raises:
        FileFormatError: it is of another format, or damaged.
    """
    from layercache import Front, Schedule, StabilityProfile
    from layercache._utils.formats import FRONT, MODULES, PROFILE, SCHEDULE, format_of, unexpected, what_is
    from layercache.schedule.module_schedule import ModuleSchedule

    classes: dict[str, Any] = {SCHEDULE: Schedule, MODULES: ModuleSchedule, PROFILE: StabilityProfile, FRONT: Front}
    wanted, found = expected or tuple(classes), format_of(path)
    if found not in wanted:
        raise unexpected(path, what_is(path), *wanted)
    return classes[found].load(path)


def load_source(path: Path) -> StabilityProfile | Front:
    """What a schedule can be planned from."""
    from layercache._utils.formats import FRONT, MODULES, PROFILE, SCHEDULE, format_of

    if format_of(path) in (SCHEDULE, MODULES):
        raise typer.BadParameter(f"{path} is a schedule already; give a profile, or a front.")
    return load(path, PROFILE, FRONT)  # type: ignore[return-value]


def load_schedule(path: Path) -> Schedule | ModuleSchedule:
    """A schedule of groups of layers, or of single modules."""
    from layercache._utils.formats import MODULES, SCHEDULE

    return load(path, SCHEDULE, MODULES)  # type: ignore[return-value]
