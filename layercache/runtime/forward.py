"""One forward of the transformer, as its router is asked about it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from layercache.models.spec import ModelSpec

_TIMES = ("timestep", "timesteps", "t", "time", "sigma")


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward that is about to start.

    Attributes:
        branch: name of the cache context it runs in, or ``None``.
        step: that the caller says, or ``None``.
        arguments: all arguments of the transformer, by name.
        dry_run: runs the same forward once outside the compiled graph; ``None`` where nothing is compiled.
        part: of the picture, a window or tile that the caller names; ``None`` for the whole.
    """

    branch: str | None
    step: int | None
    arguments: Mapping[str, Any]
    dry_run: Callable[[], Any] | None = None
    part: Hashable = None

    @property
    def key(self) -> str:
        """Of its branch and part."""
        return self.key_of(self.branch or "")

    def key_of(self, branch: str) -> str:
        return branch if self.part is None else f"{branch}, part {self.part!r}"

    def timestep(self, spec: ModelSpec) -> Any:
        """The argument that holds the time, whatever its unit; ``None`` where there is none."""
        if spec.timestep is not None:
            return self.arguments.get(spec.timestep)
        return next((self.arguments[name] for name in _TIMES if self.arguments.get(name) is not None), None)


class Said(NamedTuple):
    """What the caller says of the forwards within a context."""

    branch: str | None = None
    step: int | None = None
    part: Hashable = None


NOTHING = Said()
_now: ContextVar[Mapping[object, Said]] = ContextVar("layercache forwards", default=MappingProxyType({}))


def said_of(owner: object) -> Said:
    """What the present context says of the forwards of ``owner``'s transformer; threads and tasks have their own."""
    return _now.get().get(owner, NOTHING)


class Saying(AbstractContextManager[Any]):
    """Within it, forwards of a transformer have this branch, step and part; ``None`` leaves what was said before."""

    def __init__(self, owner: object, said: Said, inner: AbstractContextManager[Any] | None = None):
        self._owner, self._said, self._inner = owner, said, inner
        self._token: Token[Mapping[object, Said]] | None = None

    def __enter__(self) -> Any:
        self._before = _now.get()
        result = None if self._inner is None else self._inner.__enter__()
        outer, said = self._before.get(self._owner), self._said
        if outer is not None:
            branch = outer.branch if said.branch is None else said.branch
            step = outer.step if said.step is None else said.step
            said = Said(branch, step, outer.part if said.part is None else said.part)
        self._token = _now.set({**self._before, self._owner: said})
        return result

    def __exit__(self, *exc: Any) -> Any:
        assert self._token is not None
        try:
            _now.reset(self._token)
        except ValueError:  # a generator that is closed from another context
            _now.set(self._before)
        return None if self._inner is None else self._inner.__exit__(*exc)
