"""Search and cached generation on one of diffusers' own pipelines, with tiny random components."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import layercache
from layercache import ops
from layercache.methods import invardiff, l2c
from layercache.methods.dicache import DiCache
from layercache.methods.easycache import EasyCache
from layercache.methods.fbcache import DBCache, FBCache
from layercache.methods.invardiff import InvarDiff
from layercache.methods.teacache import SpectralCache, TeaCache
from layercache.models.registry import spec_for
from layercache.planning.fit import Forecast
from layercache.planning.rollout import Rollouts, psnr_of, skipping
from support.tiny import randomise

CALL = {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    randomise(transformer)
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.1,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "prompt_embeds": torch.randn(1, 7, 32, generator=generator),
            "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
        }
        for _ in range(3)
    ]


def pictures(pipe, samples, schedule=None):
    found = []
    for seed, sample in enumerate(samples):
        call = {**CALL, **sample, "generator": torch.Generator().manual_seed(seed), "output_type": "np"}
        if schedule is None:
            found.append(pipe(**call).images)
        else:
            with layercache.enabled(pipe, schedule):
                found.append(pipe(**call).images)
    return found


def test_schedules_of_rollouts_give_the_same_in_the_pipeline(pipe, samples):
    rollouts = Rollouts(pipe, samples, **CALL)
    for a, b in zip(pictures(pipe, samples), rollouts.pictures, strict=True):
        np.testing.assert_array_equal(a, b)
    assert rollouts.samplers is not None
    rollout = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 3, 5]), Forecast(terms=2))
    for a, psnr, full in zip(pictures(pipe, samples, rollout.schedule), rollout.psnr, rollouts.pictures, strict=True):
        assert psnr_of(full, a) == pytest.approx([psnr], rel=1e-6)


@pytest.mark.slow
def test_search_from_calibration_to_picture(pipe, samples):
    front = layercache.search(pipe, samples, budgets=(0.67,), effort="quick", progress=False, **CALL)
    schedule = layercache.plan(front, 0.67)
    full, cached = pictures(pipe, samples), pictures(pipe, samples, schedule)
    psnr = [value for a, b in zip(full, cached, strict=True) for value in psnr_of(a, b)]
    assert psnr == pytest.approx(front.choose(0.67).psnr, rel=1e-6)


DYNAMIC = [
    FBCache(threshold=1.0, warmup=2),
    DBCache(front=2, back=1, warmup=2, threshold=1.0),
    TeaCache(threshold=5.0),  # FLUX has published coefficients
    SpectralCache(threshold=20.0),
    DiCache(threshold=5.0, retention=0.0),
    EasyCache(threshold=5.0, warmup=2),
]


@pytest.mark.parametrize("method", DYNAMIC, ids=lambda m: m.name)
def test_dynamic_methods_across_both_block_lists(pipe, samples, method):
    full = pictures(pipe, samples[:1])
    with layercache.enabled(pipe, method) as cache:
        call = {**CALL, **samples[0], "generator": torch.Generator().manual_seed(0), "output_type": "np"}
        cached = pipe(**call).images
    (decisions,) = set(cache.decisions.values())
    assert set(decisions) == {True, False} and not np.array_equal(cached, full[0])
    np.testing.assert_array_equal(pictures(pipe, samples[:1], cache.export_schedule())[0], cached)


def test_the_modulated_input_is_the_blocks_own(pipe, samples):
    """What TeaCache watches, against what the first block's own norm makes."""
    block, seen, ours = pipe.transformer.transformer_blocks[0], [], []
    modulation = spec_for(pipe.transformer).modulation
    hooks = [
        block.norm1.register_forward_hook(lambda m, a, out: seen.append(out[0])),
        block.register_forward_pre_hook(
            lambda m, a, k: ours.append((k["hidden_states"], modulation(m, k))), with_kwargs=True
        ),
    ]
    pipe(**CALL, **samples[0], generator=torch.Generator().manual_seed(0), output_type="latent")
    for hook in hooks:
        hook.remove()
    (hidden, (scale, shift, eps)), expected = ours[0], seen[0]
    found, _ = ops.modulate(hidden, scale, shift, eps=eps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_modules_of_both_kinds_of_blocks(pipe, samples):
    schedule = invardiff.InvarDiff(0.4, 0.6, 0.0).schedule(pipe, samples[:2], **CALL)
    kinds = {name.split(".", 2)[2] for name in schedule.units}
    assert kinds == {"attn", "ff", "ff_context", "proj_mlp+act_mlp"}
    named = InvarDiff(**invardiff.PROFILES["flux-slow"])
    assert named.quantile_of("single_transformer_blocks.attn") == 0.68
    assert named.quantile_of("single_transformer_blocks.proj_mlp+act_mlp") == 0.62
    calls = []
    module = pipe.transformer.single_transformer_blocks[0].proj_mlp
    original = module.forward
    module.forward = lambda *a, **k: calls.append(1) or original(*a, **k)
    try:
        pictures(pipe, samples[:1], schedule)
        assert module.forward.__name__ == "<lambda>"
    finally:
        del module.forward
    unit = schedule.units.index("single_transformer_blocks.0.proj_mlp+act_mlp")
    ran = [row[unit] for step, row in enumerate(schedule.computed) if step not in schedule.reused_steps]
    assert len(calls) == sum(ran)


def test_a_router_is_trained_on_a_real_pipeline(pipe, samples):
    settings = l2c.LearningToCache(rounds=1)
    router = settings.train(pipe, samples[:1], progress=False, output_type="latent", **CALL)
    assert router.theta.shape == (3, 2 * 3 + 2 * 2) and np.isfinite(router.losses).all()
    assert np.isfinite(pictures(pipe, samples[:1], router.schedule(0.5))[0]).all()
