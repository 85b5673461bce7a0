"""What a command was given, kept in the files it makes, so that the next command can be printed whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercache.tools.cli.options import CallOptions, Dtype, ModelOptions, words_of
from layercache.tools.cli.workers import differences

if TYPE_CHECKING:
    from layercache.planning.front import Front
    from layercache.schedule.fingerprint import Fingerprint

LONGEST = 2000  # characters of an option in a file


def with_command(fingerprint: Fingerprint, model: ModelOptions, call: CallOptions, prompt: Any) -> Fingerprint:
    """A fingerprint that says with which options it was measured, and on which prompt first."""
    from layercache.schedule.fingerprint import COMMAND

    given: dict[str, Any] = {"prompt": prompt.get("prompt", "") if isinstance(prompt, Mapping) else prompt}
    for group in (model, call):
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if value != field.default and value not in (None, []):
                given[field.name] = value.value if isinstance(value, Dtype) else value
    more = {"processes": list(found)} if (found := differences()) else {}
    return replace(fingerprint, settings={**fingerprint.settings, COMMAND: given, **more})


def front_with_command(front: Front, model: ModelOptions, call: CallOptions, prompt: Any) -> Front:
    """The same of every schedule of a front."""
    points = []
    for point in front.points:
        schedule = point.schedule
        marked = replace(schedule, fingerprint=with_command(schedule.fingerprint, model, call, prompt))
        points.append(replace(point, schedule=marked))
    return replace(front, points=tuple(points))


def generate_with(schedule: Path, fingerprint: Fingerprint, *more: str) -> list[object] | None:
    """The command that draws with a schedule; ``None`` where the file does not say of what model it is."""
    from layercache.schedule.fingerprint import COMMAND

    given = fingerprint.settings.get(COMMAND)
    if not isinstance(given, Mapping) or not _is_text(given.get("prompt")):
        return None
    words = [word for group in (ModelOptions, CallOptions) for word in words_of(_read(group, given))]
    prompt = given["prompt"]
    prompted = [f"--prompt={prompt}"] if prompt.startswith("-") else ["--prompt", prompt]
    return ["generate", *words, *prompted, "--schedule", schedule, *more]


def _read(group: Any, given: Mapping[str, Any]) -> Any:
    """A group of options from a file, which a stranger may have written: what is no option's value is left out."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        value, kind = given.get(field.name), str(field.type)
        if field.name == "dtype":
            is_value = value in [one.value for one in Dtype]
            value = Dtype(value) if is_value else value
        elif "list[str]" in kind:
            is_value = isinstance(value, (list, tuple)) and all(map(_is_text, value))
        elif "int" in kind or "float" in kind:
            is_value = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        else:
            is_value = _is_text(value)
        if is_value:
            found[field.name] = value
    return group(**found)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and value.isprintable()


def budget_of(front: Front) -> str:
    """A budget that the front holds, in two digits: of the schedule that computes about half."""
    used = min((point.used for point in front.points), key=lambda used: abs(used - 0.5))
    return f"{min(1.0, math.ceil(used * 100 - 1e-7) / 100):.2f}"
