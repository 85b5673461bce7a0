"""`layercache.compare` and `layercache.measure`: their figures against direct computation, and methods of one's own."""

import copy
import importlib.metadata
import json
import math
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig

import layercache
from layercache.errors import (
    ArgumentError,
    BudgetError,
    CacheStateError,
    FileFormatError,
    MethodError,
    MissingExtraError,
    ScheduleMismatchError,
)
from layercache.methods import FBCache, TaylorSeer, Uniform
from layercache.planning.front import Front, Point
from layercache.runtime.attachment import attachment_of
from layercache.runtime.report import CacheReport
from layercache.tools.compare import calls as calls_module
from layercache.tools.compare.calls import PictureCalls, samples_of
from layercache.tools.compare.files import ComparisonFiles, Outcome, finished
from layercache.tools.compare.peers import block_calls
from layercache.tools.compare.scores import fidelity
from layercache.tools.compare.table import ComparisonTable
from layercache.tools.compare.trial import run_trial, steps_taken
from support.marks import slow
from support.tiny import calm_pipeline, generate
from support.zoo import build

CALL = {"num_inference_steps": 6, "guidance_scale": 4.0}
PROMPTS = ["cat", {"prompt": "coffee"}]


@pytest.fixture(scope="module")
def pipe():
    return calm_pipeline(2)


@pytest.fixture(scope="module")
def schedule(pipe):
    with layercache.enabled(pipe, Uniform(interval=3)) as cache:
        generate(pipe, steps=6)
        return cache.schedule


@contextmanager
def first_block_cache(pipe):
    """A cache that is none of ours."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.7))
    try:
        yield "this is no cache of layercache"
    finally:
        pipe.transformer.disable_cache()


def made_for(model, budget):
    return TaylorSeer(interval=3), f"for {budget:g}"


def fails(model, budget):
    raise ZeroDivisionError("as it was written")


METHODS = {
    "every third": Uniform(interval=3),
    "tuned/class": FBCache,
    "function": made_for,
    "hooks": first_block_cache,
    "ours": FBCache(threshold=0.7),
    "fails": fails,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


def compared(pipe, folder, methods=METHODS, budgets=(0.8,), **more):
    more = {"calibration": 1, "progress": False, **CALL, **more}
    return layercache.compare(pipe, methods, PROMPTS, budgets, folder=folder, **more)


@pytest.fixture(scope="module")
def table(pipe, folder):
    return compared(pipe, folder)


def pictures(pipe, plan=None):
    """The two pictures, and how many blocks ran."""
    ran = []
    hooks = [block.register_forward_hook(lambda *_: ran.append(1)) for block in pipe.transformer.transformer_blocks]
    found = []
    for seed, prompt in enumerate(("cat", "coffee")):
        call = {**CALL, "generator": torch.Generator().manual_seed(seed), "output_type": "np"}
        if plan is None:
            found.append(pipe(prompt, **call).images)
        else:
            with layercache.enabled(pipe, plan):
                found.append(pipe(prompt, **call).images)
    for hook in hooks:
        hook.remove()
    return np.concatenate(found).astype(np.float64), len(ran)


def decibels(a, b):
    return [-10 * math.log10(np.mean((x - y) ** 2)) for x, y in zip(a, b, strict=True)]


def test_rows_are_what_the_same_runs_give(pipe, table):
    full, blocks = pictures(pipe)
    for name, plan in (("every third", Uniform(interval=3)), ("function", TaylorSeer(interval=3))):
        cached, ran = pictures(pipe, plan)
        (row,) = table.of(name)
        assert row.psnr == pytest.approx(decibels(full, cached)) and row.used == pytest.approx(ran / blocks)
        assert row.psnr_worst == min(row.psnr) and row.psnr_mean == pytest.approx(np.mean(row.psnr))
        assert row.psnr_p10 == pytest.approx(np.quantile(row.psnr, 0.1)) and row.ssim > 0.9
        assert row.speedup == np.median(row.speedups) and len(row.speedups) == 3 and row.seconds > 0
        assert (row.speedup_low, row.speedup_high) == (min(row.speedups), max(row.speedups))
    assert table.full_seconds > 0 and attachment_of(pipe.transformer) is None


def test_every_kind_of_method_has_its_row(table):
    rows = {row.method: row for row in table}
    assert list(rows) == list(METHODS) and len(table) == len(table.rows) == 6
    assert (rows["every third"].budget, rows["every third"].setting) == (None, "Uniform(interval=3)")
    assert rows["function"].budget == 0.8 and rows["function"].setting == "for 0.8"
    assert rows["tuned/class"].used <= 0.8 and rows["tuned/class"].setting.startswith("threshold 0.")
    assert rows["fails"].error == "ZeroDivisionError: as it was written" and math.isnan(rows["fails"].used)
    # the hook of diffusers takes the decisions that ours takes with this threshold, and its share is counted
    assert rows["hooks"].used == pytest.approx(rows["ours"].used) and 0 < rows["hooks"].used < 1
    assert rows["hooks"].psnr == pytest.approx(rows["ours"].psnr, abs=0.05) and rows["hooks"].cache_bytes is None
    assert rows["ours"].cache_bytes > 0


def test_a_finished_comparison_is_read_and_nothing_runs(pipe, table, folder, monkeypatch):
    monkeypatch.setattr(PictureCalls, "run", lambda *_: pytest.fail("generated again"))
    settled = {name: value for name, value in METHODS.items() if name != "fails"}
    again = compared(pipe, folder, settled)
    assert again.rows == tuple(row for row in table if row.method != "fails")
    assert finished(folder, settled, (0.8,), {}) is not None
    assert finished(folder, settled, (0.8, 0.5), {}) is None and finished(folder, settled, (0.8,), {"steps": 7}) is None
    assert finished(folder / "none", settled, (0.8,), {}) is None
    # its own reason would not make another try fail again
    assert finished(folder, METHODS, (0.8,), {}) is None and [row.error for row in again] == [""] * 5
    with pytest.raises(ScheduleMismatchError, match="another folder"):
        compared(pipe, folder, num_inference_steps=7)


def test_another_method_under_the_same_name_is_run(pipe, table, folder):
    ran = compared(pipe, folder, {"every third": Uniform(interval=2), "function": made_for})
    assert [row.used for row in ran] == pytest.approx([0.5, table.of("function")[0].used])
    assert ran.of("function")[0].speedups == table.of("function")[0].speedups


def refused(pipe, kind, match, *arguments, **more):
    before = pipe.transformer.forward
    pipe.transformer.forward = lambda *_, **__: pytest.fail("it ran")
    try:
        with pytest.raises(kind, match=match):
            layercache.compare(pipe, *arguments, progress=False, **more)
    finally:
        pipe.transformer.forward = before
        if pipe.transformer.__dict__.get("forward") is not None:
            del pipe.transformer.forward


def test_what_cannot_be_compared_is_refused_before_anything_runs(pipe, schedule):
    refused(pipe, MethodError, r"unknown method meancach;.*meancache", ["meancach"], ["cat"])
    refused(pipe, MethodError, r"method 'mine' is int, which is no plan; give", {"mine": 3}, ["cat"])
    refused(pipe, MethodError, r"the class Front; give an instance", {"mine": Front}, ["cat"])
    refused(pipe, MethodError, r"a function that does not take", {"mine": lambda a, b, c: None}, ["cat"])
    refused(pipe, MethodError, "mapping from names", [Uniform()], ["cat"])
    refused(pipe, MethodError, r"\(none given\)", {}, ["cat"])
    refused(pipe, BudgetError, "above 0 and at most 1", "uniform", ["cat"], (1.5,))
    refused(pipe, ArgumentError, "one seed per picture: 2 pictures, 1 seeds", "uniform", PROMPTS, seeds=[4])
    refused(pipe, ArgumentError, "unknown effort", "uniform", PROMPTS, effort="hard")
    refused(pipe, ArgumentError, r"DemoPipeline takes no steps; it takes prompt, num", "uniform", PROMPTS, steps=4)
    refused(pipe, ArgumentError, "generator is given by", "uniform", PROMPTS, generator=torch.Generator())
    with layercache.enabled(pipe, schedule):
        refused(pipe, CacheStateError, "disable first", "uniform", PROMPTS)


def test_fronts_and_functions_without_a_plan(pipe, schedule, tmp_path):
    front = Front((Point(schedule, "by hand", (40.0,)),), (1.0, 0.1, 0.0))
    methods = {"front": front, "plan": schedule, "none": lambda model, budget: 3}
    rows = compared(pipe, None, methods, (0.5, 0.1), repeats=1).rows
    # no point keeps to a budget of 0.1: the nearest is taken
    assert [(row.method, row.budget) for row in rows[:3]] == [("front", 0.5), ("front", 0.1), ("plan", None)]
    assert [row.used for row in rows[:3]] == pytest.approx([1 / 3] * 3) and rows[0].psnr == rows[2].psnr
    assert rows[3].error.startswith("MethodError: its function returned int for a budget of 0.5, which is no plan")
    path = ComparisonTable(ComparisonFiles(tmp_path), []).save(tmp_path / "empty.json")
    assert ComparisonTable.load(path).rows == ()


def entry_points(monkeypatch, **values):
    found = [importlib.metadata.EntryPoint(name, value, "layercache.methods") for name, value in values.items()]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: found if group == "layercache.methods" else []
    )


def test_methods_of_packages_go_by_the_names_of_their_entry_points(pipe, monkeypatch):
    entry_points(monkeypatch, theirs="layercache.methods.fixed:Uniform", broken="nowhere_to_be_found:X")
    (row,) = compared(pipe, None, ["theirs"], repeats=1).rows
    assert row.method == "theirs" and row.used == 0.5 and row.budget is None
    refused(pipe, MethodError, "broken, which another package brings, does not import", ["broken"], ["cat"])


@pytest.mark.parametrize("plan", [Uniform(interval=3), *slow(FBCache(threshold=0.7))])
def test_measured_figures_are_those_of_the_same_runs(pipe, plan):
    found = layercache.measure(pipe, plan, PROMPTS, repeats=2, **CALL)
    full, blocks = pictures(pipe)
    cached, ran = pictures(pipe, plan)
    assert found.psnr == pytest.approx(decibels(full, cached)) and found.used == pytest.approx(ran / blocks)
    assert len(found.speedups) == 2 and found.speedup == np.median(found.speedups) and found.cache_bytes > 0
    assert found.forwards == 2 * 2 * 6 and found.computed_in_full == [] and found.fallback_rows == 0
    assert str(found).startswith(f"{type(plan).__name__}(") and len(str(found).splitlines()) == 4
    assert json.loads(found.to_json())["used"] == found.used and found._repr_html_().count("<tr>") == 4


def test_what_was_computed_in_full_is_said(pipe):
    found = layercache.measure(pipe, Uniform(interval=3), ["cat"], repeats=1, **CALL)
    changed = type(found)(**{**vars(found), "unidentified": 3})
    assert "3 of 12 forwards were computed in full because nothing said their step" in str(changed)


def test_measure_takes_a_target_as_enable_does(pipe):
    found = layercache.measure(pipe, prompts=["cat"], budget=0.5, repeats=1, **CALL | {"num_inference_steps": 8})
    assert found.used == pytest.approx(0.5) and found.forwards == 16 and found.psnr[0] > 30
    assert attachment_of(pipe.transformer) is None and type(pipe).__name__ == "DemoPipeline"
    with pytest.raises(MethodError, match="the prompts come behind it"):
        layercache.measure(pipe, ["cat"])
    with pytest.raises(MethodError, match="give an instance: Uniform"):
        layercache.measure(pipe, Uniform, ["cat"])


class Stub:
    """Calls of so many seconds, full and cached, that note their order."""

    def __init__(self, monkeypatch, times):
        self.times, self.order, self.is_cached = dict(times), [], False
        self.batches, self.pipeline = [(0, 1), (1, 2)], None
        monkeypatch.setattr("layercache.tools.compare.trial.find_transformer", lambda pipe: None)

    def run(self, batch, changed=None):
        kind = "cached" if self.is_cached else "full"
        self.order.append(f"{kind} {batch}")
        return np.full((1, 2, 2, 3), batch), self.times[kind].pop(0)

    @contextmanager
    def attach(self):
        self.is_cached = True
        yield self
        self.is_cached = False

    def report(self):
        forwards = 10 * sum(one.startswith("cached") for one in self.order)
        return CacheReport(0.5, 0, 0, 0, forwards, 0, len(self.order), ())


def test_full_and_cached_runs_take_turns(monkeypatch):
    stub = Stub(monkeypatch, {"full": [4.0, 6.0, 10.0], "cached": [99.0, 2.0, 2.0, 4.0]})
    trial = run_trial(stub, stub.attach, repeats=3)
    assert stub.order == [f"{one} {b}" for b, one in ((0, "cached"), (0, "full"), (0, "cached"), (1, "cached"))] + [
        "full 1",
        "full 0",
        "cached 0",
    ]
    assert trial.pairs == ((4, 2), (6, 2), (10, 4)) and trial.speedups == (2.0, 3.0, 2.5) and trial.speedup == 2.5
    assert trial.seconds == 4.0 and trial.used == 0.5
    assert np.concatenate(trial.looks)[:, 0, 0, 0].tolist() == [0, 1]


def test_steps_are_counted_on_the_sampler_alone(pipe):
    with layercache.enabled(pipe, Uniform()), steps_taken(pipe) as steps:
        copied = copy.deepcopy(pipe.scheduler)
        pipe("cat", **CALL)
        assert copied.step.__self__ is copied
    assert steps == [6] and "step" not in vars(pipe.scheduler)


def test_a_video_counts_as_one_picture():
    numbers = np.random.default_rng(0)
    full = numbers.random((2, 5, 8, 8, 3), dtype=np.float32)
    other = np.clip(full + numbers.normal(0, 0.02, full.shape), 0, 1).astype(np.float32)
    found = fidelity(full, other)
    assert found.psnr == pytest.approx(decibels(full.astype(float), other.astype(float))) and len(found.ssim) == 2
    frames = [fidelity(full[0, k : k + 1], other[0, k : k + 1]).ssim[0] for k in range(5)]
    assert found.ssim[0] == pytest.approx(np.mean(frames))


def test_frames_of_a_pipeline_are_read(tmp_path):
    class VideoPipeline:
        device = "cpu"

        def __call__(self, prompt, image, generator, output_type):
            shape = (1, 5, 4, 4, 3) if prompt == "a" else (5, 4, 4, 3)
            return type("Output", (), {"frames": np.full(shape, image, dtype=np.float32)})

    calls = PictureCalls(VideoPipeline(), ["a", {"prompt": "b", "image": 0.75}], [0, 1], {"image": 0.5})
    videos, seconds = calls.run_all()
    assert videos.shape == (2, 5, 4, 4, 3) and videos[:, 0, 0, 0, 0].tolist() == [0.5, 0.75] and len(seconds) == 2
    files = ComparisonFiles(tmp_path)
    files.keep_full(videos, 0.5)
    assert files.full_seconds == 0.5 and files.full_pictures().shape == (2, 4, 4, 3)  # a frame of each
    with pytest.raises(layercache.LayerCacheError, match="pictures must lie in 0..1"):
        PictureCalls(VideoPipeline(), ["a"], [0], {"image": 2.0}).run(0)


@pytest.mark.parametrize(
    ("prompts", "seeds", "batch", "expected"),
    [
        ("a", None, 1, ([["a"]], [0])),
        (["a", "b", "c"], None, 2, ([["a", "b"], ["c"]], [0, 1, 2])),
        (["a", "b"], 3, 2, ([["a", "b"], ["a"]], [0, 1, 2])),
        (["a", {"prompt": "b"}], [7, 9], 2, ([["a"], [{"prompt": "b"}]], [7, 9])),
        ([["a", "b"], "c"], [3, 4, 5], 1, ([["a", "b"], ["c"]], [3, 4, 5])),
    ],
)
def test_prompts_by_call(prompts, seeds, batch, expected):
    assert samples_of(prompts, seeds, batch) == expected


def outcome(**more):
    figures = {"used": 0.5, "seconds": 2.0, "speedup": 1.9, "speedups": (1.8, 1.9, 2.1), "cache_bytes": 2**20}
    return Outcome("a" * 30, "s", 0.5, **figures | {"psnr": (40.123, math.inf), "ssim": (0.99, 1.0)} | more)


def test_forms_of_the_table(tmp_path, monkeypatch):
    failed = Outcome("<b>", "", 0.5, error="BudgetError: no threshold\x1b[31m")
    table = ComparisonTable(ComparisonFiles(tmp_path), [outcome(), failed], "title")
    monkeypatch.setenv("COLUMNS", "60")
    assert repr(table).splitlines()[2].split() == ["a" * 30, "0.500", "1.90x", "40.12", "inf"]
    assert "Left out at this width: budget, range, worst, SSIM, MiB" in " ".join(repr(table).split())
    monkeypatch.setenv("COLUMNS", "120")
    lines = repr(table).splitlines()
    cells = ["a" * 30, "0.5", "0.500", "1.90x", "1.80-2.10", "40.12", "inf", "40.12", "0.9950", "1.0"]
    assert lines[2].split() == cells
    assert lines[0] == "title" and lines[-1] == r"<b> failed: BudgetError: no threshold\x1b[31m" and len(lines) == 5
    assert "<b>" not in table._repr_html_() and "&lt;b&gt;" in table._repr_html_()
    many = ComparisonTable(ComparisonFiles(tmp_path), [outcome()] * 60)
    assert len(repr(many).splitlines()) < 30 and "36 rows more" in repr(many)
    loaded = ComparisonTable.load(table.save(tmp_path / "table.json"))
    assert loaded.rows[0] == table.rows[0] and loaded.title == "title" and loaded.rows[1].error == failed.error
    assert json.loads(table.to_json())["rows"][0]["psnr"] == [40.123, "inf"]
    frame = table.to_pandas()
    assert frame["psnr_mean"][0] == 40.123 and list(frame.columns)[:3] == ["method", "setting", "budget"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"layercache\[compare\]"):
        table.to_pandas()
    with pytest.raises(FileFormatError, match="missing or damaged"):
        loaded.save_html(tmp_path / "page.html")


def test_page_of_a_folder(table, tmp_path):
    page = ComparisonTable.load(table.files.folder).save_html(tmp_path / "page.html").read_text()
    assert "every third" in page and "tuned/class" in page and len(page) > 10_000


def test_failures_that_another_try_would_not_change():
    assert outcome(error="BudgetError: x").fails_again and not outcome(error="RuntimeError: memory").fails_again
    assert not outcome(error="MissingExtraError: x").fails_again


def test_the_pipeline_shows_its_progress_again(pipe):
    before = dict(pipe._progress_bar_config)
    with calls_module.quiet(pipe):
        assert pipe._progress_bar_config["disable"]
    assert pipe._progress_bar_config == before


def test_blocks_that_a_foreign_cache_skips_are_not_counted():
    """Its hooks replace the block's own forward; blocks of Wan have no ``attn``."""
    model, inputs = build("WanTransformer3DModel")
    model.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    with block_calls(model) as calls, torch.no_grad():
        for _ in range(3):
            with model.cache_context("cond"):
                model(**inputs)
    assert calls == [len(model.blocks) + 2]
