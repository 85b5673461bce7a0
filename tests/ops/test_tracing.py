"""Cases of ops under torch.compile, and on fake tensors of any device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from layercache.tools.bench.case import Case, Inputs
from support.op_cases import OP_CASES, UNMEASURED, copied, inputs_of, results_of

NAMES = {"capture", "capture and slope", "mean velocity and step", "alignment", "gated reuse"}
NAMES |= {"router lerp", "gated router lerp", "modulate", "guidance and norm"}
TRACED = [case for case in OP_CASES if not case.gradient and (case in UNMEASURED or case.name in NAMES)]
cases = pytest.mark.parametrize("case", TRACED, ids=lambda case: case.name)


def fake(inputs: Inputs, device: str) -> Inputs:
    def outline(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    lists = [list(map(outline, tensors)) for tensors in (inputs.x, inputs.text, inputs.out)]
    extra = {name: outline(tensor) for name, tensor in inputs.extra.items()}
    return Inputs(lists[0], lists[1], outline(inputs.gate), lists[2], extra)


@cases
def test_compiled_bits(case: Case) -> None:
    torch._dynamo.reset()
    inputs = inputs_of(case, (2, 3, 16), torch.bfloat16)
    expected = case.ours(copied(inputs))
    found = torch.compile(case.ours, fullgraph=True, backend="aot_eager")(inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@cases
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_fake(case: Case, device: str) -> None:
    inputs = inputs_of(case, (2, 3, 16), torch.bfloat16)
    real = results_of(case, copied(inputs))
    with FakeTensorMode():
        found = results_of(case, fake(inputs, device))
    for a, b in zip(found, real, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, device)
