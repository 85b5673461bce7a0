"""Methods of one's own in a comparison: plans, configs, functions that make a plan, and caches of other packages."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import layercache
from layercache.errors import BudgetError, MethodError
from layercache.methods import ENTRY_POINTS
from layercache.planning.front import Front
from layercache.planning.profile import StabilityProfile
from layercache.planning.search_files import digest_of
from layercache.runtime.enable import make_router
from layercache.runtime.policy import DynamicMethod, PlannedMethod, RowMethod, StepMethod
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.schedule import Schedule, call_arguments
from layercache.tools.compare.fewer import CallArguments
from layercache.tools.compare.model import CalibratedModel, Entry
from layercache.tools.compare.peers import PEERS
from layercache.tools.compare.tuned import METHODS, TUNINGS
from layercache.tools.compare.tuning import Maker, tuned_by_knob

KINDS = (DynamicMethod, StepMethod, RowMethod, PlannedMethod)
LONGEST_SETTING = 80
WAYS = (
    "give a schedule, a front, a config of layercache.methods, a function (model, budget) that returns one of them, or "
    "a function () or (pipe) that returns a context manager"
)


@dataclass(frozen=True)
class Method:
    """A method that is compared.

    Attributes:
        name: in the table.
        identity: digest of what it is; what was kept of another one under this name is not taken for its own.
        make: plans or tunes it for a budget, and may raise.
        is_fixed: whether it runs as it is, once, whatever the budgets are.
        tuned_as: the method of `METHODS` whose plan it runs; empty where it makes its own.
    """

    name: str
    identity: str
    make: Callable[[CalibratedModel, float], Entry] = field(repr=False)
    is_fixed: bool = False
    tuned_as: str = ""


def method_of(name: str, value: Any) -> Method:
    """The method that a name stands for.

    Args:
        name: in the table.
        value: the name of a known method, or one of one's own (`layercache.tools.compare.api.compare`).

    Raises:
        MethodError: no method has this name, or the value is no plan and makes none.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise MethodError(f"a method is named by a text on one line, got {name!r}", argument="methods")
    if isinstance(value, str):
        return _named(name, value)
    identity = digest_of(contents_of(value))
    if isinstance(value, Front):
        return Method(name, identity, partial(_planned, name, partial(_from_front, value)))
    if isinstance(value, StabilityProfile):
        return Method(name, identity, partial(_planned, name, partial(_from_profile, value)))
    if is_plan(value):
        return Method(name, identity, partial(_as_it_is, name, value), is_fixed=True)
    if isinstance(value, type) and issubclass(value, KINDS) and hasattr(value, "knob"):
        return Method(name, identity, partial(_planned, name, tuned_by_knob(value)))
    takes = _arguments_taken(value)
    if takes == 2:
        return Method(name, identity, partial(_made_by, name, value))
    if takes is not None:
        return Method(name, identity, partial(_foreign, name, value, takes), is_fixed=True)
    raise _refused(name, value)


def is_plan(value: Any) -> bool:
    """Whether `layercache.enable` takes it as a plan, or it is other arguments of the call."""
    return isinstance(value, CallArguments) or make_router.dispatch(type(value)) is not make_router.dispatch(object)


def known_methods() -> list[str]:
    """All methods that can be named: ours, those of other packages' entry points, and other packages' caches."""
    return [*METHODS, *_entry_points(), *PEERS]


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _named(name: str, known: str) -> Method:
    if known in METHODS:
        make = partial(_planned, name, lambda model, budget: model.made(known, budget))
        return Method(name, _identity_of(known, known), make, tuned_as=known)
    if known in PEERS:
        ours = known.removeprefix("diffusers:")
        tuned_as = ours if ours in METHODS else ""
        return Method(name, _identity_of(known, tuned_as), partial(_peer, name, known), tuned_as=tuned_as)
    entry = _entry_points().get(known)
    if entry is None:
        raise unknown([known])
    try:
        value = entry.load()
    except Exception as error:  # another package's
        raise MethodError(
            f"method {known}, which another package brings, does not import: {type(error).__name__}: {error}",
            argument="methods",
        ) from error
    if isinstance(value, type) and issubclass(value, PlannedMethod) and not hasattr(value, "knob"):
        value = value()
    return method_of(name, value)


def _identity_of(known: str, tuned_as: str) -> str:
    """Of a method that can be named: its name, and in which way it is tuned where that is not the first one."""
    changes = TUNINGS.get(tuned_as, 0)
    return f"{known}, tuned otherwise {changes}" if changes else known


def unknown(names: Sequence[str]) -> MethodError:
    """The error for names that no method has; for no names at all."""
    found = f"unknown method {', '.join(names) or '(none given)'}; choose from {', '.join(known_methods())}"
    return MethodError(found, argument="methods")


def _refused(name: str, value: Any) -> MethodError:
    if isinstance(value, type):
        found = f"the class {value.__name__}; give an instance: {value.__name__}(...)"
    elif callable(value):
        found = f"a function that does not take (model, budget), (pipe) or nothing; {WAYS}"
    else:
        found = f"{type(value).__name__}, which is no plan; {WAYS}"
    return MethodError(f"method {name!r} is {found}", argument="methods")


def _arguments_taken(value: Any) -> int | None:
    """How many arguments a function has to be given, by position; ``None`` of no function, or of three and more."""
    if not callable(value) or (isinstance(value, type) and not hasattr(value, "__enter__")):
        return None
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    by_name = any(p.kind is p.KEYWORD_ONLY for p in needed)
    return len(needed) if len(needed) <= 2 and not by_name else None


# --- what the methods make -----------------------------------------------------------------------------------


def _planned(name: str, maker: Maker, model: CalibratedModel, budget: float) -> Entry:
    plan, setting = maker(model, budget)
    return _enabled(name, plan, setting, model, budget)


def _as_it_is(name: str, plan: Any, model: CalibratedModel, budget: float) -> Entry:
    return _enabled(name, plan, described_plan(plan), model, budget)


def _enabled(name: str, plan: Any, setting: str, model: CalibratedModel, budget: float) -> Entry:
    if isinstance(plan, CallArguments):
        return Entry(name, setting, budget, nullcontext, plan.arguments)
    return Entry(name, setting, budget, lambda: layercache.enabled(model.pipeline, plan), call_arguments(plan))


def _peer(name: str, known: str, model: CalibratedModel, budget: float) -> Entry:
    entry = PEERS[known](model, budget)
    return Entry(name, entry.setting, entry.budget, entry.attach)


def _from_front(front: Front, model: CalibratedModel, budget: float) -> tuple[Any, str]:
    """The best point within the budget, or the nearest where all compute more."""
    try:
        point = front.choose(budget)
    except BudgetError:
        if not front.points:
            raise
        point = front.points[0]
    return point.schedule, point.origin


def _from_profile(profile: StabilityProfile, model: CalibratedModel, budget: float) -> tuple[Any, str]:
    schedule = layercache.plan(profile, budget)
    return schedule, described_plan(schedule)


def _made_by(name: str, function: Callable[..., Any], model: CalibratedModel, budget: float) -> Entry:
    """What a function of one's own makes for a budget."""
    found = function(model, budget)
    plan, setting = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if is_plan(plan):
        return _enabled(name, plan, described_plan(plan) if setting is None else str(setting), model, budget)
    takes = _arguments_taken(plan)
    if takes not in (0, 1):
        raise MethodError(
            f"its function returned {type(plan).__name__} for a budget of {budget:g}, which is no plan; return one, or "
            "(plan, setting), or a function () or (pipe) that returns a context manager"
        )
    entry = _foreign(name, plan, takes, model, budget)
    return entry if setting is None else Entry(name, str(setting), budget, entry.attach)


def _foreign(name: str, function: Callable[..., Any], takes: int, model: CalibratedModel, budget: float) -> Entry:
    """A cache that is no plan of ours, and is there as long as a context manager is entered."""

    def attach() -> AbstractContextManager[Any]:
        manager = function(model.pipeline) if takes else function()
        if not hasattr(manager, "__enter__"):
            raise MethodError(
                f"its function returned {type(manager).__name__}, which is no context manager; decorate it with "
                "contextlib.contextmanager, and enable the cache in front of its yield"
            )
        return _WithoutResult(manager)

    return Entry(name, getattr(function, "__name__", type(function).__name__).strip("<>"), budget, attach)


class _WithoutResult(AbstractContextManager[None]):
    """A context manager whose value, whatever it is, is no cache of ours."""

    def __init__(self, manager: Any):
        self._manager = manager

    def __enter__(self) -> None:
        self._manager.__enter__()

    def __exit__(self, *exc: Any) -> bool:
        return bool(self._manager.__exit__(*exc))


# --- what a method is, in words and as a digest ----------------------------------------------------------------


def described_plan(plan: Any) -> str:
    """A plan's own settings in a line."""
    if isinstance(plan, Schedule):
        made_by = plan.made_by.get("method") or plan.made_by.get("solver") or "as it is"
        text = f"{len(plan.groups)} {'group' if len(plan.groups) == 1 else 'groups'}, {made_by}"
    elif isinstance(plan, ModuleSchedule):
        text = f"{len(plan.units)} modules, {plan.made_by.get('method', 'as it is')}"
    elif isinstance(plan, CallArguments):
        text = ", ".join(f"{name}={value!r}" for name, value in plan.arguments.items())
    elif is_dataclass(plan):
        text = f"{type(plan).__name__}({', '.join(_own_settings(plan))})"
    else:
        text = type(plan).__name__
    return text if len(text) <= LONGEST_SETTING else text[: LONGEST_SETTING - 1] + "…"


def _own_settings(config: Any) -> list[str]:
    """The fields that differ from their defaults, or the class's first where none does."""
    own = []
    for one in fields(config):
        value = getattr(config, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if default is MISSING or value != default:
            own.append(f"{one.name}={value!r}")
    first = [one.name for one in fields(config) if one.name in type(config).__annotations__][:1]
    return own or [f"{name}={getattr(config, name)!r}" for name in first]


def contents_of(value: Any, depth: int = 6) -> Any:
    """All that a value holds, as lists of what `digest_of` takes; of a function its code and what it refers to."""
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return [[str(name), contents_of(one, depth - 1)] for name, one in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [contents_of(one, depth - 1) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        own = {one.name: getattr(value, one.name) for one in fields(value)}
        return [type(value).__qualname__, contents_of(own, depth - 1)]
    if isinstance(value, partial):
        return [contents_of(one, depth - 1) for one in (value.func, value.args, value.keywords)]
    if inspect.isfunction(value) or inspect.ismethod(value):
        return _contents_of_function(value, depth)
    if isinstance(value, (str, bytes, int, float, type(None))) or hasattr(value, "tobytes") or hasattr(value, "detach"):
        return value
    if isinstance(value, type):
        return [value.__module__, value.__qualname__]
    return [type(value).__qualname__, re.sub(r" at 0x[0-9a-f]+", "", repr(value))]


def _contents_of_function(function: Any, depth: int) -> list[Any]:
    function = inspect.unwrap(getattr(function, "__func__", function))
    try:
        code: Any = inspect.getsource(function)
    except (OSError, TypeError):  # typed into a prompt
        code = [function.__code__.co_code, function.__code__.co_names, repr(function.__code__.co_consts)]
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    more = [function.__defaults__ or (), function.__kwdefaults__ or {}, cells]
    return [function.__qualname__, code, *(contents_of(one, depth - 1) for one in more)]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
