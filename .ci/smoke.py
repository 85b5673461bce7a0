"""Whether an installed wheel runs: both extensions, an op, a cached run of the bundled model.

    python .ci/smoke.py                  # in an environment with the wheel and what it depends on
    python .ci/smoke.py --extensions     # with the wheel and numpy alone

It works in an empty folder, and never imports a checkout.
"""

import ctypes
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def extensions() -> None:
    """Both load, the scheduler plans."""
    import numpy as np

    from layercache import _core

    errors = np.full((3, 3, 1), np.inf)  # from a step on, for some steps
    errors[:, 1, 0], errors[0, 2, 0], errors[1, 2, 0] = 0.0, 1.0, 5.0
    if (steps := _core.shortest_path(errors, 2, gamma=1.0).steps) != [0, 2]:
        raise SystemExit(f"the path that skips step 1 is the cheapest, not {steps}")
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)  # as torch does
    from layercache import _cpu

    print(f"{_core.__file__}: {_cpu.instruction_set()}, {_cpu.parallel()} threads")


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
