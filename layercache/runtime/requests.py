"""Many generations on one transformer at a time: requests, batches of requests, memory and counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch

from layercache import ops
from layercache.errors import CacheStateError
from layercache.models.registry import config_hash, count_blocks
from layercache.models.spec import Streams
from layercache.runtime.forward import Forward
from layercache.runtime.groups import ScheduleRouter
from layercache.runtime.identity import Identity
from layercache.runtime.report import CacheReport
from layercache.runtime.router import Router
from layercache.schedule.memory_plan import CAPTURE, COMPUTE, REUSE, GroupAction
from layercache.schedule.schedule import Schedule

Rows = tuple[tuple[str, int | None], ...]
_now: ContextVar[tuple[int, Rows] | None] = ContextVar("layercache requests", default=None)


class Requests:
    """Routers of the requests that share a transformer.

    Attributes:
        routers: by request, those called last at the end.
        limit_bytes: memory of the stored residuals of all requests; above it those that were not called for longest
            lose theirs, and compute their next steps until they have new ones. ``None`` for no limit.
        evictions: how often that happened.
    """

    def __init__(self, root: ScheduleRouter):
        self._root = root
        self.routers: OrderedDict[str, ScheduleRouter] = OrderedDict()
        self._gone = dict.fromkeys(_COUNTED, 0.0)
        self._counting = Lock()  # a request is counted among those that are under way, or those that have ended
        self.limit_bytes: int | None = None
        self.evictions = 0
        self._batch: tuple[Rows, BatchRouter] | None = None

    def __len__(self) -> int:
        return len(self.routers)

    @contextmanager
    def entered(
        self, rows: Mapping[str, int | None], scheduler: Any = None, schedule: Schedule | None = None
    ) -> Iterator[None]:
        """Within, forwards belong to these requests."""
        if not rows or any(count is not None and count < 1 for count in rows.values()):
            raise CacheStateError(f"a batch needs requests with at least one sample each, got {dict(rows)}")
        for name in rows:
            self._find(name, scheduler, schedule)
        token = _now.set((id(self), tuple(rows.items())))
        try:
            yield
        finally:
            _now.reset(token)

    def _find(self, name: str, scheduler: Any = None, schedule: Schedule | None = None) -> ScheduleRouter:
        router = self.routers.get(name)
        if router is None:
            return self._begin(name, scheduler, self._root.schedule if schedule is None else schedule)
        if scheduler is not None and scheduler is not router.identity.scheduler:
            raise CacheStateError(f"request {name!r} is under way with another scheduler; forget it first")
        if schedule is not None and schedule is not router.schedule and schedule != router.schedule:
            raise CacheStateError(f"request {name!r} is under way with another schedule; forget it first")
        return router

    def _begin(self, name: str, scheduler: Any, schedule: Schedule) -> ScheduleRouter:
        """The router of a new request."""
        root = self._root
        if schedule is not root.schedule:
            model = root.transformer
            schedule.fingerprint.check_model(type(model).__name__, config_hash(model), count_blocks(model))
        router = ScheduleRouter(root.transformer, root.spec, schedule, scheduler, root.storage.name, root.offload)
        if router.replaces_velocity and scheduler is None and not root.replaces_velocity:
            raise CacheStateError(
                f"the schedule of request {name!r} changes velocities on their way to the sampler: name the one that "
                "steps it: cache.request(name, scheduler, schedule)"
            )
        router.attachment = root.attachment
        router.identity.any_thread = True
        if scheduler is not None:
            root.attachment.follow(router, scheduler)
        self.routers[name] = router
        return router

    @property
    def is_entered(self) -> bool:
        """Whether forwards belong to requests here."""
        entered = _now.get()
        return entered is not None and entered[0] == id(self)

    def router(self) -> Router:
        """The router of the present forward."""
        entered = _now.get()
        if entered is None or entered[0] != id(self):
            return self._root
        rows = entered[1]
        members = [(self._find(name), count) for name, count in rows]
        for name, _ in rows:
            self.routers.move_to_end(name)
        self._evict({name for name, _ in rows})
        if len(members) == 1 and members[0][1] is None:
            return members[0][0]
        if self._batch is None or self._batch[0] != rows:
            self._batch = rows, BatchRouter(self._root, [(router, count or 1) for router, count in members])
        return self._batch[1]

    def _evict(self, present: set[str]) -> None:
        if self.limit_bytes is None:
            return
        held = {name: router.cache_bytes for name, router in list(self.routers.items())}
        total = sum(held.values())
        for name in list(self.routers):
            if total <= self.limit_bytes:
                return
            if name not in present and held[name]:
                self.routers[name].drop()
                total -= held[name]
                self.evictions += 1

    def stepped_by(self, scheduler: Any) -> ScheduleRouter | None:
        """The router of the request whose forwards were those of the run that this sampler is at."""
        run = getattr(scheduler, "timesteps", None)
        for router in list(self.routers.values()):
            generation = router.generation
            if run is not None and generation is not None and generation.run is run:
                return router
        return None

    def end_all(self) -> None:
        """The generations of all requests are over."""
        for router in list(self.routers.values()):
            router.end_generation(completed=False)

    def has_scheduler(self, scheduler: Any) -> bool:
        """Whether a request is stepped by this scheduler."""
        return any(router.identity.scheduler is scheduler for router in list(self.routers.values()))

    def forget(self, name: str) -> None:
        with self._counting:
            router = self.routers.pop(name, None)
            for key, value in _counts(router).items() if router else ():
                self._gone[key] += value
        if router is None:
            raise self._unknown(name)
        self._batch = None
        scheduler = router.identity.scheduler
        if all(other.identity.scheduler is not scheduler for other in (self._root, *self.routers.values())):
            self._root.attachment.unfollow(scheduler)
        router.check()

    def report(self, name: str) -> CacheReport:
        """What was computed and reused for one request, until it is forgotten.

        Raises:
            CacheStateError: there is no such request.
        """
        router = self.routers.get(name)
        if router is None:
            raise self._unknown(name)
        return router.report()

    def _unknown(self, name: str) -> CacheStateError:
        return CacheStateError(f"there is no request {name!r}; known: {', '.join(self.routers) or 'none'}")

    def metrics(self) -> dict[str, float]:
        with self._counting:
            totals, routers = dict(self._gone), [self._root, *list(self.routers.values())]
            for router in routers:
                for key, value in _counts(router).items():
                    totals[key] += value
        stored = sum(router.cache_bytes for router in routers)
        return {
            "forwards": totals["forwards"],
            "generations": totals["generations"],
            "hits": totals["hits"],
            "misses": totals["misses"],
            "hit_rate": totals["saved_share"] / totals["forwards"] if totals["forwards"] else 0.0,
            "seconds_saved": totals["seconds_saved"],
            "fallback_rows": totals["fallback_rows"],
            "unidentified": totals["unidentified"],
            "bytes": float(stored),
            "requests": float(len(self.routers)),
            "evictions": float(self.evictions),
        }


_COUNTED = (
    "forwards",
    "generations",
    "hits",
    "misses",
    "fallback_rows",
    "unidentified",
    "saved_share",
    "seconds_saved",
)


def _counts(router: ScheduleRouter) -> dict[str, float]:
    """Of one router: what `Requests.metrics` adds up; ``saved_share`` is in forwards."""
    schedule, identity = router.schedule, router.identity
    saved_share = router.forwards * (1.0 - router.used)
    # a step's seconds are those of all its branches, each of which is a forward
    seconds = sum(schedule.group_seconds) / max(1, len(schedule.fingerprint.branches)) if schedule.is_timed else 0.0
    return {
        "forwards": float(router.forwards),
        "generations": float(identity.count),
        "hits": float(sum(router.cached)),
        "misses": float(sum(router.computed)),
        "fallback_rows": float(router.fallback_rows),
        "unidentified": float(identity.unidentified.total()),
        "saved_share": saved_share,
        "seconds_saved": saved_share * seconds,
    }


class ScheduleCache(ScheduleRouter):
    """Routes a transformer by a schedule, or by one per request; ``layercache.enable`` returns it."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.requests = Requests(self)

    @property
    def in_request(self) -> bool:
        return self.requests.is_entered

    def for_call(self) -> Router:
        return self.requests.router() if self.requests.routers else self

    def note_settings(self, settings: Mapping[str, Any]) -> None:
        router = self.for_call()
        super().note_settings(settings) if router is self else router.note_settings(settings)

    def for_sampler(self, scheduler: Any) -> Router:
        router = self.for_call()
        if router is self and self.requests.routers:  # maybe behind the block of the request
            return self.requests.stepped_by(scheduler) or router
        return router

    def request(
        self, request_id: str, scheduler: Any = None, schedule: Schedule | None = None
    ) -> AbstractContextManager[None]:
        """Forwards in this ``with`` block belong to a request, which has a place and residuals of its own.

        Requests may be entered again and again, in any order and from several threads; one forward runs at a time. A
        schedule that changes velocities (a searched one, EasyCache's) needs the scheduler.

        Args:
            request_id: any name; it is new, or its generation goes on.
            scheduler: the request's own sampler; without one its forwards are counted, one per branch and step.
            schedule: the request's own, for this model and any number of steps; without one that of the cache.

        Raises:
            ScheduleMismatchError: the schedule was made for another model.
            CacheStateError: the request is under way with another scheduler or schedule, or its schedule changes
                velocities and nothing steps it.
        """
        return self.requests.entered({request_id: None}, scheduler, schedule)

    def batch(self, rows: Mapping[str, int]) -> AbstractContextManager[None]:
        """Forwards in this ``with`` block are a batch of several requests, each at its own step.

        A group is reused where all of them reuse it, each sample from its request's residuals; where one has to compute
        it, it is computed for all.

        Args:
            rows: requests in the order of the batch, and how many samples of it each has.

        Raises:
            CacheStateError: their schedules have different groups of blocks, or change velocities; at the forward.
        """
        return self.requests.entered(rows)

    def forget(self, request_id: str) -> None:
        """A request has ended: its memory is freed.

        Raises:
            CacheStateError: there is no such request.
            NonFiniteResidualError: one of its stored residuals held NaN or infinity.
        """
        self.requests.forget(request_id)

    def metrics(self) -> dict[str, float]:
        """Counts of this cache and all its requests since it was enabled, as plain numbers to export.

        ``forwards``, ``generations``, ``hits`` and ``misses`` (groups reused and computed), ``hit_rate`` (of the block
        time), ``seconds_saved`` (block time not spent, by the seconds measured in calibration; 0 of schedules that were
        made without, such as those that follow from step numbers alone), ``fallback_rows``, ``unidentified`` (both as
        in `CacheReport`), ``bytes``, ``requests`` (known now), ``evictions``. May be called from any thread.
        """
        return self.requests.metrics()

    def invalidate(self) -> None:
        super().invalidate()
        self.requests.end_all()

    def free(self) -> None:
        super().free()
        for router in list(self.requests.routers.values()):
            router.free()

    def has_request_of(self, scheduler: Any) -> bool:
        return self.requests.has_scheduler(scheduler)


class BatchRouter(Router):
    """One forward for several requests, whose samples lie one behind the other in the batch."""

    def __init__(self, root: ScheduleRouter, members: Sequence[tuple[ScheduleRouter, int]]):
        groups = {router.schedule.groups for router, _ in members}
        if len(groups) > 1:
            raise CacheStateError("requests of one batch have schedules with the same groups of blocks, these differ")
        super().__init__(root.transformer, root.spec, groups.pop())
        self.identity = Identity(root.spec)
        self.attachment = root.attachment
        self.members: list[tuple[ScheduleRouter, slice]] = []
        self.size = 0
        for router, count in members:
            self.members.append((router, slice(self.size, self.size + count)))
            self.size += count
        if any(router.replaces_velocity for router, _ in self.members):
            raise CacheStateError("a schedule that changes velocities serves one request per forward: cache.request()")

    def begin(self, forward: Forward) -> None:
        if forward.dry_run is not None:
            raise CacheStateError(
                "batches of requests are not for a transformer that is compiled whole: compile its blocks instead "
                "(compile_repeated_blocks)"
            )
        nothing = (GroupAction(COMPUTE),) * len(self.members[0][0].schedule.groups)
        own = []
        for router, rows in self.members:
            actions = router.prepare(self._part(forward, rows))
            router.is_placed = actions is not None
            own.append(nothing if actions is None else actions)
        together = self._together(own)
        for router, _ in self.members:
            router.count(together)
        self.open(together)

    def end_generation(self, completed: bool = True) -> None:
        for router, _ in self.members:
            router.end_generation(completed)

    def _part(self, forward: Forward, rows: slice) -> Forward:
        """The forward of one request."""
        arguments = {name: self._rows(value, rows) for name, value in forward.arguments.items()}
        return Forward(forward.branch, forward.step, arguments, part=forward.part)

    def _rows(self, value: Any, rows: slice) -> Any:
        if isinstance(value, torch.Tensor):
            return value[rows] if value.dim() and value.shape[0] == self.size else value
        return value[rows] if isinstance(value, list) and len(value) == self.size else value

    def _together(self, own: Sequence[Sequence[GroupAction]]) -> tuple[GroupAction, ...]:
        """Reuses what all reuse and have the streams for; stores what any of them stores."""
        count = len(own[0])
        reused = [all(actions[g].kind == REUSE for actions in own) for g in range(count)]
        for run in _ranges(reused):
            needs_text = self.spec.has_text and (run.stop < count or self.spec.text_leaves)
            if any(router.terms(run, needs_text) is None for router, _ in self.members):
                for group in run:
                    reused[group] = False
        runs = {run.stop - 1: run for run in _ranges(reused)}
        self._runs = runs
        actions = []
        for group in range(count):
            captures = [actions_[group] for actions_ in own if actions_[group].kind == CAPTURE]
            if reused[group]:
                run = next(run for run in runs.values() if group in run)
                text = self.spec.has_text and (run.stop < count or self.spec.text_leaves)
                ends = group in runs and any(router.terms(run, text) for router, _ in self.members)
                actions.append(GroupAction(REUSE, text, ends))
            else:
                kind = CAPTURE if captures else COMPUTE
                actions.append(GroupAction(kind, any(action.text for action in captures)))
        return tuple(actions)

    def capture(self, group: int, image_in: Any, text_in: Any, image_out: Any, text_out: Any) -> None:
        streams = (image_in, text_in, image_out, text_out)
        for router, rows in self.members:
            if router.is_placed and router.row.captures[group] is not None:
                router.capture(group, *(None if stream is None else stream[rows] for stream in streams))

    def reuse(self, group: int, image: Any, text: Any, results: Streams | None = None) -> Streams:
        advances = text is not None and self.actions[group].text
        base = [image, text] if advances else [image]
        if any(router.storage.is_mixed for router, _ in self.members):
            return self._reuse_apart(group, base, text)
        into: list[Any] = list(results[: len(base)]) if results else [torch.empty_like(stream) for stream in base]
        for router, rows in self.members:
            parts = [stream[rows] for stream in base]
            targets = [stream[rows] for stream in into]
            terms = router.terms(self._runs[group], advances) or ()
            if not terms:
                for target, part in zip(targets, parts, strict=True):
                    target.copy_(part)
            for lo in range(0, len(terms), ops.MAX_TERMS):
                chunk = terms[lo : lo + ops.MAX_TERMS]
                stored: list[list[Any]] = [[term[1 + stream] for term in chunk] for stream in range(len(parts))]
                router.storage.restore(parts, stored, [term[0] for term in chunk], targets)
                parts = targets
        return into[0], into[1] if advances else text

    def _reuse_apart(self, group: int, base: list[torch.Tensor], text: Any) -> Streams:
        """The same where a request stores other dtypes than its streams have; each gives new tensors."""
        found = []
        for router, rows in self.members:
            parts = [stream[rows] for stream in base]
            terms = router.terms(self._runs[group], len(base) == 2) or ()
            for lo in range(0, len(terms), ops.MAX_TERMS):
                chunk = terms[lo : lo + ops.MAX_TERMS]
                stored: list[list[Any]] = [[term[1 + stream] for term in chunk] for stream in range(len(parts))]
                parts = router.storage.restore(parts, stored, [term[0] for term in chunk], None)
            found.append(parts)
        streams = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return streams[0], streams[1] if len(base) == 2 else text


def _ranges(flags: Sequence[bool]) -> list[range]:
    """Ranges of consecutive true flags."""
    found, start = [], None
    for index, flag in enumerate((*flags, False)):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            found.append(range(start, index))
            start = None
    return found
