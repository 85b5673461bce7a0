"""The cache on a real (tiny, untrained) Qwen-Image transformer: exactness, isolation, restoration."""

import contextlib
import itertools
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from torch import nn

import layercache
from layercache.errors import (
    CacheStateError,
    MethodError,
    NonFiniteResidualError,
    NonFiniteWarning,
    ScheduleMismatchError,
    UnsupportedModelError,
)
from layercache.methods.fbcache import FBCache
from layercache.models.spec import ModelSpec
from layercache.planning.front import Front
from layercache.planning.profile import StabilityProfile
from layercache.runtime.attachment import attachment_of
from layercache.schedule.schedule import Schedule
from support.tiny import (
    GROUPS,
    PROMPTS,
    SlopeTransformer,
    fingerprint,
    generate,
    mixed_cells,
    randomise,
    schedule_for,
    shifted_sigmas,
    tiny_pipeline,
)

STEPS = 8


@pytest.fixture
def pipe():
    return tiny_pipeline()


def traces(root: nn.Module, pipe=None) -> list:
    """Everything about a model that a cache could leave changed."""
    found = []
    for name, module in root.named_modules():
        hooks = [
            len(getattr(module, a)) for a in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
        ]
        found.append((name, type(module), sorted(module.__dict__), hooks, id(type(module).forward)))
    if pipe is not None:
        found.append((sorted(pipe.__dict__), type(pipe), type(pipe).__call__))
    return found


def test_computing_everything_changes_no_bit(pipe):
    full = generate(pipe)
    # diffusers itself leaves a hook registry behind at the first cache_context
    before = traces(pipe.transformer, pipe)
    everything = Schedule.compute_all(fingerprint(pipe.transformer, shifted_sigmas(STEPS)), GROUPS)
    with layercache.enabled(pipe, everything) as cache:
        assert torch.equal(generate(pipe), full)
    assert cache.report().used == 1.0
    assert cache.report().cached_cells == 0
    assert torch.equal(generate(pipe), full)
    assert traces(pipe.transformer, pipe) == before


def test_disable_restores_exactly(pipe):
    full = generate(pipe)
    before = traces(pipe.transformer, pipe)
    state = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    schedule = schedule_for(pipe, mixed_cells())
    layercache.enable(pipe, schedule)
    assert list(pipe.transformer.state_dict()) == list(state)
    assert len(pipe.transformer.transformer_blocks) == 6
    assert [type(b) for b in pipe.transformer.transformer_blocks] == [type(pipe.transformer.transformer_blocks[0])] * 6
    cached = generate(pipe)
    layercache.disable(pipe)
    assert not torch.equal(cached, full)
    assert torch.equal(generate(pipe), full)
    assert traces(pipe.transformer, pipe) == before
    for key, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, state[key])


SETS = [c for n in range(1, 4) for c in itertools.combinations(range(3), n)]


@pytest.mark.parametrize("control", [False, True], ids=["plain", "controlnet"])
@pytest.mark.parametrize("cached", SETS, ids=str)
def test_same_input_as_the_anchor_gives_the_uncached_output(pipe, cached, control):
    """Every prefix, suffix and middle set of groups; with external residuals added between the blocks."""
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 64, 48),
        "encoder_hidden_states": torch.randn(2, 4, 64),
        "timestep": torch.full((2,), 0.6),
        "img_shapes": [(1, 8, 8)] * 2,
        "return_dict": False,
    }
    if control:
        inputs["controlnet_block_samples"] = [torch.randn(2, 64, 56) for _ in range(6)]
    row = tuple({0: 1.0} if group in cached else None for group in range(3))
    schedule = Schedule(fingerprint(pipe.transformer, (0.6, 0.6, 0.0)), GROUPS, ((None,) * 3, row), (1.0,) * 3)
    with torch.no_grad():
        expected = pipe.transformer(**inputs)[0]
        with layercache.enabled(pipe.transformer, schedule) as cache:
            for step in range(2):
                with cache.step(step, branch="cond"):
                    output = pipe.transformer(**inputs)[0]
                torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert cache.report().cached_cells == len(cached)


def test_same_input_keeps_the_text_stream(pipe):
    """The text stream that reaches a computed group behind a cached one, seen directly."""
    seen = []
    block = pipe.transformer.transformer_blocks[4]
    block.register_forward_pre_hook(lambda m, a, k: seen.append(k["encoder_hidden_states"].clone()), with_kwargs=True)
    inputs = {
        "hidden_states": torch.randn(1, 64, 48),
        "encoder_hidden_states": torch.randn(1, 4, 64),
        "timestep": torch.full((1,), 0.6),
        "img_shapes": [(1, 8, 8)],
    }
    cells = ((None,) * 3, ({0: 1.0}, {0: 1.0}, None))
    schedule = Schedule(fingerprint(pipe.transformer, (0.6, 0.6, 0.0)), GROUPS, cells, (1.0,) * 3)
    with torch.no_grad(), layercache.enabled(pipe.transformer, schedule):
        for step in range(2):
            with pipe.transformer.cache_context("cond", step_index=step):
                pipe.transformer(**inputs)
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=1e-5)


layercache.register_model(ModelSpec("SlopeTransformer", timestep="timestep"))


@pytest.mark.parametrize("seed", range(10))
def test_extrapolation_is_exact_for_residuals_linear_in_sigma(seed):
    """Any spacing of sigma, through the planner's own coefficients and the whole runtime."""
    from layercache.schedule.forecast import secant_coefficients

    torch.manual_seed(seed)
    # gaps within a factor of three of each other keep the extrapolation factor below its limit
    gaps = torch.rand(5, dtype=torch.float64) * 2 + 1
    levels = torch.flip(torch.cumsum(gaps, 0), [0]) / gaps.sum()
    sigmas = (*levels.tolist(), 0.0)
    model = SlopeTransformer()
    rows = [(None,) * 3, (None,) * 3]
    for step in (2, 3, 4):
        rows.append((secant_coefficients(sigmas, step, 1, 0),) * 3 if step != 3 else (None,) * 3)
    rows[4] = (secant_coefficients(sigmas, 4, 3, 1), None, secant_coefficients(sigmas, 4, 3, 0))
    schedule = Schedule(fingerprint(model, sigmas, ("all",)), GROUPS, tuple(rows), (1.0,) * 3)
    image, text = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    with torch.no_grad():
        with layercache.enabled(model, schedule) as cache:
            outputs = [model(image, text, torch.tensor(s)) for s in sigmas[:-1]]
        for sigma, output in zip(sigmas, outputs, strict=False):
            torch.testing.assert_close(output, model(image, text, torch.tensor(sigma)), atol=1e-5, rtol=1e-5)
    assert cache.report().cached_cells == 3 + 2


def test_batch_of_two_equals_two_batches_of_one(pipe):
    with layercache.enabled(pipe, schedule_for(pipe, mixed_cells())):
        both = generate(pipe)
        single = torch.cat([generate(pipe, [name], seed=k) for k, name in enumerate(PROMPTS)])
    torch.testing.assert_close(both, single, atol=1e-5, rtol=1e-5)


def test_branches_never_share_a_residual(pipe):
    """With the unconditional weights of guidance at work, one shared slot would change the result."""
    schedule = schedule_for(pipe, mixed_cells())
    with layercache.enabled(pipe, schedule) as cache:
        combined = generate(pipe, guidance_scale=4.0)
        assert set(cache.states) == {"cond", "uncond"}
        tensors = [b.tensor.data_ptr() for s in cache.states.values() for b in (*s.images, *s.texts)]
        assert len(set(tensors)) == len(tensors)
    expected = reference_generation(pipe, schedule, guidance_scale=4.0)
    torch.testing.assert_close(combined, expected, atol=1e-4, rtol=1e-4)


def reference_generation(pipe, schedule: Schedule, guidance_scale: float) -> torch.Tensor:
    """The cached generation written out: no hooks, a dictionary of residuals per branch."""
    from layercache.demo.model import NULL_CLASS, pack_patches
    from support.tiny import generators

    model, sigmas = pipe.transformer, shifted_sigmas(schedule.num_steps)
    noise = [torch.randn((3, 32, 32), generator=g) for g in generators(len(PROMPTS))]
    x = pack_patches(torch.stack(noise))
    ids = torch.tensor(pipe.class_ids(PROMPTS))
    texts = {"cond": ids, "uncond": torch.full_like(ids, NULL_CLASS)}
    stored: dict = {}
    with torch.no_grad():
        for step, row in enumerate(schedule.cells):
            velocity = {}
            for branch, classes in texts.items():
                sigma = torch.full((len(x),), sigmas[step])
                h = model.img_in(x)
                e = model.txt_in(model.txt_norm(pipe.class_encoder(classes)))
                temb = model.time_text_embed(sigma, h)
                rope = model.pos_embed([(1, 8, 8)] * len(x), max_txt_seq_len=4, device=h.device)
                for group, (lo, hi) in enumerate(schedule.groups):
                    if row[group] is None:
                        h_in, e_in = h, e
                        for block in model.transformer_blocks[lo:hi]:
                            e, h = block(h, e, None, temb, rope)
                        stored[branch, group, step] = (h - h_in, e - e_in)
                    else:
                        for anchor, coefficient in row[group].items():
                            h = h + coefficient * stored[branch, group, anchor][0]
                            e = e + coefficient * stored[branch, group, anchor][1]
                velocity[branch] = model.proj_out(model.norm_out(h, temb))
            v = velocity["uncond"] + guidance_scale * (velocity["cond"] - velocity["uncond"])
            x = x + (sigmas[step + 1] - sigmas[step]) * v
    return x


def test_generations_in_a_row_equal_fresh_ones(pipe):
    schedule = schedule_for(pipe, mixed_cells())
    with layercache.enabled(pipe, schedule):
        first, second = generate(pipe), generate(pipe, seed=7)
    with layercache.enabled(pipe, schedule):
        assert torch.equal(generate(pipe, seed=7), second)
    with layercache.enabled(pipe, schedule) as cache:
        assert torch.equal(generate(pipe), first)
        assert cache.report().fallback_rows == 0


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["between steps", "inside a block"])
@pytest.mark.parametrize("step", range(0, STEPS, 2))
def test_an_exception_leaves_nothing_behind(pipe, where, step):
    schedule = schedule_for(pipe, mixed_cells())
    with layercache.enabled(pipe, schedule):
        fresh = generate(pipe)

    def stop(*args):
        if args[1] == step:
            raise Interrupted
        return {}

    with layercache.enabled(pipe, schedule) as cache:
        if where == "between steps":
            with pytest.raises(Interrupted):
                generate(pipe, seed=3, callback_on_step_end=stop)
        else:
            calls = itertools.count()

            def fail(module, args):
                if next(calls) == step + 1:
                    raise Interrupted

            hook = pipe.transformer.transformer_blocks[4].register_forward_pre_hook(fail)
            with contextlib.suppress(Interrupted):
                generate(pipe, seed=3)
            hook.remove()
        assert torch.equal(generate(pipe), fresh)
        assert cache.report().fallback_rows == 0


def test_another_size_in_between_needs_nothing(pipe):
    schedule = schedule_for(pipe, mixed_cells())
    with layercache.enabled(pipe, schedule):
        fresh = generate(pipe)
        other = [generate(pipe, height=16, width=24), generate(pipe, ["rocket"]), generate(pipe, ["cat"] * 3)]
        assert torch.equal(generate(pipe), fresh)
    with layercache.enabled(pipe, schedule):
        assert torch.equal(generate(pipe, height=16, width=24), other[0])


def test_another_dtype_in_between_needs_nothing(pipe):
    schedule = schedule_for(pipe, mixed_cells())
    with layercache.enabled(pipe, schedule) as cache:
        fresh = generate(pipe)
        pipe.to(torch.bfloat16)
        low = generate(pipe)
        assert low.dtype == torch.bfloat16
        assert {b.tensor.dtype for s in cache.states.values() for b in s.images} == {torch.bfloat16}
        assert torch.isfinite(low).all()
    assert fresh.dtype == torch.float32


def test_a_bare_transformer_is_counted(pipe):
    """Same calls as the pipeline makes, without a scheduler the cache could look at."""
    schedule = schedule_for(pipe, mixed_cells())
    with layercache.enabled(pipe, schedule):
        expected = generate(pipe)
    with layercache.enabled(pipe.transformer, schedule) as cache:
        assert torch.equal(generate(pipe), expected)
        # an interrupted run: the rising timestep tells that a new generation has begun

        def stop(pipeline, step, timestep, tensors):
            if step == 3:
                raise Interrupted
            return {}

        with pytest.raises(Interrupted):
            generate(pipe, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), expected)
    assert cache.report().generations == 3


def test_calls_without_a_context_are_told_apart(pipe, monkeypatch):
    """A pipeline that sets no cache context calls twice per step."""
    schedule = schedule_for(pipe, mixed_cells())
    with layercache.enabled(pipe, schedule):
        expected = generate(pipe)
    monkeypatch.setattr(type(pipe.transformer), "cache_context", lambda self, name: contextlib.nullcontext())
    with layercache.enabled(pipe, schedule) as cache:
        # the instance attribute that watches contexts is bypassed as well
        del pipe.transformer.__dict__["cache_context"]
        assert torch.equal(generate(pipe), expected)
        assert cache.report().branches == ("call 0", "call 1")
        assert torch.equal(generate(pipe), expected)


def test_without_guidance_one_branch(pipe):
    with layercache.enabled(pipe, schedule_for(pipe, mixed_cells())) as cache:
        generate(pipe, guidance_scale=1.0)
        assert cache.report().branches == ("cond",)
        assert cache.report().forwards == STEPS


def test_another_schedule_is_refused_before_any_compute(pipe):
    schedule = schedule_for(pipe, mixed_cells())
    calls = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda m, a: calls.append(1))
    with layercache.enabled(pipe, schedule) as cache:
        with pytest.raises(ScheduleMismatchError, match="8 steps, this run has 5"):
            generate(pipe, steps=5)
        with pytest.raises(ScheduleMismatchError, match="sigma"):
            generate(pipe, sigmas=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
        assert calls == []
        generate(pipe)
        assert cache.report().fallback_rows == 0
    other = tiny_pipeline(layers=4)
    with pytest.raises(ScheduleMismatchError, match="6 blocks"):
        layercache.enable(other, schedule)


def test_a_bare_transformer_at_a_wrong_timestep_is_refused(pipe):
    with layercache.enabled(pipe.transformer, schedule_for(pipe, mixed_cells())):
        with pytest.raises(ScheduleMismatchError, match="timestep"):
            generate(pipe, steps=20)


def test_wrong_use(pipe):
    schedule = schedule_for(pipe, mixed_cells())
    with pytest.raises(CacheStateError, match="no layercache cache"):
        layercache.disable(pipe)
    with layercache.enabled(pipe, schedule):
        with pytest.raises(CacheStateError, match="already enabled"):
            layercache.enable(pipe, schedule)
        with pytest.raises(CacheStateError, match="already enabled"):
            layercache.enable(pipe.transformer, schedule)
        with pytest.raises(CacheStateError, match="no_grad"):
            pipe.transformer(
                hidden_states=torch.randn(1, 64, 48),
                encoder_hidden_states=torch.randn(1, 4, 64),
                timestep=torch.ones(1),
                img_shapes=[(1, 8, 8)],
            )
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(CacheStateError, match="disable_cache"):
        layercache.enable(pipe, schedule)
    pipe.transformer.disable_cache()
    with pytest.raises(UnsupportedModelError, match="register_model"):
        layercache.enable(nn.Linear(2, 2), schedule)
    with pytest.raises(UnsupportedModelError, match="pipeline"):
        layercache.enable("a string", schedule)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_residual_is_reported_when_the_generation_ends(pipe, value):
    """Step 1 stores a residual with one bad element; the steps before and after are fine."""
    schedule = schedule_for(pipe, mixed_cells())
    armed = True

    def spoil(module, args, output):
        if armed and abs(float(cache.identity.generation.step) - 1) < 0.5:
            text, image = output
            image = image.clone()
            image[0, 3, 5] = value
            return text, image
        return output

    pipe.transformer.transformer_blocks[1].register_forward_hook(spoil)
    with layercache.enabled(pipe, schedule) as cache:
        with pytest.warns(NonFiniteWarning, match=r"NaN or infinity in sample 0 of the batch"):
            assert len(generate(pipe, output_type="pil")) == len(PROMPTS)
        with pytest.raises(NonFiniteResidualError, match="NaN or infinity") as caught:
            cache.check()
        assert caught.value.samples == (0,)
        cache.check()  # told once
        armed = False
        assert torch.isfinite(generate(pipe)).all()
    armed = True
    with pytest.raises(NonFiniteResidualError), layercache.enabled(pipe.transformer, schedule) as cache:
        generate(pipe)


def test_a_run_that_starts_in_the_middle_computes(pipe):
    """Image-to-image starts at a later step: rows whose anchors are missing are computed."""
    schedule = schedule_for(pipe, mixed_cells())
    pipe.scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)])
    pipe.scheduler.set_begin_index(2)
    inputs = {
        "hidden_states": torch.randn(1, 64, 48),
        "encoder_hidden_states": torch.randn(1, 4, 64),
        "img_shapes": [(1, 8, 8)],
        "return_dict": False,
    }

    def loop():
        pipe.scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)])
        pipe.scheduler.set_begin_index(2)
        outputs = []
        for t in pipe.scheduler.timesteps[2:4]:
            with pipe.transformer.cache_context("cond"):
                outputs.append(pipe.transformer(timestep=t.expand(1) / 1000, **inputs)[0])
            pipe.scheduler.step(outputs[-1], t, inputs["hidden_states"])
        return outputs

    with torch.no_grad():
        expected = loop()
        with layercache.enabled(pipe, schedule) as cache:
            for got, want in zip(loop(), expected, strict=True):
                assert torch.equal(got, want)
    assert cache.report().fallback_rows == 2


def test_flux_with_two_block_lists():
    """Double and single blocks; a group may end at the transition, a run may cross it."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=8,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    randomise(model)
    inputs = {
        "hidden_states": torch.randn(1, 16, 8),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "pooled_projections": torch.randn(1, 12),
        "timestep": torch.full((1,), 0.6),
        "img_ids": torch.rand(16, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": None,
        "return_dict": False,
    }
    samples = [torch.randn(1, 16, 32) for _ in range(2)]
    with torch.no_grad():
        for control in ({}, {"controlnet_block_samples": samples, "controlnet_single_block_samples": samples}):
            expected = model(**inputs, **control)[0]
            for cached in SETS:
                row = tuple({0: 1.0} if group in cached else None for group in range(3))
                prints = fingerprint(model, (0.6, 0.6, 0.0), ("all",))
                schedule = Schedule(prints, GROUPS, ((None,) * 3, row), (1.0,) * 3)
                with layercache.enabled(model, schedule):
                    for _ in range(2):
                        with model.cache_context("all"):
                            output = model(**inputs, **control)[0]
                        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_a_group_may_cross_the_block_lists():
    layercache.register_model(ModelSpec("TwoLists", block_lists=("first_blocks", "second_blocks"), timestep="timestep"))

    class TwoLists(nn.Module):
        def __init__(self):
            super().__init__()
            blocks = SlopeTransformer().transformer_blocks
            self.first_blocks, self.second_blocks = nn.ModuleList(blocks[:2]), nn.ModuleList(blocks[2:])

        def forward(self, image, text, timestep):
            for blocks in (self.first_blocks, self.second_blocks):
                for block in blocks:
                    text, image = block(image, text, timestep)
            return image

    model, image, text = TwoLists(), torch.randn(1, 5, 16), torch.randn(1, 3, 16)
    prints = fingerprint(model, (0.6, 0.6, 0.6, 0.0), ("all",))
    whole = Schedule(prints, ((0, 6),), ((None,), ({0: 1.0},), (None,)), (1.0,))
    with torch.no_grad():
        expected = model(image, text, torch.tensor(0.6))
        with layercache.enabled(model, whole):
            for _ in range(3):
                torch.testing.assert_close(model(image, text, torch.tensor(0.6)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "plan, message",
    [
        ("schedule.json", "Schedule.load"),
        (Path("schedule.json"), "Schedule.load"),
        (object.__new__(StabilityProfile), "plan with it first"),
        (object.__new__(Front), "plan with it first"),
        (FBCache, "give an instance: FBCache()"),
        (7, "see layercache.plan"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_way_to_one(pipe, plan, message):
    with pytest.raises(MethodError, match=message):
        layercache.enable(pipe, plan)
    assert attachment_of(pipe.transformer) is None


def test_a_method_that_decides_has_nothing_to_export_before_it_ran(pipe):
    with layercache.enabled(pipe, FBCache()) as cache:
        with pytest.raises(CacheStateError, match="nothing has run yet"):
            cache.export_schedule()
