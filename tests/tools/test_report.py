"""Tables, sentences, JSON and figures from data made by hand."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import PIL.Image
import pytest

from layercache.errors import MissingExtraError
from layercache.planning.profile import StabilityProfile
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.schedule import Schedule, Velocity
from layercache.tools.bench.measure import Row as KernelRow
from layercache.tools.bench.measure import Timing
from layercache.tools.bench.peer_table import Row as PeerRow
from layercache.tools.bench.peer_table import table as peer_table
from layercache.tools.bench.results import table as kernel_table
from layercache.tools.compare.report import comparison_table as compared
from layercache.tools.compare.run import Outcome
from layercache.tools.report import machine, plots
from layercache.tools.report import tables as report
from layercache.tools.report.fitting import Column, FittingTable
from layercache.tools.report.front import FrontRow, front_table
from layercache.tools.report.tables import Measured
from support.profiles import made_profile
from support.text import plain_text

SIGMAS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
GROUPS = ((0, 1), (1, 4))
FINGERPRINT = Fingerprint("SomeTransformer", "0123456789ab", 4, SIGMAS, ("cond", "uncond"), "1.2.3")


@pytest.fixture
def schedule() -> Schedule:
    cells = (
        (None, None),
        (None, None),
        ({1: 1.0}, None),
        ({1: 1.0}, {2: 1.5, 0: -0.5}),
        (None, None),
    )
    return Schedule(FINGERPRINT, GROUPS, cells, (1.0, 3.0), {"method": "by hand", "budget": 0.75, "spans": [1, 2]})


@pytest.fixture
def profile() -> StabilityProfile:
    steps, groups = 5, 2
    change = np.array([[0, 0], [0.04, 0.3], [0.08, 0.15], [0.02, 0.1], [0.5, 0.06]])
    errors = np.zeros((1, 2, steps, groups, 3, 2))
    errors[0, :, :, :, 1, 0] = 10 * change
    norms = np.full((1, 2, steps, groups), 10.0)
    names = ("image_error_l1", "image_error_l2", "text_error_l1")
    tables = dict.fromkeys(names, errors) | {name.replace("error", "norm"): norms for name in names}
    return StabilityProfile(FINGERPRINT, GROUPS, (0.010, 0.030), (0.0005, 0.0007), 0.004, ("seed 0: cat",), tables)


@pytest.fixture
def measured() -> list[Measured]:
    return [
        Measured("full", 1.0, 8.0),
        Measured("cached", 0.6, 5.0, (40.0, 30.0, math.inf), (0.9, 0.8, 1.0)),
    ]


def row_of(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(name))


def test_comparison_table(measured):
    text = plain_text(report.comparison_table(measured), width=80)
    assert row_of(text, "full") == ["full", "1.000", "8.00", "1.00x", "-", "-", "-", "-"]
    assert row_of(text, "cached") == ["cached", "0.600", "5.00", "1.60x", "35.00", "40.00", "32.00", "0.9000"]
    assert "SSIM (mean) of 3 pictures" in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 80


def test_identical_pictures_are_pointed_out(measured):
    assert "1 of 3" in report.identical_note(measured)
    assert report.identical_note(measured[:1]) == ""


def test_figures_of_a_run(measured):
    figures = measured[1].to_json(8.0)
    assert figures["speedup"] == pytest.approx(1.6)
    assert figures["psnr"] == {"mean": 35.0, "median": 40.0, "quantile10": 32.0, "count": 3, "infinite": 1}
    assert measured[0].to_json(8.0)["psnr"] is None


def test_json_is_strict(tmp_path):
    data = {"a": math.inf, "b": [math.nan, (-math.inf, 1.5)], "c": tmp_path, 3: None}
    path = machine.write_json(tmp_path / "made" / "x.json", data)
    loaded = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert loaded == {"a": "inf", "b": ["nan", ["-inf", 1.5]], "c": str(tmp_path), "3": None}
    assert float(loaded["a"]) == math.inf


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("before")
    with pytest.raises(TypeError):
        machine.write_json(path, {"x": object()})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_machine_info():
    info = machine.machine_info()
    assert info["cpu"] and info["cpu_count"] >= 1 and info["threads"] >= 1
    assert info["versions"]["torch"].startswith("2.")
    line = machine.machine_line(info)
    assert info["versions"]["diffusers"] in line and "None" not in line


def test_schedule_figures(schedule):
    figures = report.schedule_figures(schedule)
    # 3 of 5 steps of a second each, 4 of 5 of three seconds each, out of 20 seconds
    assert figures["used"] == pytest.approx((3 * 1 + 4 * 3) / 20)
    first, second = figures["groups"]
    assert first["blocks"] == [0, 1]
    assert (first["computed_steps"], first["reused_steps"], first["forecast_steps"]) == (3, 2, 0)
    assert (second["computed_steps"], second["reused_steps"], second["forecast_steps"]) == (4, 0, 1)
    assert (first["longest_cached_run"], second["longest_cached_run"]) == (2, 1)
    json.loads(machine.json_text(figures))


def test_schedule_in_words(schedule):
    text = report.schedule_sentences(schedule)
    assert "SomeTransformer (4 blocks in 2 groups) and 5 steps" in text
    assert "75.0% of the block time" in text
    assert "block 0: computed at 3 of 5 steps, reused at 2; longest cached run: 2." in text
    assert "blocks 1-3: computed at 4 of 5 steps, forecast at 1; longest cached run: 1." in text
    assert "layercache 1.2.3: method by hand, budget 0.75, spans (1, 2)" in text


def test_schedule_table(schedule):
    lines = plain_text(report.schedule_table(schedule)).splitlines()
    assert lines[0].split() == ["step", "sigma", "block", "0", "blocks", "1-3"]
    assert len(lines) == 6
    assert lines[3].split() == ["2", "0.600", "as", "step", "1", "compute"]
    assert lines[4].split() == ["3", "0.400", "as", "step", "1", "1.50·r2", "-0.50·r0"]


def test_schedule_table_of_many_groups_fits_a_terminal(schedule):
    groups = tuple((k, k + 1) for k in range(20))
    fingerprint = Fingerprint("SomeTransformer", "0123456789ab", 20, SIGMAS, ("cond",), "1.2.3")
    row = tuple({1: 1.0} if k % 2 else {2: 1.5, 0: -0.5} for k in range(20))
    computed = (None,) * 20
    # an odd group is not computed at step 2, an even one not at step 1
    first = tuple(None if k % 2 else {0: 1.0} for k in range(20))
    second = tuple({1: 1.0} if k % 2 else None for k in range(20))
    wide = Schedule(fingerprint, groups, (computed, first, second, row, computed), (1.0,) * 20)
    lines = plain_text(report.schedule_table(wide), width=80).splitlines()
    assert lines[0].split()[2:] == [str(k) for k in range(20)]
    assert lines[3].split() == ["2", "0.600"] + ["■", "·"] * 10
    assert lines[4].split() == ["3", "0.400"] + ["2", "·"] * 10
    assert "first block" in report.schedule_legend(wide)
    assert "first block" not in report.schedule_legend(schedule)


def test_profile_in_words(profile):
    text = report.profile_sentences(profile)
    assert "measured on 1 sample." in text
    assert "A step takes 44 ms: 40 ms in the blocks, 4 ms outside" in text
    assert "blocks 1-3: 30 ms to compute, 0.7 ms to reuse" in text


def test_profile_table(profile):
    lines = plain_text(report.profile_table(profile)).splitlines()
    assert lines[1].split() == ["0", "1.000", "-", "-"]
    assert lines[2].split() == ["1", "0.800", "4.0%", "30.0%"]
    assert lines[5].split() == ["4", "0.200", "50.0%", "6.0%"]
    figures = json.loads(machine.json_text(report.profile_figures(profile)))
    assert figures["stability"][0] == ["nan", "nan"]
    assert figures["stability"][4] == pytest.approx([0.5, 0.06])


@pytest.mark.parametrize(("change", "style"), [(0.05, "green"), (0.06, "yellow"), (0.15, "dark_orange"), (3.0, "red")])
def test_stability_colours(change, style):
    assert report.stability_text(change).style == style
    assert report.stability_text(change, compact=True).plain == f"{change * 100:.0f}"


def test_pictures_are_enlarged_without_blur(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    rows = [plots.PictureRow("row", pictures)]
    page = np.asarray(PIL.Image.open(plots.save_pictures(tmp_path / "p.png", rows, ["a", "b"])).convert("RGB"))
    for column, picture in enumerate(pictures):
        left = plots.LABEL_WIDTH + column * (96 + plots.GAP)
        top = plots.COLUMN_HEIGHT
        shown = page[top : top + 96, left : left + 96]
        assert np.array_equal(shown, picture.repeat(3, axis=0).repeat(3, axis=1))


def test_large_pictures_are_reduced(tmp_path):
    rows = [plots.PictureRow("", np.zeros((1, 512, 1024, 3)), ["caption"])]
    width, height = PIL.Image.open(plots.save_pictures(tmp_path / "p.png", rows, ["a"], "title")).size
    assert 512 < width < 800 and 256 < height < 400


def test_difference_is_amplified_and_cut_off():
    a, b = np.full((1, 4, 4, 3), 0.5), np.full((1, 4, 4, 3), 0.6)
    assert np.allclose(plots.difference(a, b), 0.4)
    assert plots.difference(a, np.ones((1, 4, 4, 3))).max() == 1.0


@pytest.mark.parametrize("content", ["stability", "schedule", "both"])
def test_maps(tmp_path, schedule, profile, content):
    panel = plots.MapPanel(
        "a title",
        GROUPS,
        SIGMAS,
        stability=profile.stability() if content != "schedule" else None,
        schedule=schedule if content != "stability" else None,
    )
    path = plots.save_maps(tmp_path / "m.png", [panel, panel])
    page = np.asarray(PIL.Image.open(path).convert("RGB"))
    colours = {tuple(c) for c in page.reshape(-1, 3)}
    assert len(colours) > 50
    assert ((27, 120, 55) in colours) == (content == "schedule")
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path, schedule):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    panel = plots.MapPanel("", GROUPS, SIGMAS, schedule=schedule)
    for call in (plots.check_installed, lambda: plots.save_maps(tmp_path / "m.png", [panel])):
        with pytest.raises(MissingExtraError, match=r'pip install "layercache\[figures\]"'):
            call()
    assert not list(tmp_path.iterdir())


# --- tables at the width of a terminal ----------------------------------------------------------------------------

LONGEST = "cache-dit:dbcache-taylor"


def front_of_long_names() -> FittingTable:
    psnr = (51.44, 30.79, 103.02)
    origin = "whole steps, surrogate, steer-all n=4+x+b q=0.5"
    names = ("layercache", LONGEST, "MeanCache, one-shot")
    return front_table([FrontRow(name, 0.6, 0.596, origin, psnr, psnr, 11.64, psnr) for name in names], "a title")


def comparison_of_long_names() -> FittingTable:
    figures = {"psnr": (51.44, 30.79), "ssim": (0.9981,), "lpips": (0.0213,), "cache_bytes": 7 * 2**30}
    setting = "F1B0 threshold 0.2481, whole steps, errors^1"
    names = ("layercache", LONGEST, "diffusers:taylorseer")
    return compared(
        [Outcome(n, setting, 0.75, 0.733, 6.5, 11.36, **figures, operators=13284, reads=0.17) for n in names]
    )


def peers_of_long_names() -> FittingTable:
    rows = [PeerRow("cache-dit + Taylor", bool(k), True, 120, 3, 210, 11, 60, 0.13128) for k in (0, 0, 1, 1)]
    return peer_table(rows)


def kernels_of_long_names() -> FittingTable:
    times = {name: Timing(0.0123456, 0.01, 0.02) for name in ("ours", "eager", "compiled", "copy")}
    host = {"ours": 2.04e-6, "eager": 104.1e-6}
    counts = {"ours": 1, "eager": 112}
    sizes = ((1, 4096, 3072), "bfloat16", "cuda", 752974720)
    row = KernelRow("capture and change, two streams", "capture", *sizes, times, 0.0, True, counts, {}, host)
    return kernel_table([row])


def profile_of_many_groups() -> FittingTable:
    return report.profile_table(made_profile(steps=12, groups=60, distance=2, span=1))


def steps_and_velocities(groups: int) -> FittingTable:
    """Cells of groups that forecast, and velocities of up to four terms."""
    steps, edges = 14, tuple((k, k + 1) for k in range(groups))
    sigmas = tuple(np.linspace(1, 0, steps + 1))
    prints = Fingerprint("SomeTransformer", "0123456789ab", groups, sigmas, ("cond",), "1.2.3")
    forecast = tuple({10: 1.25, 8: -0.25} for _ in range(groups))
    cells = (*((None,) * groups for _ in range(11)), forecast, ({},) * groups, (None,) * groups)
    velocity = Velocity({11: 1.25, 10: -2.125, 9: 1.5, 8: 0.375}, -0.125)
    velocities = (*(None for _ in range(12)), velocity, None)
    return report.schedule_table(Schedule(prints, edges, cells, (1.0,) * groups, velocities=velocities))


TABLES = {
    "front": front_of_long_names,
    "compare": comparison_of_long_names,
    "peers": peers_of_long_names,
    "kernels": kernels_of_long_names,
    "profile": profile_of_many_groups,
    "cells": lambda: steps_and_velocities(4),
    "many cells": lambda: steps_and_velocities(40),
}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_no_number_is_ever_cut(name, width):
    table = TABLES[name]()
    text = plain_text(table, width)
    assert max(map(len, text.splitlines())) <= width
    shown = table.headings(width)
    words = text.split()
    for cells in table.rows:
        for column, cell in zip(table.columns, cells, strict=True):
            if column.heading in shown:
                assert all(word in words for word in cell.plain.split()), (column.heading, cell.plain)
    missing = [column.heading for column in table.columns if column.heading not in shown]
    note = " ".join(text.split("Left out at this width:")[-1].split())
    assert all(heading in note for heading in missing) and ("Left out" in text) == bool(missing)
    assert {"method", "used", "PSNR"} & {c.heading for c in table.columns} <= set(shown)


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("groups", [4, 40])
def test_every_row_names_its_step_and_sigma(groups, width):
    text = plain_text(steps_and_velocities(groups), width)
    for part in text.split("\n\n"):
        lines = part.splitlines()
        assert lines[0].split()[:2] == ["step", "sigma"]
        begun = [line.split()[:2] for line in lines[1:] if line[:4].strip()]
        assert begun == [[str(step), f"{1 - step / 14:.3f}"] for step in range(14)]
    assert "1.25·v11" in text.split() and "-0.125·x" in text.split()


def test_columns_that_are_not_wanted_go_first():
    table = FittingTable([Column("name", numeric=False), Column("a", 1), Column("b", 2), Column("c")])
    table.add_row("x" * 10, "1234", "1234", "1234")
    assert [table.headings(width) for width in (28, 27, 20, 10)] == [
        ["name", "a", "b", "c"],
        ["name", "a", "c"],
        ["name", "c"],
        ["name", "c"],
    ]
    with pytest.raises(ValueError, match="4 columns, 1 cells"):
        table.add_row("x")
