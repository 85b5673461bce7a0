"""What is put in the place of methods and attributes of a model or scheduler, and taken away again."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

from layercache._utils.compat import OutsideGraphs


def _class_method(owner: Any, name: str) -> Any:
    return MethodType(getattr(type(owner), name), owner)


class MethodPatch(functools.partial[Any]):
    """An instance attribute in front of a method. Copies and pickles of its owner get the method itself.

    Attributes:
        before: what the instance had under that name; empty where it was the class's method.
        behind: the method as it was.
    """

    of: tuple[Any, str]
    before: dict[str, Any]
    behind: Any

    def __new__(cls, owner: Any, name: str, call: Callable[..., Any]) -> MethodPatch:
        patch = super().__new__(cls, call)
        patch.behind = getattr(owner, name)
        functools.update_wrapper(patch, patch.behind)
        patch.of = owner, name
        return patch

    def end(self) -> None:
        """Calls the method as it was, where another patch that lies in front of this one still calls it."""
        self.__class__ = EndedPatch

    def __reduce__(self) -> Any:
        return _class_method, self.of


class EndedPatch(MethodPatch):
    """A `MethodPatch` that was taken away; only it pays for a Python call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.behind(*args, **kwargs)


def restore(owner: Any, name: str, before: dict[str, Any]) -> None:
    """Takes a `MethodPatch` away, or another value that was put there; patches in front of it stay."""
    above, patch = None, owner.__dict__.get(name)
    while isinstance(patch, MethodPatch) and patch.before is not before:
        above, patch = patch, patch.before.get(name)
    if isinstance(patch, MethodPatch):
        patch.end()
        if above is not None:  # another cache's, which ends later (two transformers and one scheduler)
            above.before.clear()
            above.before.update(before)
            return
    owner.__dict__.pop(name, None)
    owner.__dict__.update(before)


class CacheConfigMarker:
    """In the place of a configuration of one of diffusers' caches; copies and pickles of the model have none."""

    def __reduce__(self) -> Any:
        return type(None), ()


def _do_nothing(*args: Any) -> None:
    pass


class ForwardHook(OutsideGraphs):
    """A module hook that stays with its module: what copies and pickles of the module get does nothing."""

    def __reduce__(self) -> Any:
        return ForwardHook, (_do_nothing,)


class CopyHook:
    """A scheduler's ``__deepcopy__``: hears of the copies that a pipeline makes, one for each further output (LTX-2).

    Args:
        scheduler: a pipeline's.
        heard: called with a copy that a method of the pipeline made.
    """

    def __init__(self, scheduler: Any, heard: Callable[[Any], None]):
        self.scheduler, self.heard = scheduler, heard

    def __call__(self, memo: dict[int, Any]) -> Any:
        names = sys._getframe(2).f_locals  # behind copy.deepcopy: of the pipeline, or a block of a modular one
        makers = [names.get("self"), names.get("components")]
        own = self.scheduler.__dict__.pop(DEEPCOPY)
        try:
            made = copy.deepcopy(self.scheduler, memo)
        finally:
            self.scheduler.__dict__[DEEPCOPY] = own
        if any(getattr(maker, "scheduler", None) is self.scheduler for maker in makers):
            self.heard(made)
        return made

    def __reduce__(self) -> Any:
        return type(None), ()  # of a pickled scheduler; it is copied as any other


DEEPCOPY = "__deepcopy__"
