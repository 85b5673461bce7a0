"""Search and cached generation on one of diffusers' own pipelines, with tiny random components."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import layercache
from layercache.fitting import Forecast
from layercache.rehearsal import Rehearsal, psnr_of, skipping
from tiny import randomise

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


def test_rehearsed_schedules_give_the_same_in_the_pipeline(pipe, samples):
    rehearsal = Rehearsal(pipe, samples, **CALL)
    for a, b in zip(pictures(pipe, samples), rehearsal.pictures, strict=True):
        np.testing.assert_array_equal(a, b)
    assert rehearsal.is_euler
    take = rehearsal.run(skipping(rehearsal.fingerprint, [0, 1, 3, 5]), Forecast(terms=2))
    for a, psnr, full in zip(pictures(pipe, samples, take.schedule), take.psnr, rehearsal.pictures, strict=True):
        assert psnr_of(full, a) == pytest.approx([psnr], rel=1e-6)


def test_search_from_calibration_to_picture(pipe, samples):
    profile = layercache.calibrate(pipe, samples, progress=False, max_distance=4, max_span=4, **CALL)
    assert profile.samples[0] == "seed 0: prompt_embeds, pooled_prompt_embeds"
    front = layercache.search(pipe, samples, profiles=profile, budgets=(0.67,), trials=2, progress=False, **CALL)
    schedule = layercache.plan(front, 0.67)
    full, cached = pictures(pipe, samples), pictures(pipe, samples, schedule)
    psnr = [value for a, b in zip(full, cached, strict=True) for value in psnr_of(a, b)]
    assert psnr == pytest.approx(front.choose(0.67).psnr, rel=1e-6)
