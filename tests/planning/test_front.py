"""The front of a search: what it keeps, chooses and writes, on a tiny untrained pipeline."""

import json
from dataclasses import replace

import numpy as np
import pytest

import layercache
from layercache.errors import BudgetError, FileFormatError
from layercache.planning.front import Front, Point, quality
from layercache.planning.rollout import Rollouts, skipping
from layercache.planning.search import BAR
from layercache.tools.report.front import (
    FrontRow,
    front_table,
    order_sentence,
    rows_of,
    save_front_page,
    save_front_plot,
)
from support.text import plain_text
from support.tiny import generators, tiny_pipeline

STEPS = 8
PROMPTS = [["cat", "coffee"], "rocket"]
SEEDS = [3, 4, 5]
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(2)


@pytest.fixture(scope="module")
def rollouts(pipe):
    return Rollouts(pipe, PROMPTS, SEEDS, **CALL)


@pytest.fixture(scope="module")
def front(pipe, short_searches):
    validation = (["temple"], [9])
    settings = {"seeds": SEEDS, "budgets": (0.75, 0.5), "effort": "quick", "validation": validation, "progress": False}
    return layercache.search(pipe, PROMPTS, **settings, **CALL)


def test_the_front_keeps_what_it_promises(pipe, rollouts, front):
    assert [p.used for p in front.points] == sorted(p.used for p in front.points)
    qualities = [quality(p.expected, 0.5) for p in front.points]
    assert qualities == sorted(qualities)
    for point in front.points:
        assert rollouts.run(point.schedule).psnr == pytest.approx(point.psnr, rel=1e-9)
        assert len(point.held_out) == 1 and len(point.expected) == 3


def test_schedules_of_whole_steps_carry_the_measured_seconds(pipe, front):
    blocks = front.seconds[0]
    for schedule in (point.schedule for point in front.points):
        assert schedule.group_seconds == (blocks,) and schedule.is_timed
        skipped = sum(schedule.is_skipped(step) for step in range(STEPS))
        assert schedule.used == (STEPS - skipped) / STEPS
        with layercache.enabled(pipe, schedule) as cache:
            pipe("cat", generator=generators(1)[0], output_type="latent", **CALL)
            assert cache.report().used == schedule.used
            assert cache.metrics()["seconds_saved"] == pytest.approx(skipped * blocks)


def test_old_fronts_without_measured_seconds_stay_as_they_are(pipe, front, tmp_path):
    path = front.save(tmp_path / "front.json")
    data = json.loads(path.read_text())
    del data["checksum"]
    for point in data["points"]:
        point["schedule"]["group_seconds"] = [1.0]
    path.write_text(json.dumps(data))
    old, new = Front.load(path).points[0].schedule, front.points[0].schedule
    assert not old.is_timed and (old.cells, old.velocities, old.used) == (new.cells, new.velocities, new.used)
    with layercache.enabled(pipe, old) as cache:
        pipe("cat", generator=generators(1)[0], output_type="latent", **CALL)
        assert cache.report().used == new.used and cache.metrics()["seconds_saved"] == 0.0


def test_budgets_speedups_and_qualities_are_chosen(front):
    assert layercache.plan(front, 0.5).used <= 0.5
    assert layercache.plan(front, 0.75).used <= 0.75
    best = front.points[-1]
    for percentile, figure in ((None, np.mean), (10, lambda psnr: np.percentile(psnr, 10))):
        top = max(figure(p.likely) for p in front.points)
        first = next(p for p in front.points if figure(p.likely) == top)
        assert front.choose(min_psnr=top, percentile=percentile) == first
    assert front.choose(speedup=1.0) == best
    speed = front.speedup(front.points[0])
    assert front.choose(speedup=speed) == front.points[0]
    for condition in (
        {"budget": 0.01},
        {"speedup": 50.0},
        {"min_psnr": 1000.0},
        {},
        {"budget": 0.5, "speedup": 2.0},
        {"budget": 0.5, "percentile": 10},
    ):
        with pytest.raises(BudgetError):
            front.choose(**condition)
    for condition in ({"budget": 0.0}, {"budget": 1.5}, {"speedup": 0.5}):
        with pytest.raises(BudgetError):
            front.choose(**condition)


def test_files(front, tmp_path):
    path = front.save(tmp_path / "front.json")
    assert Front.load(path) == front
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(FileFormatError, match="whole"):
        Front.load(path)
    path.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(FileFormatError, match="upgrade"):
        Front.load(path)
    with pytest.raises(FileFormatError, match="does not exist"):
        Front.load(tmp_path / "none.json")


def test_dominated_points_are_dropped(rollouts):
    cheap, dear = (skipping(rollouts.fingerprint, steps) for steps in ([0, 4], [0, 2, 4]))
    points = [Point(cheap, "a", (30.0,)), Point(dear, "b", (29.0,)), Point(dear, "c", (31.0,))]
    assert [p.origin for p in Front.of(points, (1.0, 0.1, 0.01)).points] == ["a", "c"]
    astray = Point(dear, "d", (60.0,) * 4 + (10.0,))  # a good mean, one bad picture
    for tail, origins in ((0.0, ["a", "d"]), (1.0, ["a", "c"])):
        front = Front.of([*points, astray], (1.0, 0.1, 0.01), tail=tail)
        assert [p.origin for p in front.points] == origins


def test_table_plot_and_page(front, tmp_path):
    rows = rows_of(front)
    text = plain_text(front_table(rows, "a title"), width=200)
    assert f"{front.points[0].validation.mean:.2f}" in text
    assert save_front_plot(tmp_path / "f.png", rows).read_bytes().startswith(b"\x89PNG")
    page = save_front_page(tmp_path / "f.html", rows, "<budget>", front=front).read_text()
    assert "&lt;budget&gt;" in page and f"used {front.points[0].used:.3f}" in page
    assert "http://" not in page and "https://" not in page


def test_how_all_were_found_stands_once():
    rows = [FrontRow("layercache", used, used, "whole steps, hold", (40.0,)) for used in (0.6, 0.5)]
    text = " ".join(plain_text(front_table(rows), width=80).split())
    assert text.count("velocity held") == 1 and "found by" not in text.replace("All were found by", "")
    apart = front_table([*rows, replace(rows[0], origin="by hand")])
    assert [cells[-1].plain for cells in apart.rows][-1] == "by hand"


def test_the_bar_of_a_search_fits_a_terminal():
    text = BAR.format(n=160, total=160, bar="", elapsed="1:00:00", remaining="1:00:00", postfix=", used 0.50: 60.3 dB")
    assert len(text) <= 80


def row(used, psnr, held_out=()):
    return FrontRow("layercache", used, used, "by hand", psnr, held_out)


def test_what_is_said_of_the_order_holds_in_the_figures():
    rising = [row(0.75, (50.0, 52.0)), row(0.5, (45.0, 47.0)), row(0.25, (30.0, 31.0))]
    assert order_sentence(rising) == "Every schedule has a higher mean PSNR than all that use less."
    judged = [row(0.75, (50.0, 52.0), (41.0,)), row(0.5, (45.0, 47.0), (42.0,)), row(0.25, (30.0, 31.0), (30.0,))]
    assert order_sentence(judged) == (
        "1 of 3 schedules has no higher mean PSNR than one that uses less: they were chosen on 2 other pictures, and 1 "
        "held-out picture is few to tell neighbours apart."
    )
    upside_down = [row(used, (50.0,) * 16, (50.0 - used,) * 12) for used in (0.75, 0.5, 0.25)]
    assert order_sentence(upside_down) == (
        "2 of 3 schedules have no higher mean PSNR than one that uses less: they were chosen on 16 other pictures, and "
        "12 held-out pictures are few to tell neighbours apart."
    )
    # a front weighs the 10 % quantile too
    steadier = [row(0.75, (40.0, 44.0)), row(0.5, (20.0, 65.0))]
    assert order_sentence(steadier) == (
        "1 of 2 schedules has no higher mean PSNR than one that uses less: it was chosen for its worst pictures too, "
        "the 10 % quantile."
    )


def test_nothing_is_said_of_an_order_where_there_is_none():
    assert order_sentence([]) == order_sentence([row(0.5, (40.0,))]) == ""
    same = [row(0.75, (40.004,)), row(0.5, (40.001,))]  # the same figure in the table
    assert order_sentence(same).startswith("1 of 2 schedules has no higher")


def test_quality_weighs_the_tail():
    psnr = (60.0,) * 9 + (10.0,)
    assert quality(psnr, 0.0) == pytest.approx(55.0)
    assert quality(psnr, 1.0) == pytest.approx(np.quantile(psnr, 0.1))
    assert quality(psnr, 0.5) == pytest.approx((55.0 + np.quantile(psnr, 0.1)) / 2)
