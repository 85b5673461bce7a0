"""Summaries: five lines at most at a prompt, the same in a notebook, and nothing in them that is obeyed."""

from __future__ import annotations

from dataclasses import replace

import pytest

import layercache
from layercache.planning.front import Front, Point
from layercache.runtime.report import CacheReport
from layercache.schedule import ModuleSchedule
from support.profiles import made_profile

REPORT = CacheReport(
    0.5, 6, 6, 2, 12, 1, 2**20, ("cond", "uncond"), "scheduler", 3, 1.8, (40.0, 35.0), {"nothing said its step": 3}
)


def summarised():
    profile = made_profile(steps=8, groups=2, distance=4, span=4)
    schedule = layercache.plan(profile, 0.7)
    front = Front((Point(schedule, "a", (30.0, 40.0)),), (1.0, 0.1, 0.0), 7, ("a note",) * 9)
    modules = ModuleSchedule(profile.fingerprint, ("a",), ((True,),) * 8)
    return {
        "profile": (profile, ("8 steps", "2 groups", "2: a, b", "cond and uncond")),
        "schedule": (schedule, ("8 steps", f"{schedule.used:.1%} of the block time", "budget 0.7")),
        "planned from a front": (layercache.plan(front, 0.7), ("PSNR 35.0 dB, nine pictures of ten above 31.0",)),
        "front": (front, ("1 schedule ", f"{schedule.used:.3f}", "35.0", "7 runs, a note")),
        "empty front": (Front((), (1.0, 0.0, 0.0)), ("no schedules",)),
        "modules": (modules, ("1 modules", "100.0%")),
        "report": (REPORT, ("12 forwards in 2", "reused: 50.0%", "1.0 MiB", "1.80x", "35.0", "3 forwards because")),
    }


@pytest.mark.parametrize("name", summarised())
def test_five_lines_say_what_it_is(name):
    item, expected = summarised()[name]
    text, table = str(item), item._repr_html_()
    assert repr(item) == text and 1 <= text.count("\n") + 1 <= 5 and max(map(len, text.splitlines())) <= 180
    for words in expected:
        assert words in text and words in table
    assert table.startswith("<table>") and table.count("<tr>") == text.count("\n")


def test_names_of_strangers_are_escaped():
    profile = made_profile(steps=8, groups=2, distance=4, span=4)
    named = replace(profile.fingerprint, model_class="<img onerror=x>\x1b[2J\nsecond")
    item = replace(profile, fingerprint=named, samples=("<b>", "b" * 10_000))
    assert "<img" not in item._repr_html_() and "<b>" not in item._repr_html_()
    assert "\x1b" not in str(item) and len(str(item)) < 1000 and str(item).count("\n") <= 4
