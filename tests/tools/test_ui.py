"""The page of ``layercache ui``: what runs behind it, and once in a real browser."""

import re
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
from diffusers import EulerDiscreteScheduler
from typer.testing import CliRunner

import layercache
from layercache._utils import metrics
from layercache.errors import LayerCacheError, ScheduleMismatchError
from layercache.methods import Universal
from layercache.planning.front import Front, Point
from layercache.planning.rollout import skipping
from layercache.tools import ui
from layercache.tools.cli import app as cli
from layercache.tools.cli.options import CallOptions
from layercache.tools.side_by_side import SideBySide, Wanted
from support.tiny import fingerprint, shifted_sigmas, tiny_pipeline

CHROMIUM = Path("/usr/bin/chromium")
STEPS = 6
WANTED = Wanted("cat", seed=3, steps=STEPS, guidance=2.0, budget=0.5)


@pytest.fixture
def pipe():
    return tiny_pipeline(layers=2)


class Shown(Exception):
    """In the place of gradio's own error, which the browser's test sees shown."""

    def __init__(self, message: str, print_exception: bool):
        super().__init__(message)


@pytest.fixture
def gr(monkeypatch):
    """In the place of gradio, whose import takes longer than these tests: what is used of it while pictures come."""
    module = SimpleNamespace(Error=Shown, skip=lambda: None)
    monkeypatch.setitem(sys.modules, "gradio", module)
    return module


def front_of(pipe) -> Front:
    prints = fingerprint(pipe.transformer, shifted_sigmas(STEPS))
    plans = [skipping(prints, steps) for steps in ([0, 3], [0, 1, 2, 4])]
    points = [Point(plan, f"point {k}", (30.0 + k, 40.0 + k)) for k, plan in enumerate(plans)]
    return Front.of(points, (1.0, 0.1, 0.0))


def generated(pipe, wanted: Wanted) -> np.ndarray:
    import torch

    generator = torch.Generator().manual_seed(wanted.seed)
    call = {"num_inference_steps": wanted.steps, "guidance_scale": wanted.guidance, "output_type": "np"}
    return pipe(wanted.prompt, generator=generator, **call).images[0]


def test_both_runs_are_those_of_the_pipeline_and_steps_are_seen_as_they_happen(pipe):
    full = generated(pipe, WANTED)
    with layercache.enabled(pipe, Universal(budget=WANTED.budget)) as cache:
        cached = generated(pipe, WANTED)
        computed = [not cache.schedule.is_skipped(step) for step in range(STEPS)]
    runs = SideBySide(pipe)
    moments = list(runs.run(WANTED))
    last = moments[-1]
    assert last.is_complete and not any(moment.is_complete for moment in moments[:-1])
    assert np.array_equal(last.cached.picture, cached) and np.array_equal(last.full.picture, full)
    assert last.cached.used == 0.5 and last.full.used == 1.0
    assert last.psnr == pytest.approx(metrics.psnr([full], [cached])[0])
    assert [len(moment.cached.steps) for moment in moments[:STEPS]] == list(range(1, STEPS + 1))
    assert last.cached.steps == tuple(map(float, computed)) and last.full.steps == (1.0,) * STEPS
    # another budget: the full picture is there already
    more = list(runs.run(replace(WANTED, budget=0.8)))
    assert not any(moment.full.steps for moment in more[:-1]) and more[-1].full is last.full
    assert more[-1].cached.used > 0.5


def test_a_cancelled_run_ends_before_its_next_step_and_leaves_nothing(pipe):
    runs = SideBySide(pipe, front_of(pipe))
    expected = list(runs.run(WANTED))[-1]
    forwards = []
    hook = pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    under_way = runs.run(replace(WANTED, seed=8))
    next(under_way)
    under_way.close()
    again = list(runs.run(WANTED))[-1]
    hook.remove()
    abandoned = runs.run(replace(WANTED, seed=9))
    next(abandoned)
    runs.close()
    assert not pipe.transformer.is_cache_enabled and not any(moment.is_complete for moment in abandoned)
    assert len(forwards) < 4 * STEPS, "of the cancelled run, and of the cached one behind it"
    assert np.array_equal(again.cached.picture, expected.cached.picture)
    assert not pipe.transformer.is_cache_enabled


def test_a_front_gives_the_nearest_schedule_and_what_it_expects(pipe, gr):
    front = front_of(pipe)
    runs = SideBySide(pipe, front)
    assert runs.budgets == (front.points[0].used, front.points[1].used) and runs.fixed_steps == STEPS
    for budget, point in ((0.34, 0), (0.45, 0), (0.6, 1), (0.9, 1)):
        assert runs.point_for(budget) is front.points[point]
    *_, last = ui.page_updates(gr, runs, "cat", 0, 99, 0.9, 2.0)
    figures = last[3]
    assert "point 1" in figures and "36.0 dB" in figures and "0.667" in figures
    assert ui.budget_range(runs) == (0.33, 0.67)  # a third, two thirds: no digits that leave the page
    other = tiny_pipeline(layers=3)
    with pytest.raises(ScheduleMismatchError):
        SideBySide(other, front)
    assert not other.transformer.is_cache_enabled


def test_mistakes_are_shown_as_sentences(pipe, gr):
    runs = SideBySide(pipe)
    with pytest.raises(gr.Error, match="Write what to draw"):
        next(ui.page_updates(gr, runs, "  ", 0, 4, 0.5))
    with pytest.raises(gr.Error, match="'dog' is not one of astronaut"):
        list(ui.page_updates(gr, runs, "dog", 0, 4, 0.5))
    pipe.image_processor = None
    with pytest.raises(gr.Error, match="AttributeError: .*postprocess"):
        list(ui.page_updates(gr, runs, "cat", 0, 4, 0.5))
    assert not pipe.transformer.is_cache_enabled
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(LayerCacheError, match="for flow matching.* give it with --front"):
        SideBySide(pipe).warm_up()


class Flux:
    """The signature of FluxPipeline's call, as far as guidance goes."""

    def __init__(self, embeds: bool):
        self.transformer = SimpleNamespace(config=SimpleNamespace(guidance_embeds=embeds))

    def __call__(self, prompt, negative_prompt=None, true_cfg_scale=1.0, guidance_scale=3.5):
        raise NotImplementedError


@pytest.mark.parametrize("embeds, expected", [(True, 3.5), (False, 1.0)], ids=["distilled", "two forwards"])
def test_guidance_begins_with_the_pipelines_own(embeds, expected):
    assert SideBySide(Flux(embeds)).guidance == expected
    assert SideBySide(Flux(embeds), call=CallOptions(guidance_scale=2.5)).guidance == 2.5


def test_pipelines_that_the_page_cannot_show():
    for name, said in (("WanPipeline", "WanPipeline gives videos"), ("DiTPipeline", "DiTPipeline takes no prompt")):
        cls = getattr(diffusers, name)
        with pytest.raises(LayerCacheError, match=said):
            SideBySide(cls.__new__(cls))


def test_the_command_checks_before_it_loads_and_hands_on_its_options(pipe, gr, monkeypatch, tmp_path):
    loaded, served = [], []
    monkeypatch.setattr("layercache.tools.cli.ui.load_pipeline", lambda *options: loaded.append(options) or pipe)
    monkeypatch.setattr(ui, "serve", lambda *args, **options: served.append((args, options)))
    front = front_of(pipe).save(tmp_path / "front.json")
    runner = CliRunner()
    done = runner.invoke(
        cli.app, ["ui", "--front", str(front), "--port", "8123", "--share", "--device", "cpu", "--guidance", "3"]
    )
    assert done.exit_code == 0, done.output
    (args, options), *_ = served
    assert args[0] is pipe and args[1].points[1].origin == "point 1" and args[2] == CallOptions(guidance_scale=3)
    assert options == {"host": "127.0.0.1", "port": 8123, "share": True}
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = runner.invoke(cli.app, ["ui"])
    assert done.exit_code == 1 and "layercache[ui]" in done.output and len(loaded) == 1


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium")
def test_in_a_browser(capsys):
    """On a phone: write, generate, both pictures come; a mistake is said; a run that is stopped makes room."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    pipe = tiny_pipeline(layers=1)
    page = ui.build_page(SideBySide(pipe))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ui.launch(page, host="127.0.0.1", port=port, wait=False)
    assert capsys.readouterr().out == f"page: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    said, asked = [], []  # errors of the console, addresses
    try:
        with playwright.sync_playwright() as driver:
            flags = ["--headless", "--no-sandbox", "--disable-gpu"]
            browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=flags)
            tab = browser.new_page(viewport={"width": 390, "height": 844})
            tab.set_default_timeout(30_000)
            tab.on("console", lambda message: said.append(message) if message.type == "error" else None)
            tab.on("pageerror", lambda error: said.append(error))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(f"http://127.0.0.1:{port}")
            button = tab.get_by_role("button", name="Generate")
            tab.fill("#lc-prompt textarea", "cat")
            button.click()
            tab.wait_for_selector("#lc-figures table")
            pictures = tab.locator("#lc-pictures img")
            tab.wait_for_function(
                "[...document.querySelectorAll('#lc-pictures img')].every(i => i.naturalWidth >= 384)"
            )
            assert pictures.count() == 2
            assert "dB" in tab.inner_text("#lc-figures") and "30 of 30 steps" in tab.inner_text("#lc-steps")
            assert tab.locator("#lc-steps span.done").count() == 60
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390
            tab.fill("#lc-prompt textarea", "dog")
            button.click()
            tab.get_by_text("'dog' is not one of astronaut").wait_for()
            tab.fill("#lc-prompt textarea", "coffee")
            slow = pipe.transformer.register_forward_hook(lambda *_: time.sleep(0.1))
            button.click()
            tab.get_by_text(re.compile("cached: step [1-9] of 30")).wait_for()
            tab.get_by_role("button", name="Stop").click()
            while pipe.transformer.is_cache_enabled:
                tab.wait_for_timeout(50)
            slow.remove()
            assert "full: not begun" in tab.inner_text("#lc-steps")
            for _ in range(20):  # a click while the stop is under way is ignored
                button.click()
                tab.wait_for_timeout(500)
                if "cached: step" not in tab.inner_text("#lc-steps"):
                    break
            tab.wait_for_selector("#lc-figures table")
            browser.close()
    finally:
        page.close(verbose=False)
    assert not said
    assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:")) for url in asked), asked
    assert not pipe.transformer.is_cache_enabled
