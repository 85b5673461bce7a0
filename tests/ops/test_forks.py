"""Ops in a forked child of a process that had threads: the same numbers, on one thread."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHILD = """
import os, signal, sys, time
import torch
torch.set_num_threads(2)
torch.manual_seed(0)
from layercache import ops
x, y = (torch.randn(2, 300, 256) for _ in range(2))
wide = x[:, :80].double(), y[:, :80].double()  # on PyTorch's own operations
r, z, v = torch.zeros_like(x), torch.zeros_like(x), x[:, 0]
s, t = torch.zeros(1, 150, 256), (x[:1, :150], y[:1, :150])  # small, but enough for PyTorch to share out
def work():  # nothing large of PyTorch's own in it
    found = [ops.capture([y], [x], [r], previous=[x]), r, *ops.linear_combination([x], [[r, y]], [0.5, 0.25], [z])]
    ops.capture([t[0]], [t[1]], [s])
    found += [s, *ops.linear_combination([t[0]], [[s]], [1.0]), ops.modulate(x, v, v)[0]]
    found += [ops.gram([x, y]), ops.pair_statistics([x], [y], per_sample=True), ops.router_lerp(x, y, v[0, :1])]
    found += [ops.combine_guidance(x, y, 2.0, True), ops.row_statistics(x, y)]
    # PyTorch's own sums, whose last bit depends on the number of threads
    found += [ops.pair_statistics([wide[0]], [wide[1]]).float()]
    return [part.view(-1)[::17].tolist() for part in found]
torch.ones(1 << 20).sum()
before = work()
def fork(deeper):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(20)
    try:
        os._exit(0 if work() == before and (not deeper or fork(False) == 0) else 3)
    except BaseException:
        os._exit(4)
sys.exit(fork(True))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_child_gets_the_same_numbers() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
