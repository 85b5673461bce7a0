"""Cases of ops by their Triton kernels against the references, and nothing out of bounds."""

from __future__ import annotations

import pytest
import torch
from layercache.kernels import moments, statistics, tiles

from layercache.ops import plans
from layercache.tools.bench.case import Case, Inputs
from support import guarded_memory
from support.guarded_memory import Memory, in_cases
from support.op_cases import OP_CASES, UNMEASURED, assert_alike, by, copied, inputs_of, results_of

pytestmark = pytest.mark.usefixtures("rounding")

# Of the ops on whole rows; the others are tested with several streams of more kinds.
NAMES = {"router lerp", "router lerp and gradient", "modulate", "modulate and change", "guidance and norm"}
NAMES |= {"reuse and modulate", "row statistics", "codes reused"}
OPS = {"router_lerp", "modulate", "combine_guidance", "row_statistics"}
FORMS = [case for case in OP_CASES if case.name in NAMES or (case in UNMEASURED and case.op in OPS)]
SITUATIONS = in_cases([case for case in guarded_memory.CASES if len(case.shapes[0]) == 3])


def guarded(inputs: Inputs, memory: Memory) -> Inputs:
    """The same numbers in guarded memory; what is strided is a slice along the rows of a longer tensor."""
    for tensors in (inputs.x, inputs.text, inputs.out):
        for k, tensor in enumerate(tensors):
            batch, rows, channels = tensor.shape
            more = tensor.storage_offset() // channels if not tensor.is_contiguous() else 0
            wide = memory.tensor((batch, rows + more, channels), tensor.dtype)
            tensors[k] = wide[:, more:].copy_(tensor)
    return inputs


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@SITUATIONS
def test_gives_what_the_reference_gives(
    form: Case, case: guarded_memory.Case, dtype: torch.dtype, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tiles, statistics, moments):
        for name in ("GROUPS", "SLOW_GROUPS"):
            monkeypatch.setattr(module, name, case.groups)
    inputs = inputs_of(form, case.shapes[0], dtype, "strided" if case.strided else "dense")
    with by("reference"), plans.ignored():
        expected = results_of(form, copied(inputs))
    with by("launch"), plans.ignored():
        assert_alike(form, results_of(form, guarded(inputs, memory)), expected)
