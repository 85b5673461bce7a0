"""`layercache compare`: its figures against the same runs made by hand, going on after a stop, and its files."""

import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import layercache
from layercache._utils.metrics import psnr, ssim
from layercache.errors import (
    BudgetError,
    FileFormatError,
    LayerCacheError,
    LayerCacheWarning,
    MethodError,
    ScheduleMismatchError,
)
from layercache.methods import EasyCache, InvarDiff
from layercache.methods.fixed import TaylorSeer, uniform
from layercache.runtime.attachment import attachment_of
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.tools.cli.app import app
from layercache.tools.compare.entries import METHODS, PEERS, CalibratedModel
from layercache.tools.compare.files import finished
from layercache.tools.compare.report import comparison_table, failures, save_comparison
from layercache.tools.compare.run import Comparison, Counter, Outcome
from layercache.tools.compare.tuned import TUNINGS
from layercache.tools.compare.tuning import ENDS, _changes, by_interval, by_threshold
from support.marks import slow
from support.text import plain_text
from support.tiny import calm_pipeline

STEPS = 8
CALL = {"num_inference_steps": STEPS, "guidance_scale": 4.0}
PROMPTS, SEEDS = [["cat", "coffee"], ["rocket"]], [0, 1, 2]


@pytest.fixture(scope="module")
def pipe():
    """Residuals that change by less than their own size from step to step, so that thresholds below 1 reach budgets."""
    return calm_pipeline(4)


@pytest.fixture(scope="module")
def model(pipe):
    return CalibratedModel(pipe, ["retina"], [10], CALL, [0.5], effort="quick", rounds=2)


def pictures(pipe, plan=None):
    found = []
    for prompts, seeds in ((PROMPTS[0], SEEDS[:2]), (PROMPTS[1], SEEDS[2:])):
        call = {**CALL, "generator": [torch.Generator().manual_seed(s) for s in seeds], "output_type": "np"}
        if plan is None:
            found.append(pipe(prompts, **call).images)
        else:
            with layercache.enabled(pipe, plan):
                found.append(pipe(prompts, **call).images)
    return np.concatenate(found)


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory):
    comparison = Comparison(model, PROMPTS, SEEDS, tmp_path_factory.mktemp("compare"))
    return comparison, comparison.run(["uniform", "taylorseer"])


def test_figures_are_those_of_the_same_runs(pipe, model, compared):
    comparison, outcomes = compared
    schedule, setting = model.made("uniform", 0.5)
    reference, cached = pictures(pipe), pictures(pipe, schedule)
    found = outcomes[0]
    assert (found.method, found.setting, found.used) == ("uniform", setting, 0.5)
    assert found.psnr == pytest.approx(psnr(reference, cached)) and found.ssim == pytest.approx(ssim(reference, cached))
    assert np.array_equal(comparison.full_pictures(), reference)
    np.testing.assert_array_equal(comparison.pictures(found), cached)
    assert found.cache_bytes > 0 and found.operators > 100 and found.seconds > 0 and found.speedup > 0


def test_a_router_learns_from_none_of_the_pictures_that_are_compared(model, monkeypatch):
    seeds = []
    monkeypatch.setattr(model, "_routers", {})
    monkeypatch.setattr("layercache.methods.LearningToCache.train", lambda self, *a, **k: seeds.append(self.seed))
    model.router(0.6)
    assert seeds == [10] and max(SEEDS) < 10


@pytest.mark.slow
def test_a_peer_with_the_same_decisions_gives_the_same_pictures(model, tmp_path):
    ours, theirs = Comparison(model, PROMPTS, SEEDS, tmp_path).run(["fbcache", "diffusers:fbcache"])
    # tuned on another sample, so the share is near the budget only
    assert 0.3 < ours.used < 0.7 and theirs.used == pytest.approx(ours.used)
    assert theirs.psnr == pytest.approx(ours.psnr, abs=0.05) and theirs.cache_bytes is None
    assert "warmup" in ours.setting or theirs.setting == ours.setting


@pytest.mark.slow
def test_one_failure_does_not_lose_the_others(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    outcomes = Comparison(model, PROMPTS, SEEDS, tmp_path).run(["cache-dit:dbcache", "uniform"])
    assert "cache-dit is not installed" in outcomes[0].error and math.isnan(outcomes[0].used)
    assert failures(outcomes) == ["cache-dit:dbcache at 0.5: cache-dit is not installed: pip install cache-dit"]
    assert outcomes[1].used == 0.5 and not outcomes[1].error


@pytest.mark.slow
def test_cache_dit_is_tuned_too(model, tmp_path):
    pytest.importorskip("cache_dit")
    (outcome,) = Comparison(model, PROMPTS, SEEDS, tmp_path).run(["cache-dit:dbcache"])
    assert not outcome.error and 0.3 < outcome.used < 0.7


@pytest.mark.parametrize("damage", ["cut", *slow("empty", "changed", "missing", "other")])
def test_damaged_pictures_are_made_again(model, compared, tmp_path, damage):
    comparison, outcomes = compared
    shutil.copytree(comparison.folder, tmp_path / "copy")
    for name in ("full.npy", "pictures/uniform-0.5.npy"):
        path = tmp_path / "copy" / name
        whole = path.read_bytes()
        path.unlink()
        contents = {"cut": whole[:-100], "empty": b"", "changed": whole[:-1] + bytes([whole[-1] ^ 1]), "other": b"PK"}
        if damage != "missing":
            path.write_bytes(contents[damage])
        again = Comparison(model, PROMPTS, SEEDS, tmp_path / "copy")
        assert [o.psnr for o in again.run(["uniform"])] == [outcomes[0].psnr]
        assert np.array_equal(np.load(path), np.load(comparison.folder / name))
        assert save_comparison(again, outcomes[:1], ["a", "b", "c"], "again")["page"].exists()


def test_goes_on_where_it_was_stopped(model, compared, monkeypatch):
    comparison, outcomes = compared
    again = Comparison(model, PROMPTS, SEEDS, comparison.folder)
    monkeypatch.setattr(again.calls, "run", lambda *a: pytest.fail("generated again"))
    names = [o.method for o in outcomes if not o.error]
    assert [o.psnr for o in again.run(names)] == [o.psnr for o in outcomes if not o.error]
    with pytest.raises(ScheduleMismatchError, match="another folder"):
        Comparison(model, PROMPTS, [4, 5, 6], comparison.folder)


def test_outcomes_of_an_earlier_tuning_are_run_again(model, compared, monkeypatch, tmp_path):
    comparison, outcomes = compared
    shutil.copytree(comparison.folder, tmp_path / "copy")
    monkeypatch.setitem(TUNINGS, "uniform", 1)
    again = Comparison(model, PROMPTS, SEEDS, tmp_path / "copy")
    assert again.is_complete(["taylorseer"]) and not again.is_complete(["uniform"])
    assert finished(tmp_path / "copy", ["uniform"], [0.5], {}) is None
    with pytest.warns(LayerCacheWarning, match="holds of uniform was .* tuned in another way; it is run again"):
        found = again.run(["uniform", "taylorseer"])
    assert [o.psnr for o in found] == [o.psnr for o in outcomes] and found[1] == outcomes[1]
    assert again.is_complete(["uniform", "taylorseer"])


def test_a_damaged_file_is_refused(model, tmp_path):
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(FileFormatError, match="remove it"):
        Comparison(model, PROMPTS, SEEDS, tmp_path)
    with pytest.raises(LayerCacheError, match="one seed per picture"):
        Comparison(model, PROMPTS, [1], tmp_path / "other")


TUNED = ("dbcache", "dicache", "fbcache", "fbcache-1", "invardiff", "l2c", "spectralcache", "teacache")
TUNED += ("precisecache", "seacache", "sencache")


OTHERS = ("precisecache-steps", "seacache-1", "easycache", "layercache", "uniform", "fewer-steps", "fewer-steps-sigmas")
PLANNED = [name for name in METHODS if name not in TUNED + OTHERS]


@pytest.mark.parametrize("name", [*PLANNED, *slow(*TUNED)])
def test_every_method_keeps_to_the_budget(model, name):
    plan, setting = METHODS[name](model, 0.6)
    planned = isinstance(plan, (layercache.Schedule, ModuleSchedule))
    used = plan.used if planned else model.used_by(plan)
    assert 0 < used <= 0.6 + 1e-9 and setting
    if name == "l2c":  # below a half by another period
        assert METHODS[name](model, 0.3)[0].used <= 0.3
    assert attachment_of(model.pipeline.transformer) is None


def test_thresholds_are_tuned_to_the_largest_share_within_the_budget(model):
    tried = []
    build = by_threshold(lambda model, t: tried.append(t) or uniform(model.fingerprint, 1 + int(t)), 1, 64)
    plan, _ = build(model, 0.55)
    assert plan.used == pytest.approx(0.5) and len(tried) == 9
    with pytest.raises(BudgetError, match="no threshold"):
        build(model, 0.01)


def test_steps_at_both_ends_are_those_that_give_the_best_pictures(model):
    """Each with the shortest interval within the budget; the ends that a method has by itself are among them."""
    fingerprint = replace(model.fingerprint, sigmas=tuple(1 - k / 20 for k in range(21)))
    made, seen = {}, []

    def quality_of(plan):
        computed = [step for step in range(20) if not plan.is_skipped(step)]
        assert plan.used <= 0.6
        seen.append(computed)
        return made.setdefault(tuple(computed), len({*range(5)} & {*computed}) + 3 * ({18, 19} <= {*computed}))

    stub = SimpleNamespace(fingerprint=fingerprint, quality_of=quality_of)
    plan, setting = by_interval(lambda model, n: TaylorSeer(interval=n))(stub, 0.6)
    assert len(seen) == 5 and quality_of(plan) == max(made.values())
    assert setting == "interval 3, warmup 5, stop 18"


def test_steps_at_both_ends_that_a_method_cannot_have_are_left_out():
    """Each end by its own settings: shares of the steps, or numbers of them."""
    changes = [list(_changes(InvarDiff(), names, shares, 20)) for names, shares in ENDS]
    assert changes == [[{"nonskip": 0.0}, {"nonskip": 0.25}], [{"cooldown": 2}]]
    changes = [list(_changes(EasyCache(warmup=3), names, shares, 20)) for names, shares in ENDS]
    assert changes == [[{"warmup": 1}, {"warmup": 2}, {"warmup": 5}], [{"cooldown": 0}, {"cooldown": 2}]]


@pytest.mark.slow
def test_searched_layercache_is_in_it(pipe, model):
    plan, origin = METHODS["layercache"](model, 0.5)
    assert plan.used <= 0.5 and origin


def test_unknown_methods_are_refused_at_once(model, tmp_path):
    with pytest.raises(MethodError, match=r"unknown method nocache.*fbcache"):
        Comparison(model, PROMPTS, SEEDS, tmp_path).run(["nocache"])
    result = CliRunner().invoke(app, ["compare", "--methods", "nocache", "-o", str(tmp_path / "x")])
    assert result.exit_code == 1 and "unknown method nocache" in result.output and not (tmp_path / "x").exists()


def test_counting():
    with Counter() as counter:
        x = torch.ones(3) + 1
        assert float(x.sum()) == 6.0
        x.tolist()
        bool(x[0] > 0)
    assert counter.operators >= 4 and counter.reads >= 3
    assert torch.ones(1).item() == 1.0 and torch.Tensor.item.__name__ == "item"


def test_files_of_a_comparison(compared):
    comparison, outcomes = compared
    files = save_comparison(comparison, outcomes, ["cat", "coffee", "rocket"], "a <title>")
    assert all(path.stat().st_size > 1000 for path in files.values())
    text = files["page"].read_text(encoding="utf-8")
    assert "a &lt;title&gt;" in text and "taylorseer" in text and "2: coffee" in text
    # full, and each outcome's picture and difference, of three prompts
    assert text.count("data:image/webp;base64,") == 3 * (1 + 2 * sum(not o.error for o in outcomes))
    assert outcomes[0].setting in plain_text(comparison_table(outcomes), 170)
    assert outcomes[0].setting not in plain_text(comparison_table(outcomes, width=80), 170)
    data = json.loads(files["figures"].read_text())
    assert {"machine", "settings", "outcomes"} <= set(data)
    assert [Outcome.from_json(o).psnr for o in data["outcomes"]][0] == pytest.approx(outcomes[0].psnr)


@pytest.mark.slow
def test_command(tmp_path):
    arguments = ["compare", "--methods", "uniform,meancache", "--budgets", "0.6", "--steps", "6", "--seeds", "2"]
    arguments += ["--calibration", "2", "--batch", "2", "-o", str(tmp_path / "out"), "--json", str(tmp_path / "f.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"compare.json", "compare.html", "compare.png"}
    rows = json.loads((tmp_path / "f.json").read_text())["outcomes"]
    assert [row["method"] for row in rows] == ["uniform", "meancache"] and all(len(r["psnr"]) == 2 for r in rows)


def test_peers_are_named_after_their_packages():
    assert all(":" in name for name in PEERS) and not any(":" in name for name in METHODS)
