"""Lossless timestep tables of one transformer: its projections of the timestep alone, looked up row by row."""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import (
    ADAPTER_METHODS,
    is_autocast_enabled,
    offloading_of,
    scheduler_step,
    stateful_hook_of,
)
from layercache.errors import CacheStateError, LayerCacheWarning, UnsupportedModelError
from layercache.runtime.conditioning import is_on_accelerator
from layercache.runtime.loop import ForwardLock
from layercache.runtime.patches import ForwardHook, MethodPatch, restore
from layercache.runtime.projections import Found, find_projections, times_of
from layercache.runtime.tabulated import Projection, Tables, TableState, flat

_log = logging.getLogger("layercache")

_MARK = "_layercache_timestep_tables"
_OTHER_PRECISION = "it runs under another autocast setting or precision of matrix products than the first one did"
_GRADIENTS = "gradients are recorded"
_TOO_LARGE = "tables for so large a batch would take more memory than the weights"
_NO_TENSOR = "its timestep is no tensor"
_NOT_A_NUMBER = "its timestep is NaN"


class FoundLayers(Exception):
    """Breaks off a forward of which nothing but its projections was wanted."""


class TransformerTables:
    """The tables of one transformer, and what was changed on it.

    Attributes:
        projections: that became tables; none before the first forward.
        kinds: tables by the kind of forward.
        state: what the projections look at.
        kept, in_full, looked_up, computed: as in the report.
        reads_times: the host reads every forward's timestep; else it takes the sampler's where that is known.
        has_folded: some layers were tables before.
        only_finds: a forward is broken off, by `FoundLayers`, once its projections are known.
    """

    def __init__(self, transformer: nn.Module, pipeline: Any, name: str, steps: int):
        self.transformer, self.pipeline, self.name, self.steps = transformer, pipeline, name, steps
        self.state = TableState(self.forget)
        self.projections: list[Projection] = []
        self.kinds: OrderedDict[Hashable, Tables] = OrderedDict()
        self.kept: Counter[str] = Counter()
        self.in_full: Counter[str] = Counter()
        self.looked_up = self.computed = 0
        self.reads_times = self.only_finds = self.has_folded = False
        self._around: list[nn.Module] = [transformer]  # the projections and what they lie in
        self._parameters = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self._too_large: set[Hashable] = set()
        self._precision: Hashable = None
        self._run: object = None
        self._values: list[float] = []
        self._at: float | None = None  # the sampler's timestep of the forward under way, where the host knows it
        self._warned: set[str] = set()
        self._lock = ForwardLock()
        self._hooks: list[Any] = []
        self._patches: list[tuple[str, dict[str, Any]]] = []

    # --- what is changed on the transformer ---

    def check_model(self) -> None:
        """Raises where tables are there already, the model is offloaded, or nothing holds a timestep."""
        model = type(self.transformer).__name__
        if self.transformer.__dict__.get(_MARK) is not None:
            raise CacheStateError(f"this {model} has timestep tables already; call undo() on them first")
        if not times_of(dict.fromkeys(self._parameters, torch.empty(0))):
            raise UnsupportedModelError(f"the forward of {model} has no argument that holds a timestep")
        self._refuse_offloading(self.transformer.modules())

    def _refuse_offloading(self, modules: Iterable[nn.Module]) -> None:
        found = offloading_of(modules)
        if found is not None:
            raise CacheStateError(
                f"{found} moves or casts the weights of this {type(self.transformer).__name__} at every forward, and "
                "timestep tables keep them on the host: take one of both (pipe.remove_all_hooks() ends accelerate's)"
            )

    def attach(self) -> None:
        self.transformer.__dict__[_MARK] = self
        before, after = ForwardHook(self._before_forward), ForwardHook(self._after_forward)
        self._hooks = [
            self.transformer.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            self.transformer.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        for name in ADAPTER_METHODS:
            if hasattr(self.transformer, name):
                patch = MethodPatch(self.transformer, name, self._changing(getattr(self.transformer, name)))
                patch.before = {name: self.transformer.__dict__[name]} if name in self.transformer.__dict__ else {}
                self.transformer.__dict__[name] = patch
                self._patches.append((name, patch.before))

    def _changing(self, original: Any) -> Any:
        """A method after which the model is another one, which works on weights where the model is."""

        def changing(*args: Any, **kwargs: Any) -> Any:
            self.unfold()
            return original(*args, **kwargs)

        return changing

    def undo(self) -> None:
        if self.transformer.__dict__.get(_MARK) is not self:
            return
        del self.transformer.__dict__[_MARK]
        for hook in self._hooks:
            hook.remove()
        for name, before in reversed(self._patches):
            restore(self.transformer, name, before)
        self._hooks, self._patches = [], []
        self.unfold()

    def unfold(self, lost: Sequence[Projection] | None = None) -> None:
        """Makes plain layers of projections again, of all by default, with their weights where the model is."""
        going = self.projections if lost is None else lost
        self.forget()
        home = self._home()
        for projection in going:
            projection.leave()
            projection.move(home)
        self.projections = [one for one in self.projections if one not in going]
        self.state.is_released = self.state.is_released and bool(self.projections)

    def forget(self) -> None:
        """Drops all tables; the next forward makes new ones."""
        self.kinds.clear()
        self._too_large.clear()
        self._precision = None
        self.state.looks_up = False
        for projection in self.projections:
            projection.layer.__dict__.update(_layercache_table=None, _layercache_inputs=None, _layercache_fresh=None)

    def _home(self) -> torch.device:
        """Where the rest of the model is."""
        own = {id(p) for one in self.projections for p in one.layer.parameters(recurse=False)}
        others = (parameter.device for parameter in self.transformer.parameters() if id(parameter) not in own)
        return next(others, torch.device("cpu"))

    @property
    def device(self) -> torch.device:
        return self._home()

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (*self.transformer.parameters(), *self.transformer.buffers()))

    def release(self) -> None:
        """The projections' weights go to the host, if there are tables."""
        if self.projections and self.kinds and not self.state.is_released:
            for projection in self.projections:
                projection.move(torch.device("cpu"))
            self.state.is_released = True
            _log.info("the weights of %d projections of the timestep are on the host", len(self.projections))

    # --- forwards ---

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._lock.acquire()
        self.state.looks_up = False  # the forward before may have been interrupted
        for tables in self.kinds.values():
            tables.forget_fresh()
        try:
            arguments = dict(zip(self._parameters, args, strict=False)) | kwargs if args else kwargs
            forward = functools.partial(module.forward, *args, **kwargs)
            if self.only_finds:
                self._tables(arguments, times_of(arguments), forward)
                raise FoundLayers
            self.state.looks_up = self._prepare(arguments, forward)
        except BaseException as error:
            if isinstance(error, UnsupportedModelError):
                self.undo()
            self._lock.release()
            raise
        if not self._hooks:  # undone: nothing hears of the end of this forward
            self._lock.release()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._lock.is_held:
            return
        try:
            looked_up = self.state.looks_up
            self.state.looks_up = False
            for tables in self.kinds.values():
                tables.forget_fresh()
            if output is not None and looked_up:
                self.looked_up += 1
                if not is_on_accelerator(self.state.row):
                    self.check()
                if any(len(tables.rows) >= self.steps for tables in self.kinds.values()):
                    self.release()
        finally:
            self._lock.release()

    def _prepare(self, arguments: Mapping[str, Any], forward: Any) -> bool:
        """Whether the forward that is about to start looks results up, for which its row is chosen."""
        self._refuse_offloading(self._around)
        if not all(projection.is_intact for projection in self.projections):
            self.unfold()
        if torch.is_grad_enabled():
            return self._in_full(_GRADIENTS)
        times = times_of(arguments)
        if not times and self.projections:
            return self._in_full(_NO_TENSOR)
        precision = _precision()
        if self._precision not in (None, precision):
            return self._in_full(_OTHER_PRECISION)
        try:
            tables = self._tables(arguments, times, forward)
        except UnsupportedModelError as error:
            if not self.has_folded:
                raise
            self._warn(f"{error}")  # a LoRA was loaded on all of them, say: from now on it is a plain model
            self.undo()
            return False
        if tables is None:
            return self._in_full(_TOO_LARGE)
        self._precision = precision
        given = tuple(times.values())
        expected = self._expected(tables) if is_on_accelerator(given[0]) else None
        if expected is not None and not self.reads_times:
            self._expect(tables, expected, given)
            tables.use()
            return True
        if is_on_accelerator(given[0]):
            self.check()
        values = tuple(flat(given).tolist())
        if any(value != value for value in values):
            return self._in_full(_NOT_A_NUMBER)
        row, is_new = tables.row_of(values, given)
        self.computed += is_new
        if tables.computed > 2 * self.steps:
            self._warn(
                f"more than {self.steps} distinct timesteps are used, so that some are computed again from the "
                "weights on the host: give fold_timesteps a larger number of steps"
            )
        if self._at is not None:
            tables.expected[self._at] = row
        self.state.row.fill_(row)
        tables.use()
        return True

    def _in_full(self, reason: str) -> bool:
        self.in_full[reason] += 1
        self._warn(f"the projections of the timestep are computed in full, because {reason}")
        return False

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, LayerCacheWarning, stacklevel=2)

    # --- rows ---

    def _expected(self, tables: Tables) -> int | None:
        """The row of the sampler's present step, as far as the host knows it without asking the device."""
        self._at = None
        scheduler = getattr(self.pipeline, "scheduler", None)
        timesteps, step = getattr(scheduler, "timesteps", None), scheduler_step(scheduler)
        if timesteps is None or step is None:
            return None
        if timesteps is not self._run:  # read once in a run
            self._run, self._values = timesteps, torch.as_tensor(timesteps).tolist()
        if not 0 <= step < len(self._values):
            return None
        self._at = self._values[step]
        return tables.expected.get(self._at)

    def _expect(self, tables: Tables, row: int, times: Sequence[torch.Tensor]) -> None:
        """Takes this row if it is that of these times, and NaN else; the device compares, the host does not wait."""
        differs = (tables.times[row] != flat(times).to(self.state.device)).any()
        self.state.failed[0].logical_or_(differs)
        self.state.row.fill_(row)
        self.state.row.masked_fill_(differs, 0)

    def check(self) -> None:
        """Raises `CacheStateError` where a row was taken for another timestep, or another input, than its own."""
        failed = getattr(self.state, "failed", None)
        if failed is None or not bool(failed.any()):
            return
        is_time = bool(failed[0])  # then inputs differ too, from NaN
        failed.zero_()
        if is_time:
            self.reads_times = True
            raise CacheStateError(
                "the transformer was called with another timestep than its pipeline's scheduler has at this step, and "
                "timestep tables gave NaN: the result is not usable. Run it again: from now on the timestep of every "
                "forward is read from the device"
            )
        self.undo()
        raise CacheStateError(
            f"the embedding of the timestep of {type(self.transformer).__name__} depends on something else that "
            "timestep tables did not see, such as a number among the arguments of its forward, and they gave NaN: the "
            "result is not usable. The tables are undone, run it again without fold_timesteps"
        )

    def __reduce__(self) -> Any:
        return type(None), ()  # copies and pickles of the transformer have no tables

    # --- kinds of forwards ---

    def _tables(self, arguments: Mapping[str, Any], times: Mapping[str, torch.Tensor], forward: Any) -> Tables | None:
        """The tables for forwards of this kind, made where it is the first; ``None`` where they would be too large."""
        kind = (*_given(arguments), *((one.shape, one.dtype, one.device) for one in times.values()))
        tables = self.kinds.get(kind)
        if tables is not None:
            self.kinds.move_to_end(kind)
            return tables
        if kind in self._too_large:
            return None
        found = self._find(arguments, forward)
        device = found.sizes[0][1].device  # where the layers run; the times may be elsewhere
        self.state.place(device)
        count = sum(one.numel() for one in times.values())
        limit = sum(projection.nbytes for projection in self.projections)
        wanted = (self.steps + 1) * sum(one.nbytes for places in found.sizes for one in places[1:])
        if wanted > limit:
            self._too_large.add(kind)
            return None
        while self.kinds and wanted + sum(tables.nbytes for tables in self.kinds.values()) > limit:
            self.kinds.popitem(last=False)
        self.kinds[kind] = Tables(found.program, found.projections, self.steps, count, found.sizes, device)
        return self.kinds[kind]

    def _find(self, arguments: Mapping[str, Any], forward: Any) -> Found:
        """The projections in a forward of a new kind."""
        hook = stateful_hook_of(self.transformer)
        if hook is not None:
            raise CacheStateError(
                f"timestep tables follow one more forward, which diffusers' hook {hook!r} would count as its own: "
                "enable that cache after the first call with tables"
            )
        layers = [projection.layer for projection in self.projections]
        if not layers:
            found = find_projections(self.transformer, arguments, forward, self.steps)
            self._fold(found)
            return found
        found = find_projections(self.transformer, arguments, forward, self.steps, layers)
        lost = [one for one in self.projections if one.layer not in {other.layer for other in found.projections}]
        if lost:
            self._warn(f"{len(lost)} projections depend on more than the timestep in this forward, and are kept")
            self.unfold(lost)
            if not self.projections:
                raise self._refusal(found.kept)
            found = find_projections(
                self.transformer, arguments, forward, self.steps, [one.layer for one in self.projections]
            )
        own = {one.layer: one for one in self.projections}
        return Found(found.program, [own[one.layer] for one in found.projections], found.sizes)

    def _fold(self, found: Found) -> None:
        self.kept = found.kept
        if not found.projections:
            raise self._refusal(found.kept)
        self.has_folded = True
        self.projections = found.projections
        for projection in self.projections:
            projection.enter(self.state)
        around = {self.transformer: None}
        for projection in self.projections:
            parts = projection.name.split(".")
            around |= dict.fromkeys(
                self.transformer.get_submodule(".".join(parts[:k])) for k in range(1, len(parts) + 1)
            )
        self._around = list(around)

    def _refusal(self, kept: Mapping[str, int]) -> UnsupportedModelError:
        why = "; ".join(f"{count} of its layers {reason}" for reason, count in kept.items())
        return UnsupportedModelError(
            f"{type(self.transformer).__name__} has nothing to fold into timestep tables: "
            f"{why or 'no linear layer gets an embedding of the timestep alone'}. The model is as it was; leave out "
            "fold_timesteps"
        )


def _given(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the arguments that a forward is given, also of those in dictionaries."""
    found = []
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            found += [f"{name}.{key}" for key, inner in value.items() if inner is not None]
        elif value is not None:
            found.append(name)
    return tuple(found)


def _precision() -> Hashable:
    """Settings of the process that change the bits of a matrix product."""
    autocast = None
    if is_autocast_enabled():
        autocast = tuple(
            str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        )
    return autocast, torch.get_float32_matmul_precision()
