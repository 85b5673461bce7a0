"""The cache under torch.compile: whole model and repeated blocks, both with fullgraph=True."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import layercache
from tiny import generate, mixed_cells, schedule_for, tiny_pipeline

STEPS = 8


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_as(pipe, how, backend):
    if how == "whole":
        pipe.transformer.compile(backend=backend, fullgraph=True)
    elif how == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    else:
        pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)


@pytest.mark.parametrize(
    ("how", "order"),
    [
        ("whole", "compiled first"),
        ("whole", "enabled first"),
        ("wrapped", "compiled first"),
        ("blocks", "compiled first"),
        ("blocks", "enabled first"),
    ],
)
def test_graphs_breaks_and_bits(how, order):
    pipe = tiny_pipeline(layers=3)
    schedule = schedule_for(pipe, mixed_cells(), ((0, 1), (1, 2), (2, 3)))
    with layercache.enabled(pipe, schedule):
        eager = generate(pipe)
    full = generate(pipe)
    backend = CompileCounter()
    if order == "compiled first":
        compile_as(pipe, how, backend)
        assert torch.equal(generate(pipe), full)
    with layercache.enabled(pipe, schedule) as cache:
        if order == "enabled first":
            compile_as(pipe, how, backend)
        before = backend.frame_count
        assert torch.equal(generate(pipe), eager)
        graphs = backend.frame_count
        if how == "blocks":
            assert graphs <= 1
        else:
            distinct = {(r.actions, tuple(run and len(run.coefficients) for run in r.runs)) for r in cache.layout.rows}
            assert graphs - before <= len(distinct)
        assert torch.equal(generate(pipe), eager)
        assert backend.frame_count == graphs, "nothing is compiled again"
        assert cache.report().cached_cells > 0
        assert cache.report().fallback_rows == 0
    assert not counters["graph_break"]
    assert torch.equal(generate(pipe), full)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_inductor_agrees_with_eager(how):
    """Real code generation: the blocks may round differently, the cache must not add to it."""
    pipe = tiny_pipeline(layers=3)
    groups = ((0, 1), (1, 2), (2, 3))
    cells = [(None,) * 3, ({0: 1.0}, {0: 1.0}, None), ({0: 1.0},) * 3, (None,) * 3]
    schedule = schedule_for(pipe, cells, groups)
    with layercache.enabled(pipe, schedule):
        eager = generate(pipe, steps=4)
        compile_as(pipe, how, "inductor")
        for _ in range(2):
            torch.testing.assert_close(generate(pipe, steps=4), eager, atol=1e-4, rtol=1e-4)
