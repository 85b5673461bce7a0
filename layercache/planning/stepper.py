"""Several generations of one pipeline that take their steps in turns, so that something can look at all of them.

A pipeline's call cannot be stopped from outside. Each call therefore runs in a thread of its own, of which only one
runs at any time: the order of everything, and with it the result, is the same as if there were one thread.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from layercache._utils.compat import quiet_copy, scheduler_step, step_argument, with_velocity
from layercache.runtime.patches import DEEPCOPY, CopyHook, MethodPatch, restore
from layercache.runtime.timesteps import StepTally


class Abandoned(BaseException):
    """Raised inside a generation that nobody waits for any more."""


class PausableRun:
    """A function that can pause: ``resume`` runs it up to its next ``pause``, or to its end.

    Attributes:
        item: what the function handed over at its last pause.
        result: what it returned, once `is_over`.
    """

    def __init__(self, function: Callable[[], Any]):
        self.item: Any = None
        self.result: Any = None
        self.is_over = False
        self._reply: Any = None
        self._error: BaseException | None = None
        self._is_abandoned = False
        self._to_function, self._to_caller = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(_as_here(function),), daemon=True)

    def resume(self, reply: Any = None) -> bool:
        """Continues the function, ``pause`` returning ``reply`` in it; whether it paused again.

        Raises:
            BaseException: whatever the function raised.
        """
        self._reply = reply
        if self._thread.ident is None:
            self._thread.start()
        self._to_function.release()
        self._to_caller.acquire()
        if self._error is not None:
            raise self._error
        return not self.is_over

    def pause(self, item: Any) -> Any:
        """Called in the function: hands ``item`` over and waits to be resumed."""
        self.item = item
        self._to_caller.release()
        self._to_function.acquire()
        if self._is_abandoned:
            raise Abandoned
        return self._reply

    def abandon(self) -> None:
        """Ends the function where it pauses."""
        if self._thread.ident is None or self.is_over:
            return
        self._is_abandoned = True
        self._to_function.release()
        self._thread.join()

    def _run(self, function: Callable[[], Any]) -> None:
        self._to_function.acquire()
        try:
            if not self._is_abandoned:
                self.result = function()
        except Abandoned:
            pass
        except BaseException as error:
            self._error = error
        self.is_over = True
        self._to_caller.release()


def _as_here(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function under what torch keeps per thread and the caller may have set: device, autocast, grad mode."""
    modes: list[Callable[[], Any]] = [functools.partial(torch.set_grad_enabled, torch.is_grad_enabled())]
    if torch.is_inference_mode_enabled():
        modes.append(torch.inference_mode)
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            modes.append(functools.partial(torch.autocast, device, torch.get_autocast_dtype(device)))
    if torch.cuda.is_initialized():
        modes.append(functools.partial(torch.cuda.device, torch.cuda.current_device()))

    def run() -> Any:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            return function()

    return run


def clones(pipe: Any, count: int) -> list[Any]:
    """Copies of a pipeline that share its models and have a scheduler, and guiders, each.

    A call writes to the pipeline (its guidance scale, its progress) and to the scheduler; models are only read.
    """
    copies = []
    for _ in range(count):
        clone = quiet_copy(pipe)
        clone.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
        copies.append(clone)
    return copies


@contextlib.contextmanager
def paused_at_steps(scheduler: Any, run: PausableRun, outputs: int = 1) -> Iterator[None]:
    """Pauses the run at every sampler step with ``(step, velocity, latents)``; the reply is the velocity to take.

    Of a model with two outputs the second's steps, which the pipeline takes by a copy of its scheduler, pause behind
    the first's, with a 1 behind the latents.
    """
    before = {"step": scheduler.__dict__["step"]} if "step" in scheduler.__dict__ else {}
    patch = MethodPatch(scheduler, "step", _pausing(scheduler, scheduler.step, run, ()))
    patch.before = before
    scheduler.__dict__["step"] = patch
    if outputs > 1:

        def pause_copy(copied: Any) -> None:
            copied.__dict__["step"] = _pausing(copied, copied.step, run, (1,))

        scheduler.__dict__[DEEPCOPY] = CopyHook(scheduler, pause_copy)
    try:
        yield
    finally:
        scheduler.__dict__.pop(DEEPCOPY, None)
        restore(scheduler, "step", before)  # patches of a router's attachment may lie in front of it


def _pausing(scheduler: Any, original: Any, run: PausableRun, output: tuple[int, ...]) -> Callable[..., Any]:
    tally = StepTally(scheduler)

    def step(*args: Any, **kwargs: Any) -> Any:
        at = scheduler_step(scheduler)
        if at is None:
            at = tally.step(step_argument(scheduler, "timestep", args, kwargs))
        given = args[0] if args else kwargs["model_output"]
        velocity = run.pause((at, given, step_argument(scheduler, "sample", args, kwargs), *output))
        args, kwargs = with_velocity(velocity, args, kwargs)
        result = original(*args, **kwargs)
        tally.count()
        return result

    return step


def run_in_step(
    runs: Sequence[PausableRun],
    select: Callable[[int], object],
    answer: Callable[[int, list[tuple[Any, ...]]], list[Any]],
) -> list[Any]:
    """Resumes all runs to their end, stopping at every sampler step; their results.

    Args:
        runs: paused by `paused_at_steps`.
        select: called with a run's number before it goes on.
        answer: of the step's number and every run's ``(velocity, latents)``, and the output where it is not the first,
            the velocities to take.

    Raises:
        ValueError: the runs do not take the same steps.
    """
    replies: list[Any] = [None] * len(runs)
    try:
        while True:
            running = []
            for number, run in enumerate(runs):
                select(number)
                running.append(run.resume(replies[number]))
            if not any(running):
                return [run.result for run in runs]
            steps = {run.item[0] if goes_on else None for run, goes_on in zip(runs, running, strict=True)}
            step = steps.pop()
            if steps or step is None:
                raise ValueError(f"the generations do not take the same steps: {sorted(map(str, {step, *steps}))}")
            replies = answer(step, [run.item[1:] for run in runs])
    finally:
        for run in runs:
            run.abandon()
