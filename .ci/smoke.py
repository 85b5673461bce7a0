"""Whether an installed wheel runs: both extensions, an op, a cached run of the bundled model.

    python .ci/smoke.py                  # in an environment with the wheel, layercache-demo and what they depend on
    python .ci/smoke.py --extensions     # with the wheel and numpy alone

It works in an empty folder, and never imports a checkout.
"""

import ctypes
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Array:
    """A NumPy array with the attributes by which the ops know a tensor, where torch is not installed."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.dtype, self.shape = "float32", values.shape

    def data_ptr(self) -> int:
        return self.values.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.values.itemsize for step in self.values.strides)


def extensions() -> None:
    """Both load; the scheduler plans; ops with every set of instructions equal their formulas."""
    import numpy as np

    from layercache import _core

    errors = np.full((3, 3, 1), np.inf)  # from a step on, for some steps
    errors[:, 1, 0], errors[0, 2, 0], errors[1, 2, 0] = 0.0, 1.0, 5.0
    if (steps := _core.shortest_path(errors, 2, gamma=1.0).steps) != [0, 2]:
        raise SystemExit(f"the path that skips step 1 is the cheapest, not {steps}")
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)  # as torch does
    from layercache import _cpu

    _cpu.know_torch(["float32"], Array, ValueError)
    tried = [name for name in ("base", "avx2", "avx512") if _cpu.use_instruction_set(name)]
    for name in tried:
        _cpu.use_instruction_set(name)
        a, b, out = (np.random.default_rng(seed).normal(size=(2, 65, 96)).astype(np.float32) for seed in range(3))
        _cpu.router_lerp(Array(a), Array(b), [0.25], None, None, Array(out), 2)
        np.testing.assert_allclose(out, b + 0.25 * (a - b), rtol=1e-5, atol=1e-6)
        _cpu.guidance(Array(a), Array(b), 4.0, False, Array(out), 2)
        np.testing.assert_allclose(out, b + 4.0 * (a - b), rtol=1e-5, atol=1e-5)
        _cpu.linear_map([Array(a), Array(b)], [Array(out)], [1.5, -0.5], [], False, None, [], 2)
        np.testing.assert_allclose(out, 1.5 * a - 0.5 * b, rtol=1e-5, atol=1e-6)
    print(f"{_core.__file__}: {', '.join(tried)}; {_cpu.parallel()} threads")


def everything() -> None:
    """An op equals its formula; a run with half of the steps gives a picture."""
    import torch

    import layercache
    from layercache import ops
    from layercache.demo.pipeline import load_demo_pipeline
    from layercache.ops import native

    if native.UNAVAILABLE:
        raise SystemExit(native.UNAVAILABLE)
    full, cached = torch.ones(2, 64, 32), torch.zeros(2, 64, 32)
    torch.testing.assert_close(ops.router_lerp(full, cached, torch.tensor(0.25)), torch.full_like(full, 0.25))
    pipe = load_demo_pipeline("cpu")
    pipe.set_progress_bar_config(disable=True)
    with layercache.enabled(pipe) as cache:
        pipe([0], num_inference_steps=30)
    print(layercache.__file__, native.describe(), cache.report(), sep="\n")


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / ".ci")]
    extensions() if "--extensions" in sys.argv else everything()
