"""The cache under torch.compile: whole model and repeated blocks, both with fullgraph=True."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import layercache
from layercache.models import registry
from layercache.models.registry import spec_for, temporarily_known
from layercache.models.spec import ModelSpec
from layercache.runtime import attachment
from layercache.schedule.schedule import Schedule
from support.forwards import call, schedule, stepping
from support.marks import slow
from support.tiny import SlopeTransformer, fingerprint, mixed_cells, schedule_for, tiny_pipeline
from support.tiny import generate as make_pictures
from support.zoo import build

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
        ("blocks", "enabled first"),
        *slow(
            ("whole", "enabled first"),
            ("whole", "compiled first"),
            ("wrapped", "compiled first"),
            ("blocks", "compiled first"),
        ),
    ],
)
def test_graphs_breaks_and_bits(how, order):
    pipe, cells = tiny_pipeline(layers=3), mixed_cells(5)
    schedule = schedule_for(pipe, cells, ((0, 1), (1, 2), (2, 3)))
    generate = partial(make_pictures, steps=len(cells))
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


CLASSES = {  # graphs of compiled blocks, uncached
    "Flux2Transformer2DModel": 2,
    "HunyuanVideoTransformer3DModel": 5,
    "LTX2VideoTransformer3DModel": 1,
    "WanTransformer3DModel": 1,
    "ZImageTransformer2DModel": 3,
}
ROWS = ((None,) * 3, ({0: 1.0}, None, {0: 1.0}), ({0: 1.0}, {1: 1.0}, {0: 1.0}))


@pytest.mark.parametrize("name", ["WanTransformer3DModel", *slow(*sorted(CLASSES.keys() - {"WanTransformer3DModel"}))])
def test_other_classes(name, monkeypatch):
    """Joined streams, two heads, lists of pictures, transposed inputs: still one graph per row and no break."""
    model, inputs = build(name)
    monkeypatch.setitem(registry._REGISTRY, name, replace(spec_for(model), timestep=None))
    plan = schedule(model, *ROWS)
    with layercache.enabled(model, plan) as cache:
        step = stepping(cache, 3)
        eager = [step(call, model, inputs) for _ in range(6)]
    whole, backend = torch.compile(model, backend=(counter := CompileCounter()), fullgraph=True), CompileCounter()
    frames = []
    with layercache.enabled(whole, plan) as cache:
        step = stepping(cache, 3)
        for expected in eager:
            assert all(torch.equal(a, b) for a, b in zip(step(call, whole, inputs), expected, strict=True))
            frames.append(counter.frame_count)
        assert cache.report().fallback_rows == 0
    assert frames == [1, 2, 3, 3, 3, 3] and not counters["graph_break"]
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    call(model, inputs)
    assert backend.frame_count == CLASSES[name]
    with layercache.enabled(model, plan) as cache:
        step = stepping(cache, 3)
        for number, expected in enumerate(eager):
            assert all(torch.equal(a, b) for a, b in zip(step(call, model, inputs), expected, strict=True))
            if number == 2:
                after_one = backend.frame_count
    assert backend.frame_count == after_one <= CLASSES[name] + 1 and not counters["graph_break"]


def test_slots_keep_their_place_for_cuda_graphs():
    """What a graph writes into is declared to stay where it is; other slots of the same row shape compile nothing."""
    pipe = tiny_pipeline(layers=3)
    schedule = schedule_for(pipe, mixed_cells(), ((0, 1), (1, 2), (2, 3)))
    with layercache.enabled(pipe, schedule) as cache:
        make_pictures(pipe)
        tensors = [b.tensor for state in cache.states.values() for b in (*state.images, *state.texts, state.flag)]
        places = [tensor.data_ptr() for tensor in tensors]
        assert all(tensor._dynamo_static_input_type == "unguarded" for tensor in tensors)
        make_pictures(pipe)
        assert places == [tensor.data_ptr() for tensor in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_inductor_agrees_with_eager(how):
    """Real code generation: the blocks may round differently, the cache must not add to it."""
    pipe = tiny_pipeline(layers=3)
    groups = ((0, 1), (1, 2), (2, 3))
    cells = [(None,) * 3, ({0: 1.0}, {0: 1.0}, None), ({0: 1.0},) * 3, (None,) * 3]
    schedule = schedule_for(pipe, cells, groups)
    with layercache.enabled(pipe, schedule):
        eager = make_pictures(pipe, steps=4)
        compile_as(pipe, how, "inductor")
        for _ in range(2):
            torch.testing.assert_close(make_pictures(pipe, steps=4), eager, atol=1e-4, rtol=1e-4)


def test_where_torch_does_not_tell_whether_it_traces_hooks_are_kept_out_all_the_same(monkeypatch):
    from layercache._utils import compat

    monkeypatch.setattr(compat, "get_eval_frame_callback", None)
    seen = []
    hook = compat.OutsideGraphs(lambda x: seen.append(torch.compiler.is_compiling()) or x + 1)
    module = torch.nn.Identity()
    module.register_forward_hook(lambda module, args, output: hook(output))
    compiled = torch.compile(module, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0] and hook(1) == 2 and seen == [False, False]
    torch._dynamo.reset()


def test_further_sizes_and_batches_have_room_for_their_graphs(monkeypatch):
    """Of two schedules, one after the other; only what their shapes make room for is there."""
    monkeypatch.setattr(attachment, "allow_graphs", lambda graphs: None)
    model, sigmas = SlopeTransformer(layers=2).eval(), (1.0, 0.8, 0.5, 0.0)
    shapes = [(1, 4), (2, 4), (1, 6), (2, 6)]

    def generate(batch, tokens):
        torch.manual_seed(tokens)
        streams = {"hidden_states": torch.randn(batch, tokens, 16), "encoder_hidden_states": torch.randn(batch, 3, 16)}
        with torch.no_grad():
            return torch.stack([model(**streams, timestep=torch.tensor(sigma)) for sigma in sigmas[:-1]])

    with temporarily_known(ModelSpec("SlopeTransformer")):
        prints, groups = fingerprint(model, sigmas, ("all",)), ((0, 1), (1, 2))
        rows = [((None, None), row, (None, None)) for row in (({0: 1.0}, None), (None, {0: 1.0}))]
        plans = [Schedule(prints, groups, row, (1.0, 1.0)) for row in rows]
        expected = []
        for plan in plans:
            with layercache.enabled(model, plan):
                expected.append([generate(*shape) for shape in shapes])
        with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
            model.compile(backend="eager", fullgraph=True, dynamic=False)
            for plan, right in zip(plans, expected, strict=True):
                with layercache.enabled(model, plan):
                    for shape, outputs in zip(shapes, right, strict=True):
                        assert torch.equal(generate(*shape), outputs)
                    limit = torch._dynamo.config.recompile_limit
                    generate(*shapes[0])
                    assert torch._dynamo.config.recompile_limit == limit, "the same size again needs no further graphs"
