"""Schedules of single modules, InvarDiff's rates and plan, Learning-to-Cache's router."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import layercache
from layercache.errors import (
    CacheStateError,
    CalibrationError,
    FileFormatError,
    MethodError,
    NonFiniteResidualError,
    NonFiniteWarning,
    ScheduleError,
    ScheduleMismatchError,
    UnsupportedModelError,
)
from layercache.methods import invardiff, l2c
from layercache.models.registry import fingerprint_of, spec_for
from layercache.runtime.attachment import attachment_of
from layercache.runtime.modules import as_rows, copy_of, module_units
from layercache.schedule.module_schedule import ModuleSchedule, reusing
from layercache.tools.cli.app import app
from layercache.tools.report.tables import module_sentences, module_table
from support.marks import slow
from support.text import plain_text
from support.tiny import LAYERS, generate, generators, shifted_sigmas, tiny_pipeline
from support.zoo import build
from support.zoo_pipelines import PIPELINES

STEPS = 8
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
KINDS = ("attn", "img_mlp", "txt_mlp")
UNITS = [f"transformer_blocks.{k}.{kind}" for k in range(LAYERS) for kind in KINDS]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def prints(pipe, steps=STEPS):
    return fingerprint_of(pipe.transformer, shifted_sigmas(steps), ("cond", "uncond"))


def mixed(pipe, seed=0, steps=STEPS):
    """A random schedule with runs of reused outputs, and two reused steps."""
    rng = np.random.default_rng(seed)
    computed = rng.random((steps, len(UNITS))) < 0.6
    computed[0] = True
    computed[4] = computed[5] = False
    rows = tuple(tuple(bool(c) for c in row) for row in computed)
    return ModuleSchedule(prints(pipe, steps), tuple(UNITS), rows, frozenset({4, 5}))


def patched(pipe, schedule, **call):
    """The same run by hand: every module's forward replaced, outputs kept in a dictionary, blocks left out."""
    model = pipe.transformer
    kept, finals, originals, place = {}, {}, [], {"calls": 0}

    def key():
        return "cond" if place["calls"] % 2 == 0 else "uncond"

    def step():
        return place["calls"] // 2

    for number, name in enumerate(UNITS):
        module = model.get_submodule(name)
        original = module.forward

        def forward(*args, number=number, original=original, **kwargs):
            if not schedule.computed[step()][number]:
                return kept[key(), number]
            kept[key(), number] = original(*args, **kwargs)
            return kept[key(), number]

        originals.append((module, original))
        module.forward = forward
    blocks = list(model.transformer_blocks)
    for number, block in enumerate(blocks):
        original = block.forward

        def block_forward(*args, number=number, original=original, **kwargs):
            if step() in schedule.reused_steps:
                image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
                return text, finals[key()] if number == LAYERS - 1 else image
            text, image = original(*args, **kwargs)
            if number == LAYERS - 1:
                finals[key()] = image
            return text, image

        originals.append((block, original))
        block.forward = block_forward
    count = model.register_forward_hook(lambda *_: place.__setitem__("calls", place["calls"] + 1))
    try:
        return generate(pipe, **call)
    finally:
        count.remove()
        for module, _ in originals:
            del module.forward


@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
def test_a_module_schedule_runs_like_modules_patched_by_hand(pipe, seed):
    schedule = mixed(pipe, seed)
    expected = patched(pipe, schedule)
    full = generate(pipe)
    with layercache.enabled(pipe, schedule) as cache:
        assert torch.equal(generate(pipe), expected)
        assert torch.equal(generate(pipe), expected)
        report = cache.report()
    assert report.used == pytest.approx(schedule.used) and report.generations == 2 and report.cache_bytes > 0
    assert torch.equal(generate(pipe), full) and not torch.equal(expected, full)
    assert all("forward" not in pipe.transformer.get_submodule(name).__dict__ for name in UNITS)


def test_a_run_that_begins_in_the_middle_computes_everything(pipe):
    schedule = mixed(pipe)
    with layercache.enabled(pipe, schedule) as cache:
        generate(pipe)
        single = generate(pipe, prompts=["rocket"], seed=7)
    with layercache.enabled(pipe, schedule):
        assert torch.equal(generate(pipe, prompts=["rocket"], seed=7), single)
    assert cache.report().fallback_rows == 0
    with layercache.enabled(pipe.transformer, schedule, pipe.scheduler) as cache, torch.no_grad():
        pipe.scheduler.set_begin_index(3)
        try:
            pipe.scheduler.set_timesteps(STEPS)
        finally:
            pipe.scheduler._begin_index = None


def test_other_models_and_steps_are_refused(pipe):
    schedule = mixed(pipe)
    with layercache.enabled(pipe, schedule), pytest.raises(ScheduleMismatchError, match="steps"):
        generate(pipe, steps=STEPS + 1)
    other = tiny_pipeline(layers=LAYERS - 1)
    with pytest.raises(ScheduleMismatchError, match="blocks"):
        layercache.enable(other, schedule)
    renamed = replace(schedule, units=("x", *schedule.units[1:]))
    with pytest.raises(ScheduleMismatchError, match="other modules"):
        layercache.enable(pipe, renamed)
    with pytest.raises(UnsupportedModelError, match=r"ModelSpec\.modules"):
        module_units(pipe.transformer, layercache.ModelSpec("Other"))
    assert attachment_of(pipe.transformer) is None


def test_compiled_transformers_are_refused(pipe):
    import copy

    whole = copy.copy(pipe)
    whole.__dict__["transformer"] = torch.compile(pipe.transformer, backend="eager")
    with layercache.enabled(whole, mixed(pipe)), pytest.raises(CacheStateError, match="uncompiled"):
        generate(whole)


def test_files(pipe, tmp_path):
    schedule = replace(mixed(pipe), seconds=tuple(np.linspace(0.1, 1, len(UNITS)).tolist()), made_by={"method": "x"})
    path = schedule.save(tmp_path / "m.json")
    assert ModuleSchedule.load(path) == schedule
    assert 0 < schedule.used < 1
    path.write_text(path.read_text()[:-30])
    with pytest.raises(FileFormatError, match="cut off"):
        ModuleSchedule.load(path)
    with pytest.raises(FileFormatError, match="does not exist"):
        ModuleSchedule.load(tmp_path / "none.json")
    damaged = json.loads(schedule.to_json()) | {"steps": ["2"] * STEPS}
    del damaged["checksum"]
    with pytest.raises(FileFormatError, match="damaged"):
        ModuleSchedule.from_json(json.dumps(damaged))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"computed": ((False,) * len(UNITS),) * STEPS}, "step 0"),
        ({"reused_steps": frozenset({0})}, "step 0"),
        ({"reused_steps": frozenset({STEPS})}, "within"),
        ({"computed": ((True,),) * STEPS}, "rows"),
        ({"seconds": (1.0,)}, "seconds"),
    ],
)
def test_contradictions_are_refused(pipe, change, message):
    with pytest.raises(ScheduleError, match=message):
        replace(mixed(pipe), **change)


def test_copies_own_their_memory():
    a = torch.ones(2, 3)
    first = copy_of((a, a * 2))
    second = copy_of((a * 3, a * 4), first)
    assert second[0].data_ptr() == first[0].data_ptr() and torch.equal(second[1], a * 4)
    assert copy_of(torch.ones(5), first[0]).shape == (5,)
    assert copy_of(None) is None


def test_nan_is_reported(pipe):
    bias = pipe.transformer.transformer_blocks[LAYERS - 1].img_mlp.net[2].bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[0] = float("nan")
    try:
        with layercache.enabled(pipe, mixed(pipe)) as cache:
            with pytest.warns(NonFiniteWarning, match="stored output"):
                generate(pipe)
            with pytest.raises(NonFiniteResidualError):
                cache.check()
    finally:
        with torch.no_grad():
            bias.copy_(kept)


def test_outputs_of_convolutions_as_rows():
    picture = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert torch.equal(as_rows(picture), picture.reshape(2, 3, 20)) and as_rows(picture).is_contiguous()
    tokens = torch.randn(2, 6, 3)[:, 1:]
    assert as_rows(tokens) is tokens


# --- InvarDiff -----------------------------------------------------------------------------------------------


def recorded(pipe, prompts, seeds):
    """Outputs on full runs by plain hooks: ``[run][branch][unit or 'final'] -> list over steps``."""
    runs = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        seen = {"cond": {}, "uncond": {}}
        calls = [0]
        hooks = [pipe.transformer.register_forward_hook(lambda *_, c=calls: c.__setitem__(0, c[0] + 1))]

        def note(name, value, seen=seen, calls=calls):
            parts = value if isinstance(value, tuple) else (value,)
            flat = np.concatenate([t.double().numpy().ravel() for t in parts])
            seen["cond" if calls[0] % 2 == 0 else "uncond"].setdefault(name, []).append(flat)

        for name in UNITS:
            module = pipe.transformer.get_submodule(name)
            hooks.append(module.register_forward_hook(lambda m, a, out, name=name, note=note: note(name, out)))
        hooks.append(pipe.transformer.norm_out.register_forward_pre_hook(lambda m, a, note=note: note("final", a[0])))
        pipe(prompt, generator=generators(1, seed)[0], **CALL)
        for hook in hooks:
            hook.remove()
        runs.append(seen)
    return runs


def rates_literal(z, cached=None):
    """InvarDiff's two phases on one list of outputs."""
    s1 = lambda x: np.abs(x + 1e-8).sum()  # noqa: E731
    rho = np.ones(STEPS)
    reference, norm, flag = z[0], None, False
    for k in range(1, STEPS):
        moved = s1(z[k] - reference)
        if k == 1:
            norm, reference = moved, z[1]
            continue
        rho[k - 1] = moved / norm
        if cached is None or not cached[k - 1]:
            norm, reference, flag = moved, z[k], False
        elif not flag:
            norm, reference, flag = moved, z[k], True
    rho[0] = rho[-1] = 1.0
    return rho


@pytest.fixture(scope="module")
def runs(pipe):
    return recorded(pipe, ["cat", "rocket"], [3, 9])


def mean_rates(runs, name, cached=None):
    return np.mean([rates_literal(run[branch][name], cached) for run in runs for branch in run], axis=0)


def test_rates(pipe, runs):
    found = invardiff.measure(pipe, ["cat", "rocket"], [3, 9], **CALL)
    assert found.units == tuple(UNITS) and set(found.kinds) == {f"transformer_blocks.{k}" for k in KINDS}
    np.testing.assert_allclose(found.steps, mean_rates(runs, "final"), rtol=1e-4)
    for unit, name in enumerate(UNITS):
        np.testing.assert_allclose(found.modules[:, unit], mean_rates(runs, name), rtol=1e-4)
    assert all(s > 0 for s in found.seconds) and len(found.seconds) == len(UNITS)


def test_the_correction_pass_and_the_plan(pipe, runs):
    settings = invardiff.InvarDiff(step_quantile=0.4, module_quantiles=0.5, nonskip=0.2)

    def threshold(rho, q, first):
        out = rho < np.quantile(rho[1:-1], q)
        out[:first] = False
        out[-1] = False
        return out

    modules = {name: mean_rates(runs, name) for name in UNITS}
    first = {}
    for kind in KINDS:
        own = [name for name in UNITS if name.endswith(kind)]
        pooled = threshold(np.stack([modules[name] for name in own], axis=1), 0.5, 1)
        first |= {name: pooled[:, k] for k, name in enumerate(own)}
    corrected = {name: mean_rates(runs, name, first[name]) for name in UNITS}
    n0 = max(1, int(0.2 * STEPS))
    final = {}
    for kind in KINDS:
        own = [name for name in UNITS if name.endswith(kind)]
        pooled = threshold(np.stack([corrected[name] for name in own], axis=1), 0.5, n0)
        final |= {name: pooled[:, k].copy() for k, name in enumerate(own)}
    steps = threshold(mean_rates(runs, "final"), 0.4, n0)
    for t in range(STEPS):
        if steps[t]:
            for name in UNITS:
                final[name][t] = True
                if t + 1 < STEPS:
                    final[name][t + 1] = False
    schedule = settings.schedule(pipe, ["cat", "rocket"], [3, 9], **CALL)
    assert schedule.reused_steps == frozenset(np.flatnonzero(steps).tolist()) and schedule.reused_steps
    for unit, name in enumerate(UNITS):
        assert [not row[unit] for row in schedule.computed] == final[name].tolist()
    with layercache.enabled(pipe, schedule) as cache:
        assert torch.isfinite(generate(pipe)).all()
    assert cache.report().used == pytest.approx(schedule.used)


def test_quantiles_at_the_ends():
    rho = np.array([1.0, 0.5, 0.4, 0.9, 0.7, 1.0])
    assert not invardiff.below_quantile(rho, 0.0, 1).any()
    assert invardiff.below_quantile(rho, 1.0, 1).tolist() == [False, True, True, False, True, False]
    assert invardiff.below_quantile(rho, 1.0, 2, 3).tolist() == [False, False, True, False, False, False]


def test_invardiff_refuses(pipe):
    for make, message in [
        (lambda: invardiff.InvarDiff(step_quantile=1.5), "step_quantile"),
        (lambda: invardiff.InvarDiff(module_quantiles={"a": -1.0}), "module_quantiles"),
        (lambda: invardiff.InvarDiff(cooldown=0), "cooldown"),
        (lambda: invardiff.InvarDiff.preset("none"), "profile"),
        (lambda: invardiff.InvarDiff.preset("flux-slow").schedule(pipe, ["cat"], **CALL), "no entry"),
        (lambda: invardiff.measure(pipe, [], **CALL), "prompt"),
        (lambda: invardiff.measure(pipe, ["cat"], [1, 2], **CALL), "seed"),
    ]:
        with pytest.raises(MethodError, match=message):
            make()
    assert attachment_of(pipe.transformer) is None


# --- Learning-to-Cache ---------------------------------------------------------------------------------------


SETTINGS = l2c.LearningToCache(rounds=3, learning_rate=0.05, penalty=1e-3, by_cost=False)


@pytest.fixture(scope="module")
def router(pipe):
    return SETTINGS.train(pipe, ["cat", "rocket"], progress=False, **CALL)


@pytest.mark.parametrize(
    "penalty, changes",
    [
        (3e-7, {"shifted": True}),
        (0.0, {"straight_through": 0.5}),
        *slow((0.0, {}), (3e-7, {})),
    ],
    ids=str,
)
def test_the_first_update_follows_the_published_gradient(pipe, penalty, changes):
    """AdamW's first step is the sign of the gradient, which is computed here from its definition."""
    settings = replace(SETTINGS, rounds=1, penalty=penalty, **changes)
    one = settings.train(pipe, ["cat"], progress=False, **CALL)
    shifted = settings.shifted
    start = torch.randn((STEPS - shifted) // 2, len(UNITS), generator=torch.Generator().manual_seed(0))
    assert one.theta.shape == start.shape
    # cond updates first, then uncond: the first change of row 0 has the sign of its gradient
    gradient = first_gradient(pipe, start[0], penalty, 2 if shifted else 0, settings.straight_through)
    moved = one.theta[0] - start[0]
    clear = gradient.abs() > 0.2 * gradient.abs().max()
    assert clear.sum() >= 3
    assert torch.equal(torch.sign(moved[clear]), -torch.sign(gradient[clear]))
    if not changes:
        assert len(set(torch.sign(gradient[clear]).tolist())) == (2 if penalty else 1)
    assert (moved.abs() <= 2 * SETTINGS.learning_rate + 1e-4).all()


def first_gradient(pipe, theta, penalty, recorded=0, threshold=None):
    """d(mean squared error + penalty * sum beta)/d theta of the cond call behind the ``recorded`` one."""
    model, kept, calls, given = pipe.transformer, {}, [0], {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: kept.__setitem__(name, out) if calls[0] == recorded else None
        )
        for name in UNITS
    ]
    hooks.append(
        model.register_forward_pre_hook(
            lambda m, a, k: given.update(k) if calls[0] == recorded + 2 else None, with_kwargs=True
        )
    )
    hooks.append(model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)))
    pipe("cat", generator=generators(1, 0)[0], **CALL)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        teacher = model(**given)[0]

    def loss(values):
        learned = torch.sigmoid(values)
        beta = learned if threshold is None else (learned > threshold).float() + learned - learned.detach()
        originals = {}
        for number, name in enumerate(UNITS):
            module = model.get_submodule(name)
            originals[name] = original = module.forward

            def forward(*args, number=number, name=name, original=original, **kwargs):
                fresh, cached = original(*args, **kwargs), kept[name]
                if isinstance(fresh, tuple):
                    return tuple(beta[number] * f + (1 - beta[number]) * c for f, c in zip(fresh, cached, strict=True))
                return beta[number] * fresh + (1 - beta[number]) * cached

            module.forward = forward
        try:
            student = model(**given)[0]
        finally:
            for name in UNITS:
                del model.get_submodule(name).forward
        return (teacher - student).pow(2).mean() + penalty * learned.sum()

    values = theta.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(values), values)
    return gradient


def test_training_is_repeatable_and_goes_on_from_a_checkpoint(pipe, router, tmp_path):
    path = tmp_path / "router.pt"
    prompts = ["cat", "rocket"]
    replace(SETTINGS, rounds=1).train(pipe, prompts, path, progress=False, **CALL)
    resumed = SETTINGS.train(pipe, prompts, path, progress=False, **CALL)
    assert torch.equal(resumed.theta, router.theta) and resumed.losses == router.losses and len(resumed.losses) == 3
    with pytest.raises(ScheduleMismatchError, match="other settings"):
        SETTINGS.train(pipe, ["coffee"], path, progress=False, **CALL)
    path.write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="remove it"):
        SETTINGS.train(pipe, prompts, path, progress=False, **CALL)


def test_training_leaves_the_model_alone(pipe, router):
    assert all(p.requires_grad and p.grad is None for p in pipe.transformer.parameters())
    assert attachment_of(pipe.transformer) is None
    assert (router.theta.abs() <= l2c.CLAMP).all() and all(np.isfinite(router.losses).ravel())


def test_decisions_follow_the_betas(pipe, router):
    schedule = router.schedule(0.5)
    for step, row in enumerate(schedule.computed):
        expected = (router.beta[step // 2] > 0.5).tolist() if step % 2 else [True] * len(UNITS)
        assert list(row) == expected
    assert router.schedule(0.0).used == 1.0
    least = router.schedule(1.0)
    assert least.used == pytest.approx(0.5)
    kept = router.schedule(budget=0.7)
    assert 0.5 <= kept.used <= 0.7
    with pytest.raises(MethodError, match="cannot be met.* 0.500 at least"):
        router.schedule(budget=0.4)
    with pytest.raises(MethodError, match="not both"):
        router.schedule(0.1, 0.7)
    shuffled = l2c.random_router(router)
    assert [sum(row) for row in shuffled.schedule(0.5).computed] == [sum(row) for row in schedule.computed]
    with layercache.enabled(pipe, schedule):
        assert torch.isfinite(generate(pipe)).all()


@pytest.mark.slow
def test_a_large_penalty_drives_the_betas_down_and_none_up(pipe):
    settings = replace(SETTINGS, rounds=4, learning_rate=0.3)
    dear = replace(settings, penalty=10.0).train(pipe, ["cat"], progress=False, **CALL)
    free = replace(settings, penalty=0.0).train(pipe, ["cat"], progress=False, **CALL)
    assert dear.beta.mean() < 0.4 < free.beta.mean()
    assert free.losses[-1][0] < free.losses[0][0]


def test_schedules_of_what_is_reused(pipe):
    schedule = reusing(prints(pipe, 5), UNITS, {1: [UNITS[0]], 3: UNITS[1:3]})
    assert [row.count(False) for row in schedule.computed] == [0, 1, 0, 2, 0]


def test_bad_settings_are_refused(pipe):
    for rate in (0, -1, float("inf"), float("nan")):
        with pytest.raises(MethodError, match="^learning_rate must be"):
            l2c.LearningToCache(learning_rate=rate)
    with pytest.raises(MethodError, match="^penalty must be"):
        l2c.LearningToCache(penalty=float("inf"))
    with pytest.raises(MethodError, match="at least 3 steps"):
        l2c.LearningToCache(shifted=True).train(pipe, ["cat"], progress=False, **CALL | {"num_inference_steps": 2})
    with pytest.raises(MethodError, match="rounds"):
        l2c.LearningToCache(rounds=0)
    with pytest.raises(MethodError, match="prompt"):
        l2c.LearningToCache().train(pipe, [], progress=False, **CALL)


def test_commands(pipe, tmp_path):
    path, curve = tmp_path / "router.json", tmp_path / "curve.png"
    arguments = ["train-router", "--steps", "4", "--rounds", "1", "--batch", "2", "-p", "cat", "-p", "rocket"]
    result = CliRunner().invoke(app, [*arguments, "--budget", "0.8", "-o", str(path), "--plot", str(curve)])
    assert result.exit_code == 0, result.output
    assert path.with_suffix(".pt").exists() and curve.stat().st_size > 1000 and "of the modules' time" in result.output
    schedule = ModuleSchedule.load(path)
    assert 0.5 <= schedule.used <= 0.8 and schedule.num_steps == 4
    shown = CliRunner().invoke(app, ["show", str(path), "--plot", str(tmp_path / "m.png")])
    assert shown.exit_code == 0, shown.output
    assert "learning-to-cache" in shown.output and "transformer_blocks.attn" in shown.output
    assert (tmp_path / "m.png").stat().st_size > 1000
    drawn = CliRunner().invoke(
        app, ["generate", "-p", "cat", "--schedule", str(path), "-o", str(tmp_path / "p.png"), "--compare"]
    )
    assert drawn.exit_code == 0, drawn.output
    refused = CliRunner().invoke(app, ["plan", str(path), "--budget", "0.5"])
    assert refused.exit_code == 2 and "schedule already" in " ".join(refused.output.replace("│", "").split())


def test_tables_say_what_is_computed(pipe):
    text = plain_text(module_table(mixed(pipe)), 120)
    assert text.count("reuse") == 6 and "6 of 6" in text
    assert "Steps 4, 5" in module_sentences(mixed(pipe))
    part = replace(mixed(pipe), fingerprint=replace(prints(pipe), steps_run=tuple(range(6))))
    assert "8 steps, of which the transformer runs 6 (0-5)" in module_sentences(part)
    assert "ModuleSchedule of 6 steps" in repr(part)
    assert [len(line.split()) for line in plain_text(module_table(part), 120).splitlines()[-2:]] == [2, 2]


# --- what cannot be cached -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [invardiff.measure, l2c.LearningToCache().train], ids=["invardiff", "l2c"])
def test_a_batch_that_changes_while_it_is_measured(measure):
    """Z-Image's guidance ends early, and with it half of the batch."""
    pipe, call = PIPELINES["z-image"]()
    embeds = {name: call.pop(name) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pipe.encode_prompt = lambda *args, **kwargs: tuple(embeds.values())
    steps = call.pop("num_inference_steps")
    with pytest.raises(CalibrationError, match="other shapes from step 5 on; calibrate with settings that keep them"):
        measure(pipe, ["cat"], num_inference_steps=steps, **call)
    assert attachment_of(pipe.transformer) is None


def test_a_feed_forward_in_chunks_has_no_one_output():
    model, inputs = build("DiTTransformer2DModel")
    names = tuple(unit.name for unit in module_units(model, spec_for(model)))
    schedule = ModuleSchedule(
        fingerprint_of(model, (1.0, 0.5, 0.0), ("all",)), names, ((True,) * len(names), (False,) * len(names))
    )
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(inputs["hidden_states"].shape[-1] // 4, 1)
    with layercache.enabled(model, schedule), pytest.raises(CacheStateError, match="runs several times"):
        with torch.no_grad():
            model(**inputs)
    assert attachment_of(model) is None
