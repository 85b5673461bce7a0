"""One forward of the transformer, as its router is asked about it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

from layercache.models.spec import ModelSpec

_TIMES = ("timestep", "timesteps", "t", "time", "sigma")


class Forward(NamedTuple):
    """A forward that is about to start.

    Attributes:
        branch: name of the cache context it runs in, or ``None``.
        step: that the caller says, or ``None``.
        arguments: all arguments of the transformer, by name.
        dry_run: runs the same forward once outside the compiled graph; ``None`` where nothing is compiled.
        part: of the picture, a window or tile that the caller names; ``None`` for the whole.
        conditions: names of all conditions that a guider runs at this step; empty where no guider says it.
        hooked: blocks, over all lists, that a guider has put hooks on for this forward alone.
    """

    branch: str | None
    step: int | None
    arguments: Mapping[str, Any]
    dry_run: Callable[[], Any] | None = None
    part: Hashable = None
    conditions: tuple[str, ...] = ()
    hooked: frozenset[int] = frozenset()

    @property
    def key(self) -> str:
        """Of its branch and part."""
        return self.key_of(self.branch or "")

    def key_of(self, branch: str) -> str:
        return branch if self.part is None else f"{branch}, part {self.part!r}"

    def timestep(self, spec: ModelSpec) -> Any:
        """The argument that holds the time, whatever its unit; ``None`` where there is none."""
        name = self.timestep_name(spec)
        return None if name is None else self.arguments.get(name)

    def timestep_name(self, spec: ModelSpec) -> str | None:
        """The name of the argument that holds the time."""
        if spec.timestep is not None:
            return spec.timestep
        return next((name for name in _TIMES if self.arguments.get(name) is not None), None)


class Said(NamedTuple):
    """What the caller says of the forwards within a context."""

    branch: str | None = None
    step: int | None = None
    part: Hashable = None


NOTHING = Said()


def new_said() -> ContextVar[Said]:
    """What the present context says of the forwards of one transformer; threads and tasks have their own."""
    return ContextVar("layercache forwards", default=NOTHING)


class Saying(AbstractContextManager[Any]):
    """Within it, forwards of a transformer have this branch, step and part; ``None`` leaves what was said before."""

    def __init__(self, said: ContextVar[Said], now: Said, inner: AbstractContextManager[Any] | None = None):
        self._said, self._now, self._inner = said, now, inner

    def __enter__(self) -> Any:
        self._before = before = self._said.get()
        now = self._now
        if before is not NOTHING:
            now = before._replace(**{name: own for name, own in now._asdict().items() if own is not None})
        result = None if self._inner is None else self._inner.__enter__()
        self._token: Token[Said] = self._said.set(now)
        return result

    def __exit__(self, *exc: Any) -> Any:
        try:
            self._said.reset(self._token)
        except ValueError:  # a generator that is closed from another context
            self._said.set(self._before)
        return None if self._inner is None else self._inner.__exit__(*exc)


def gives(arguments: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether a forward is given one of these arguments."""
    for name in names:  # at every step; a generator would cost more than the rest
        if arguments.get(name) is not None:
            return True
    return False
