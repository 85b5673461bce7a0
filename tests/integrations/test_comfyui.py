"""The nodes of ComfyUI, on as much of it as they hold on to."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from layercache.errors import MethodError, ScheduleMismatchError
from layercache.planning.trace import Trace
from layercache.schedule import Fingerprint, Schedule, Velocity
from layercache.schedule.forecast import reforecast
from support import comfy_stub
from support.comfy_stub import CFG, COND, CONDS, FAMILIES, UNCOND, Guider, Model, Network, network_of

SIGMAS = torch.tensor([1.0, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1, 0.0])
PLACE = Path(__file__).parents[2] / "integrations" / "comfyui" / "__init__.py"
_spec = importlib.util.spec_from_file_location("layercache_comfyui", PLACE)
pack = importlib.util.module_from_spec(_spec)
sys.modules["layercache_comfyui"] = pack
_spec.loader.exec_module(pack)
caching, engine = sys.modules["layercache_comfyui.caching"], sys.modules["layercache_comfyui.engine"]
recording, groups = sys.modules["layercache_comfyui.recording"], sys.modules["layercache_comfyui.groups"]
CONTROL = 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(8))


@pytest.fixture(autouse=True)
def comfy(monkeypatch, tmp_path):
    for name in ("_warned", "_changes"):
        monkeypatch.setattr(engine, name, set())
    return comfy_stub.install(monkeypatch, tmp_path)


def noise(seed: int) -> torch.Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed))


def guider_of(attached, network=None, forward=True):
    """A guider of a model with wrappers, or without where there is nothing to attach."""
    model = Model(network or network_of("Flux"))
    if attached is not None:
        model, is_there = engine.with_wrappers(
            model, attached.outer, attached.predict, attached.forward if forward else None
        )
        assert is_there
    return Guider(model)


def prints_of(name: str, sigmas=SIGMAS) -> Fingerprint:
    made_with = {"num_layers": 2, "num_single_layers": 3} if name in ("Flux", "Chroma", "HunyuanVideo") else {}
    made_with = {"num_layers": 5, **made_with, "num_attention_heads": 4, "attention_head_dim": 4}
    levels = tuple(sigmas.tolist())
    return Fingerprint(FAMILIES[name][0], "hash", 5, levels, ("cond", "uncond"), "0.2", (), made_with)


def grouped(name="Flux", groups=((0, 1), (1, 3), (3, 5)), **changes) -> Schedule:
    """Secants: the middle group, which crosses from one list to the other, at most steps; the others at some."""
    computed = ["111", "111", "100", "010", "101", "100", "001", "111"]
    cells = tuple(tuple(None if c == "1" else {0: 1.0} for c in row[: len(groups)]) for row in computed)
    return reforecast(Schedule(prints_of(name), groups, cells, (1.0,) * len(groups), **changes), "secant")


def reference(network: Network, x, schedule: Schedule, control=None, sigmas=SIGMAS, first=0):
    """Every conditioning alone, both streams apart, no block writing into anything that is looked at again."""
    kept = {}
    for step, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True), first):
        v = {}
        for uuid in CONDS:
            cells = schedule.cells_of({COND: "cond", UNCOND: "uncond"}[uuid])[step]
            if any((uuid, a, g) not in kept for g, cell in enumerate(cells) for a in cell or ()):
                cells = (None,) * len(cells)
            img, txt, vec = network.inputs(x, here.expand(len(x)), torch.full((len(x),), CONDS[uuid]))
            start = img
            for g, (lo, hi) in enumerate(schedule.groups):
                before, last = (img, txt), None
                for k in range(lo, hi):
                    kind, _, block = network.all_blocks[k]
                    if cells[g] is None and kind == "single_block":
                        joined = block.single(network.joined(img, txt), vec)
                        img = network.image(joined, x.shape[1])
                        txt = joined[:, : txt.shape[1]] if network.text_first else joined[:, x.shape[1] :]
                    elif cells[g] is None:
                        img, own = block.double(img, txt.clone(), vec)
                        txt = own if network.has_text else txt
                    last = img
                    img = img if control is None or k == hi - 1 or cells[g] else img + control
                if cells[g] is None:
                    kept[uuid, step, g] = last - before[0], txt - before[1]
                else:
                    img, txt = (
                        stream + sum(c * kept[uuid, a, g][s] for a, c in cells[g].items())
                        for s, stream in enumerate(before)
                    )
                img = img if control is None else img + control
            v[uuid] = network.head(img) + 0.01 * start.mean()
        x = x + (there - here) * (v[UNCOND] + CFG * (v[COND] - v[UNCOND]))
    return x


@pytest.fixture(scope="module")
def made():
    recorder = recording.Recorder()
    with pytest.MonkeyPatch.context() as patch:
        comfy_stub.install(patch)
        guider = guider_of(recorder)
        for seed in range(2):
            guider.sample(noise(seed), SIGMAS)
    return recorder.runs, recording.schedule_of(recorder.like_newest, 0.5)


def test_a_schedule_made_from_recorded_runs_gives_what_its_velocities_say(made):
    _, schedule = made
    cache, network = caching.Caching(schedule), network_of("Flux")
    guider, full = guider_of(cache, network, forward=False), Guider(Model(network))
    options, found = guider.model_options, guider.sample(noise(5), SIGMAS)
    assert guider.calls == 4 and "4 forecast" in str(cache) and guider.model_options is options
    x, trace = noise(5), Trace()
    for step, (here, there) in enumerate(zip(SIGMAS[:-1], SIGMAS[1:], strict=True)):
        denoised = full.predict_noise(x, here.expand(2), {"step": 0, "transformer_options": {}})
        trace.add(x, None if schedule.is_skipped(step) else (x - denoised) / here)
        x = x + (there - here) * trace.combined(schedule.velocity(step), step)
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_all_computed_and_tails_are_the_uncached_run(made):
    runs, schedule = made
    network = network_of("Flux")
    every = guider_of(caching.Caching(Schedule.compute_all(runs[0].fingerprint)), network)
    assert torch.equal(every.sample(noise(5), SIGMAS), Guider(Model(network)).sample(noise(5), SIGMAS))
    assert caching.first_step(schedule, tuple(SIGMAS[3:].tolist())) == 3  # denoise


def test_refusals_and_interrupted_runs(made):
    _, schedule = made
    cache = caching.Caching(schedule)
    guider = guider_of(cache)
    for sampler, name in ((comfy_stub.sample_heun, "heun"), (comfy_stub.sample_euler_cfg_pp, "euler_cfg_pp")):
        with pytest.raises(MethodError, match=f"the sampler {name} does not"):
            guider.sample(noise(5), SIGMAS, sampler)
    with pytest.raises(ScheduleMismatchError, match="none of its own"):
        guider.sample(noise(5), SIGMAS * 0.9)
    one = replace(schedule.fingerprint, num_blocks=1, config_hash="other")
    other = replace(schedule, fingerprint=one, groups=((0, 1),))
    with pytest.raises(ScheduleMismatchError, match="made for Flux"):
        guider_of(caching.Caching(other)).sample(noise(5), SIGMAS)
    with pytest.raises(ScheduleMismatchError, match="2 and 3 blocks of 32 channels; the model is Flux with .* 16"):
        wide = replace(prints_of("Flux"), architecture={**prints_of("Flux").architecture, "attention_head_dim": 8})
        guider_of(caching.Caching(replace(grouped(), fingerprint=wide))).sample(noise(5), SIGMAS)
    with pytest.raises(ScheduleMismatchError, match="lets no node replace the blocks of a NextDiT"):
        unknown = type("NextDiT", (Network,), {})((("layers", "double_block", 5),))
        guider_of(caching.Caching(grouped()), unknown).sample(noise(5), SIGMAS)
    guider.fails_at = guider.calls + 2
    with pytest.raises(InterruptedError):
        guider.sample(noise(5), SIGMAS)
    assert "interrupted" in str(cache)
    guider.fails_at = -1
    assert torch.equal(guider.sample(noise(5), SIGMAS), guider_of(cache).sample(noise(5), SIGMAS))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_reused_groups_of_every_family_equal_a_reference(name):
    network, schedule = network_of(name), grouped(name)
    cache = caching.Caching(schedule)
    guider, plain = guider_of(cache, network), Guider(Model(network))
    guider.control = plain.control = CONTROL  # added in place behind every block
    found = guider.sample(noise(5), SIGMAS)
    torch.testing.assert_close(found, reference(network, noise(5), schedule, CONTROL), atol=2e-5, rtol=2e-5)
    assert torch.equal(guider.sample(noise(5), SIGMAS), found)
    assert "8 steps: 8 computed, 0 forecast; 60% of the blocks\n80 blocks of 8 forwards: 32 reused" in str(cache)
    every = guider_of(caching.Caching(replace(schedule, cells=tuple((None,) * 3 for _ in schedule.cells))), network)
    every.control = CONTROL
    assert torch.equal(every.sample(noise(5), SIGMAS), plain.sample(noise(5), SIGMAS))


ORDERS = {
    "one by one": lambda step: [[COND], [UNCOND]],
    "changing": lambda step: [[[UNCOND, COND]], [[COND, UNCOND]], [[COND], [UNCOND]]][step % 3],
}


@pytest.mark.parametrize("order", [*ORDERS, "in threads"])
@torch.no_grad()
def test_how_conditionings_are_batched_changes_nothing(order):
    network, same = network_of("Flux"), grouped()
    own = tuple(tuple(None if c is None or k == 1 else c for k, c in enumerate(row)) for row in same.cells)
    for schedule in (same, replace(same, branch_cells={"uncond": own})):
        guider = guider_of(caching.Caching(schedule), network)
        guider.batches = ORDERS.get(order, ORDERS["one by one"])
        guider.in_threads = order == "in threads"
        found = guider.sample(noise(5), SIGMAS)
        torch.testing.assert_close(found, reference(network, noise(5), schedule), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_whole_steps_are_skipped_between_steps_that_reuse_groups():
    network, schedule = network_of("Flux"), grouped()
    cells = (*schedule.cells[:4], ({},) * 3, *schedule.cells[5:])
    velocities = tuple(Velocity({3: 1.5, 2: -0.5}) if step == 4 else None for step in range(8))
    mixed = Schedule(schedule.fingerprint, schedule.groups, cells[:5] + ((None,) * 3,) * 3, (1.0,) * 3, {}, velocities)
    guider = guider_of(caching.Caching(mixed), network)
    found, x = guider.sample(noise(5), SIGMAS), noise(5)
    states = [x, *(reference(network, x, mixed, sigmas=SIGMAS[: k + 2]) for k in range(4))]
    v = [(b - a) / (SIGMAS[k + 1] - SIGMAS[k]) for k, (a, b) in enumerate(zip(states, states[1:], strict=False))]
    x = states[4] + (SIGMAS[5] - SIGMAS[4]) * (1.5 * v[3] - 0.5 * v[2])
    torch.testing.assert_close(found, reference(network, x, mixed, sigmas=SIGMAS[5:], first=5), atol=1e-4, rtol=1e-4)
    assert guider.calls == 7


@torch.no_grad()
def test_runs_that_begin_later_compute_what_was_not_stored():
    network, schedule = network_of("Flux"), grouped()
    cache = caching.Caching(schedule)
    found = guider_of(cache, network).sample(noise(5), SIGMAS[3:])  # denoise below 1
    expected = reference(network, noise(5), schedule, sigmas=SIGMAS[3:], first=3)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert "times in full" in str(cache)


@torch.no_grad()
def test_samplings_share_nothing():
    """Two of one guider after each other and at once, whose conditionings have the same uuids, and one without."""
    network, cache = network_of("Flux"), caching.Caching(grouped())
    lists = [getattr(network, name) for name, _, _ in network.lists]
    guider, plain = guider_of(cache, network), Guider(Model(network))
    alone = [guider.sample(noise(seed), SIGMAS) for seed in (5, 6)]
    full = plain.sample(noise(5), SIGMAS)
    meeting, found = threading.Barrier(3), [None] * 3
    guider.after = plain.after = lambda *_: meeting.wait(20)

    def sample(k, own, seed):
        found[k] = own.sample(noise(seed), SIGMAS)

    threads = [threading.Thread(target=sample, args=a) for a in ((0, guider, 5), (1, guider, 6), (2, plain, 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, [*alone, full], strict=True))
    assert all(type(getattr(network, name)) is nn.ModuleList for name, _, _ in network.lists)
    assert all(getattr(network, name) is one for (name, _, _), one in zip(network.lists, lists, strict=True))


def test_an_exception_drops_what_was_stored(monkeypatch):
    made = []
    run_of = caching.run_of
    monkeypatch.setattr(caching, "run_of", lambda *given: made.append(run_of(*given)) or made[-1])
    cache = caching.Caching(grouped())
    guider = guider_of(cache)
    options, expected = guider.model_options, guider.sample(noise(5), SIGMAS)
    guider.calls, guider.fails_at = 0, 4
    with pytest.raises(InterruptedError):
        guider.sample(noise(5), SIGMAS)
    assert "interrupted" in str(cache) and guider.model_options is options and engine.KEY not in str(options.keys())
    assert made[0].groups.largest == made[1].groups.largest > 0 and cache._runs == []
    assert [(run.groups.chunks, run.groups.nbytes, run.track.nbytes) for run in made] == [({}, 0, 0)] * 2
    guider.fails_at = -1
    assert torch.equal(guider.sample(noise(5), SIGMAS), expected)


class OnDevice(torch.Tensor):
    """Noise levels on a device that counts how often it is waited for."""

    waits = 0
    device = property(lambda self: torch.device("cuda"))

    def _waited(self, name, *args):
        OnDevice.waits += 1
        return getattr(self.as_subclass(torch.Tensor), name)(*args)

    def tolist(self):
        return self._waited("tolist")

    def item(self):
        return self._waited("item")

    def __float__(self):
        return self._waited("__float__")

    def __bool__(self):
        return self._waited("__bool__")


def test_noise_levels_are_read_once():
    guider = guider_of(caching.Caching(grouped()))
    expected = guider.sample(noise(5), SIGMAS)

    def sample_euler(model, x, sigmas, extra_args, **_):
        def asked(x, sigma, **extra):
            return model(x, sigma.as_subclass(OnDevice), **extra)

        return comfy_stub.sample_euler(asked, x, SIGMAS, extra_args)

    OnDevice.waits = 0
    assert torch.equal(guider.sample(noise(5), SIGMAS.as_subclass(OnDevice), sample_euler), expected)
    assert OnDevice.waits == 1


def test_residuals_are_stored_while_planning_of_memory_is_paused(monkeypatch):
    """Newer ComfyUI give a forward's memory to the next one, but for what is allocated in a pause."""
    paused, copied, copy = [], [], groups._copy
    module = types.ModuleType("comfy.model_prefetch")

    @contextlib.contextmanager
    def pause():
        paused.append(True)
        yield
        paused.pop()

    module.pause_malloc_graph = pause
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(groups, "_copy", lambda stream: copied.append(len(paused)) or copy(stream))
    engine._pause.cache_clear()
    try:
        guider_of(caching.Caching(grouped(groups=((0, 5),)))).sample(noise(5), SIGMAS)
    finally:
        engine._pause.cache_clear()
    assert 1 in copied and paused == []


def test_a_prefix_cache_stays_on_where_no_blocks_are_replaced(made):
    _, whole = made
    network = network_of("QwenImage21Transformer2DModel")
    whole = replace(whole, fingerprint=prints_of("QwenImage21Transformer2DModel"))
    guider = guider_of(caching.Caching(whole), network, forward=False)
    guider.sample(noise(5), SIGMAS)
    assert network.with_prefix_cache == guider.calls == 4
    guider_of(caching.Caching(grouped("QwenImage21Transformer2DModel")), network).sample(noise(5), SIGMAS)
    assert network.with_prefix_cache == 4


@torch.no_grad()
def test_forwards_beside_those_of_the_steps_do_not_mix_with_them():
    """Of skip-layer guidance, which replaces a block itself, and of context windows, whose uuids come twice a step."""
    cache = caching.Caching(grouped())
    guider = guider_of(cache)
    expected = guider.sample(noise(5), SIGMAS)

    def skip_layer(own, x, sigma, model_options):
        handed = dict(own.handed)
        comfy_stub.set_model_options_patch_replace(handed, lambda args, _: args, "dit", "double_block", 1)
        own.run([COND], x, sigma, handed, {})

    def keep(batch, x, sigma, model_options, found):
        guider.handed = model_options
        return Guider.run(guider, batch, x, sigma, model_options, found)

    guider.run, guider.after = keep, skip_layer
    assert torch.equal(guider.sample(noise(5), SIGMAS), expected) and "8 forwards in full" in str(cache)
    full = guider_of(None)
    for own in (guider, full):
        own.batches, own.after = (lambda step: [[UNCOND, COND], [COND]]), lambda *_: None
    assert torch.equal(guider.sample(noise(5), SIGMAS), full.sample(noise(5), SIGMAS))
    assert "(windows)" in str(cache)


def hidden(name):
    def rename(wrappers, patcher, patch, network):
        for owner in (wrappers.WrappersMP, patcher, Model):
            if name in vars(owner):
                patch.delattr(owner, name)

    return rename


def other_lists(wrappers, patcher, patch, network):
    network._modules["layers"] = network._modules.pop("double_blocks")
    network.lists = (("layers", "double_block", 2), *network.lists[1:])


def other_step(wrappers, patcher, patch, network):
    def ask(guider, run, x, sigma, options, seed):
        run.function = lambda sigma, x, options: guider.predict_noise(x, sigma, options)
        return run(sigma, x, options)

    patch.setattr(Guider, "ask", ask)


def other_blocks(wrappers, patcher, patch, network):
    network.suffix = "_layer"


def no_uuids(wrappers, patcher, patch, network):
    create = Guider.__init__

    def init(guider, model):
        create(guider, model)
        guider.names_conditionings = False

    patch.setattr(Guider, "__init__", init)


SEAMS = {
    "kinds of wrappers": hidden("PREDICT_NOISE"),
    "forward wrappers": hidden("DIFFUSION_MODEL"),
    "adding wrappers": hidden("add_wrapper_with_key"),
    "removing wrappers": hidden("remove_wrappers_with_key"),
    "replacing blocks": hidden("set_model_options_patch_replace"),
    "block lists": other_lists,
    "call of a step": other_step,
    "names of blocks": other_blocks,
    "uuids": no_uuids,
}


@pytest.mark.parametrize("seam", SEAMS)
@torch.no_grad()
def test_an_engine_that_changed_gives_one_warning_and_no_cache(seam, comfy, monkeypatch, caplog, tmp_path):
    network = network_of("Flux")
    (tmp_path / "layercache").mkdir()
    grouped().save(tmp_path / "layercache" / "flux.json")
    expected = Guider(Model(network)).sample(noise(5), SIGMAS)
    SEAMS[seam](*comfy, monkeypatch, network)
    nodes = sys.modules["layercache_comfyui.nodes"]
    model, cache = nodes.LayerCacheModel().execute(Model(network), "flux.json", 0.5)
    guider = Guider(model)
    for _ in range(2):
        assert torch.equal(guider.sample(noise(5), SIGMAS), expected)
    assert len(caplog.messages) == 1 and "does not know" in caplog.text, caplog.messages
    assert "100% of the blocks" in str(cache) or "in full" in str(cache)
