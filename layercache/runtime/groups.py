"""Executing a schedule: one `CacheState` per branch, stored residuals, the row of the current step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import allow_more_graphs
from layercache.errors import CacheStateError, NonFiniteResidualError
from layercache.models.spec import ModelSpec, Streams
from layercache.runtime.forward import Forward
from layercache.runtime.report import CacheReport
from layercache.runtime.router import BlockPass, Router
from layercache.runtime.state import CacheState, Row
from layercache.runtime.steps import Signature, StepCounter, signature_of
from layercache.runtime.storage import Buffer, Storage, check_alike
from layercache.runtime.velocity import VelocityTrack
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
        end_is_announced: bool = False,
        storage: str = "same",
    ):
        super().__init__(transformer, spec, schedule.groups)
        self.schedule = schedule
        self.storage = Storage(storage)
        self._end_is_announced = end_is_announced
        self.has_post_hook = type(self).after is not ScheduleRouter.after
        self.layout = self._lay_out("")
        self.steps = StepCounter(schedule.fingerprint.sigmas, scheduler, schedule.fingerprint.check_sigmas)
        self.states: dict[str, CacheState] = {}
        self.state: CacheState
        self.row: Row
        self.track = VelocityTrack(self.layout)
        self._dry_pass: DryPass | None = None
        self._compiled_shapes: set[Any] = set()
        self._skipped = [schedule.is_skipped(step) for step in range(schedule.num_steps)]
        self._runs: dict[tuple[GroupAction, ...], int] = {}
        self._generations: dict[str, int] = {}
        self._fallback_rows = 0

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
        self.count(actions)
        self.open(actions)

    def prepare(self, forward: Forward) -> tuple[GroupAction, ...]:
        """Finds the forward's place, and what its groups do there."""
        place = self.locate(forward)
        state = self.states.get(place.branch)
        if state is None:
            cells = self.schedule.cells_of(place.branch)
            state = self.states[place.branch] = CacheState(self._lay_out(place.branch), cells, self.storage)
        if place.starts:
            self._start_generation(place.branch, state)
        if state.signature.changes(forward.arguments, place.starts):
            state.reset()
            if forward.dry_run is not None:
                self._fit_ahead(state, forward)
        if self.track.layouts:
            self.track.begin(place.step, self.steps.run)
        return self._choose_row(state, place.step)

    def _lay_out(self, branch: str) -> Layout:
        spec = self.spec
        return lay_out(self.schedule, spec.has_text, branch, spec.text_leaves, not spec.couples)

    def _fit_ahead(self, state: CacheState, forward: Forward) -> None:
        """Makes room for the graphs of further shapes, and allocates the slots outside of them.

        A graph that allocates would be compiled again once they are there.
        The shapes come from a forward whose blocks are all skipped; offload hooks and the like see a normal forward.
        """
        shapes = signature_of(forward.arguments)
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

    def _start_generation(self, branch: str, state: CacheState) -> None:
        """Forgets the last generation of a branch; reads its flag where nothing else announced its end."""
        self._generations[branch] = self._generations.get(branch, 0) + 1
        if not self._end_is_announced:
            self.check()
        elif state.flag.tensor is not None:
            state.flag.tensor.zero_()
        state.reset()

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
            self._fallback_rows += 1
        elif row.layout.reads:
            state.upload_coefficients()
        return actions

    def count(self, actions: tuple[GroupAction, ...]) -> None:
        """Notes a forward that is run by ``actions``."""
        self._runs[actions] = self._runs.get(actions, 0) + 1

    def _count_of(self, reused: bool) -> list[int]:
        groups = range(len(self.schedule.groups))
        return [sum(n for row, n in self._runs.items() if (row[g].kind == REUSE) is reused) for g in groups]

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
            if image_out.dtype == torch.float16 and not self._end_is_announced:
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
            streams = self.storage.restore(streams, terms.buffers, terms.on(image.device), into)
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
                if image.tensor is None or (beside is not None and beside.tensor is None):
                    return None
                found.append((coefficient, image, beside))
        return found

    def invalidate(self) -> None:
        self.track.held = [None] * len(self.track.held)
        for state in self.states.values():
            state.reset()

    def drop(self) -> None:
        """Frees the stored residuals; until there are new ones everything is computed."""
        for state in self.states.values():
            state.reset()
            for buffer in (*state.images, *state.texts, state.flag):
                buffer.free()

    def reset(self) -> None:
        """Starts afresh: the next call of every branch is step 0 of a new generation."""
        self.steps.reset()
        self.track.reset()
        for state in self.states.values():
            state.reset()

    @property
    def replaces_velocity(self) -> bool:
        return bool(self.track.layouts)

    def replace_velocity(self, step: int, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """What the sampler gets at a step instead of the model's velocity.

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
        return self.track.replace_velocity(velocity, latents)

    def check(self) -> None:
        """Reads the device flag of the finished generation, and looks at its stored velocities.

        Raises:
            NonFiniteResidualError: a stored residual or velocity held NaN or infinity, also where a warning told so at
                the end of a pipeline's call. The flag is cleared.
        """
        self.raise_told()
        bad, samples = [], set[int]()
        for name, state in self.states.items():
            if not state.is_finite():
                bad.append(name)
                samples |= state.bad_samples
        if not self.track.is_finite():
            samples |= self.track.bad_samples()
            self.track.reset()
            bad.append("all")
        if bad:
            overflow = self._widen_storage()
            raise NonFiniteResidualError.of(
                f"a stored residual or velocity of branch {', '.join(bad)}", samples, overflow
            )

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
        computed, seconds = self.computed, self.schedule.group_seconds
        forwards = [a + b for a, b in zip(computed, self.cached, strict=True)]
        return CacheReport(
            used=time_share(seconds, computed, forwards) if self._runs else 1.0,
            computed_cells=sum(computed),
            cached_cells=sum(self.cached),
            generations=max(self._generations.values(), default=0),
            forwards=sum(self._runs.values()),
            fallback_rows=self._fallback_rows,
            cache_bytes=sum(state.nbytes for state in self.states.values()) + self.track.nbytes,
            branches=tuple(self.states),
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
