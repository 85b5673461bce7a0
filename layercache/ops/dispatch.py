"""Which implementation of an op runs, and its registration with torch.library.

On a GPU an op launches its Triton kernel, on the CPU it runs the compiled path or the eager reference; all are called
directly, because the dispatcher costs more than the call. While torch.compile traces, or a dispatch mode such as
FakeTensorMode watches, it calls the registered op ``torch.ops.layercache.*``, so that a graph holds one opaque node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from layercache.errors import MissingExtraError
from layercache.kernels.deferred import has_triton, use_triton
from layercache.kernels.tiles import accumulator_dtype
from layercache.ops.repeating import Repeats

_TENSOR_TYPES = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("layercache", "DEF")

NO_TRITON = (
    "triton is not installed, and tensors on a GPU need it: pip install 'layercache[triton]' (with PyTorch for ROCm: "
    "reinstall torch, which brings its own build of triton)"
)


class Kernels:
    """The implementations of one op; a call picks the one for the device of its first argument.

    Args:
        triton: for CUDA and ROCm GPUs.
        reference: eager PyTorch, for the CPU where the compiled path is not there or the dtype is float64.
        native: the compiled CPU path.
        repeatable: whether ``triton`` hands host numbers to its kernels as they come, in order, and decides nothing by
            them; then calls are repeated.

    Attributes:
        every: those of all ops.
    """

    every: ClassVar[list[Kernels]] = []

    def __init__(
        self,
        triton: Callable[..., Any],
        reference: Callable[..., Any],
        native: Callable[..., Any] | None = None,
        repeatable: bool = True,
    ):
        self.triton, self.reference, self.native = triton, reference, native
        self.use(repeatable)
        self.every.append(self)

    def use(self, repeatable: bool) -> None:
        """Whether calls are repeated from now on; what was written down so far is forgotten."""
        self.repeatable = repeatable
        self._checked, self._trusted = Repeats(), Repeats()

    @property
    def kept(self) -> int:
        """How many calls are written down."""
        return self._checked.kept + self._trusted.kept

    def again(self, *arguments: Any) -> Any:
        """What a call with arguments laid out like these returns, without a look at them; NotImplemented where there
        was none that `run` made."""
        return NotImplemented if torch.compiler.is_dynamo_compiling() else self._checked.again(*arguments)

    def run(self, *arguments: Any) -> Any:
        """Runs the op on validated arguments, the first of which is a tensor, a list of tensors or of such lists.

        Raises:
            MissingExtraError: a GPU tensor, and triton is not installed, or does not import.
        """
        return self.choose(_first_tensor(arguments), checked=True)(*arguments)

    def __call__(self, *arguments: Any) -> Any:
        """`run`, for arguments that nobody has looked at; those are repeated apart."""
        return self.choose(_first_tensor(arguments))(*arguments)

    def choose(self, tensor: Tensor, checked: bool = False) -> Callable[..., Any]:
        """What runs the op where a tensor is."""
        if not tensor.is_cuda:
            usable = self.native is not None and tensor.dtype != torch.float64
            return self.native if usable else self.reference  # type: ignore[return-value]
        if trouble := trouble_with_triton():
            raise MissingExtraError(trouble)
        return self.launch_checked if checked else self.launch

    def launch_checked(self, *arguments: Any) -> Any:
        """By Triton: whoever has looked at the arguments has asked `again` before."""
        return self._record(self._checked, arguments)

    def launch(self, *arguments: Any) -> Any:
        """As before, or by Triton."""
        found = self._trusted.again(*arguments)
        return self._record(self._trusted, arguments) if found is NotImplemented else found

    def _record(self, repeats: Repeats, arguments: tuple[Any, ...]) -> Any:
        return repeats.record(self.triton, arguments) if self.repeatable else self.triton(*arguments)


def _first_tensor(arguments: Any) -> Tensor:
    while not isinstance(arguments, Tensor):
        arguments = arguments[0]
    return arguments


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


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines one op with its implementation for CPU and GPU and its fake; the overload that calls it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"layercache::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.layercache, name).default


def new_statistics(model: Tensor, rows: int, columns: int) -> Tensor:
    """What an op with statistics returns, for its fake."""
    return model.new_empty((rows, columns), dtype=accumulator_dtype(model.dtype))
