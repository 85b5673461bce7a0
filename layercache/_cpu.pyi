"""The native ops. Tensors are looked at through DLPack's exchange API, or, where torch has none, their attributes."""

from typing import Any

from torch import Tensor

def know_torch(dtypes: list[Any], tensor_class: type[Tensor], error_class: type[Exception]) -> None: ...
def capture(
    outputs: list[Tensor],
    inputs: list[Tensor],
    residuals: list[Tensor],
    previous: list[Tensor],
    statistics: int,
    samples: int,
    look: bool,
    threads: int,
    result: Tensor | None,
) -> bool: ...
def capture_compact(
    output: Tensor, before: Tensor, codes: Tensor, scales: Tensor, look: bool, threads: int
) -> bool: ...
def pair_statistics(a: list[Tensor], b: list[Tensor], samples: int, threads: int, result: Tensor) -> None: ...
def linear_map(
    inputs: list[Tensor],
    outputs: list[Tensor],
    coefficients: list[float | None],
    factors: list[float],
    base: bool,
    gate: Tensor | None,
    scales: list[Tensor | None],
    threads: int,
) -> None: ...
def combination_error(
    target: Tensor, terms: list[Tensor], coefficients: list[float], threads: int, result: Tensor
) -> None: ...
def gram(tensors: list[Tensor], threads: int, result: Tensor) -> None: ...
def linear_sums(tensors: list[Tensor], coefficients: list[float | None], threads: int) -> list[float]: ...
def router_lerp(
    fresh: Tensor,
    cached: Tensor,
    beta: list[float],
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    threads: int,
) -> None: ...
def router_lerp_backward(
    grad: Tensor,
    fresh: Tensor,
    cached: Tensor,
    beta: list[float],
    gate: Tensor | None,
    grad_fresh: Tensor,
    threads: int,
) -> list[float]: ...
def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    z: Tensor,
    residuals: list[Tensor],
    coefficients: list[float],
    previous: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stream: Tensor | None,
    bounds: list[int],
    eps: float,
    scales: list[Tensor],
    threads: int,
    result: Tensor | None,
) -> None: ...
def guidance(cond: Tensor, uncond: Tensor, scale: float, rescale: bool, out: Tensor, threads: int) -> None: ...
def row_statistics(a: Tensor, b: Tensor, samples: int, threads: int) -> list[float]: ...
def instruction_set() -> str: ...
def decide(
    numerator: Tensor, denominator: Tensor, accumulated: Tensor, polynomial: list[float], threshold: float
) -> bool: ...
def use_instruction_set(name: str) -> bool: ...
def stream_from(bytes: int) -> int: ...
def parallel() -> int: ...
