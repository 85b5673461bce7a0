"""Executing a `ModuleSchedule`, and looking at the outputs of modules: routers that go inside the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import scheduler_sigmas
from layercache.errors import (
    CacheStateError,
    CalibrationError,
    NonFiniteResidualError,
    ScheduleMismatchError,
    UnsupportedModelError,
)
from layercache.models.registry import count_blocks
from layercache.models.spec import ModelSpec, Streams
from layercache.runtime.forward import Forward
from layercache.runtime.guidance import DerivedBranches
from layercache.runtime.identity import Identity
from layercache.runtime.identity import Place as ForwardPlace
from layercache.runtime.offload import HostTensor, Transfers, host_bytes, prefetch
from layercache.runtime.outputs import Output, as_rows, copy_of, extended, fetched, leaves, parked, settled, tensors_of
from layercache.runtime.report import CacheReport, Counts
from layercache.runtime.router import Router
from layercache.runtime.samples import bad_samples
from layercache.runtime.signature import Signature
from layercache.schedule.memory_plan import CAPTURE, COMPUTE, REUSE, GroupAction
from layercache.schedule.module_schedule import ModuleSchedule

__all__ = ["ModuleRouter", "ModuleScheduleRouter", "Output", "as_rows", "copy_of", "module_units", "tensors_of"]


@dataclass(frozen=True)
class ModuleUnit:
    """A module of a block whose output can be cached.

    Attributes:
        name: block list, block and submodules, such as ``transformer_blocks.3.attn``.
        kind: the submodules' names alone, the same in every block of a list.
        block: where they are looked up.
        parts: names of the submodules, which run one after the other; the last one's output is kept.
    """

    name: str
    kind: str
    block: nn.Module = field(repr=False)
    parts: tuple[str, ...] = field(repr=False)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The submodules that are there now: an adapter (LoRA) or a quantiser puts others in their place."""
        return tuple(attrgetter(part)(self.block) for part in self.parts)


def module_units(transformer: nn.Module, spec: ModelSpec) -> list[ModuleUnit]:
    """Every unit of a transformer, in the order of the blocks.

    Raises:
        UnsupportedModelError: the model's description names no modules.
    """
    if not spec.modules:
        raise UnsupportedModelError(
            f"the description of {spec.model_class} does not say which modules of a block can be cached; add "
            "ModelSpec.modules, or take a method of whole blocks"
        )
    units = []
    for name in spec.block_lists:
        for number, block in enumerate(getattr(transformer, name)._modules.values()):
            for parts in spec.modules.get(name, ()):
                kind = "+".join(parts)
                unit = ModuleUnit(f"{name}.{number}.{kind}", f"{name}.{kind}", block, parts)
                if None not in unit.modules:  # some blocks lack one, such as the text's feed-forward in the last block
                    units.append(unit)
    return units


class ModuleRouter(Router):
    """Stands in front of every unit of a transformer. Subclasses say what happens there.

    The modules' forwards are replaced for the length of each forward of the model and of no longer: whatever else takes
    hold of the modules in between (adapters, hooks, offloading, quantisation) finds them as they are.

    Raises:
        UnsupportedModelError: the description names no modules, or gradients are needed and do not pass through them.
    """

    needs_gradients = False

    def __init__(self, transformer: nn.Module, spec: ModelSpec, scheduler: Any):
        super().__init__(transformer, spec, [(0, count_blocks(transformer))])
        self.units = module_units(transformer, spec)
        if self.needs_gradients and not spec.differentiable:
            raise UnsupportedModelError(
                f"no gradient passes through the blocks of {spec.model_class}; take InvarDiff, which needs none"
            )
        self.identity = Identity(spec, scheduler)
        self.branch, self.step_index, self.starts = "", 0, False
        self.first_step = 0
        self._signatures: dict[str, Signature] = {}
        self._ran: set[int] = set()
        self._made: dict[tuple[int, int], tuple[nn.Module, Any, Any]] = {}
        self._replaced: list[tuple[nn.Module, Any, Any]] = []

    def _replace(self) -> None:
        """Puts a callable in front of the forward of every module of the units."""
        for number, unit in enumerate(self.units):
            for place, module in enumerate(unit.modules):
                own = module.__dict__.get("forward")  # a hook's, where there is one
                call = module.__dict__["forward"] = self._stand_in(number, place, module, own)
                self._replaced.append((module, own, call))

    def _stand_in(self, number: int, place: int, module: nn.Module, own: Any) -> Any:
        """The callable in front of a module's forward: the same as long as both are, which graphs rely on."""
        made = self._made.get((number, place))
        if made is None or made[0] is not module or made[1] is not own:
            unit, original = self.units[number], module.forward
            is_last = place == len(unit.parts) - 1
            call = self._last(number, unit, original) if is_last else self._front(number, original)
            made = self._made[number, place] = module, own, call
        return made[2]

    def _restore(self) -> None:
        """Gives the modules their own forwards back; the last one replaced first, should a module be there twice."""
        while self._replaced:
            module, own, call = self._replaced.pop()
            if module.__dict__.get("forward") is not call:  # somebody has put another there since
                continue
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own

    def _front(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """A module before a unit's last: passed by where the unit is."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.is_announced and self.passes_by(number):
                return args[0] if args else next(iter(kwargs.values()))
            return original(*args, **kwargs)

        return forward

    def _last(self, number: int, unit: ModuleUnit, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.is_announced:
                return original(*args, **kwargs)
            if number in self._ran:
                raise CacheStateError(
                    f"{unit.name} runs several times in one forward and has no one output to store; turn chunked "
                    "feed-forward off (transformer.disable_forward_chunking()), or take a method of whole blocks"
                )
            self._ran.add(number)
            return self.through(number, lambda: original(*args, **kwargs))

        return forward

    def begin(self, forward: Forward) -> None:
        if forward.dry_run is not None:
            raise CacheStateError(
                "modules inside the blocks cannot be routed in a compiled transformer; call it uncompiled, or take a "
                "method of whole blocks"
            )
        place = self.placed(forward)
        if place is None:
            return
        self.branch, self.step_index = place.key, place.step
        self.starts = place.key not in self._signatures
        if self.starts:
            self._signatures[place.key] = Signature()
        self.announce(forward.arguments)

    def begin_generation(self, place: ForwardPlace) -> None:
        self._signatures, self.first_step = {}, place.step

    def placed(self, forward: Forward) -> ForwardPlace | None:
        """Where a forward stands; what is measured needs a place, what is reused runs in full without one."""
        return self.place_of(forward)

    def open(self, actions: tuple[GroupAction, ...]) -> None:
        super().open(actions)
        self._ran.clear()
        self._restore()  # where the last forward was interrupted
        self._replace()

    def shut(self) -> None:
        super().shut()
        self._restore()

    def announce(self, arguments: Mapping[str, Any]) -> None:
        """A forward starts; calls `open`."""
        self.open((GroupAction(COMPUTE),))

    def leaving(self, image: torch.Tensor, text: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The streams that the transformer's head reads."""
        return (image, text) if self.spec.text_leaves and text is not None else (image,)

    def require_one_shape(self, arguments: Mapping[str, Any]) -> None:
        """What is measured is compared from step to step.

        Raises:
            CalibrationError: the branch has other shapes than at the step before.
        """
        changes = self._signatures[self.branch].changes(arguments)
        # an unnamed branch that begins in the middle is one that was there, with another prompt or batch
        is_late = self.step_index > self.first_step and self.branch.startswith("call ")
        if changes and (not self.starts or is_late):
            raise CalibrationError(
                f"branch {self.branch} has other shapes from step {self.step_index} on; calibrate with settings that "
                "keep them, such as guidance at every step"
            )

    def passes_by(self, number: int) -> bool:
        """Whether the unit's own work is left out in the present forward."""
        return False

    def through(self, number: int, compute: Callable[[], Output]) -> Output:
        """What the unit gives; ``compute`` runs it."""
        raise NotImplementedError


class ModuleScheduleRouter(ModuleRouter):
    """Routes by a `ModuleSchedule`; this is what ``layercache.enable`` returns for one."""

    def __init__(
        self, transformer: nn.Module, spec: ModelSpec, schedule: ModuleSchedule, scheduler: Any, offload: int = 0
    ):
        super().__init__(transformer, spec, scheduler)
        self.offload = offload
        self._transfers = Transfers() if offload else None
        self._ahead: list[HostTensor] = []  # that are on their way
        self._coming: list[int] = []  # units whose stored outputs the present forward has still to read
        names = tuple(unit.name for unit in self.units)
        if names != schedule.units:
            raise ScheduleMismatchError("the schedule names other modules than this transformer has; plan it again")
        self.schedule = schedule
        prints = schedule.fingerprint
        self.identity = Identity(spec, scheduler, prints.sigmas, prints.check_sigmas)
        steps = schedule.num_steps
        self._stored_at = schedule.stored_at()
        self._branches_from = DerivedBranches(self._transfers)
        self.has_post_hook = bool(schedule.derived)
        self._place: ForwardPlace
        self._arguments: Mapping[str, Any] = {}
        self._derives, self._keeps = False, True
        self._final_at = [step + 1 in schedule.reused_steps for step in range(steps)]
        self.outputs: dict[str, dict[int, Output]] = {}
        self.older: dict[str, dict[int, Output]] = {}  # before those, where steps take their difference
        self.finals: dict[str, Output] = {}
        self._valid: dict[str, set[int]] = {}
        self._older_valid: dict[str, set[int]] = {}
        self._has_run: dict[str, set[int]] = {}
        self._final_valid: set[str] = set()
        self._computes_all = False
        self._counts = Counts()
        self._branches: tuple[str, ...] = ()
        self._seconds = {"computed": 0.0, "all": 0.0}

    def begin_generation(self, place: ForwardPlace) -> None:
        super().begin_generation(place)
        self._valid, self._older_valid, self._has_run, self._final_valid = {}, {}, {}, set()
        self._branches_from.start()

    def placed(self, forward: Forward) -> ForwardPlace | None:
        place = self.locate(forward)
        if place is None:
            self._count(False, set(), False)
        else:
            self._place = place
        return place

    def drop_generation(self) -> None:
        self._branches = tuple(self._signatures)
        self._valid, self._older_valid, self._has_run, self._final_valid = {}, {}, {}, set()
        self._signatures = {}
        self._branches_from.start()

    def free(self) -> None:
        super().free()
        self.outputs, self.older, self.finals = {}, {}, {}
        self._branches_from = DerivedBranches(self._transfers)

    def announce(self, arguments: Mapping[str, Any]) -> None:
        branch, step = self.branch, self.step_index
        if self._signatures[branch].changes(arguments):
            self._valid[branch], self._older_valid[branch] = set(), set()
            self._final_valid.discard(branch)
            self._branches_from.forget(branch)
        self._arguments = arguments if self.has_post_hook else {}
        # branches behind the first run at steps that compute every module, or not at all: they read nothing
        self._keeps = not self.schedule.derived or self._branches_from.is_first(self._place)
        self._derives = self.schedule.derives(step) and self._branches_from.is_derived(self._place)
        if self._derives:
            self._computes_all = False
            self._count(True, set(), False)
            return self.open((GroupAction(REUSE),))
        row = self.schedule.computed[step]
        reuses = step in self.schedule.reused_steps
        needed = set() if reuses else {unit for unit, computed in enumerate(row) if not computed}
        missing = branch not in self._final_valid if reuses else self._lacks(needed)
        self._computes_all = missing
        if self._transfers is not None:
            self._expect([] if missing else sorted(needed & self._valid[branch]), reuses and not missing)
        self._count(reuses and not missing, needed if not missing else set(), missing)
        if reuses and not missing:
            self.open((GroupAction(REUSE, ends_run=True),))
        elif self._final_at[step]:
            self.open((GroupAction(CAPTURE),))
        else:
            self.open((GroupAction(COMPUTE),))

    def _lacks(self, needed: set[int]) -> bool:
        """Whether an output that the step is to reuse is not stored; what a branch never runs (LTX-2) is not missed."""
        lacking = needed - self._valid[self.branch]
        return bool(lacking) and not (
            self._valid[self.branch] and lacking.isdisjoint(self._has_run.get(self.branch, ()))
        )

    @property
    def computes_all(self) -> bool:
        return super().computes_all and (self._computes_all or all(self.schedule.computed[self.step_index]))

    def _count(self, reuses: bool, passed_by: set[int], missing: bool) -> None:
        weights = self.schedule.seconds or (1.0,) * len(self.units)
        total = sum(weights)
        self._seconds["all"] += total
        self._seconds["computed"] += 0.0 if reuses else total - sum(weights[unit] for unit in passed_by)
        self._counts.note(reused=False)
        self._counts.fallbacks += missing

    def passes_by(self, number: int) -> bool:
        reuses = not self._computes_all and not self.schedule.computed[self.step_index][number]
        return reuses and number in self._valid[self.branch]

    def through(self, number: int, compute: Callable[[], Output]) -> Output:
        stored = self.outputs.setdefault(self.branch, {})
        self._has_run.setdefault(self.branch, set()).add(number)
        if self.passes_by(number):
            return self._forecast(number, stored)
        output = compute()
        if (self._keeps and self._stored_at[self.step_index][number]) or self._computes_all:
            self._store(number, output, stored)
        return output

    def _store(self, number: int, output: Output, stored: dict[int, Output]) -> None:
        """Keeps a unit's output; where steps take the difference of two, the one before too."""
        valid, before = self._valid[self.branch], stored.get(number)
        if self.schedule.weights and number in valid:
            older = self.older.setdefault(self.branch, {})
            older[number], before = stored[number], older.get(number)
            self._older_valid[self.branch].add(number)
        stored[number] = self._copied(output, before)
        valid.add(number)

    def _forecast(self, number: int, stored: dict[int, Output]) -> Output:
        """What stands for a unit's output: the newest one that is stored, extended by its last difference."""
        found = stored[number] if self._transfers is None else self._fetch(number, self._transfers)
        weight = self.schedule.weights[self.step_index] if self.schedule.weights else 0.0
        if not weight or number not in self._older_valid[self.branch]:
            return found
        older = self.older[self.branch][number]
        return extended(found, older if self._transfers is None else fetched(older, self._transfers), weight)

    def after(self, output: Any, rerun: Callable[[], Any]) -> Any:
        """Gives a branch that did not run its output, and keeps that of one that did for the others."""
        arguments, self._arguments = self._arguments, {}
        if not self._derives:
            self._branches_from.record(self._place, output, arguments)
            return None
        weights = self.schedule.derived[self.step_index]
        assert weights is not None
        return self._branches_from.derived(self._place, output, weights)

    def _copied(self, output: Output, before: Output | None) -> Output:
        """A copy of an output, in the memory of the one before."""
        if self._transfers is None:
            return copy_of(output, before)
        self._transfers.settle()
        return parked(output, before, self._transfers)

    def _expect(self, units: list[int], reads_final: bool) -> None:
        """A forward begins that reads these stored outputs, or the final hidden state; the first is on its way."""
        transfers, stored = self._transfers, self.outputs.get(self.branch, {})
        assert transfers is not None
        transfers.settle()
        for one in self._ahead:
            one.drop()
        self._coming, self._ahead = units, []
        self._prefetch(self.finals[self.branch] if reads_final else stored[units[0]] if units else ())

    def _prefetch(self, output: Output) -> None:
        self._ahead = [one for one in leaves(output) if isinstance(one, HostTensor)]
        prefetch(self._ahead)

    def _fetch(self, number: int, transfers: Transfers) -> Output:
        """A stored output on its device; the next one that is read is on its way."""
        transfers.settle()
        stored = self.outputs[self.branch]
        found = fetched(stored[number], transfers)
        if number in self._coming:
            self._coming = self._coming[self._coming.index(number) + 1 :]
            self._prefetch(stored[self._coming[0]] if self._coming else ())
        return found

    def capture(self, group: int, image_in: Any, text_in: Any, image_out: Any, text_out: Any) -> None:
        self.finals[self.branch] = self._copied(self.leaving(image_out, text_out), self.finals.get(self.branch))
        self._final_valid.add(self.branch)

    def reuse(self, group: int, image: Any, text: Any, results: Streams | None = None) -> Streams:
        final = self.finals[self.branch]
        if self._transfers is not None:
            final = fetched(final, self._transfers)
        return final[0], final[1] if len(final) == 2 else text

    def find_fault(self) -> NonFiniteResidualError | None:
        """Looks at what is stored of final hidden states and outputs of the last block."""
        found: list[torch.Tensor] = []
        for branch, valid in self._valid.items():
            if valid:
                found += map(settled, leaves(self.outputs[branch][max(valid)]))
            if branch in self._final_valid:
                found += map(settled, self.finals[branch])
        found += map(settled, self._branches_from.valid)
        samples = set[int]().union(*map(bad_samples, found))
        return NonFiniteResidualError.of("a stored output", samples) if samples else None

    def report(self) -> CacheReport:
        """What the cache did since it was enabled; shares are of the modules' time."""
        return replace(self.counted(), speedup=self.measured_speedup)

    def counted(self) -> CacheReport:
        """The report without the measured speedup, which waits for the device."""
        outputs = [output for stored in list(self.outputs.values()) for output in list(stored.values())]
        outputs += [output for stored in list(self.older.values()) for output in list(stored.values())]
        held = [t for output in [*outputs, *list(self.finals.values())] for t in leaves(output)]
        held += self._branches_from.stored
        branches = tuple(self._signatures) or self._branches
        nbytes = sum(one.nbytes for one in held)
        report = self._counts.report(0.0, nbytes, branches, self.identity)
        if self._transfers is not None:
            report = replace(report, host_bytes=host_bytes(held), staged_bytes=self._transfers.peak)
        used = self._seconds["computed"] / self._seconds["all"] if self._seconds["all"] else 1.0
        cells = report.forwards * len(self.units)
        computed = round(used * cells)
        return replace(report, used=used, computed_cells=computed, cached_cells=cells - computed)


def sigmas_of(scheduler: Any) -> tuple[float, ...]:
    """Noise levels of the run that is under way.

    Raises:
        CacheStateError: the scheduler has none.
    """
    sigmas = scheduler_sigmas(scheduler)
    if not sigmas:
        raise CacheStateError("this needs a scheduler with sigmas that a pipeline has set")
    return sigmas
