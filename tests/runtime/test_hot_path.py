"""Exact counts: launches, full-size operators and synchronisations of a cached forward."""

import pytest
import torch

import layercache
from layercache.runtime.blocks import BlockProxy
from layercache.schedule.memory_plan import CAPTURE, REUSE
from support.operators import Operators
from support.tiny import GROUPS, PROMPTS, fingerprint, generate, mixed_cells, schedule_for, tiny_pipeline

STEPS = 8
TOKENS, DIM = 64, 56


def count_forwards(pipe, schedule) -> list[Operators]:
    """The operators of each forward of the second generation (the first allocates)."""
    forwards: list[Operators] = []
    forward = pipe.transformer.forward

    def counted(*args, **kwargs):
        forwards.append(Operators())
        with forwards[-1]:
            return forward(*args, **kwargs)

    with layercache.enabled(pipe, schedule):
        generate(pipe)
        pipe.transformer.forward = counted
        try:
            generate(pipe)
        finally:
            del pipe.transformer.forward
    return forwards


def streams_of_ours(operators: Operators) -> list[tuple[str, int]]:
    """Our ops in order, each with the number of streams it takes."""
    return [(o.ours, o.first) for o in operators.seen if o.ours]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_launches_per_row(pipe):
    """One capture per stored group, one linear combination per run, for all streams that are read."""
    schedule = schedule_for(pipe, mixed_cells())
    layout = layercache.enable(pipe, schedule).layout
    layercache.disable(pipe)
    forwards = count_forwards(pipe, schedule)
    assert len(forwards) == 2 * STEPS
    for index, operators in enumerate(forwards):
        row = layout.rows[index // 2]
        expected = []
        for action in row.actions:
            if action.kind == CAPTURE:
                expected.append(("capture", 2 if action.text else 1))
            elif action.kind == REUSE and action.ends_run:
                expected.append(("linear_combination", 2 if action.text else 1))
        assert streams_of_ours(operators) == expected


@pytest.mark.parametrize("groups", [GROUPS, ((0, 1), (1, 2), (2, 6)), tuple((k, k + 1) for k in range(6))])
def test_the_end_of_a_stored_group_is_the_beginning_of_the_next(pipe, groups):
    """Where nothing is added between them, the next one has no call of ours of its own; the same bits are stored."""
    parts = len(groups)
    rows = ((None,) * parts, (None, {0: 1.0}, *(None,) * (parts - 2)), ({0: 1.0},) * parts)
    schedule = layercache.Schedule(fingerprint(pipe.transformer, (0.6,) * 3 + (0.0,)), groups, rows, (1.0,) * parts)
    inputs = {
        "hidden_states": torch.randn(2, 64, 48),
        "encoder_hidden_states": torch.randn(2, 4, 64),
        "timestep": torch.full((2,), 0.6),
        "img_shapes": [(1, 8, 8)] * 2,
        "return_dict": False,
    }
    nothing = [torch.zeros(2, 64, 56)] * 6
    seen = []
    for control in ({}, {"controlnet_block_samples": nothing}):
        with torch.no_grad(), layercache.enabled(pipe.transformer, schedule) as cache:
            outputs = []
            for step in range(3):
                with cache.step(step, branch="cond"):
                    outputs.append(pipe.transformer(**inputs, **control)[0])
            cache.open(cache.layout.rows[0].actions)
            cache._is_asked_by_forward = lambda: True  # here the test asks
            calls = list(cache.route(0, pipe.transformer.transformer_blocks._modules.values()))
            cache.shut()
            stored = [b.tensor for state in cache.states.values() for b in (*state.images, *state.texts)]
        seen.append((outputs, stored, [isinstance(call, BlockProxy) for call in calls]))
    (outputs, stored, ours), (expected, wanted, separate) = seen
    assert all(map(torch.equal, outputs, expected)) and all(map(torch.equal, stored, wanted))
    opening = sum(lo + 1 < hi for lo, hi in groups[1:])
    assert sum(separate) - sum(ours) == opening
    if parts == 6:
        assert all(ours)


def test_a_static_schedule_reads_nothing_back(pipe):
    for operators in count_forwards(pipe, schedule_for(pipe, mixed_cells())):
        assert not operators.host_reads


def test_a_wholly_cached_step_touches_the_hidden_state_once(pipe):
    """Beside the embedder and the head, one launch on the image stream alone."""
    forwards = count_forwards(pipe, schedule_for(pipe, mixed_cells()))
    cached = forwards[2 * 3]
    assert streams_of_ours(cached) == [("linear_combination", 1)]
    empty = tiny_pipeline()
    empty.transformer.transformer_blocks = torch.nn.ModuleList()
    bare = Operators()
    with torch.no_grad(), bare:
        empty.transformer(
            hidden_states=torch.randn(2, 64, 48),
            encoder_hidden_states=torch.randn(2, 4, 64),
            timestep=torch.ones(2),
            img_shapes=[(1, 8, 8)] * 2,
        )
    size = len(PROMPTS) * TOKENS * DIM
    assert cached.giving(size) == bare.giving(size) and bare.giving(size)


def test_memory_is_known_before_the_run(pipe):
    schedule = schedule_for(pipe, mixed_cells())
    with layercache.enabled(pipe, schedule) as cache:
        generate(pipe)
        image, text = len(PROMPTS) * TOKENS * DIM * 4, len(PROMPTS) * 4 * DIM * 4
        expected = 2 * (cache.layout.image_slots * image + cache.layout.text_slots * text)
        assert cache.report().cache_bytes == expected


def test_report_counts(pipe):
    schedule = schedule_for(pipe, mixed_cells())
    cached = sum(cell is not None for row in schedule.cells for cell in row)
    with layercache.enabled(pipe, schedule) as cache:
        assert cache.report().used == 1.0
        generate(pipe)
        generate(pipe)
    report = cache.report()
    assert report.generations == 2
    assert report.forwards == 2 * 2 * STEPS
    assert report.cached_cells == 4 * cached
    assert report.computed_cells == 4 * (STEPS * len(GROUPS) - cached)
    assert report.used == pytest.approx(schedule.used)
    assert "reused: 62.5%" in str(report)


def test_slots_keep_their_address(pipe):
    """Graph captures rely on it."""
    with layercache.enabled(pipe, schedule_for(pipe, mixed_cells())) as cache:
        generate(pipe)
        before = [b.tensor.data_ptr() for s in cache.states.values() for b in (*s.images, *s.texts, s.flag)]
        generate(pipe, seed=5)
        assert before == [b.tensor.data_ptr() for s in cache.states.values() for b in (*s.images, *s.texts, s.flag)]
