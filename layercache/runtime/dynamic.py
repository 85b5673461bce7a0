"""Executing a method that decides as it runs: whether the blocks behind its probe are computed or reused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import scheduler_sigmas
from layercache.errors import CacheStateError, MethodError, NonFiniteResidualError
from layercache.models.registry import count_blocks, fingerprint_of
from layercache.models.spec import ModelSpec, Streams, named_arguments
from layercache.ops.pending import Pending
from layercache.runtime.forward import Forward
from layercache.runtime.policy import Decider, DynamicMethod, Observation, Run
from layercache.runtime.report import CacheReport, Counts
from layercache.runtime.router import BlockPass, BlockProxy, Place, Router
from layercache.runtime.samples import Excluded
from layercache.runtime.steps import Signature, StepCounter
from layercache.runtime.storage import Buffer, Storage, check_alike
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
    """Stored residuals, references and decisions of one branch.

    Attributes:
        anchors: steps whose residuals are stored, newest first.
        stored: their residuals, image and text, in the same order.
        log: per step of this generation, ``None`` where it was computed, else the coefficients by step.
        excluded: samples of the batch that are NaN.
    """

    decider: Decider
    reader: Reader
    anchors: list[int] = field(default_factory=list)
    stored: list[list[Buffer]] = field(default_factory=list)
    log: list[Cell] = field(default_factory=list)
    excluded: Excluded = field(default_factory=Excluded)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for one in self.stored for buffer in one) + self.decider.nbytes


class _Visit(BlockPass):
    """One passage through the blocks."""

    router: DynamicRouter

    def __init__(self, router: DynamicRouter):
        super().__init__(router)
        self.restart()

    def restart(self) -> None:
        """Another forward begins."""
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
                router.modulation = lambda: modulation(block, named_arguments(block, args, kwargs))
        if at == router.skip_from:
            self.base = [image, text] if router.keeps_text and text is not None else [image]
        if at == router.probe:
            assert self.start is not None
            start = self.start
            if start.dtype != image.dtype:  # under torch.autocast
                wider = torch.promote_types(start.dtype, image.dtype)
                start, image = start.to(wider), image.to(wider)
            self.reuses = router.decides_to_reuse(Observation(start, image, router.modulation))

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


class DynamicRouter(Router):
    """Routes a transformer by a `DynamicMethod`; this is what ``layercache.enable`` returns for one."""

    keeps_items = True

    def __init__(
        self,
        transformer: nn.Module,
        spec: ModelSpec,
        method: DynamicMethod,
        scheduler: Any = None,
        num_steps: int | None = None,
        process_group: Any = None,
        storage: str = "same",
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
        self.num_blocks, self.end = count, count - method.tail
        self.probe, self.skip_from = method.probe, method.skip_from
        self.landmarks = frozenset({0, self.skip_from, self.probe})
        self.keeps_text = spec.has_text and (method.tail > 0 or spec.text_leaves)
        self.storage = Storage(storage, may_wait=method.sync == "step")
        self.steps = StepCounter(scheduler=scheduler)
        self.states: dict[str, BranchState] = {}
        self.modulation: Callable[[], tuple[torch.Tensor, torch.Tensor, float]] = _no_modulation
        self._num_steps, self._group = num_steps, process_group
        self._sigmas: tuple[float, ...] | None = None
        self._branch, self._step = "", 0
        self._signatures: defaultdict[str, Signature] = defaultdict(Signature)
        self._flag: torch.Tensor | None = None
        self._counts = Counts()

    def begin(self, forward: Forward) -> None:
        if forward.dry_run is not None:
            raise CacheStateError(
                f"{self.method.name} decides inside the forward, which one compiled graph cannot hold: compile the "
                "blocks (transformer.compile_repeated_blocks()), or run the schedule of cache.export_schedule()"
            )
        place = self.locate(forward)
        self._branch, self._step = place.branch, place.step
        changed = self._signatures[place.branch].changes(forward.arguments, place.starts)
        if changed or place.starts or place.branch not in self.states:
            self._start(place.branch, place.step)
        if self._kept_pass is not None:
            self._kept_pass.restart()  # type: ignore[attr-defined]
        self.open((GroupAction(COMPUTE),))

    def _start(self, branch: str, step: int) -> None:
        self._counts.generations += not self.states or branch == next(iter(self.states))
        if self.steps.scheduler is not None and (step == 0 or self._sigmas is None):
            self._sigmas = scheduler_sigmas(self.steps.scheduler)
        steps = self._num_steps if self._sigmas is None else len(self._sigmas) - 1
        decider = self.method.decider(Run(steps, self._sigmas))
        # a run that begins in the middle, or changes its shape: what came before was computed, or is gone
        before = self.states[branch].log[:step] if step and branch in self.states else []
        log: list[Cell] = [*before, *[None] * (step - len(before))]
        self.states[branch] = BranchState(decider, Reader(self.method.sync, self._group), log=log)

    def new_pass(self) -> BlockPass:
        return _Visit(self)

    def item(self, block_pass: BlockPass, block: nn.Module, place: Place) -> Any:
        assert isinstance(block_pass, _Visit)
        gated = place.block in self.landmarks or self.probe <= place.block < self.end
        return _Gate(block_pass, block, place) if gated else block

    def route(self, index: int, blocks: Iterable[nn.Module]) -> Iterator[Any]:
        """Behind the decision: the blocks as they are, or only the one where the stored residual is added."""
        if self._next_list != index:
            return iter(blocks)
        return self._as_decided(index, list(super().route(index, blocks)))

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

    def decides_to_reuse(self, observation: Observation) -> bool:
        """Looks, decides, and notes what was decided."""
        state, step = self.states[self._branch], self._step
        leader = self._leader()
        if leader is not None:
            terms = leader.log[step] if set(leader.log[step] or ()) <= set(state.anchors) else None
        else:
            terms = self._decide(state, step, observation)
        del state.log[step:]
        state.log += [None] * (step - len(state.log)) + [terms]
        self._counts.note(reused=terms is not None)
        return terms is not None

    def _decide(self, state: BranchState, step: int, observation: Observation) -> Cell:
        decider = state.decider
        must = not state.anchors or decider.must_compute(step)
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
        first = next(iter(self.states))
        if self.method.per_branch or self._branch == first or len(self.states[first].log) <= self._step:
            return None
        return self.states[first]

    def keep(self, streams: list[torch.Tensor], base: list[torch.Tensor]) -> None:
        state = self.states[self._branch]
        is_full = len(state.stored) == self.method.depth
        buffers = state.stored.pop() if is_full else [Buffer() for _ in streams]
        for stream, before, buffer in zip(streams, base, buffers, strict=True):
            check_alike(before, stream)
            if not self.storage.is_mixed and not self.storage.fits(buffer, stream):
                self.storage.allocate(buffer, stream)
        state.stored.insert(0, buffers)
        del state.anchors[self.method.depth - 1 :]
        state.anchors.insert(0, self._step)
        self.storage.store(streams, base, buffers, self._flag_for(streams[0]))
        if state.excluded.is_due and len(streams[0]) > 1 and self._group is None:
            if self.storage.may_wait or not streams[0].is_cuda:
                if state.excluded.look(streams[0]):
                    state.decider.clear(state.excluded)

    def _flag_for(self, stream: torch.Tensor) -> torch.Tensor | None:
        """Raised on the way where numbers cannot be looked at in their place when the generation ends."""
        if not (stream.is_cuda or self.storage.is_compact):
            return None
        if self._flag is None or self._flag.device != stream.device:
            self._flag = torch.zeros(1, dtype=torch.int32, device=stream.device)
        return self._flag

    def add_stored(self, base: list[torch.Tensor], results: Streams | None = None) -> list[torch.Tensor]:
        state = self.states[self._branch]
        terms = state.log[self._step] or {}
        stored = dict(zip(state.anchors, state.stored, strict=True))
        residuals = [[stored[anchor][stream] for anchor in terms] for stream in range(len(base))]
        into = None if results is None else [r for r in results[: len(base)] if r is not None]
        return self.storage.restore(base, residuals, list(terms.values()), into)

    def invalidate(self) -> None:
        for state in self.states.values():
            state.anchors.clear()
            state.stored.clear()

    def reset(self) -> None:
        """Starts afresh: the next call of every branch is step 0 of a new generation."""
        self.steps.reset()
        self.states.clear()

    def check(self) -> None:
        """Reads the device flag of the finished generation; without a GPU, looks at what is stored.

        Raises:
            NonFiniteResidualError: a stored residual held NaN or infinity, also where a warning told so at the end of
                a pipeline's call. It is forgotten.
        """
        self.raise_told()
        bad = self._flag is not None and bool(self._flag.item())
        buffers = [buffer for state in self.states.values() for one in state.stored for buffer in one]
        if bad or not all(self.storage.is_finite(buffer) for buffer in buffers):
            if self._flag is not None:
                self._flag.zero_()
            samples = self.storage.bad_among(buffers)
            overflow = self.storage.may_overflow
            if overflow:
                self.storage.widen()
            self.invalidate()
            raise NonFiniteResidualError.of("a stored residual", samples, overflow)

    @property
    def decisions(self) -> dict[str, tuple[bool, ...]]:
        """Of the last generation, per branch and step: whether the blocks were computed."""
        return {name: tuple(cell is None for cell in state.log) for name, state in self.states.items()}

    def export_schedule(self) -> Schedule:
        """The decisions of the last generation as a schedule; running it gives the same bits without deciding.

        Raises:
            CacheStateError: no generation was finished, or nothing says at which noise levels it ran.
        """
        logs = {name: state.log for name, state in self.states.items()}
        if not logs:
            raise CacheStateError("run a whole generation first; nothing has run yet")
        if self._sigmas is None:
            raise CacheStateError("there is no scheduler that says at which noise levels the steps ran; use a pipeline")
        steps = len(self._sigmas) - 1
        if any(len(log) != steps for log in logs.values()):
            seen = {name: len(log) for name, log in logs.items()}
            raise CacheStateError(f"run a whole generation of {steps} steps first; steps seen so far: {seen}")
        groups, place = self._groups()
        cells = {
            name: tuple(tuple(cell if g == place else None for g in range(len(groups))) for cell in log)
            for name, log in logs.items()
        }
        shared = next(iter(cells.values()))
        prints = fingerprint_of(self.transformer, self._sigmas, tuple(logs))
        return Schedule(
            prints,
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
        return self._counts.report(saved, sum(state.nbytes for state in self.states.values()), self.states)


def _no_modulation() -> tuple[torch.Tensor, torch.Tensor, float]:
    raise CacheStateError("this method did not ask for the modulated input")
