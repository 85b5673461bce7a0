"""Pages of each kind in a browser: they draw, sort and slide, fit a phone, have a dark form, and ask for nothing."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import layercache
from layercache.errors import MissingExtraError
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.tools.bench.pages import kind_of, save_result_page
from layercache.tools.cli.app import app
from layercache.tools.compare.report import pictures_block, save_page
from layercache.tools.compare.run import Outcome
from layercache.tools.report import cells, pages, pictures
from layercache.tools.report.charts import looks
from layercache.tools.report.front import FrontRow, save_front_page
from layercache.tools.report.pictures import PictureEntry, page_pictures
from layercache.tools.report.words import origin_words
from support.profiles import made_profile

RESULTS = Path(__file__).parents[2] / "bench" / "results"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>alert(1)</script>"
METHODS = [
    *("layercache", "layercache-planned", "cache-dit:dbcache-taylor", "diffusers:taylorseer", HOSTILE),
    *(f"method {number}" for number in range(20)),
]
MACHINE = {"cpu": "a CPU", "gpu": None, "threads": 1, "versions": {"torch": "2"}}


def compare_page(path: Path) -> Path:
    """25 methods at two budgets, four pictures of each."""
    rng = np.random.default_rng(0)
    full = rng.uniform(size=(4, 16, 16, 3))
    outcomes, entries = [], []
    for number, name in enumerate(METHODS):
        for budget in (0.6, 0.4):
            psnr = tuple(20 + 30 * budget + rng.uniform(0, 10, 4) - number / 3)
            ssim = tuple(rng.uniform(0.5, 1, 4))
            outcomes.append(Outcome(name, "threshold 0.1", budget, budget, 1.0, 1 / budget, psnr, ssim, (), 0, 9, 1))
            entries.append(PictureEntry(name, budget, budget, np.clip(full + 0.02 * number, 0, 1), psnr, ssim))
    outcomes.append(Outcome("l2c", "", 0.4, error="BudgetError: no such budget"))
    blocks = pictures_block(full, entries, ["cat", "coffee", "rocket", "a street in Lisbon at noon"])
    return save_page(path, outcomes, "methods", blocks, commands=["layercache compare " + "--methods all " * 20])


def front_page(path: Path) -> Path:
    rows = [
        FrontRow("layercache", used, used, "whole steps, steer-all n=3+x+b q=1", (40 * used, 50 * used), (), 1 / used)
        for used in (0.7, 0.5, 0.3)
    ]
    rows += [FrontRow("fewer steps", 0.5, 0.5, "no cache", (), (19.0, 21.0))]
    return save_front_page(path, rows, "a front", machine=MACHINE)


def module_page(path: Path) -> Path:
    prints = made_profile(steps=6, distance=2, span=1).fingerprint
    names = tuple(f"blocks.{block}.{part}" for block in range(6) for part in ("attn", "mlp"))
    computed = tuple(tuple(step == 0 or (step + unit) % 2 == 0 for unit in range(12)) for step in range(6))
    return cells.save_schedule_page(path, ModuleSchedule(prints, names, computed), "modules")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, profile = tmp_path_factory.mktemp("pages"), made_profile(steps=30, groups=8)
    results = {name: json.loads((RESULTS / f"{name}-cpu.json").read_text()) for name in ("kernels", "peers")}
    return {
        "compare": compare_page(folder / "compare.html"),
        "front": front_page(folder / "front.html"),
        "profile": cells.save_profile_page(folder / "profile.html", profile, "a profile"),
        "schedule": cells.save_schedule_page(folder / "schedule.html", layercache.plan(profile, 0.6), "a schedule"),
        "modules": module_page(folder / "modules.html"),
        **{name: save_result_page(folder / f"{name}.html", data, name) for name, data in results.items()},
    }


@dataclass
class Visit:
    """A page that a browser has open, and what went wrong in it."""

    tab: Any
    troubles: list[str] = field(default_factory=list)

    def at(self, path: Path) -> Visit:
        """Opens a page; what it asks for, prints or raises is a trouble."""
        own = path.as_uri()
        self.tab.on("console", lambda message: self.troubles.append(message.text))
        self.tab.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.troubles.append(dialog.message), dialog.dismiss()))
        self.tab.on("request", lambda request: self._asked_for(request.url, own))
        self.tab.goto(own)
        self.drawn(1)
        return self

    def _asked_for(self, url: str, own: str) -> None:
        if url != own and not url.startswith("data:"):
            self.troubles.append(f"asked for {url}")

    def drawn(self, times: int) -> None:
        self.tab.wait_for_function(f"document.documentElement.dataset.drawn >= {times}", timeout=60_000)

    def ask(self, script: str) -> Any:
        return self.tab.evaluate(script)

    @property
    def width(self) -> int:
        return self.ask("document.documentElement.scrollWidth")

    @property
    def ground(self) -> str:
        return self.ask("getComputedStyle(document.body).backgroundColor")

    def column(self, place: int) -> list[str]:
        rows = "[...document.querySelector('table').tBodies[0].rows]"
        return self.ask(f"{rows}.map((row) => row.cells[{place}].textContent.trim())")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with driver.sync_playwright() as playwright:
        options = ["--headless", "--no-sandbox", "--disable-gpu"]
        with contextlib.closing(playwright.chromium.launch(executable_path=BROWSER, args=options)) as started:
            yield started


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    with contextlib.closing(browser.new_context(viewport={"width": 390, "height": 844})) as context:
        yield Visit(context.new_page())


@pytest.mark.parametrize("kind", ["compare", "front", "profile", "schedule", "kernels", "peers"])
def test_a_page_on_a_phone_by_day_and_by_night(made, visit, kind):
    page = visit.at(made[kind])
    assert page.width <= 390
    assert page.ask(
        "[...document.querySelectorAll('.chart')].every((chart) => chart.querySelectorAll('path').length > 5)"
    )
    headings = page.tab.locator("table >> nth=0").locator("th button")
    numeric = page.ask("[...document.querySelectorAll('table')[0].querySelectorAll('th')].map((h) => h.className)")
    last = max(k for k, name in enumerate(numeric) if name == "number" and len(set(page.column(k))) > 1)
    before = page.column(last)
    for _ in range(2):
        headings.nth(last).click()
    numbers = [float(re.match(r"[-\d.]+", text)[0]) for text in page.column(last) if text != "-"]
    assert sorted(before) == sorted(page.column(last)) and numbers == sorted(numbers)
    by_day = page.ground
    page.tab.emulate_media(color_scheme="dark")
    page.drawn(2)
    assert page.ground != by_day and page.width <= 390 and page.troubles == []


def test_the_slider_uncovers_the_full_picture(made, visit):
    page = visit.at(made["compare"])
    clip = "getComputedStyle(document.querySelector('.stage .cached')).clipPath"
    assert "50%" in page.ask(clip)
    page.tab.locator(".slider").fill("80")
    assert "80%" in page.ask(clip)
    stage = page.tab.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    page.tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + box["width"] / 4, box["y"] + 20)
    page.tab.mouse.up()
    assert float(re.search(r"([\d.]+)%", page.ask(clip))[1]) == pytest.approx(25, abs=1)
    before = page.tab.locator("img.cached").get_attribute("src")
    page.tab.locator(".thumbnails button").nth(20).click()
    assert page.tab.locator("select.method").input_value() == METHODS[20]
    assert page.tab.locator("img.cached").get_attribute("src") != before
    page.tab.locator("select.budget").select_option("0.4")
    assert page.tab.locator(".pictures .figures").inner_text().startswith("40.0% computed")
    assert page.troubles == []


def test_a_curve_stands_out_under_the_pointer(made, visit):
    visit.tab.set_viewport_size({"width": 1200, "height": 900})
    page = visit.at(made["compare"])
    faint = (
        "[...document.querySelectorAll('.chart .mark-line path')].filter((p) => p.getAttribute('opacity') < 1).length"
    )
    assert page.ask(faint) == 0
    page.tab.locator(".chart .mark-symbol.role-mark path").first.hover(force=True)
    page.tab.wait_for_selector("#vg-tooltip-element.visible")
    assert "PSNR, 10 %" in page.tab.locator("#vg-tooltip-element").inner_text()
    assert page.ask(faint) == len(METHODS) - 1
    higher = "document.querySelector('.chart .mark-line path').getAttribute('d')"
    before = page.ask(higher)
    page.tab.locator(".vega-bindings select").select_option("worst")
    page.tab.wait_for_function(f"{higher} !== {json.dumps(before)}")
    assert page.troubles == []


def test_pages_are_whole_files_of_less_than_two_megabytes(made):
    for kind, path in made.items():
        text = path.read_text(encoding="utf-8")
        assert len(text) < 2e6 and text.count("plot-library") >= 1, kind
        assert "http://" not in text and "https://" not in text and HOSTILE not in text
        assert '<meta name="viewport" content="width=device-width' in text and "<pre" not in text
    compare = made["compare"].read_text(encoding="utf-8")
    assert "l2c at 0.4: no such budget" in compare and "layercache compare --methods all" in compare
    assert "3 velocities and latents at every step" in made["front"].read_text(encoding="utf-8")


def test_every_result_in_the_repository_has_a_page_or_none(tmp_path):
    kinds = {}
    for name in ("compare-demo-30-cfg4", "pareto-demo-30-cfg4", "end-to-end-cpu", "solvers"):
        data = json.loads((RESULTS / f"{name}.json").read_text())
        kinds[name] = kind_of(data)
        assert not kinds[name] or save_result_page(tmp_path / f"{name}.html", data, name).stat().st_size > 5000
    assert list(kinds.values())[:3] == ["comparison", "front", "other"]


def test_large_and_many_pictures_are_reduced(monkeypatch):
    rng = np.random.default_rng(0)
    full = rng.uniform(size=(3, 160, 240, 3))
    entry = PictureEntry("a", 0.5, 0.5, full, (40.0,) * 3, (0.9,) * 3)
    assert len(page_pictures(full, [entry], "abc")["prompts"]) == 3
    monkeypatch.setattr(pictures, "MOST_BYTES", 1000)
    assert page_pictures(full, [entry], "abc")["prompts"] == ["1: a"]


def test_curves_are_told_apart():
    found = looks([*METHODS, *(f"more {number}" for number in range(40))])
    assert len(set(found.values())) == len(found) == 65


def test_forecasts_in_words():
    assert origin_words("whole steps, steer-all n=4+x+b") == "whole steps, 4 velocities and latents at every step"
    assert origin_words("paths, teacher n=1 q=0.5") == "paths, 1 velocity, fitted to the velocity"
    assert origin_words("threshold, hold") == "threshold, the last velocity held"
    assert origin_words("interval 2, withhold") == "interval 2, withhold"


@pytest.mark.parametrize("package", ["altair", "jinja2", "vl_convert"])
def test_a_missing_package_is_named_before_the_work(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r'pip install "layercache\[compare\]"'):
        front_page(tmp_path / "front.html")
    monkeypatch.setattr("layercache.tools.cli.search.load_with_prompts", lambda *_: pytest.fail("loaded a model"))
    result = CliRunner().invoke(app, ["compare", "--methods", "uniform", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1 and "layercache[compare]" in result.output and not list(tmp_path.iterdir())
    with pytest.raises(MissingExtraError):
        pages.check_installed()


def test_show_writes_pages(tmp_path):
    schedule = layercache.plan(made_profile(steps=6, distance=2, span=1), 0.7).save(tmp_path / "schedule.json")
    for file in (schedule, RESULTS / "pareto-demo-30-cfg4.front.json", RESULTS / "peers-cpu.json"):
        page = tmp_path / f"{file.stem}.html"
        result = CliRunner().invoke(app, ["show", str(file), "--page", str(page)])
        assert result.exit_code == 0 and f"page: {page}" in result.output.replace("\n", ""), result.output
        assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (tmp_path / "damaged.json").write_text('{"kind": "peers", "rows": [{"mode": "x"}]}')
    result = CliRunner().invoke(app, ["show", str(tmp_path / "damaged.json")])
    assert result.exit_code == 1 and "no whole file of results" in result.output
