"""What a function expects, said where it is given something of another kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from layercache.errors import ArgumentError

# Where each kind comes from, by the name of its class.
SOURCES = {
    "Fingerprint": "profiles and schedules have one, such as profile.fingerprint",
    "Front": "layercache.search gives one, layercache.Front.load(path) reads one",
    "Integral": "a fingerprint has it: fingerprint.num_steps",
    "LearnedRouter": "layercache.methods.l2c.train(pipe, prompts) gives one",
    "Rates": "layercache.methods.invardiff.measure(pipe, prompts) gives them",
    "Rollouts": "make one: layercache.planning.rollout.Rollouts(pipe, prompts)",
    "Schedule": "layercache.plan(profile, budget=0.6) makes one, layercache.Schedule.load(path) reads one",
    "Settings": "the class is in the same module",
    "StabilityProfile": (
        "layercache.calibrate(pipe, prompts) measures one, layercache.StabilityProfile.load(path) reads one"
    ),
}
SPOKEN = {"Integral": "a number of steps"}


def expect(by: str, value: Any, *kinds: type) -> None:
    """Checks the kind of an argument where a mistake would otherwise show as an attribute that is missing.

    Args:
        by: the function that was called, for the message.
        value: what it was given.
        kinds: what it takes; the message says where the first comes from.

    Raises:
        ArgumentError: it is none of them.
    """
    if isinstance(value, kinds):
        return
    names = " or ".join(SPOKEN.get(kind.__name__, kind.__name__) for kind in kinds)
    raise ArgumentError(f"{by} expects {names}, got {_described(value)}; {_way(value, kinds[0].__name__)}")


def expect_table(by: str, value: Any, dims: Sequence[str], source: str) -> np.ndarray:
    """The value as an array with these dims; ``source`` says where such a table comes from.

    Raises:
        ArgumentError: it is no array of numbers, or has another number of dims.
    """
    try:
        table = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.empty(())
    if table.ndim == len(dims):
        return table
    found = f"one of shape {list(table.shape)}" if table.ndim else _described(value)
    raise ArgumentError(f"{by} expects an array [{', '.join(dims)}], got {found}; {source}")


def _described(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (str, os.PathLike)):
        return f"the {'text' if isinstance(value, str) else 'path'} {os.fspath(value)!r}"
    return type(value).__name__


def _way(value: Any, wanted: str) -> str:
    if type(getattr(value, "fingerprint", None)).__name__ == wanted:
        return "give its .fingerprint"
    return SOURCES[wanted]
