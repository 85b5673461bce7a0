"""Which implementation of an op runs, and its registration with torch.library.

On a GPU an op launches its Triton kernel, on the CPU it runs the compiled path or the eager reference; all are called
directly, because the dispatcher costs more than the call. While torch.compile traces, or a dispatch mode such as
FakeTensorMode watches, it calls the registered op ``torch.ops.layercache.*``, so that a graph holds one opaque node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from layercache.errors import MissingExtraError
from layercache.kernels.deferred import has_triton, use_triton
from layercache.kernels.launching import Planned, first_tensor, on_device_of
from layercache.kernels.tiles import accumulator_dtype
from layercache.ops.plans import Call, Plan, count_modes, is_compiling, read

_Parameter = torch.nn.Parameter
_LIBRARY = torch.library.Library("layercache", "DEF")
# Of one op. Only numbers that are never the same twice make more than a few hundred.
MOST_PLANS = 1024

NO_TRITON = (
    "triton is not installed, and tensors on a GPU need it: pip install 'layercache[triton]' (with PyTorch for ROCm: "
    "reinstall torch, which brings its own build of triton)"
)


class Kernels:
    """One op: the checks of its arguments and its implementations, of which a call takes that for its first tensor.

    All take the op's arguments one by one: those of the public function, in its order and all of them.

    Args:
        check: raises where an argument is wrong; gives all of them as the implementations take them.
        triton: for CUDA and ROCm GPUs; of a `Planned` launcher the plans are kept.
        reference: eager PyTorch, for the CPU where the compiled path is not there or the dtype is float64.
        native: the compiled CPU path.
        check_memory: raises where tensors share memory and must not; for tensors that have memory.
        call: the op through torch.library; by default the overload that `register` defines.
        plans_on_cpu: whether the checks take longer than looking for a plan does, which is then worth it on the CPU
            too; on a GPU a plan also saves the layout.

    Attributes:
        every: those of all ops.
    """

    every: ClassVar[list[Kernels]] = []

    def __init__(
        self,
        check: Callable[..., Sequence[Any]],
        triton: Callable[..., Any],
        reference: Callable[..., Any],
        native: Callable[..., Any] | None = None,
        check_memory: Callable[..., None] | None = None,
        call: Callable[..., Any] | None = None,
        plans_on_cpu: bool = False,
    ):
        self.check, self.check_memory, self.call = check, check_memory, call
        self.triton, self.reference, self.native = triton, reference, native
        self.plans_on_cpu = plans_on_cpu
        self._is_planned = isinstance(triton, Planned)
        self._plans: dict[Any, Plan] = {}
        self.every.append(self)

    def again(self, arguments: Sequence[Any]) -> Any:
        """Runs the op if a call like this one went through `run` before; else returns NotImplemented, for the caller
        to go on with `first`. Not for an op whose checks look at what a tensor holds."""
        if not self.plans_on_cpu:
            first = arguments[0]
            while type(first) in (list, tuple) and first:
                first = first[0]
            if not getattr(first, "is_cuda", False):
                return NotImplemented
        call = read(arguments)
        if call is None or (plan := self._plans.get(call[0])) is None:
            return NotImplemented
        if plan.relation(*call[1:]) not in plan.checked or not plan.is_current():
            return NotImplemented
        return plan.run(*arguments)

    def first(self, arguments: Sequence[Any]) -> Any:
        """Checks the arguments and runs the op, through torch.library where something must see it.

        Raises:
            OpInputError: names the argument, what it is, and what it should be.
            MissingExtraError: a GPU tensor, and triton is not installed, or does not import.
        """
        checked = self.check(*arguments)
        if self.call is not None and through_registry(checked):
            return self.call(*checked)
        return self.run(*checked)

    def run(self, *arguments: Any) -> Any:
        """Runs the op on arguments that `check` gave; then `again` runs calls like this one."""
        if self.check_memory is not None:
            self.check_memory(*arguments)
        tensor = first_tensor(arguments)
        run = self.choose(tensor)
        if self._is_planned and (self.plans_on_cpu or tensor.is_cuda) and (call := read(arguments)) is not None:
            self._plan(call, arguments).approve(*call[1:])
        return run(*arguments)

    def __call__(self, *arguments: Any) -> Any:
        """Runs the implementation on unvalidated arguments, without a plan."""
        return self.choose(first_tensor(arguments))(*arguments)

    def choose(self, tensor: Tensor) -> Callable[..., Any]:
        """What runs the op where a tensor is."""
        if not tensor.is_cuda:
            usable = self.native is not None and tensor.dtype != torch.float64
            return self.native if usable else self.reference  # type: ignore[return-value]
        if trouble := trouble_with_triton():
            raise MissingExtraError(trouble)
        return self.launch

    def launch(self, *arguments: Any) -> Any:
        """By Triton, as planned for the first call like this one."""
        return self._launch(read(arguments), arguments)

    def launch_fitting(self, by: Sequence[Any], *arguments: Any) -> Any:
        """`launch`, for arguments whose layout follows from ``by``: some of them, and dtype and number of the others,
        which are contiguous, begin at a multiple of 16 and have the shapes of those."""
        return self._launch(read(("fitting", *by)), arguments)

    def _launch(self, call: Call | None, arguments: Sequence[Any]) -> Any:
        if call is None:
            return self.triton(*arguments)
        plan = self._plans.get(call[0]) or self._plan(call, arguments)
        if plan.is_current():
            return plan.run(*arguments)
        with on_device_of(call[1][0]):
            return plan.run(*arguments)

    def _plan(self, call: Call, arguments: Sequence[Any]) -> Plan:
        """The plan for a call, made if there is none."""
        key, tensors, _ = call
        if (plan := self._plans.get(key)) is not None:
            return plan
        run: Callable[..., Any] = self
        if self.choose(tensors[0]) == self.launch:
            run = self.triton.plan(*arguments) if isinstance(self.triton, Planned) else self.triton
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        plan = self._plans[key] = Plan(run, tensors)
        return plan


@functools.cache
def trouble_with_triton() -> str | None:
    """Why no kernel can be launched on a GPU here, and what to do about it."""
    if not has_triton():
        return NO_TRITON
    try:
        use_triton()
    except ImportError as error:
        return f"triton is installed, but importing it fails ({error}); reinstall the version that your torch asks for"
    return None


def through_registry(arguments: Iterable[Any]) -> bool:
    """Whether something other than plain execution is under way, which must see one op instead of many."""
    return is_compiling() or count_modes() > 0 or _has_unusual(arguments)


def _has_unusual(arguments: Iterable[Any]) -> bool:
    """Whether a tensor among them, also in lists, is on meta or of a class other than torch's own."""
    for argument in arguments:  # a generator would cost more than all the rest
        kind = type(argument)
        if kind is Tensor or kind is _Parameter:
            if argument.is_meta:
                return True
        elif kind is list or kind is tuple:
            if _has_unusual(argument):
                return True
        elif issubclass(kind, Tensor):  # of a trace without dynamo (non-strict export)
            return True
    return False


def register(
    schema: str,
    kernels: Kernels,
    fake: Callable[..., Any],
    take: Callable[..., Sequence[Any]] | None = None,
    give: Callable[..., Any] | None = None,
) -> Any:
    """Defines ``torch.ops.layercache.*`` for an op, which checks its arguments, whoever calls it; returns the overload.

    Args:
        fake: from the op's arguments to its result for tensors without memory.
        take: from the arguments of the schema to those of the op; by default they are the same.
        give: from the result of the op and the arguments of the schema to what the schema returns.
    """
    name = schema.partition("(")[0]

    def run(*arguments: Any) -> Any:
        taken = arguments if take is None else take(*arguments)
        found = kernels.again(taken)
        if found is NotImplemented:
            found = kernels.run(*kernels.check(*taken))
        return found if give is None else give(found, *arguments)

    def run_fake(*arguments: Any) -> Any:
        taken = arguments if take is None else take(*arguments)
        # of a trace they were checked before, and have sizes that are not known; meta tensors come from anywhere
        if not has_tensors_of_a_trace(taken):
            kernels.check(*taken)
        return fake(*taken)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # the last is for calls without a tensor, and for devices that the checks refuse
    for key in ("CUDA", "CPU", "CompositeExplicitAutograd"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"layercache::{name}", run_fake, lib=_LIBRARY)
    overload = getattr(torch.ops.layercache, name).default
    kernels.call = kernels.call or overload
    return overload


def has_tensors_of_a_trace(arguments: Iterable[Any]) -> bool:
    """Whether a tensor among them, also in a list, is of a class other than torch's own, such as FakeTensor."""
    return any(
        has_tensors_of_a_trace(argument)
        if isinstance(argument, (list, tuple))
        else isinstance(argument, Tensor) and type(argument) not in (Tensor, _Parameter)
        for argument in arguments
    )


def new_statistics(model: Tensor, rows: int, columns: int) -> Tensor:
    """What an op with statistics returns, for its fake."""
    return model.new_empty((rows, columns), dtype=accumulator_dtype(model.dtype))
