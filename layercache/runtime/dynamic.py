"""Executing a method that decides as it runs: whether the blocks behind its probe are computed or reused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import model_config, scheduler_sigmas
from layercache.errors import CacheStateError, MethodError, NonFiniteResidualError
from layercache.models.modulation import Modulated
from layercache.models.positions import Grid, on_grid, token_grid
from layercache.models.registry import count_blocks, fingerprint_of
from layercache.models.spec import ModelSpec, Streams, named_arguments
from layercache.ops.pending import Pending
from layercache.runtime.blocks import BlockPass, BlockProxy, Place
from layercache.runtime.ended import EndedRun, whole_rows
from layercache.runtime.forward import Forward
from layercache.runtime.host_storage import make_storage
from layercache.runtime.identity import Identity
from layercache.runtime.identity import Place as ForwardPlace
from layercache.runtime.policy import Decider, DynamicMethod, Observation, Run
from layercache.runtime.report import CacheReport, Counts
from layercache.runtime.router import Router
from layercache.runtime.samples import Excluded
from layercache.runtime.signature import Signature
from layercache.runtime.storage import Buffer, check_alike
from layercache.schedule.memory_plan import COMPUTE, GroupAction
from layercache.schedule.schedule import Cell, Schedule


class Reader:
    """Brings statistics to the host: those of this step at once, or those of the step before without waiting."""

    def __init__(self, sync: str, group: Any = None):
        self._lagged, self._group = sync == "lagged", group
        self._under_way: Pending | None = None

    def read(self, statistics: torch.Tensor | None) -> list[float] | None:
        """The newest numbers that may be looked at; ``None`` where there are none yet.

        In a process group they are the sums over its processes, added up where they are in one packed collective.
        """
        if statistics is not None and self._group is not None:
            statistics = statistics.clone()
            torch.distributed.all_reduce(statistics, group=self._group)
        if not self._lagged:
            return None if statistics is None else statistics.flatten().tolist()
        before, self._under_way = self._under_way, None
        if statistics is not None:
            self._under_way = Pending(statistics)
        # processes that decide together must look at the same step's numbers, also where one has them later
        return before.value() if before is not None and (self._group is not None or before.ready()) else None


@dataclass
class BranchState:
    """Stored residuals, references and decisions of one branch or part of it.

    Attributes:
        place: where its forwards stand.
        anchors: steps whose residuals are stored, newest first.
        stored: their residuals, image and text, in the same order.
        log: per step of this generation, ``None`` where it was computed, else the coefficients by step.
        excluded: samples of the batch that are NaN.
        grid: tokens of the picture by axis, once they were asked for.
    """

    place: ForwardPlace
    decider: Decider
    reader: Reader
    signature: Signature = field(default_factory=Signature)
    anchors: list[int] = field(default_factory=list)
    stored: list[list[Buffer]] = field(default_factory=list)
    log: list[Cell] = field(default_factory=list)
    excluded: Excluded = field(default_factory=Excluded)
    grid: Grid | None = None

    @property
    def residuals(self) -> list[list[Buffer]]:
        """What is stored, by stream."""
        return [list(own) for own in zip(*self.stored, strict=True)]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for one in self.stored for buffer in one) + self.decider.nbytes

    @property
    def host_bytes(self) -> int:
        return sum(buffer.host_bytes for one in self.stored for buffer in one)


class _Visit(BlockPass):
    """One passage through the blocks."""

    router: DynamicRouter

    def __init__(self, router: DynamicRouter):
        super().__init__(router)
        self.clear()

    def clear(self) -> None:
        super().clear()
        self.modulation: Callable[[], Modulated] = _no_modulation
        self.start: torch.Tensor | None = None
        self.base: list[torch.Tensor] = []
        self.reuses = False

    def arrive(
        self, block: nn.Module, at: int, streams: Streams, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """The streams are in front of block number ``at``, which is called with these arguments."""
        router, method = self.router, self.router.method
        image, text = streams
        if at == 0:
            self.start = image
            if method.needs_modulation:
                modulation = router.spec.modulation
                assert modulation is not None
                self.modulation = lambda: modulation(block, named_arguments(block, args, kwargs))
        if at == router.skip_from:
            self.base = [image, text] if router.keeps_text and text is not None else [image]
        if at == router.probe:
            assert self.start is not None
            start = self.start
            if start.dtype != image.dtype:  # under torch.autocast
                wider = torch.promote_types(start.dtype, image.dtype)
                start, image = start.to(wider), image.to(wider)
            self.reuses = router.decides_to_reuse(router.observed(start, image, self.modulation))

    def leave(self, image: torch.Tensor, text: torch.Tensor | None) -> None:
        """The blocks were computed: stores what they added."""
        streams = [image, text] if len(self.base) == 2 else [image]
        self.router.keep(streams, self.base)  # type: ignore[arg-type]

    def restore(self, text: torch.Tensor | None, results: Streams | None) -> Streams:
        found = self.router.add_stored(self.base, results)
        return found[0], found[1] if len(found) == 2 else text


class _Gate(BlockProxy):
    """A block that is computed or skipped by what was decided on the way to it."""

    block_pass: _Visit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        visit, at = self.block_pass, self.place.block
        router = visit.router
        if at in router.landmarks:
            visit.arrive(self.block, at, self.streams(args, kwargs), args, kwargs)
        if at < router.probe or not visit.reuses:
            output = self.block(*args, **kwargs)
            if at == router.end - 1:
                visit.leave(*self.calls.unpack(output, visit.tokens))
            return output
        if self.splits:
            args, kwargs = self.sharded(args, kwargs)
        if at == router.probe and self.place.list in router.rewritten and at != router.end - 1:
            return self.calls.copied(args, kwargs)
        if at != router.end - 1:
            return self.calls.passed(args, kwargs)
        here = self.calls.inputs(args, kwargs, visit.tokens)
        new = visit.restore(here[1], here if self.calls.order is not None else None)
        return self.packed(args, kwargs, here, new)


@dataclass
class DynamicRun:
    """What a method has stored and decided in one generation, per branch and part.

    Attributes:
        sigmas: noise levels of the run, or ``None`` where no scheduler says them.
        steps: their number, where it is known.
        first: step at which the transformer began.
    """

    sigmas: tuple[float, ...] | None
    steps: int | None
    first: int
    states: dict[str, BranchState] = field(default_factory=dict)
    flag: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in list(self.states.values()))  # another thread may ask for a report

    @property
    def host_bytes(self) -> int:
        return sum(state.host_bytes for state in list(self.states.values()))

    def ended(self, is_over: bool) -> EndedRun:
        logs = {name: state.log for name, state in list(self.states.items())}
        return EndedRun(self.sigmas, logs, self.nbytes, self.host_bytes, self.first, is_over)


class DynamicRouter(Router):
    """Routes a transformer by a `DynamicMethod`; this is what ``layercache.enable`` returns for one."""

    keeps_items = True
    schedule_source = "cache.export_schedule() gives what was decided, once a generation has run"

    def __init__(
        self,
        transformer: nn.Module,
        spec: ModelSpec,
        method: DynamicMethod,
        scheduler: Any = None,
        num_steps: int | None = None,
        process_group: Any = None,
        storage: str = "same",
        offload: int = 0,
    ):
        count = count_blocks(transformer)
        super().__init__(transformer, spec, [(0, count)])
        method = method.for_model(type(transformer).__name__) if hasattr(method, "for_model") else method
        method.check_blocks(count)
        if method.needs_modulation and spec.modulation is None:
            raise MethodError(
                f"{method.name} watches the modulated input of the first block, and the description of "
                f"{spec.model_class} does not say how to get it; take fbcache, or add ModelSpec.modulation"
            )
        if method.needs_num_steps and scheduler is None and num_steps is None:
            raise MethodError(
                f"{method.name} must know the number of steps: enable it on the pipeline, or give num_steps"
            )
        self.method = method
        self._stream = tuple(inspect.signature(type(transformer).forward).parameters)[1]
        self.num_blocks, self.end = count, count - method.tail
        self.probe, self.skip_from = method.probe, method.skip_from
        groups, reused = self._groups()
        self.check_skips(groups, {reused})
        self.landmarks = frozenset({0, self.skip_from, self.probe})
        self.keeps_text = spec.has_text and (method.tail > 0 or spec.text_leaves)
        self.offload = offload
        self.storage = make_storage(storage, method.sync == "step", offload)
        self.identity = Identity(spec, scheduler, num_steps=num_steps)
        self._run: DynamicRun | None = None
        self._forward: Forward | None = None
        self._state: BranchState
        self._num_steps, self._group = num_steps, process_group
        self._step = 0
        self._ended = EndedRun()
        self._counts = Counts()

    def begin(self, forward: Forward) -> None:
        if forward.dry_run is not None:
            raise CacheStateError(
                f"{self.method.name} decides inside the forward, which one compiled graph cannot hold: compile the "
                "blocks (transformer.compile_repeated_blocks()), or run the schedule of cache.export_schedule()"
            )
        place = self.locate(forward)
        if place is None:
            self._counts.note(reused=False)
            return
        run = self._run
        assert run is not None
        state = run.states.get(place.key)
        if state is None or state.signature.changes(forward.arguments):
            state = self._start_branch(run, place, forward)
        self._state, self._step, self._forward = state, place.step, forward
        if self.storage.offloads:  # on its way while the probe runs, should it be reused
            self.storage.expect([state.residuals] if state.stored else ())
        self.open((GroupAction(COMPUTE),))

    def shut(self) -> None:
        super().shut()
        self._forward = None  # nothing of its arguments is kept

    def begin_generation(self, place: ForwardPlace) -> None:
        sigmas = None if place.generation.source != "scheduler" else scheduler_sigmas(self.identity.scheduler)
        self._run = DynamicRun(sigmas, self._num_steps if sigmas is None else len(sigmas) - 1, place.step)

    def _start_branch(self, run: DynamicRun, place: ForwardPlace, forward: Forward) -> BranchState:
        """The state of a branch that begins, or changes its shape in the middle, when what was decided stays said."""
        before = run.states.get(place.key)
        log = [] if before is None else before.log[: place.step]
        log += [None] * (place.step - len(log))  # a run that begins in the middle: what came before was computed
        decider = self.method.decider(Run(run.steps, run.sigmas))
        state = BranchState(place, decider, Reader(self.method.sync, self._group), log=log)
        state.signature.changes(forward.arguments)
        run.states[place.key] = state
        return state

    def drop_generation(self) -> None:
        run, self._run = self._run, None
        assert run is not None
        self.storage.release()
        self._ended = run.ended(self.identity.is_over)
        self.__dict__.pop("_state", None)

    def new_pass(self) -> BlockPass:
        return _Visit(self)

    def item(self, block_pass: BlockPass, block: nn.Module, place: Place) -> Any:
        assert isinstance(block_pass, _Visit)
        gated = place.block in self.landmarks or self.probe <= place.block < self.end
        return _Gate(block_pass, block, place) if gated else block

    def routed(self, index: int, blocks: Iterable[nn.Module]) -> Iterator[Any]:
        """Behind the decision: the blocks as they are, or only the one where the stored residual is added."""
        return self._as_decided(index, list(super().routed(index, blocks)))

    def _as_decided(self, index: int, items: list[Any]) -> Iterator[Any]:
        first = self._positions[index][0].block if items else 0
        lo, hi = (min(max(block - first, 0), len(items)) for block in (self.probe + 1, self.end - 1))
        yield from items[:lo]
        between = items[lo:hi]  # the decision was made on the way here
        if between and not between[0].block_pass.reuses:
            yield from [gate.block for gate in between]
        elif self.adds:
            yield from between
        yield from items[max(lo, hi) :]

    def observed(self, start: torch.Tensor, probe: torch.Tensor, modulation: Callable[[], Modulated]) -> Observation:
        """What the method may look at in the present forward."""
        forward, state = self._forward, self._state
        assert forward is not None
        arguments, time = forward.arguments, forward.timestep(self.spec)
        given, model = arguments[self._stream], self.transformer

        def grid() -> Grid:
            if state.grid is None:
                state.grid = token_grid(given, arguments, model_config(model), start.shape[1])
            return state.grid

        def latents() -> torch.Tensor:
            return on_grid(given, arguments, model_config(model))

        if isinstance(time, (int, float)):
            time = torch.tensor(float(time), device=start.device)
        return Observation(start, probe, modulation, latents, grid, time)

    def decides_to_reuse(self, observation: Observation) -> bool:
        """Looks, decides, and notes what was decided."""
        state, step = self._state, self._step
        leader = self._leader()
        if leader is not None:
            terms = leader.log[step] if set(leader.log[step] or ()) <= set(state.anchors) else None
        else:
            terms = self._decide(state, step, observation)
        del state.log[step:]
        state.log += [None] * (step - len(state.log)) + [terms]
        self._counts.note(reused=terms is not None)
        return terms is not None

    @property
    def computes_all(self) -> bool:
        block_pass = self._kept_pass
        return not (isinstance(block_pass, _Visit) and block_pass.reuses)

    def _decide(self, state: BranchState, step: int, observation: Observation) -> Cell:
        decider = state.decider
        forward = self._forward
        assert forward is not None
        hooked = bool(forward.hooked) and min(forward.hooked) <= self.probe  # what is seen is a guider's hooks
        must = not state.anchors or hooked or decider.must_compute(step)
        numbers = state.reader.read(self._seen(state, step, state.excluded.observed(observation), must))
        state.excluded.note(numbers)
        reuses = not must and numbers is not None and decider.may_reuse(step, numbers)
        decider.record(step, not reuses)
        return decider.terms(step, state.anchors) if reuses else None

    def _seen(self, state: BranchState, step: int, observation: Observation, must: bool) -> torch.Tensor | None:
        """Statistics of what is seen; not sent to the host where nothing depends on them."""
        statistics = state.decider.observe(step, observation)
        return None if must and self.method.sync == "step" else statistics

    def _leader(self) -> BranchState | None:
        """The branch whose decision at this step the present one follows."""
        assert self._run is not None
        first = next(iter(self._run.states.values()))
        if self.method.per_branch or self._state is first or first.place.step != self._step:
            return None
        return first if len(first.log) > self._step else None

    def keep(self, streams: list[torch.Tensor], base: list[torch.Tensor]) -> None:
        state = self._state
        is_full = len(state.stored) == self.method.depth
        buffers = state.stored.pop() if is_full else [self.storage.new_buffer() for _ in streams]
        for stream, before, buffer in zip(streams, base, buffers, strict=True):
            check_alike(before, stream)
            if not self.storage.is_mixed and not self.storage.fits(buffer, stream):
                self.storage.make_room(buffer, stream)
        state.stored.insert(0, buffers)
        del state.anchors[self.method.depth - 1 :]
        state.anchors.insert(0, self._step)
        run = self._run
        assert run is not None
        run.flag = self.storage.flag_for(streams[0], run.flag)
        self.storage.store(streams, base, buffers, run.flag)
        if state.excluded.is_due and len(streams[0]) > 1 and self._group is None:
            if self.storage.may_wait or not streams[0].is_cuda:
                if state.excluded.look(streams[0]):
                    state.decider.clear(state.excluded)

    def add_stored(self, base: list[torch.Tensor], results: Streams | None = None) -> list[torch.Tensor]:
        state = self._state
        terms = state.log[self._step] or {}
        stored = dict(zip(state.anchors, state.stored, strict=True))
        residuals = [[stored[anchor][stream] for anchor in terms] for stream in range(len(base))]
        into = None if results is None else [r for r in results[: len(base)] if r is not None]
        return self.storage.restore(base, residuals, list(terms.values()), into)

    def find_fault(self) -> NonFiniteResidualError | None:
        """Looks at the stored residuals: by the device's flag, or without a GPU at themselves."""
        run = self._run
        assert run is not None
        buffers = [buffer for state in run.states.values() for one in state.stored for buffer in one]
        return self.storage.find_fault(buffers, run.flag)

    @property
    def _newest(self) -> EndedRun:
        """Of the present generation, or of the last one."""
        return self._ended if self._run is None else self._run.ended(self.identity.is_over)

    @property
    def decisions(self) -> dict[str, tuple[bool, ...]]:
        """Of the last generation, per branch and step: whether the blocks were computed."""
        return {name: tuple(cell is None for cell in log) for name, log in self._newest.logs.items()}

    def export_schedule(self) -> Schedule:
        """The decisions of the last generation as a schedule; running it gives the same bits without deciding.

        Raises:
            CacheStateError: no generation was finished, or nothing says at which noise levels it ran.
        """
        run, (groups, place) = self._newest, self._groups()
        log_rows = {
            name: [tuple(cell if g == place else None for g in range(len(groups))) for cell in log]
            for name, log in run.logs.items()
        }
        steps, cells = whole_rows(run, log_rows)
        shared = next(iter(cells.values()))
        return Schedule(
            fingerprint_of(self.transformer, run.sigmas or (), tuple(cells), steps),
            groups,
            shared,
            tuple(float(hi - lo) for lo, hi in groups),
            {"method": self.method.name, "settings": repr(self.method)},
            branch_cells={name: own for name, own in cells.items() if own != shared},
        )

    def _groups(self) -> tuple[tuple[tuple[int, int], ...], int]:
        """Block ranges of the schedule, and which of them is reused."""
        edges = [0, self.method.skip_from, self.end, self.num_blocks]
        groups = tuple((lo, hi) for lo, hi in zip(edges, edges[1:], strict=False) if lo < hi)
        return groups, groups.index((self.method.skip_from, self.end))

    def report(self) -> CacheReport:
        """What the cache did since it was enabled; shares are counted in blocks."""
        saved = (self.end - self.method.probe) / self.num_blocks
        run = self._newest
        report = self._counts.report(saved, run.nbytes, run.logs, self.identity, self.measured_speedup)
        return replace(report, host_bytes=run.host_bytes, staged_bytes=self.storage.staged_bytes)


def _no_modulation() -> Modulated:
    raise CacheStateError("this method did not ask for the modulated input")
