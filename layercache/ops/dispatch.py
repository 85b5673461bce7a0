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
from layercache.ops.plans import Call, Plan, read

_TENSOR_TYPES = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("layercache", "DEF")
# Of one op. Only numbers that are never the same twice make more than a few hundred.
MOST_PLANS = 1024

NO_TRITON = (
    "triton is not installed, and tensors on a GPU need it: pip install 'layercache[triton]' (with PyTorch for ROCm: "
    "reinstall torch, which brings its own build of triton)"
)


class Kernels:
    """The implementations of one op; a call picks the one for the device of its first argument.

    Args:
        triton: for CUDA and ROCm GPUs; of a `Planned` launcher the plans are kept.
        reference: eager PyTorch, for the CPU where the compiled path is not there or the dtype is float64.
        native: the compiled CPU path.
        plans_on_cpu: whether the checks take longer than looking for a plan does, which is then worth it on the CPU
            too; on a GPU a plan also saves the layout.

    Attributes:
        every: those of all ops.
    """

    every: ClassVar[list[Kernels]] = []

    def __init__(
        self,
        triton: Callable[..., Any],
        reference: Callable[..., Any],
        native: Callable[..., Any] | None = None,
        plans_on_cpu: bool = False,
    ):
        self.triton, self.reference, self.native = triton, reference, native
        self.plans_on_cpu = plans_on_cpu
        self._plans: dict[Any, Plan] = {}
        self.every.append(self)

    def again(self, *arguments: Any) -> Any:
        """Runs the op if a call like this one went through `run` before; else returns NotImplemented, for the caller
        to check the arguments. Not for an op whose checks look at what a tensor holds."""
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

    def run(self, *arguments: Any) -> Any:
        """Runs the op on validated arguments, the first of which is a tensor, a list of tensors or of such lists; then
        `again` runs calls like this one.

        Raises:
            MissingExtraError: a GPU tensor, and triton is not installed, or does not import.
        """
        run = self.choose(first_tensor(arguments))
        if (self.plans_on_cpu or run == self.launch) and (call := read(arguments)) is not None:
            self._plan(call, arguments).approve(*call[1:])
        return run(*arguments)

    def __call__(self, *arguments: Any) -> Any:
        """`run`, for arguments that nobody has looked at."""
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


def through_registry(tensors: Iterable[Tensor]) -> bool:
    """Whether something other than plain execution is under way, which must see one op instead of many."""
    # a trace without dynamo (non-strict export) brings tensors of its own
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for tensor in tensors:  # a generator would cost more than all the rest
        if type(tensor) not in _TENSOR_TYPES or tensor.is_meta:
            return True
    return False


def register(schema: str, checked: Checked, fake: Callable[..., Any]) -> Any:
    """Defines one op with its implementation and its fake; the overload that calls it.

    Args:
        checked: its implementation, which checks the arguments: anybody may call ``torch.ops.layercache.*``.
        fake: its result for tensors without memory.
    """
    name = schema.partition("(")[0]

    def checked_fake(*arguments: Any) -> Any:
        if not has_tensors_of_a_trace(arguments):  # but meta tensors
            checked.check(*arguments)
        return fake(*arguments)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # the last is for calls without a tensor, and for devices that the checks refuse
    for key in ("CUDA", "CPU", "CompositeExplicitAutograd"):
        _LIBRARY.impl(name, checked, key)
    torch.library.register_fake(f"layercache::{name}", checked_fake, lib=_LIBRARY)
    return getattr(torch.ops.layercache, name).default


def has_tensors_of_a_trace(arguments: Iterable[Any]) -> bool:
    """Whether a tensor among them, also in a list, is of a class other than torch's own, such as FakeTensor."""
    return any(
        has_tensors_of_a_trace(argument)
        if isinstance(argument, (list, tuple))
        else isinstance(argument, Tensor) and type(argument) not in _TENSOR_TYPES
        for argument in arguments
    )


class Checked:
    """An op that checks its arguments and runs, whatever modes are on.

    Args:
        kernels: its implementations.
        check: raises where an argument is wrong; gives the arguments as `run` takes them.
        run: the op on arguments that were checked; by default that of the kernels.
        take: from the arguments of the schema to those of the op; by default they are the same.
        give: from the result of the op and the arguments of the schema to what the schema returns.
    """

    def __init__(
        self,
        kernels: Kernels,
        check: Callable[..., Sequence[Any]],
        run: Callable[..., Any] | None = None,
        take: Callable[..., Sequence[Any]] | None = None,
        give: Callable[..., Any] | None = None,
    ):
        self._kernels, self._check, self._run = kernels, check, run or kernels.run
        self._take, self._give = take, give

    def check(self, *arguments: Any) -> None:
        self._check(*(arguments if self._take is None else self._take(*arguments)))

    def __call__(self, *arguments: Any) -> Any:
        taken = arguments if self._take is None else self._take(*arguments)
        found = self._kernels.again(*taken)
        if found is NotImplemented:
            found = self._run(*self._check(*taken))
        return found if self._give is None else self._give(found, *arguments)


def new_statistics(model: Tensor, rows: int, columns: int) -> Tensor:
    """What an op with statistics returns, for its fake."""
    return model.new_empty((rows, columns), dtype=accumulator_dtype(model.dtype))
