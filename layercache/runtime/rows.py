"""Executing a method that decides before each step which groups of blocks are computed."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layercache import ops
from layercache._utils.compat import model_config, scheduler_sigmas
from layercache.errors import CacheStateError, MethodError, NonFiniteResidualError, UnsupportedModelError
from layercache.models.positions import on_grid, shrunk
from layercache.models.registry import count_blocks, fingerprint_of
from layercache.models.spec import ModelSpec, Streams
from layercache.runtime.dynamic import Reader
from layercache.runtime.ended import EndedRun, Row, whole_rows
from layercache.runtime.forward import Forward
from layercache.runtime.host_storage import make_storage
from layercache.runtime.identity import Identity
from layercache.runtime.identity import Place as ForwardPlace
from layercache.runtime.policy import RowDecider, RowMethod, Run
from layercache.runtime.report import CacheReport, reasons
from layercache.runtime.router import Router
from layercache.runtime.samples import Excluded
from layercache.runtime.signature import Signature
from layercache.runtime.state import MAX_TERMS
from layercache.runtime.storage import Buffer, check_alike
from layercache.runtime.timing import device_of
from layercache.schedule.memory_plan import CAPTURE, REUSE, GroupAction
from layercache.schedule.schedule import Schedule


@dataclass
class RowState:
    """Stored residuals and rows of one branch or part of it.

    Attributes:
        stored: per group the newest residual, image and text.
        anchors: per group the step that it is of.
        log: the rows of this generation.
    """

    stored: list[list[Buffer]]
    anchors: list[int | None]
    log: list[Row] = field(default_factory=list)
    signature: Signature = field(default_factory=Signature)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for group in self.stored for buffer in group)

    @property
    def host_bytes(self) -> int:
        return sum(buffer.host_bytes for group in self.stored for buffer in group)


@dataclass
class RowRun:
    """What a method has decided in one generation, and what is stored for it.

    Attributes:
        first: step at which the transformer began.
        step: that was decided last, or -1.
        computed: per group whether that step computes it.
        sizes: per group what it added when it was last measured, until the method has seen it.
        measured: branch whose groups are measured in the present step, or "".
        excluded: samples of the batch that are NaN.
    """

    sigmas: tuple[float, ...] | None
    decider: RowDecider
    first: int
    states: dict[str, RowState] = field(default_factory=dict)
    step: int = -1
    computed: tuple[bool, ...] = ()
    sizes: dict[int, torch.Tensor] = field(default_factory=dict)
    measured: str = ""
    excluded: Excluded = field(default_factory=Excluded)
    flag: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in list(self.states.values())) + self.decider.nbytes

    def ended(self, is_over: bool) -> EndedRun:
        states = list(self.states.items())
        held = sum(state.host_bytes for _, state in states)
        logs = {name: state.log for name, state in states}
        return EndedRun(self.sigmas, logs, self.nbytes, held, self.first, is_over)


class RowRouter(Router):
    """Routes a transformer by a `RowMethod`; this is what ``layercache.enable`` returns for one."""

    schedule_source = "cache.export_schedule() gives what was decided, once a generation has run"

    def __init__(
        self,
        transformer: nn.Module,
        spec: ModelSpec,
        method: RowMethod,
        scheduler: Any = None,
        num_steps: int | None = None,
        process_group: Any = None,
        storage: str = "same",
        offload: int = 0,
    ):
        self.groups = method.groups(count_blocks(transformer))
        super().__init__(transformer, spec, self.groups)
        if method.needs_num_steps and scheduler is None and num_steps is None:
            raise MethodError(
                f"{method.name} must know the number of steps: enable it on the pipeline, or give num_steps"
            )
        self.keeps_items = len(self.groups) == 1  # else there are too many rows to keep something for each
        self.method, self.offload = method, offload
        self.storage = make_storage(storage, True, offload)
        self.identity = Identity(spec, scheduler, num_steps=num_steps)
        self._stream = tuple(inspect.signature(type(transformer).forward).parameters)[1]
        self._num_steps, self._reader = num_steps, Reader("step", process_group)
        self._run: RowRun | None = None
        self._state: RowState
        self._key = ""
        self._launches: dict[int, list[list[list[Buffer]]]] = {}
        self._ended = EndedRun()
        self._rows: Counter[tuple[bool, ...]] = Counter()
        self._trials = 0.0  # in forwards
        self._fallbacks = 0

    @property
    def storage_name(self) -> str:
        return self.storage.name

    def begin(self, forward: Forward) -> None:
        if forward.dry_run is not None:
            raise CacheStateError(
                f"{self.method.name} decides between the forwards, which one compiled graph cannot follow: compile the "
                "blocks (transformer.compile_repeated_blocks()), or run the schedule of cache.export_schedule()"
            )
        place = self.locate(forward)
        if place is None:
            self._rows[(True,) * len(self.groups)] += 1
            return
        run = self._run
        assert run is not None
        state = run.states.get(place.key)
        if state is None or state.signature.changes(forward.arguments):
            state = self._start_branch(run, place, forward)
        if place.step != run.step:
            self._decide(run, place, forward)
        self._state, self._key = state, place.key
        chosen = zip(run.computed, state.anchors, strict=True)
        computed = tuple(own or anchor is None for own, anchor in chosen)
        self._fallbacks += computed != run.computed
        self._rows[computed] += 1
        del state.log[place.step :]
        state.log += [(None,) * len(self.groups)] * (place.step - len(state.log))
        cells = (None if own else {anchor: 1.0} for own, anchor in zip(computed, state.anchors, strict=True))
        state.log.append(tuple(cells))  # type: ignore[arg-type]
        state.anchors = [place.step if own else anchor for own, anchor in zip(computed, state.anchors, strict=True)]
        actions = self._actions(computed)
        self._launches = self._launches_of(actions, state)
        if self.storage.offloads:
            self.storage.expect([one for launches in self._launches.values() for one in launches])
        self.open(actions)

    def begin_generation(self, place: ForwardPlace) -> None:
        sigmas = None if place.generation.source != "scheduler" else scheduler_sigmas(self.identity.scheduler)
        self._run = RowRun(sigmas, self._new_decider(sigmas), place.step)

    def _new_decider(self, sigmas: tuple[float, ...] | None) -> RowDecider:
        steps = self._num_steps if sigmas is None else len(sigmas) - 1
        return self.method.decider(Run(steps, sigmas), len(self.groups))

    def _start_branch(self, run: RowRun, place: ForwardPlace, forward: Forward) -> RowState:
        """The state of a branch that begins, or changes its shape in the middle, when what was decided stays said."""
        before = run.states.get(place.key)
        log = [] if before is None else before.log[: place.step]
        log += [(None,) * len(self.groups)] * (place.step - len(log))  # what came before was computed
        if before is not None:
            run.decider = self._new_decider(run.sigmas)
            run.step, run.sizes, run.excluded = -1, {}, Excluded()
        streams = 2 if self.spec.has_text else 1
        stored = [[self.storage.new_buffer() for _ in range(streams)] for _ in self.groups]
        state = RowState(stored, [None] * len(self.groups), log)
        state.signature.changes(forward.arguments)
        run.states[place.key] = state
        return state

    def _decide(self, run: RowRun, place: ForwardPlace, forward: Forward) -> None:
        """Decides about a step when its first forward comes, for all its forwards."""
        step, decider = place.step, run.decider
        trial = self._trial(forward) if self.method.trial and decider.wants_trial(step) else None
        if trial is not None:
            if run.excluded.is_due and len(trial) > 1:
                run.excluded.look(trial)
            trial = run.excluded.without(trial)
        complete = len(run.sizes) == len(self.groups)
        sizes = torch.stack([run.sizes[group] for group in range(len(self.groups))]) if complete else None
        run.sizes = {}
        numbers = self._reader.read(decider.observe(step, trial, sizes))
        run.excluded.note(numbers)
        run.computed, run.step = decider.choose(step, numbers), step
        run.measured = place.key if decider.wants_sizes(step) else ""

    def _trial(self, forward: Forward) -> torch.Tensor:
        """The model's output on a smaller picture, ``[B, ..., C]``.

        Raises:
            UnsupportedModelError: the model cannot be run on one.
        """
        assert self.method.trial is not None
        config = model_config(self.transformer)
        arguments, share = shrunk(self._stream, forward.arguments, config, self.method.trial)
        try:
            with self.attachment.times.beside(device_of(arguments[self._stream])):
                output = self.transformer.forward(**arguments)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{self.method.name} runs the model on a smaller picture too, which {self.spec.model_class} cannot do "
                f"with these arguments ({type(error).__name__}: {error}); take another method, such as SeaCache"
            ) from error
        self._trials += share
        found = output if isinstance(output, torch.Tensor) else output[0]
        return on_grid(found, arguments, config)

    def _actions(self, computed: Sequence[bool]) -> tuple[GroupAction, ...]:
        """What the groups do, by which of them are computed (`layercache.schedule.memory_plan.lay_out`)."""
        spec, actions = self.spec, list[GroupAction]()
        for group, own in enumerate(computed):
            run = self._run_from(group, computed)
            text = spec.has_text and (spec.text_leaves or run.stop < len(computed))
            actions.append(GroupAction(CAPTURE, text) if own else GroupAction(REUSE, text, group == run.stop - 1))
        return tuple(actions)

    def _run_from(self, group: int, computed: Sequence[bool]) -> range:
        """The groups from this one on that are reused together; itself where it is computed."""
        stop = group + 1
        while not computed[group] and not self.spec.needs_every_output and stop < len(computed) and not computed[stop]:
            stop += 1
        return range(group, stop)

    def _launches_of(self, actions: Sequence[GroupAction], state: RowState) -> dict[int, list[list[list[Buffer]]]]:
        """By the group that ends a run of reused ones: the residuals that are added, per launch and stream."""
        found: dict[int, list[list[list[Buffer]]]] = {}
        first = 0
        for group, action in enumerate(actions):
            if action.kind == REUSE and action.ends_run:
                parts = [state.stored[lo : min(lo + MAX_TERMS, group + 1)] for lo in range(first, group + 1, MAX_TERMS)]
                found[group] = [[[own[k] for own in part] for k in range(1 + action.text)] for part in parts]
            if action.kind != REUSE or action.ends_run:
                first = group + 1
        return found

    def drop_generation(self) -> None:
        run, self._run = self._run, None
        assert run is not None
        self.storage.release()
        self._ended, self._launches = run.ended(self.identity.is_over), {}
        self.__dict__.pop("_state", None)

    def capture(self, group: int, image_in: Any, text_in: Any, image_out: Any, text_out: Any) -> None:
        run, buffers = self._run, self._state.stored[group]
        assert run is not None
        with_text = self.actions[group].text
        streams, bases = ([image_out, text_out], [image_in, text_in]) if with_text else ([image_out], [image_in])
        for stream, base, buffer in zip(streams, bases, buffers, strict=False):
            check_alike(base, stream)
            if not self.storage.is_mixed and not self.storage.fits(buffer, stream):
                self.storage.make_room(buffer, stream)
        run.flag = self.storage.flag_for(image_out, run.flag)
        self.storage.store(streams, bases, buffers[: len(streams)], run.flag)
        if run.measured == self._key:
            wider = torch.promote_types(image_in.dtype, image_out.dtype)  # another under torch.autocast
            pair = [image_out.to(wider)], [image_in.to(wider)]
            squares = ops.pair_statistics(*pair, per_sample=True)[:, 3]
            run.sizes[group] = run.excluded.without(squares).sum()

    def reuse(self, group: int, image: Any, text: Any, results: Streams | None = None) -> Streams:
        streams = [image, text] if self.actions[group].text else [image]
        for buffers in self._launches[group]:
            into: Any = list(results[: len(streams)]) if results else None
            streams = self.storage.restore(streams, buffers, (1.0,) * len(buffers[0]), into)
        return streams[0], streams[1] if len(streams) == 2 else text

    def find_fault(self) -> NonFiniteResidualError | None:
        """Looks at the stored residuals: by the device's flag, or without a GPU at themselves."""
        run = self._run
        assert run is not None
        buffers = [buffer for state in run.states.values() for group in state.stored for buffer in group]
        return self.storage.find_fault(buffers, run.flag)

    @property
    def _newest(self) -> EndedRun:
        """Of the present generation, or of the last one."""
        return self._ended if self._run is None else self._run.ended(self.identity.is_over)

    @property
    def decisions(self) -> dict[str, tuple[bool, ...]]:
        """Of the last generation, per branch and step: whether any block was computed."""
        return {name: tuple(None in row for row in log) for name, log in self._newest.logs.items()}

    @property
    def rows(self) -> dict[str, tuple[tuple[bool, ...], ...]]:
        """Of the last generation, per branch, step and group: whether it was computed."""
        logs = self._newest.logs
        return {name: tuple(tuple(cell is None for cell in row) for row in log) for name, log in logs.items()}

    def export_schedule(self) -> Schedule:
        """The decisions of the last generation as a schedule; running it gives the same bits without deciding.

        Raises:
            CacheStateError: no generation was finished, or nothing says at which noise levels it ran.
        """
        run = self._newest
        steps, cells = whole_rows(run, run.logs)
        shared = next(iter(cells.values()))
        return Schedule(
            fingerprint_of(self.transformer, run.sigmas or (), tuple(cells), steps),
            self.groups,
            shared,
            tuple(float(hi - lo) for lo, hi in self.groups),
            {"method": self.method.name, "settings": repr(self.method)},
            branch_cells={name: own for name, own in cells.items() if own != shared},
        )

    def report(self) -> CacheReport:
        """What the cache did since it was enabled; shares are counted in blocks, forwards on smaller pictures too."""
        run, rows = self._newest, list(self._rows.items())
        blocks = [hi - lo for lo, hi in self.groups]
        forwards = sum(times for _, times in rows)
        spent = sum(times * sum(size for own, size in zip(row, blocks, strict=True) if own) for row, times in rows)
        computed = sum(times * sum(row) for row, times in rows)
        return CacheReport(
            used=(spent / sum(blocks) + self._trials) / forwards if forwards else 1.0,
            computed_cells=computed,
            cached_cells=forwards * len(blocks) - computed,
            generations=self.identity.count,
            forwards=forwards,
            fallback_rows=self._fallbacks,
            cache_bytes=run.nbytes,
            host_bytes=run.host_bytes,
            staged_bytes=self.storage.staged_bytes,
            branches=tuple(run.logs),
            source=self.identity.source,
            unidentified=self.identity.unidentified.total(),
            speedup=self.measured_speedup,
            in_full=reasons(self.identity, self._fallbacks),
        )
