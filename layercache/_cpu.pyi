class View:
    def __init__(
        self, data: int, dtype: int, batch: int, rows: int, cols: int, batch_stride: int, row_stride: int
    ) -> None: ...

def capture(
    outputs: list[View],
    inputs: list[View],
    residuals: list[View],
    previous: list[View],
    statistics: int,
    samples: int,
    look: bool,
    threads: int,
) -> tuple[bool, list[float]]: ...
def capture_compact(output: View, before: View, codes: View, scales: View, look: bool, threads: int) -> bool: ...
def pair_statistics(a: list[View], b: list[View], samples: int, threads: int) -> list[float]: ...
def linear_map(
    inputs: list[View],
    outputs: list[View],
    coefficients: list[float | None],
    factors: list[float],
    base: bool,
    gate: View | None,
    scales: list[View | None],
    threads: int,
) -> None: ...
def combination_error(target: View, terms: list[View], coefficients: list[float], threads: int) -> list[float]: ...
def gram(tensors: list[View], threads: int) -> list[float]: ...
def linear_sums(tensors: list[View], coefficients: list[float | None], threads: int) -> list[float]: ...
def router_lerp(
    fresh: View, cached: View, beta: list[float], gate: View | None, residual: View | None, out: View, threads: int
) -> None: ...
def router_lerp_backward(
    grad: View, fresh: View, cached: View, beta: list[float], gate: View | None, grad_fresh: View, threads: int
) -> list[float]: ...
def modulate(
    x: View,
    scale: View,
    shift: View,
    z: View,
    residuals: list[View],
    coefficients: list[float],
    previous: View | None,
    weight: View | None,
    bias: View | None,
    stream: View | None,
    bounds: list[int],
    eps: float,
    scales: list[View],
    threads: int,
) -> list[float]: ...
def guidance(cond: View, uncond: View, scale: float, rescale: bool, out: View, threads: int) -> None: ...
def row_statistics(a: View, b: View, samples: int, threads: int) -> list[float]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> bool: ...
def parallel() -> int: ...
