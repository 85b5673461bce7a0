"""What is compared: every method here, those of other packages that are installed, and methods of one's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layercache._utils.validate import described
from layercache.errors import MethodError
from layercache.tools.compare.fewer import CallArguments as CallArguments
from layercache.tools.compare.model import CalibratedModel as CalibratedModel
from layercache.tools.compare.model import Entry as Entry
from layercache.tools.compare.own import Method as Method
from layercache.tools.compare.own import known_methods as known_methods
from layercache.tools.compare.own import method_of, unknown
from layercache.tools.compare.peers import PEERS as PEERS
from layercache.tools.compare.peers import block_calls as block_calls
from layercache.tools.compare.tuned import METHODS as METHODS

GROUPS: dict[str, Sequence[str]] = {"ours": tuple(METHODS), "peers": tuple(PEERS), "all": (*METHODS, *PEERS)}
"""Names that stand for several methods."""

Methods = str | Sequence[str] | Mapping[str, Any]


def methods_of(methods: Methods) -> list[Method]:
    """The methods that were asked for.

    Args:
        methods: ``"ours"``, ``"peers"`` or ``"all"``, names with commas between them, a sequence of names, or a mapping
            from names in the table to names and methods of one's own (`layercache.tools.compare.own.method_of`).

    Raises:
        MethodError: a name is unknown, a value is no method, or there is none.
    """
    if isinstance(methods, Mapping):
        if not methods:
            raise unknown([])
        return [method_of(name, value) for name, value in methods.items()]
    if isinstance(methods, str):
        methods = GROUPS.get(methods) or [name.strip() for name in methods.split(",") if name.strip()]
    if not isinstance(methods, Sequence) or not all(isinstance(name, str) for name in methods):
        raise MethodError(
            f"methods are names, or a mapping from names to methods of one's own such as "
            f'{{"mine": FBCache(threshold=0.1)}}, got {described(methods)}',
            argument="methods",
        )
    check_methods(methods)
    return [method_of(name, name) for name in dict.fromkeys(methods)]


def check_methods(names: Sequence[str]) -> None:
    """Raises `MethodError` where a name is unknown, or there is none; nothing is imported."""
    known = known_methods()
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise unknown(missing)


@dataclass(frozen=True)
class Job:
    """A method to be run at a budget.

    Attributes:
        method: see `Method`.
        budget: a share of the block time; NaN of a method that runs as it is.
    """

    method: Method
    budget: float

    @property
    def key(self) -> str:
        return key_of(self.method.name, self.budget, self.method.is_fixed)


def key_of(method: str, budget: float, is_fixed: bool = False) -> str:
    """What the outcome of a method at a budget is kept under."""
    return method if is_fixed else f"{method} {budget:g}"


def jobs_of(methods: Sequence[Method], budgets: Sequence[float]) -> Iterator[Job]:
    """Every method at every budget, the largest first; those that run as they are once."""
    for method in methods:
        for budget in (math.nan,) if method.is_fixed else sorted(set(budgets), reverse=True):
            yield Job(method, budget)
