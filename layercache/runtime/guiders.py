"""Conditions of diffusers' guiders: which one a forward computes, and which its step has.

A guider of a modular pipeline makes a list of conditions at every step (``prepare_inputs``) and hears of each forward,
one per condition and in their order: ``prepare_models`` before it and ``cleanup_models`` behind it. While caches are
enabled all guiders are followed from their next ``set_state`` on, whichever pipeline or loop they are of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import nn

from layercache._utils.compat import condition_names, guider_class, guider_output, hooks_in, unwrap_compiled
from layercache.runtime.patches import MethodPatch, restore

if TYPE_CHECKING:
    from layercache.runtime.attachment import Attachment


class Condition(NamedTuple):
    """What a guider says of the forward that is about to start.

    Attributes:
        branch: name of the guidance branch; ``None`` where the guider does not say it.
        layers: what distinguishes it from forwards of the same name with other hooks; "" for the first of them.
        step: names of all conditions of the step.
        hooked: blocks, over all lists, that the guider has put hooks on for this forward alone.
    """

    branch: str | None
    layers: str
    step: tuple[str, ...]
    hooked: frozenset[int]


def branch_of(name: str | None) -> str | None:
    """The branch that a condition is of: guiders call ``pred_cond`` what pipelines call ``cond``."""
    return name.removeprefix("pred_") if name and name.startswith(("pred_cond", "pred_uncond")) else name


class StepConditions:
    """The conditions that the guiders of one thread have prepared for the step it is at."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.has_begun = False

    def add(self, names: tuple[str, ...]) -> None:
        """One more guider has prepared its own; of a step whose forwards have begun none follow."""
        self.names = names if self.has_begun else self.names + names
        self.has_begun = False


class FollowedGuider:
    """One guider, whose methods say which of its conditions is next.

    Args:
        guider: of diffusers' class, or derived from it.
        follower: of all guiders.
    """

    def __init__(self, guider: Any, follower: Follower):
        self._guider, self._follower = ref(guider), follower
        self.names: tuple[str, ...] = ()
        self.taken = 0
        self.denoiser: nn.Module | None = None
        self._layers: dict[str | None, list[Any]] = {}  # by name, the hooks that its forwards had
        self._patched: list[tuple[str, dict[str, Any]]] = []
        self._puts_hooks = type(guider).prepare_models is not follower.base.prepare_models
        for name, call in {
            "prepare_inputs": self._preparing,
            "prepare_inputs_from_block_state": self._preparing,
            "prepare_models": self._beginning,
            "cleanup_models": self._ending,
            "forward": self._guiding,
        }.items():
            before = {name: guider.__dict__[name]} if name in guider.__dict__ else {}
            patch = MethodPatch(guider, name, call(getattr(guider, name)))
            patch.before = before
            guider.__dict__[name] = patch
            self._patched.append((name, before))

    def end(self) -> None:
        """The guider's methods are its own again."""
        guider = self._guider()
        for name, before in self._patched if guider is not None else ():
            restore(guider, name, before)

    def _preparing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            batches = original(*args, **kwargs)
            self.names, self.taken = condition_names(self._guider(), batches), 0
            self._follower.conditions().add(self.names)
            return batches

        return prepare_inputs

    def _beginning(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_models(denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
            model = unwrap_compiled(denoiser)
            before = hooks_in(self._follower.blocks_of(model)) if self._puts_hooks else {}
            result = original(denoiser, *args, **kwargs)
            after = hooks_in(self._follower.blocks_of(model)) if self._puts_hooks else {}
            changed = {key: names for key, names in after.items() if before.get(key) != names}
            self.denoiser = model
            self._follower.open(model, self._next(changed))
            return result

        return prepare_models

    def _next(self, changed: Mapping[tuple[int, int], tuple[str, ...]]) -> Condition:
        """The condition whose forward is next; nameless behind the last that was prepared."""
        conditions = self._follower.conditions()
        conditions.has_begun = True
        name = self.names[self.taken] if self.taken < len(self.names) else None
        self.taken += 1
        known = self._layers.setdefault(name, [])
        if changed not in known:
            known.append(dict(changed))
        number = known.index(changed)
        layers = f", layers {number + 1}" if number else ""
        return Condition(branch_of(name), layers, conditions.names, frozenset(block for block, _ in changed))

    def _ending(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def cleanup_models(denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._follower.close(unwrap_compiled(denoiser))
            return original(denoiser, *args, **kwargs)

        return cleanup_models

    def _guiding(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Nothing is guided of a step whose velocity is replaced: a guider's momentum sees none of it."""

        def forward(*args: Any, **predictions: Any) -> Any:
            cond = predictions.get("pred_cond")
            if args or cond is None or not self._follower.skips_step(self.denoiser):
                return original(*args, **predictions)
            return guider_output(cond, predictions.get("pred_uncond"))

        return forward


class Follower:
    """Follows all guiders for as long as a transformer has a cache.

    Attributes:
        base: the class of all guiders; ``None`` where this diffusers has none, or another kind.
    """

    def __init__(self) -> None:
        self.base: Any = None
        self._guiders: WeakKeyDictionary[Any, FollowedGuider] = WeakKeyDictionary()
        self._attachments: dict[int, Attachment] = {}  # by the transformer's id
        self._open: dict[tuple[int, int], Condition] = {}  # by thread and transformer
        self._steps: dict[int, StepConditions] = {}  # by thread
        self._set_state: Any = None

    def hear(self, attachment: Attachment) -> None:
        """A transformer has a cache from now on."""
        self._attachments[id(attachment.transformer)] = attachment
        if self.base is None and (base := guider_class()) is not None:
            self.base, self._set_state = base, base.set_state
            base.set_state = self._setting_state(base.set_state)

    def forget(self, attachment: Attachment) -> None:
        """A transformer has none any more; behind the last one nothing is followed."""
        self._attachments.pop(id(attachment.transformer), None)
        if self._attachments or self.base is None:
            return
        self.base.set_state, self.base = self._set_state, None
        for followed in list(self._guiders.values()):
            followed.end()
        self._guiders.clear()
        self._open.clear()
        self._steps.clear()

    def _setting_state(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def set_state(guider: Any, *args: Any, **kwargs: Any) -> Any:
            if self.base is not None and guider not in self._guiders:
                self._guiders[guider] = FollowedGuider(guider, self)
            return original(guider, *args, **kwargs)

        return set_state

    def conditions(self) -> StepConditions:
        """Of the step that this thread is at."""
        return self._steps.setdefault(get_ident(), StepConditions())

    def blocks_of(self, transformer: nn.Module) -> list[nn.Module]:
        """The blocks that a cache routes; none of a transformer without one."""
        attachment = self._attachments.get(id(transformer))
        lists = () if attachment is None else attachment.router.spec.block_modules(transformer)
        return [block for blocks in lists for block in blocks._modules.values() if block is not None]

    def open(self, transformer: nn.Module, condition: Condition) -> None:
        """The forwards that come are of a condition, until it is closed."""
        self._open[get_ident(), id(transformer)] = condition

    def close(self, transformer: nn.Module) -> None:
        self._open.pop((get_ident(), id(transformer)), None)

    def condition_of(self, transformer: nn.Module) -> Condition | None:
        """What a guider says of the transformer's forward that is about to start; ``None`` where none says anything."""
        return self._open.get((get_ident(), id(transformer))) if self._open else None

    def skips_step(self, transformer: nn.Module | None) -> bool:
        """Whether the step that a transformer's forwards were of is skipped, and its velocity replaced."""
        attachment = self._attachments.get(id(transformer))
        return attachment is not None and attachment.skips_step


FOLLOWER = Follower()
