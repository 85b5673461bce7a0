"""Putting our primitives under another package's cache, and taking them out again."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from layercache.errors import CacheStateError, MissingExtraError, UnsupportedModelError

SYNCS = ("step", "lagged")

# packages, the module here that replaces their functions, the versions it was tested with
_KNOWN = {
    "diffusers": ("layercache.backend.for_diffusers", ("0.41.", "0.42.")),
    "cache-dit": ("layercache.backend.for_cache_dit", ("1.5.",)),
}
_active: dict[str, Acceleration] = {}

Replacement = tuple[Any, str, Callable[..., Any]]


class Acceleration:
    """Functions of another package that are replaced at present; `undo` puts back exactly what was there."""

    def __init__(self, package: str, replacements: list[Replacement]):
        self.package = package
        self._before: list[tuple[Any, str, Any]] = []
        for owner, name, replacement in replacements:
            self._before.append((owner, name, owner.__dict__[name]))
            setattr(owner, name, replacement)

    def undo(self) -> None:
        """Raises `CacheStateError` when it was undone already."""
        if _active.get(self.package) is not self:
            raise CacheStateError(f"the acceleration of {self.package} was undone already")
        for owner, name, original in reversed(self._before):
            setattr(owner, name, original)
        del _active[self.package]


def accelerate(package: str, sync: str = "step") -> Acceleration:
    """Runs the caches of another package on the ops of this one, from now on and for all its models.

    Its decisions stay what they are; its cached steps take fewer passes over the memory. Enable and disable its caches
    as ever.

    Args:
        package: ``"diffusers"`` (FirstBlockCache, TaylorSeer) or ``"cache-dit"`` (DBCache, TaylorSeer).
        sync: ``"step"``: every decision reads its number in its step, as the package does. ``"lagged"``: it uses the
            number of the step before and never waits for the device; decisions may then differ by a step.

    Returns:
        ``undo()`` takes it back.

    Raises:
        MissingExtraError: the package is not installed.
        UnsupportedModelError: its version is not one that this was tested with.
        CacheStateError: it is accelerated already, or another value of ``sync``.
    """
    if package not in _KNOWN:
        raise UnsupportedModelError(f"no acceleration for {package!r}; there is one for {', '.join(_KNOWN)}")
    if sync not in SYNCS:
        raise CacheStateError(f"sync is {' or '.join(SYNCS)}, got {sync!r}")
    if package in _active:
        raise CacheStateError(f"{package} is accelerated already; undo that first")
    home, versions = _KNOWN[package]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError(f"{package} is not installed: pip install {package}") from None
    if not version.startswith(versions):
        known = " and ".join(f"{v}x" for v in versions)
        raise UnsupportedModelError(f"{package} {version} is not known; this was tested with {known}")
    made = Acceleration(package, importlib.import_module(home).replacements(sync))
    _active[package] = made
    return made


@contextmanager
def accelerated(package: str, sync: str = "step") -> Iterator[None]:
    """`accelerate` for the length of a ``with`` block."""
    made = accelerate(package, sync)
    try:
        yield
    finally:
        made.undo()
