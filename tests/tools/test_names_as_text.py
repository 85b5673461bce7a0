"""Names, notes and settings are text wherever they are shown: no markup, no links, no control characters."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from layercache.planning.front import Front, Point
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.schedule import Schedule
from layercache.tools.cli.app import app
from layercache.tools.compare.report import failures, save_page
from layercache.tools.compare.run import Outcome
from layercache.tools.report.front import rows_of, save_front_page, save_front_plot
from layercache.tools.report.plots import PictureRow, save_pictures
from support.profiles import made_profile

LINK = "[link=javascript:alert(1)]x[/link]"
ESCAPE = "\x1b]0;owned\x07\x1b[31mred\u202e"
FORMULA = "costs $\\frac{1 or $x"
NAMES = (LINK, ESCAPE, FORMULA, ":smile: <b>bold</b>")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def files(folder, name):
    """A file of each format whose names are this one."""
    profile = made_profile(steps=4, distance=2, span=1)
    prints = dataclasses.replace(profile.fingerprint, model_class=name, branches=(name, "b"), package_version=name)
    schedule = dataclasses.replace(Schedule.compute_all(prints), made_by={name: name, "method": name})
    modules = ModuleSchedule(prints, (f"{name}.0.a", name), ((True, True),) * 4, made_by={"method": name})
    front = Front((Point(schedule, name, (40.0,)),), (1.0, 0.1, 0.0), notes=(name,))
    profile = dataclasses.replace(profile, fingerprint=prints, samples=(name, "b"))
    made = {"schedule.json": schedule, "modules.json": modules, "front.json": front, "profile": profile}
    return [content.save(folder / kind) for kind, content in made.items()]


@pytest.mark.parametrize("name", NAMES)
def test_show_prints_and_plots_text(tmp_path, name):
    for path in files(tmp_path, name):
        result = invoke("show", path, "--plot", tmp_path / "plot.png")
        assert result.exit_code == 0, result.output
        assert "\x1b]" not in result.output and "\x07" not in result.output and "\u202e" not in result.output
        assert name != LINK or "[link=" in result.output
        (tmp_path / "plot.png").unlink()


def test_names_of_files_are_text(tmp_path):
    path = files(tmp_path, "Model")[0].rename(tmp_path / f"{FORMULA}\x1b[31m.json")
    assert invoke("show", path, "--plot", tmp_path / "plot.png").exit_code == 0
    (tmp_path / f"{ESCAPE}.json").write_text("{")
    for result in (invoke("show", tmp_path / f"{ESCAPE}.json"), invoke("show", tmp_path / f"no {ESCAPE}")):
        assert result.exit_code in (1, 2) and "\x1b]" not in result.output and "\\x1b" in result.output


@pytest.mark.parametrize("name", NAMES)
def test_pages_and_plots_hold_text(tmp_path, name):
    outcome = Outcome(name, name, 0.5, 0.5, 1.0, 1.0, (40.0,), (0.9,), (), 0, 1.0, 1.0)
    failed = Outcome(name, "", 0.5, error=f"MethodError: {name}")
    page = save_page(tmp_path / "page.html", [outcome, failed], name, []).read_text()
    front = Front.load(files(tmp_path, name)[2])
    for text in (page, save_front_page(tmp_path / "front.html", rows_of(front), name).read_text()):
        assert "href" not in text and "\x1b" not in text and "<b>" not in text and "\u202e" not in text
        assert name != LINK or "[link=" in text
        assert "\N{SMILING FACE WITH OPEN MOUTH AND SMILING EYES}" not in text
    save_front_plot(tmp_path / "front.png", rows_of(front), name)
    save_pictures(tmp_path / "grid.png", [PictureRow(name, [[[[0.5] * 3] * 8] * 8], [name])], [name], name)
    assert "\x1b" not in "".join(failures([failed]))


def test_figures_are_json_whatever_the_names(tmp_path):
    result = invoke("show", files(tmp_path, ESCAPE)[2], "--json", "-")
    assert json.loads(result.stdout)["notes"] == [ESCAPE] and "\x1b" not in result.stdout
