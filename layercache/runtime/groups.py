"""Executing a schedule: one `CacheState` per branch, stored residuals, the row of the current step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import allow_more_graphs
from layercache.errors import CacheStateError, NonFiniteResidualError
from layercache.models.spec import ModelSpec, Streams
from layercache.runtime.blocks import BlockPass
from layercache.runtime.forward import Forward
from layercache.runtime.host_storage import make_storage
from layercache.runtime.identity import Identity
from layercache.runtime.identity import Place as ForwardPlace
from layercache.runtime.offload import refuse_graph
from layercache.runtime.report import CacheReport, reasons
from layercache.runtime.router import Router
from layercache.runtime.signature import Signature, shapes_of
from layercache.runtime.state import CacheState, Row
from layercache.runtime.storage import Buffer, check_alike
from layercache.runtime.velocity import VelocityTrack, sample_shape
from layercache.schedule.memory_plan import COMPUTE, REUSE, GroupAction, Layout, lay_out
from layercache.schedule.schedule import Schedule, time_share


class DryPass(BlockPass):
    """Passes the streams by every block and remembers the first group's."""

    watches = True
    streams: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def opened(self, group: int) -> None:
        if self.streams is None:
            assert self.image is not None
            self.streams = self.image, self.text


class ScheduleRouter(Router):
    """Routes one generation at a time by a schedule; `ScheduleCache` serves several."""

    keeps_items = True

    def __init__(
        self,
        transformer: nn.Module,
        spec: ModelSpec,
        schedule: Schedule,
        scheduler: Any = None,
        storage: str = "same",
        offload: int = 0,
    ):
        super().__init__(transformer, spec, schedule.groups)
        self.offload = offload
        for row in (*schedule.cells, *(row for rows in schedule.branch_cells.values() for row in rows)):
            self.check_skips(schedule.groups, {group for group, cell in enumerate(row) if cell is not None})
        self.schedule, self.takes_experts = schedule, schedule.takes_experts
        self.storage = make_storage(storage, offload=offload)
        self.has_post_hook = type(self).after is not ScheduleRouter.after
        self.layout = self._lay_out("")
        prints = schedule.fingerprint
        self.identity = Identity(spec, scheduler, prints.sigmas, prints.check_sigmas)
        self.states: dict[str, CacheState] = {}
        self._live: dict[str, CacheState] = {}
        self.state: CacheState
        self.row: Row
        self.track = self.new_track()
        self._dry_pass: DryPass | None = None
        self._compiled_shapes: set[Any] = set()
        self._skipped = [schedule.is_skipped(step) for step in range(schedule.num_steps)]
        self._noted: set[str] = set()
        self._runs: dict[tuple[GroupAction, ...], int] = {}
        self._freed: tuple[int, int, tuple[str, ...]] = 0, 0, ()  # memory and branches, when the cache was disabled
        self._everything = (GroupAction(COMPUTE),) * len(schedule.groups)
        self.is_placed = True  # of the present forward, as a member of a batch
        self.fallback_rows = 0

    @property
    def storage_name(self) -> str:
        return self.storage.name

    @property
    def graphs(self) -> int:
        """One per distinct row (actions and number of terms), one that allocates, one that computes everything."""
        layouts = [self._lay_out(name) for name in ("", *self.schedule.branch_cells)]
        rows = {
            (row.actions, tuple(run and len(run.coefficients) for run in row.runs))
            for layout in layouts
            for row in layout.rows
        }
        return len(rows) + 2

    def begin(self, forward: Forward) -> None:
        actions = self.prepare(forward)
        self.count(actions or self._everything)
        if actions is not None:
            self.open(actions)

    def prepare(self, forward: Forward) -> tuple[GroupAction, ...] | None:
        """What the groups do in a forward; ``None`` where nothing tells its place."""
        place = self.locate(forward)
        if self.track.layouts and self.generation is not None:
            # a velocity is of all branches and parts, whichever this forward is
            self.track.begin(self.generation.step, sample_shape(forward.arguments), forward.conditions)
        if place is None:
            return None
        state = self._live.get(place.key)
        if state is None:
            state = self._start_branch(place)
        if state.signature.changes(forward.arguments):
            state.reset()
            if forward.dry_run is not None:
                if self.offload and self.layout.image_slots:
                    refuse_graph()
                self._fit_ahead(state, forward)
        return self._choose_row(state, place.step)

    def _lay_out(self, branch: str) -> Layout:
        spec = self.spec
        return lay_out(self.schedule, spec.has_text, branch, spec.text_leaves, not spec.needs_every_output)

    def _fit_ahead(self, state: CacheState, forward: Forward) -> None:
        """Makes room for the graphs of further shapes, and allocates the slots outside of them.

        A graph that allocates would be compiled again once they are there.
        The shapes come from a forward whose blocks are all skipped; offload hooks and the like see a normal forward.
        """
        shapes = shapes_of(forward.arguments)
        if shapes not in self._compiled_shapes:
            self._compiled_shapes.add(shapes)
            allow_more_graphs(self.graphs)
        self.open((GroupAction(REUSE, text=True),) * len(self.schedule.groups))
        self._dry_pass, self.keeps_items = DryPass(self), False
        try:
            assert forward.dry_run is not None
            forward.dry_run()
            if self._dry_pass.streams is not None:
                self.storage.prepare_graph(self._dry_pass.streams[0])
                state.fit(*self._dry_pass.streams)
        finally:
            self._dry_pass, self.keeps_items = None, True
            self.shut()

    def new_pass(self) -> BlockPass:
        return self._dry_pass or super().new_pass()

    def new_track(self, before: VelocityTrack | None = None) -> VelocityTrack:
        """The velocities of one generation, in memory of the last one."""
        return VelocityTrack.of(self.schedule, len(self.spec.leaves), before, self.storage.transfers)

    def note_settings(self, settings: Mapping[str, Any]) -> None:
        """Warns, once of each, of settings that lie outside of what the schedule was made with."""
        key = repr(settings)
        if key not in self._noted:
            self._noted.add(key)
            self.schedule.fingerprint.warn_of(settings)

    def begin_generation(self, place: ForwardPlace) -> None:
        self.track = self.new_track(self.track)

    def _start_branch(self, place: ForwardPlace) -> CacheState:
        """The state of a branch or part whose first forward of the generation this is, in memory of the last one."""
        state = self.states.get(place.key)
        if state is None:
            cells = self.schedule.cells_of(place.branch)
            state = self.states[place.key] = CacheState(self._lay_out(place.branch), cells, self.storage)
        state.start()
        self._live[place.key] = state
        return state

    def drop_generation(self) -> None:
        # memory of parts that the generation did not have is not kept for the next one
        self.states = dict(self._live) or self.states
        self._live = {}
        self.track = self.new_track(self.track)

    def _choose_row(self, state: CacheState, step: int) -> tuple[GroupAction, ...]:
        """The schedule's row, or computing everything where a residual the row reads is not there."""
        row = state.rows[step]
        self.state, self.row = state, row
        actions = row.layout.actions
        skipped_in_vain = self._skipped[step] and not self.track.is_complete
        valid = (not row.layout.reads or state.is_valid(row)) and not skipped_in_vain
        for slot, group in row.stores:
            state.held[slot] = (step, group)
        if not valid:
            # what the row computes anyway is still stored for the rows to come
            actions = tuple(GroupAction(COMPUTE) if a.kind == REUSE else a for a in actions)
            self.fallback_rows += 1
        elif row.layout.reads:
            state.upload_coefficients()
        if self.storage.offloads:
            self.storage.expect(row.reads if valid else ())
        return actions

    def count(self, actions: tuple[GroupAction, ...]) -> None:
        """Notes a forward that is run by ``actions``."""
        self._runs[actions] = self._runs.get(actions, 0) + 1

    def _count_of(self, reused: bool) -> list[int]:
        groups, runs = range(len(self.schedule.groups)), list(self._runs.items())  # another thread may be counting
        return [sum(n for row, n in runs if (row[g].kind == REUSE) is reused) for g in groups]

    @property
    def forwards(self) -> int:
        """Calls of the transformer."""
        return sum(list(self._runs.values()))

    @property
    def used(self) -> float:
        """Share of the block time computed, by the schedule's seconds per group; 1 before a run."""
        computed = self.computed
        forwards = [a + b for a, b in zip(computed, self.cached, strict=True)]
        return time_share(self.schedule.group_seconds, computed, forwards) if self._runs else 1.0

    @property
    def computed(self) -> list[int]:
        """Forwards that computed each group."""
        return self._count_of(False)

    @property
    def cached(self) -> list[int]:
        """Forwards that reused each group."""
        return self._count_of(True)

    def capture(self, group: int, image_in: Any, text_in: Any, image_out: Any, text_out: Any) -> None:
        state = self.state
        image_slot, text_slot = self.row.captures[group]
        if (group, text_slot is None) not in state.validated_groups:
            state.fit(image_out, text_out)
            check_alike(image_in, image_out)
            if text_slot is not None:
                check_alike(text_in, text_out)
            state.validated_groups.add((group, text_slot is None))
            if image_out.dtype == torch.float16 and self.attachment.pipeline is None:
                self.has_post_hook = True
        # without a GPU numbers are looked at where they are stored when the generation ends, not on their way
        flag = state.flag.tensor if image_out.is_cuda or self.storage.is_compact else None
        if text_slot is None:
            self.storage.store([image_out], [image_in], [image_slot], flag)
        else:
            self.storage.store([image_out, text_out], [image_in, text_in], [image_slot, text_slot], flag)

    def reuse(self, group: int, image: Any, text: Any, results: Streams | None = None) -> Streams:
        for terms in self.row.runs[group]:
            streams = [image] if len(terms.buffers) == 1 else [image, text]
            into: Any = list(results[: len(streams)]) if results else None
            streams = self.storage.restore(streams, terms.buffers, terms.beside(image), into)
            image, text = streams if len(streams) == 2 else (streams[0], text)
        return image, text

    def terms(self, groups: range, text: bool) -> list[tuple[float, Buffer, Buffer | None]] | None:
        """Coefficient, image and text residual of everything that the present row takes for these groups.

        ``None`` where one is not there: nothing says so for the text, which a row stores only as far as it needs it.
        """
        found = []
        row = self.state.layout.rows
        for group in groups:
            for anchor, coefficient in sorted((self.row.cells[group] or {}).items(), reverse=True):
                slots = row[anchor].captures[group]
                if slots is None or self.state.held[slots[0]] != (anchor, group) or (text and slots[1] is None):
                    return None
                image = self.state.images[slots[0]]
                beside = self.state.texts[slots[1]] if text and slots[1] is not None else None
                if image.like is None or (beside is not None and beside.like is None):
                    return None
                found.append((coefficient, image, beside))
        return found

    def free(self) -> None:
        """Frees the memory of the stored tensors; until there are new ones everything is computed."""
        self.end_generation(completed=False)
        self.storage.release()
        if self.states:
            self._freed = self._memory(), self._host_memory(), tuple(self.states)
        self.drop()
        self.states = {}

    @property
    def cache_bytes(self) -> int:
        """Memory of what is stored, or was when the cache was disabled."""
        return self._memory() if self.states else self._freed[0]

    def _memory(self) -> int:
        return sum(state.nbytes for state in list(self.states.values())) + self.track.nbytes

    @property
    def host_bytes(self) -> int:
        """Of `cache_bytes`, what is in host memory for another device."""
        return self._host_memory() if self.states else self._freed[1]

    def _host_memory(self) -> int:
        return sum(state.host_bytes for state in list(self.states.values())) + self.track.host_bytes

    def drop(self) -> None:
        """Frees the stored residuals in the middle of a generation; what they were for is computed."""
        for state in self.states.values():
            state.free()
        self.track.reset()
        self.track = self.new_track()

    @property
    def replaces_velocity(self) -> bool:
        return bool(self.track.layouts)

    @property
    def skips_step(self) -> bool:
        step = self.track.step
        return self.replaces_velocity and step >= 0 and self._skipped[step] and self.track.is_complete

    def replace_velocity(
        self, step: int, velocity: torch.Tensor, latents: torch.Tensor, output: int = 0
    ) -> torch.Tensor:
        """What the sampler of an output gets at a step instead of the model's velocity.

        Raises:
            CacheStateError: the sampler steps where the transformer was not called.
        """
        if step not in self.schedule.fingerprint.steps:
            return velocity  # of the pipeline's other transformer
        if step != self.track.step:
            raise CacheStateError(
                f"the scheduler takes step {step}, but the transformer was last called for step {self.track.step}; "
                "a schedule with velocities needs one scheduler, stepped once after every call of the transformer"
            )
        track = self.track.further[output - 1] if output else self.track
        return track.replace_velocity(velocity, latents)

    def find_fault(self) -> NonFiniteResidualError | None:
        """Looks at the stored velocities and residuals; reads the device's flags and clears them."""
        bad, samples = [], set[int]()
        for name, state in self._live.items():
            if not state.is_finite():
                bad.append(name)
                samples |= state.bad_samples
        if not self.track.is_finite():
            samples |= self.track.bad_samples()
            bad.append("all")
        if not bad:
            return None
        overflow = self._widen_storage()
        return NonFiniteResidualError.of(f"a stored residual or velocity of branch {', '.join(bad)}", samples, overflow)

    def _widen_storage(self) -> bool:
        """Whether float16 may have been too small for what was stored; it is stored in float32 from now on."""
        if not self.storage.may_overflow:
            return False
        self.storage.widen()
        for state in self.states.values():
            state.signature = Signature()  # graphs need other slots
        return True

    def after(self, output: Any, rerun: Callable[[], Any]) -> None:
        """Behind a bare transformer's last step nobody asks again: looks at residuals that float16 may not hold.

        Raises:
            NonFiniteResidualError: one held NaN or infinity.
        """
        if self.storage.may_overflow and self.row is self.state.rows[-1]:
            self.check()

    def report(self) -> CacheReport:
        """What the router did since it was enabled."""
        return replace(self.counted(), speedup=self.measured_speedup)

    def counted(self) -> CacheReport:
        """The report without the measured speedup, which waits for the device."""
        return CacheReport(
            used=self.used,
            computed_cells=sum(self.computed),
            cached_cells=sum(self.cached),
            generations=self.identity.count,
            forwards=self.forwards,
            fallback_rows=self.fallback_rows,
            cache_bytes=self.cache_bytes,
            host_bytes=self.host_bytes,
            staged_bytes=self.storage.staged_bytes,
            branches=tuple(self.states) if self.states else self._freed[2],
            source=self.identity.source,
            unidentified=self.identity.unidentified.total(),
            expected_psnr=self.schedule.expected_psnr,
            in_full=reasons(self.identity, self.fallback_rows),
        )


def require_inference() -> None:
    """Refuses to cache while gradients are recorded.

    Raises:
        CacheStateError: grad mode is on.
    """
    if torch.is_grad_enabled():
        raise CacheStateError(
            "caching is for inference: call the transformer under torch.no_grad() or torch.inference_mode()"
        )
