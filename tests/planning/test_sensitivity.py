"""What a group's error does to the velocity: against the substitution done by hand with plain hooks."""

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import CalibrationError
from layercache.planning.plan import weighted_errors
from layercache.planning.profile import StabilityProfile
from support.tiny import GROUPS, generators, shifted_sigmas, tiny_pipeline

STEPS = 5
CALL = {"num_inference_steps": STEPS, "progress": False, "max_distance": 3, "max_span": 2}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def profile(pipe):
    return layercache.calibrate(pipe, ["cat"], seeds=[4], sensitivity="substitution", guidance_scale=1.0, **CALL)


def by_hand(pipe):
    """Relative change of the velocity with group g replaced by its residual of the step before, ``[N, G]``."""
    transformer, blocks = pipe.transformer, pipe.transformer.transformer_blocks
    calls, older = [], {}
    handle = transformer.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    pipe(["cat"], num_inference_steps=STEPS, generator=generators(1, 4), output_type="latent", guidance_scale=1.0)
    handle.remove()
    table = np.zeros((STEPS, len(GROUPS)))
    for step, call in enumerate(calls):
        seen, hooks = {}, []

        def look(module, args, kwargs, output, seen=seen):
            seen[module] = (kwargs, output)

        hooks = [block.register_forward_hook(look, with_kwargs=True) for block in blocks]
        with torch.no_grad():
            velocity = transformer(**call)[0]
        for hook in hooks:
            hook.remove()
        residuals = []
        for lo, hi in GROUPS:
            start, (text, image) = seen[blocks[lo]][0], seen[blocks[hi - 1]][1]
            residuals.append((text - start["encoder_hidden_states"], image - start["hidden_states"]))
        for group, (lo, hi) in enumerate(GROUPS):
            if step == 0:
                continue
            start = seen[blocks[lo]][0]
            put = (
                start["encoder_hidden_states"] + older[group][0],
                start["hidden_states"] + older[group][1],
            )
            hook = blocks[hi - 1].register_forward_hook(lambda *_, put=put: put)
            with torch.no_grad():
                changed = transformer(**call)[0]
            hook.remove()
            table[step, group] = (changed - velocity).abs().sum() / velocity.abs().sum()
        older = dict(enumerate(residuals))
    return table


def test_response_against_hooks(pipe, profile):
    np.testing.assert_allclose(profile.tables["velocity_response"][0, 0], by_hand(pipe), rtol=1e-3)


def test_weights_are_response_per_error(profile):
    tables = profile.tables
    error = (tables["image_error_l1"][..., 1, 0] / tables["image_norm_l1"])[:, :, 1:]
    np.testing.assert_allclose(tables["substitute_error"][:, :, 1:], error, rtol=1e-4)
    weights = profile.sensitivity()
    np.testing.assert_allclose(
        weights[1:], (tables["velocity_response"][:, :, 1:] / error).mean(axis=(0, 1)), rtol=1e-4
    )
    assert (weights[0] == 1).all()


def test_everything_else_is_as_without(pipe, profile):
    plain = layercache.calibrate(pipe, ["cat"], seeds=[4], guidance_scale=1.0, **CALL)
    assert not plain.has_sensitivity
    for name, table in plain.tables.items():
        np.testing.assert_array_equal(table, profile.tables[name])
    with pytest.raises(CalibrationError, match="sensitivity="):
        plain.sensitivity()
    with pytest.raises(CalibrationError, match="sensitivity="):
        layercache.plan(plain, 0.7, sensitivity=True)


def test_the_planner_weighs_by_it(profile):
    sizes = np.abs(np.diff(np.asarray(shifted_sigmas(STEPS))))[:, None, None, None]
    errors = profile.relative_errors()
    expected = sizes * profile.sensitivity()[:, :, None, None] * errors
    np.testing.assert_allclose(weighted_errors(profile, 1.0, 0.0, 0.1, sensitivity=True), expected, rtol=1e-6)
    settings = {"protect_first": 1, "protect_last": 0}
    assert layercache.plan(profile, 0.7, **settings).made_by["sensitivity"] is True
    assert layercache.plan(profile, 0.7, sensitivity=False, **settings).made_by["sensitivity"] is False


def test_file_keeps_it(profile, tmp_path):
    loaded = StabilityProfile.load(profile.save(tmp_path / "p.safetensors"))
    np.testing.assert_array_equal(loaded.sensitivity(), profile.sensitivity())


def test_guided_batches_have_a_table_per_branch(pipe):
    profile = layercache.calibrate(pipe, [["cat", "grass"]], sensitivity="substitution", guidance_scale=3.0, **CALL)
    assert profile.tables["velocity_response"].shape == (1, 2, STEPS, len(GROUPS))
    assert (profile.tables["velocity_response"][:, :, 1:] > 0).all()


def test_random_directions(pipe):
    """Noise of a hundredth: in the last group, whose error meets the head alone, the response is linear in it."""
    options = {"sensitivity": "random", "guidance_scale": 1.0, **CALL}
    profile = layercache.calibrate(pipe, ["cat"], seeds=[4], **options)
    error = profile.tables["substitute_error"][:, :, 1:]
    # the mean of |noise| is 0.8 of its root mean square
    assert ((error > 0.004) & (error < 0.02)).all()
    weights = profile.sensitivity()
    assert (weights > 0).all()
    again = layercache.calibrate(pipe, ["cat"], seeds=[4], **options)
    np.testing.assert_array_equal(again.sensitivity(), weights)
    with pytest.raises(CalibrationError, match="unknown sensitivity"):
        layercache.calibrate(pipe, ["cat"], sensitivity="guess", **CALL)
