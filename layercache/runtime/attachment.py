"""The patching of a transformer's forward pass."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import (
    ADAPTER_METHODS,
    CACHE_CONFIG,
    allow_graphs,
    counts_steps,
    has_foreign_cache,
    has_own_contexts,
    is_compiled,
    is_hooked,
    loops_of,
    scheduler_step,
    step_argument,
    unwrap_compiled,
    with_velocity,
)
from layercache.errors import CacheStateError, ForeignCacheError
from layercache.models.registry import experts_of, spec_for
from layercache.runtime.experts import ExpertRouter
from layercache.runtime.forward import Forward, Said, Saying, gives, new_said
from layercache.runtime.groups import require_inference
from layercache.runtime.guiders import FOLLOWER, branch_of
from layercache.runtime.identity import OTHER_CONDITION, OTHER_LOOP
from layercache.runtime.loop import DenoisingLoop, ForwardLock, LoopOwner, arguments_of_loop
from layercache.runtime.patches import DEEPCOPY, CacheConfigMarker, CopyHook, ForwardHook, MethodPatch, restore
from layercache.runtime.router import RoutedModuleList, Router
from layercache.runtime.timesteps import StepTally
from layercache.runtime.timing import ForwardTimes, device_of
from layercache.schedule.fingerprint import call_settings
from layercache.schedule.memory_plan import GroupAction

_log = logging.getLogger("layercache")

_ROUTED_NAMES = ("_layercache_router", "_layercache_index")


class Attachment:
    """Everything that was changed on a transformer (and its pipeline) for one router, and how to undo it.

    Args:
        target: the pipeline, or the transformer.
        router: of the transformer.
        leader: of a further transformer, the attachment of the first, which is undone together with it.
    """

    def __init__(self, target: Any, router: Router, leader: Attachment | None = None):
        self.router, self.leader = router, leader
        self.experts: list[Attachment] = []
        self.transformer = router.transformer
        self.pipeline = None if isinstance(target, nn.Module) else target
        self._target = target
        experts = experts_of(target).items()
        self._name = next(
            (name for name, module in experts if unwrap_compiled(module) is self.transformer), "transformer"
        )
        self._tallies: dict[int, StepTally] = {}
        self._heard: list[Any] = []  # schedulers whose steps are heard of
        self._replacing: list[Any] = []  # those that get their velocities by way of the router
        self._driving: Any = None  # the one that drove the newest forward
        self._parameters = tuple(inspect.signature(type(self.transformer).forward).parameters)[1:]
        self._root = router
        self.said = new_said()
        self.has_own_contexts = has_own_contexts(self.transformer)
        self._loop: LoopOwner = LoopOwner() if leader is None else leader._loop
        self.times: ForwardTimes = ForwardTimes() if leader is None else leader.times
        self._device = torch.device("cpu")  # of the newest forward
        self._lock = ForwardLock(self._fail)
        self._classes: list[tuple[nn.ModuleList, type]] = []
        self._hooks: list[Any] = []
        self._instance_attributes: list[tuple[Any, str, dict[str, Any]]] = []

    def attach(self) -> None:
        for index, blocks in enumerate(self.router.spec.block_modules(self.transformer)):
            self._classes.append((blocks, type(blocks)))
            blocks.__dict__.update(zip(_ROUTED_NAMES, (self.router, index), strict=True))
            blocks.__class__ = RoutedModuleList
        self._lead(self.router)
        allow_graphs(self.router.graphs)
        self._hooks = [
            self.transformer.register_forward_pre_hook(ForwardHook(self._before_forward), with_kwargs=True),
            self.transformer.register_forward_hook(
                ForwardHook(self._after_forward), with_kwargs=True, always_call=True
            ),
        ]
        if hasattr(self.transformer, "cache_context"):
            original: Any = self.transformer.cache_context
            self._patch(self.transformer, "cache_context", functools.partial(self._named_context, original))
        self._mark_as_cached()
        FOLLOWER.hear(self)
        for name in ADAPTER_METHODS:
            if hasattr(self.transformer, name):
                self._patch(self.transformer, name, self._changing(getattr(self.transformer, name)))
        identity = self.router.identity
        if self.pipeline is not None and identity.scheduler is getattr(self.pipeline, "scheduler", None):
            identity.follow(self.pipeline)
        self._follow(self.pipeline, identity.scheduler)
        self._lead_experts(self.pipeline)
        self.router.attached()

    @property
    def root(self) -> Router:
        """The router that was attached; it may leave a forward to another one (`Router.for_call`)."""
        return self._root

    def _lead_experts(self, pipeline: Any) -> None:
        """The router decides about the steps of the pipeline's further transformers too."""
        for module in further_experts(pipeline, self._root):
            transformer = unwrap_compiled(module)
            if attachment_of(transformer) is None:
                self.experts.append(Attachment(module, ExpertRouter(transformer, self), self))
                self.experts[-1].attach()

    def invalidate(self) -> None:
        """The model is another one now: nothing that was stored is of use."""
        self._root.invalidate()

    def _named_context(self, original: Callable[..., Any], name: str, **fields: Any) -> Saying:
        """One of diffusers' cache contexts, whose name and step are what the caller says of the forwards within.

        Diffusers' own context is entered only where one of its hooks would hear of it.
        """
        is_heard = fields or self.has_own_contexts or is_hooked(self.transformer)
        now = Said(branch_of(name), fields.get("step_index"))
        return Saying(self.said, now, original(name, **fields) if is_heard else None)

    def _mark_as_cached(self) -> None:
        """Diffusers' own way to enable a cache is taken, and its way to disable one leads here."""
        transformer = self.transformer
        if not all(hasattr(transformer, name) for name in ("enable_cache", "disable_cache", "is_cache_enabled")):
            return

        def enable_cache(config: Any) -> None:
            raise ForeignCacheError(
                "Caching has already been enabled on this transformer, with layercache; call layercache.disable first"
            )

        self._patch(transformer, "enable_cache", enable_cache)
        self._patch(transformer, "disable_cache", self.detach)
        self._put(transformer, CACHE_CONFIG, CacheConfigMarker())

    def _changing(self, original: Any) -> Any:
        """A method after which the model is another one: nothing that it stored before is of use."""

        def changing(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.invalidate()
            return result

        return changing

    def share(self, pipeline: Any, scheduler: Any) -> None:
        """Another pipeline, or a loop with this scheduler, generates with the same transformer."""
        identity = self._root.identity
        if pipeline is None or pipeline.scheduler is not scheduler:
            identity.share(scheduler)
        else:
            identity.follow(pipeline)
        self._follow(pipeline, scheduler)
        self._lead_experts(pipeline)

    def _follow(self, pipeline: Any, scheduler: Any) -> None:
        """Hears of the end of a pipeline's generations and of its scheduler's steps."""
        if pipeline is not None:
            for owner in loops_of(pipeline):
                self._patch(owner, "progress_bar", self._denoising_loop(pipeline, owner, owner.progress_bar))
            if hasattr(pipeline, "maybe_free_model_hooks"):
                self._patch(pipeline, "maybe_free_model_hooks", self._at_end(pipeline.maybe_free_model_hooks))
        if scheduler is not None:
            self._hear_steps(scheduler)
        second = getattr(pipeline, "audio_scheduler", None)
        if second is not None and self._root.replaces_velocity and len(self._root.spec.leaves) > 1:
            self._patch(second, "step", self._sampler_step(second, second.step, output=1))

    def _hear_steps(self, scheduler: Any) -> None:
        self._heard.append(scheduler)
        if not counts_steps(scheduler) and hasattr(scheduler, "step"):
            tally = self._tallies[id(scheduler)] = StepTally(scheduler)
            self._patch(scheduler, "step", self._counted_step(scheduler.step, tally))
        if self._root.replaces_velocity:
            self._replace_velocities(scheduler)

    def _replace_velocities(self, scheduler: Any) -> None:
        """Between the model and this sampler the router may put other velocities."""
        if all(known is not scheduler for known in self._replacing):
            self._replacing.append(scheduler)
            self._patch(scheduler, "step", self._sampler_step(scheduler, scheduler.step))
            if len(self._root.spec.leaves) > 1:
                self._put(scheduler, DEEPCOPY, CopyHook(scheduler, self._hear_copy))

    def _hear_copy(self, scheduler: Any) -> None:
        """A pipeline has made a scheduler for the second output, which lasts as long as its call."""
        scheduler.__dict__["step"] = self._sampler_step(scheduler, scheduler.step, output=1)

    def detach(self) -> None:
        """Undoes everything, on all transformers of the pipeline that were attached together."""
        if self.leader is not None:
            self.leader.detach()
            return
        for attachment in (*reversed(self.experts), self):
            attachment._undo()
        self.experts = []

    def _undo(self) -> None:
        FOLLOWER.forget(self)
        self.router.shut()
        for blocks, cls in self._classes:
            blocks.__class__ = cls
            for name in _ROUTED_NAMES:
                delattr(blocks, name)
        for hook in self._hooks:
            hook.remove()
        for patched in reversed(self._instance_attributes):
            restore(*patched)
        self._classes, self._hooks, self._instance_attributes = [], [], []
        self._heard.clear()
        self._replacing.clear()
        self._root.free()

    def follow(self, router: Router, scheduler: Any) -> None:
        """A request brings a sampler of its own."""
        router.identity.tallies = self._tallies
        if all(known is not scheduler for known in self._heard):
            self._hear_steps(scheduler)
        if router.replaces_velocity:
            self._replace_velocities(scheduler)

    def unfollow(self, scheduler: Any) -> None:
        """Nothing uses this sampler any more: its steps are its own again."""
        own = [patched for patched in self._instance_attributes if patched[0] is scheduler]
        for patched in reversed(own):
            restore(*patched)
        self._instance_attributes = [s for s in self._instance_attributes if s[0] is not scheduler]
        self._heard = [known for known in self._heard if known is not scheduler]
        self._replacing = [known for known in self._replacing if known is not scheduler]
        self._tallies.pop(id(scheduler), None)

    def _follow_replaced(self, scheduler: Any) -> None:
        """Another scheduler drives the transformer than before, maybe one that a pipeline was given since."""
        self._driving = scheduler
        if scheduler is None or any(known is scheduler for known in self._heard):
            return
        kept = [driver.scheduler for driver in self._root.identity.drivers]
        for known in list(self._heard):
            if all(known is not one for one in kept) and not self._root.has_request_of(known):
                self.unfollow(known)
        self._hear_steps(scheduler)

    def switch(self, router: Router) -> None:
        """Routes by another router of the same transformer from now on."""
        self._root = router
        self._route_by(router)

    def _route_by(self, router: Router) -> None:
        self._lead(router)
        for blocks, _ in self._classes:
            blocks.__dict__["_layercache_router"] = router

    def _lead(self, router: Router) -> None:
        self.router = router
        router.attachment = self
        router.identity.tallies = self._tallies

    def _patch(self, owner: Any, name: str, replacement: Any) -> None:
        """Hides a method behind an instance attribute; what the instance itself had there comes back at the end."""
        self._put(owner, name, MethodPatch(owner, name, replacement))

    def _put(self, owner: Any, name: str, value: Any) -> None:
        before = {name: owner.__dict__[name]} if name in owner.__dict__ else {}
        if isinstance(value, MethodPatch):
            value.before = before
        owner.__dict__[name] = value
        self._instance_attributes.append((owner, name, before))

    def _at_end(self, original: Any) -> Any:
        def maybe_free_model_hooks(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._is_of_another_loop:
                return result
            router = self._root.for_call()
            router.end_generation()
            router.finish()
            return result

        return maybe_free_model_hooks

    def _denoising_loop(self, pipeline: Any, owner: Any, original: Any) -> Any:
        """A pipeline's loop runs in its progress bar: where that is left, however it is, the generation is over."""

        def begin() -> None:
            if self._loop.begin():
                self._root.identity.lead(pipeline)

        def progress_bar(*args: Any, **kwargs: Any) -> Any:
            arguments = arguments_of_loop(pipeline, owner) if self._classes else None
            if arguments is None:  # the cache has ended, or blocks that pipelines share run another one's loop
                return original(*args, **kwargs)
            # of the pipeline's call, which has put its defaults in place of what it was not given
            self._root.note_settings(call_settings(arguments))
            return DenoisingLoop(original(*args, **kwargs), begin, functools.partial(self._end_loop, pipeline))

        return progress_bar

    def _end_loop(self, pipeline: Any, completed: bool) -> None:
        FOLLOWER.close(self.transformer)
        if self._loop.end() and self._classes:
            _log.debug("a generation %s", "has ended" if completed else "was broken off")
            self._root.identity.is_held = False
            router = self._root.for_call()
            router.end_generation(completed)
            if completed and not hasattr(pipeline, "maybe_free_model_hooks"):
                router.finish()  # nothing is heard of a modular pipeline's end

    @property
    def skips_step(self) -> bool:
        """Whether the step that the newest forward was of is skipped, and the velocity replaced that it would give."""
        attachment = self.leader or self
        return not attachment._is_of_another_loop and attachment._root.for_call().skips_step

    def _counted_step(self, original: Any, tally: StepTally) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            tally.count()
            return result

        return step

    def _sampler_step(self, scheduler: Any, original: Any, output: int = 0) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            if not self._classes or self._is_of_another_loop:
                return original(*args, **kwargs)
            at = self._step_of(scheduler, args, kwargs)
            router = self._root.for_sampler(scheduler)
            if at is not None and router.replaces_velocity:
                given = args[0] if args else kwargs["model_output"]
                velocity = router.replace_velocity(at, given, step_argument(scheduler, "sample", args, kwargs), output)
                if velocity is not given:
                    args, kwargs = with_velocity(velocity, args, kwargs)
            return original(*args, **kwargs)

        return step

    def _step_of(self, scheduler: Any, args: Any, kwargs: Any) -> int | None:
        """The step that a scheduler is about to take."""
        at = scheduler_step(scheduler)
        if at is None and id(scheduler) in self._tallies:
            return self._tallies[id(scheduler)].step(step_argument(scheduler, "timestep", args, kwargs))
        return at

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            require_inference()
        self._lock.acquire()
        try:
            self._lock.is_under_way = True
            self._announce(module, args, kwargs)
        except BaseException:
            self._fail()
            self._lock.release()
            raise

    def decide(self, forward: Forward) -> tuple[GroupAction, ...]:
        """What the router's groups would do in a forward of another transformer; nothing where it has no place."""
        self._lock.acquire()
        router = self.router_of_call()
        try:
            router.begin(forward)
            return router.actions if router.is_announced else ()
        finally:
            router.shut()
            self._lock.release()

    def _fail(self) -> None:
        """A forward did not come to its end: what it stored, and what the generation has stored so far, is void."""
        self.router.shut()
        self.router.end_generation(completed=False)

    def router_of_call(self) -> Router:
        """The router of the forward that is about to start, which is routed by it from now on."""
        scheduler = self._root.identity.current()
        if scheduler is not self._driving:
            self._follow_replaced(scheduler)
        router = self._root.for_call()
        if router is not self.router:
            self._route_by(router)
        return router

    @property
    def _is_of_another_loop(self) -> bool:
        """Whether the cache serves another thread's pipeline at the moment, and no request is named."""
        return self._loop.is_another and not self._root.in_request

    def _announce(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_of_another_loop:
            return self._root.identity.leave_unidentified(OTHER_LOOP)
        router = self.router_of_call()
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs if args else kwargs
        spec = router.spec
        if spec.bypass and gives(arguments, spec.bypass):
            return
        if spec.rewritten:
            writes = (arguments.get(spec.rewritten.get(name, "")) is not None for name in spec.block_lists)
            router.rewritten = frozenset(index for index, does in enumerate(writes) if does)
        router.adds = spec.adds is None or bool(spec.skips) or gives(arguments, spec.adds)
        dry_run = None
        if is_compiled(self._target if self.pipeline is None else getattr(self.pipeline, self._name)):
            dry_run = functools.partial(module.forward, *args, **kwargs)
        branch, step, part = self.said.get()
        condition = FOLLOWER.condition_of(self.transformer)
        if condition is None:
            router.begin(Forward(branch, step, arguments, dry_run, part))
        elif (name := branch or condition.branch) is None:
            router.identity.leave_unidentified(OTHER_CONDITION)
        else:
            of_step = condition.step, condition.hooked
            router.begin(Forward(name + condition.layers, step, arguments, dry_run, part, *of_step))
        self._device = device_of(arguments.get(self._parameters[0]))
        self.times.start(self._device)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._lock.is_held:  # it was refused before it began
            return None
        try:
            router = self.router
            if output is None:
                self._fail()
                return None
            self.times.stop(self._device, not router.is_announced or router.computes_all)
            if router.has_post_hook and router.is_announced:
                return router.after(output, functools.partial(module.forward, *args, **kwargs))
            return None
        except BaseException:
            self._fail()
            raise
        finally:
            self.router.shut()
            self._lock.release()


def attachment_of(transformer: nn.Module) -> Attachment | None:
    """The attachment of the router that routes this transformer, if one does."""
    for blocks in spec_for(transformer).block_modules(transformer):
        if isinstance(blocks, RoutedModuleList):
            found = blocks._layercache_router.attachment
            assert isinstance(found, Attachment)
            return found
    return None


def further_experts(target: Any, router: Router) -> list[nn.Module]:
    """The other transformers of a pipeline whose steps the router decides about, as the pipeline calls them."""
    if target is None or isinstance(target, nn.Module) or not router.takes_experts:
        return []
    return [module for module in experts_of(target).values() if unwrap_compiled(module) is not router.transformer]


def attach(target: Any, router: Router) -> Attachment:
    """Attaches a router to a pipeline or transformer, and to its scheduler if the router replaces velocities.

    Raises:
        CacheStateError: another cache, ours or one of diffusers, is enabled on it.
    """
    for module in (router.transformer, *map(unwrap_compiled, further_experts(target, router))):
        if attachment_of(module) is not None:
            raise CacheStateError(
                "a layercache cache is already enabled on this transformer; call layercache.disable first (a second "
                "pipeline joins it with the same plan or target alone)"
            )
        if has_foreign_cache(module):
            raise CacheStateError(
                "a diffusers cache is enabled on this transformer; call transformer.disable_cache() first"
            )
    attachment = Attachment(target, router)
    attachment.attach()
    return attachment
