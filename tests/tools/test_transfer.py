"""`compare --transfer`: plans with other settings than they were made for, against the same runs made by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from typer.testing import CliRunner

import layercache
from layercache.demo import pipeline
from layercache.errors import ArgumentError, FileFormatError
from layercache.methods import TaylorSeer, Uniform
from layercache.runtime.attachment import attachment_of
from layercache.runtime.report import CacheReport
from layercache.tools.cli.app import app
from layercache.tools.compare.calls import PictureCalls
from layercache.tools.compare.entries import CallArguments
from layercache.tools.compare.files import Outcome
from layercache.tools.compare.transfer_table import BASE, SettingRun, TransferTable
from layercache.tools.compare.trial import BatchRun, Timing, Trial, _since
from layercache.tools.lora import with_lora
from support.tiny import calm_pipeline, generate

CALL = {"num_inference_steps": 4, "guidance_scale": 3.0}
LARGER, STEPS = {"height": 48, "width": 40}, {"num_inference_steps": 6}


@pytest.fixture(scope="module")
def pipe():
    return calm_pipeline(2)


@pytest.fixture(scope="module")
def schedule(pipe):
    with layercache.enabled(pipe, Uniform(interval=2)) as cache:
        generate(pipe, steps=4)
        return cache.schedule


@pytest.fixture(scope="module")
def lora(pipe, tmp_path_factory):
    """A folder with an adapter of the transformer."""
    folder = tmp_path_factory.mktemp("lora") / "strong"
    add_adapter(pipe, "strong", 3)
    pipe.transformer.save_lora_adapter(folder, adapter_name="strong")
    pipe.transformer.unload_lora()
    return folder


def add_adapter(pipe, name, seed):
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    pipe.transformer.add_adapter(settings, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in pipe.transformer.named_parameters():
            if key.endswith((f"lora_A.{name}.weight", f"lora_B.{name}.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


made = []


def tuned(model, budget):
    made.append(budget)
    return TaylorSeer(interval=2), "every second"


METHODS = {"plan": Uniform(interval=2), "tuned": tuned}
FEWER = CallArguments({"num_inference_steps": 2})


@pytest.fixture(scope="module")
def settings(schedule, lora):
    other = [{"prompt": "rocket", "category": "machines"}, "flower", "retina"]
    return [LARGER, STEPS, {"height": 50}, {"prompts": other, "guidance_scale": 1.0}, {"lora": f"{lora}:0.5"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transfer")


def compared(pipe, schedule, settings, folder):
    methods = {**METHODS, "schedule": schedule, "fewer": FEWER}
    more = {"batch": 2, "repeats": 1, "progress": False, "folder": folder, **CALL}
    return layercache.compare(pipe, methods, ["cat", "coffee"], (0.6,), transfer=settings, **more)


@pytest.fixture(scope="module")
def table(pipe, schedule, settings, folder):
    return compared(pipe, schedule, settings, folder)


def decibels(pipe, plan, prompts=("cat", "coffee"), seeds=(0, 1), **more):
    """PSNR of the pictures of one call."""

    def run():
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(list(prompts), generator=generators, output_type="np", **{**CALL, **more}).images.astype(np.float64)

    full = run()
    with layercache.enabled(pipe, plan):
        cached = run()
    return [-10 * math.log10(np.mean((a - b) ** 2)) for a, b in zip(full, cached, strict=True)]


def rows_of(table, setting):
    return {row.method: row for row in table.transfer.of(setting)}


def test_rows_are_what_the_same_runs_give(pipe, table, lora):
    base, larger = rows_of(table, BASE), rows_of(table, "height=48, width=40")
    for name, plan in (("plan", Uniform(interval=2)), ("tuned", TaylorSeer(interval=2))):
        expected = decibels(pipe, plan, **LARGER)
        assert larger[name].psnr_mean == pytest.approx(np.mean(expected)) and base[name].change == 0
        assert larger[name].psnr_worst == pytest.approx(min(expected)) and larger[name].used == base[name].used
        assert larger[name].change == pytest.approx(larger[name].psnr_mean - base[name].psnr_mean)
        assert base[name].psnr_mean == table.of(name)[0].psnr_mean
    # a picture of every prompt, the last one with a seed behind those of the calibration
    other = rows_of(table, "guidance_scale=1.0, 3 other prompts")
    expected = decibels(pipe, Uniform(interval=2), ("rocket", "flower"), guidance_scale=1.0)
    expected += decibels(pipe, Uniform(interval=2), ["retina"], [10], guidance_scale=1.0)
    assert other["plan"].psnr_mean == pytest.approx(np.mean(expected)) and other["plan"].forwards == 8
    with with_lora(pipe, f"{lora}:0.5"):
        expected = decibels(pipe, Uniform(interval=2))
    found = rows_of(table, "lora=strong:0.5")["plan"]
    assert found.psnr_mean == pytest.approx(np.mean(expected)) and found.change != 0
    assert attachment_of(pipe.transformer) is None and not hasattr(pipe.transformer, "peft_config")
    assert made == [0.6]  # nothing is tuned anew


def test_what_was_refused_is_said_and_why(table):
    steps = rows_of(table, "num_inference_steps=6")
    assert "the schedule has 4 steps, this run has 6" in steps["schedule"].error and math.isnan(steps["schedule"].used)
    assert not steps["plan"].error and steps["plan"].used == 0.5
    assert "the plan gives num_inference_steps itself" in steps["fewer"].error
    notes = table.transfer.notes
    assert any(
        note.startswith("height=50: plan, tuned at 0.6, schedule, fewer: refused: ValueError: height") for note in notes
    )
    # a schedule was made without the adapter, and says so; a method that plans at the run does not
    (warned,) = [note for note in notes if note.startswith("lora=strong:0.5")]
    assert warned.startswith("lora=strong:0.5: schedule: the figures of this schedule") and "LoRA adapters" in warned
    assert table.transfer.settings[0] == "height=48, width=40" and len(table.transfer.settings) == 5
    assert "with other settings (5): .transfer" in repr(table)


def test_what_is_there_is_not_run_again(pipe, schedule, settings, folder, table, monkeypatch):
    monkeypatch.setattr(PictureCalls, "run", lambda *_: pytest.fail("generated again"))
    again = compared(pipe, schedule, [one for one in settings if one != {"height": 50}], folder)
    kept = [row for row in table.transfer if row.setting != "height=50"]
    assert [row.psnr_mean for row in again.transfer] == pytest.approx([row.psnr_mean for row in kept], nan_ok=True)


def test_forms_of_the_table(table, tmp_path, monkeypatch):
    transfer = table.transfer
    monkeypatch.setenv("COLUMNS", "150")
    text = repr(transfer)
    assert "as compared" in text and "+0.00" in text and "0/8" in text
    loaded = TransferTable.load(transfer.save(tmp_path / "transfer.json"))
    assert loaded.notes == transfer.notes and repr(loaded) == text
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FileFormatError, match="compare again"):
        TransferTable.load(tmp_path / "other.json")
    assert list(transfer.to_pandas()["setting"].unique())[0] == BASE
    page = transfer.save_html(tmp_path / "page.html").read_text()
    assert page.count("Full, cached, difference: ") == 5 and "refused" in page
    assert transfer._repr_html_().count("<tr>") == 1 + len(transfer)


@pytest.mark.parametrize(
    ("transfer", "said"),
    [
        ({"height": 48}, "is a list of mappings"),
        ([{}], "a setting is empty"),
        ([{"heigth": 48}], "heigth=48: DemoPipeline takes no heigth"),
        ([{"generator": 1}], "generator is given by the comparison"),
        ([{"lora": "nowhere.safetensors:2"}], "there is no LoRA at 'nowhere.safetensors'"),
        ([{"height": 48}, {"height": 48}], "'height=48' is given twice"),
    ],
)
def test_settings_that_are_none_are_refused_before_anything_runs(pipe, monkeypatch, transfer, said):
    monkeypatch.setattr(PictureCalls, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ArgumentError, match=said):
        layercache.compare(pipe, METHODS, ["cat"], transfer=transfer, progress=False, **CALL)


def test_an_adapter_that_was_there_is_as_it_was(lora):
    pipe = calm_pipeline(2)
    before = generate(pipe, ["cat"], steps=2)
    add_adapter(pipe, "own", 5)
    pipe.transformer.set_adapters(["own"], [0.7])
    own = generate(pipe, ["cat"], steps=2)
    with with_lora(pipe, str(lora)), pytest.raises(ZeroDivisionError):
        both = generate(pipe, ["cat"], steps=2)
        raise ZeroDivisionError
    assert torch.equal(generate(pipe, ["cat"], steps=2), own) and not torch.equal(own, before)
    file = {"weight_name": "pytorch_lora_weights.safetensors", "adapter_name": "other"}
    pipe.transformer.load_lora_adapter(str(lora), prefix=None, **file)
    pipe.transformer.set_adapters(["own", "other"], [0.7, 1.0])
    assert torch.equal(generate(pipe, ["cat"], steps=2), both)
    with pytest.raises(layercache.LayerCacheError, match="cannot load the LoRA"), with_lora(pipe, str(lora.parent)):
        pass
    pipe.transformer.delete_adapters("other")
    pipe.transformer.set_adapters(["own"], [0.7])
    assert torch.equal(generate(pipe, ["cat"], steps=2), own)


# --- the command -------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_command(schedule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule.save("mine.json")
    Path("first.csv").write_text("prompt,category,seed\ncat,animals,5\ncoffee,food,6\n")
    Path("second.jsonl").write_text('{"prompt": "rocket"}\n')
    monkeypatch.setattr(pipeline, "load_demo_pipeline", lambda device=None: calm_pipeline(2))
    words = ["--schedule", "mine.json", "--prompts-file", "first.csv", "--seeds", 2, "--steps", 4, "--guidance", 3]
    words += ["--calibration", 1, "--batch", 2, "-o", "out"]
    words += ["--transfer", "guidance=1, prompts=second.jsonl", "--transfer", "steps=6"]
    first = run(*words, "--json", "first.json")
    assert first.exit_code == 0, first.output
    found = json.loads(Path("first.json").read_text())
    assert [row["category"] for row in found["categories"]] == ["animals", "food"]
    names = [BASE, "guidance=1, prompts=second.jsonl", "steps=6"]
    assert [row["setting"] for row in found["transfer"]] == names and found["transfer"][1]["forwards"] == 4
    assert json.loads(Path("out/compare.json").read_text())["settings"]["seeds"] == [5, 6]
    assert "refused: ScheduleMismatchError" in first.output and Path("out/transfer.html").exists()
    monkeypatch.setattr("layercache.tools.cli.compare.load_with_entries", lambda *_: pytest.fail("loaded"))
    again = run(*words, "--json", "again.json")
    assert "finished before" in again.output and json.loads(Path("again.json").read_text()) == found
    for transfer, said in (
        ("height", "'height' is not NAME=VALUE"),
        ("prompts=none.txt", "no file of prompts at none"),
    ):
        refused = run(*words, "--transfer", transfer)
        assert refused.exit_code == 2 and said in " ".join(refused.output.replace("│", " ").split())
    assert "--methods" in run("--help").output


def test_forwards_in_full_are_counted_by_their_reason(tmp_path):
    report = CacheReport(0.5, 0, 0, 1, 8, 0, 0, (), in_full={"a": 2, "b": 1})
    before = replace(report, forwards=4, in_full={"a": 2})
    assert _since(before, report).in_full == {"b": 1}
    timing = Timing(((2.0, 1.0),), 1.0, 0.0, 0.0, math.nan)
    trial = Trial([BatchRun(None, 1.0, one, 0) for one in (report, before, None)], timing, [], 2.0)
    assert (trial.in_full, trial.forwards) == ({"a": 4, "b": 1}, 12)
    outcome = Outcome("mine", "", 0.5, psnr=(30.0,), ssim=(0.9,), in_full=trial.in_full, forwards=trial.forwards)
    runs = [
        SettingRun("", [replace(outcome, in_full={}, psnr=(31.0,))], tmp_path),
        SettingRun("x", [outcome], tmp_path),
    ]
    table = TransferTable.of_runs(runs)
    assert table.notes == [f"x: mine at 0.5: {n} of 12 forwards in full: {why}" for why, n in (("a", 4), ("b", 1))]
    assert table.rows[1].change == -1 and table.rows[1].cells[-1] == "5/12"
