"""Checks of arguments whose kind, if wrong, would otherwise show as an attribute that is missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from layercache.errors import ArgumentError


def expect(by: str, value: Any, *kinds: type) -> None:
    """Checks that a value is of one of these kinds.

    Args:
        by: the function that was called, for the message.
        value: what it was given.
        kinds: classes of this library; the message says where the first comes from, its ``SOURCE``.

    Raises:
        ArgumentError: it is none of them.
    """
    if isinstance(value, kinds):
        return
    names = " or ".join(kind.__name__ for kind in kinds)
    source = getattr(kinds[0], "SOURCE", "")
    if isinstance(getattr(value, "fingerprint", None), kinds[0]):
        source = "give its .fingerprint"
    raise ArgumentError(f"{by} expects {names}, got {described(value)}" + (f"; {source}" if source else ""))


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
    found = f"one of shape {list(table.shape)}" if table.ndim else described(value)
    raise ArgumentError(f"{by} expects an array [{', '.join(dims)}], got {found}; {source}")


def described(value: Any) -> str:
    """What a value is, for messages: its class, or the text or path itself."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (str, os.PathLike)):
        return f"the {'text' if isinstance(value, str) else 'path'} {os.fspath(value)!r}"
    return type(value).__name__
