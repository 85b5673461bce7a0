"""The command line, on a tiny untrained model in the place of the bundled one (except where that is there)."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

import layercache
from layercache.demo import pipeline, weights
from layercache.errors import BudgetError, UnsupportedModelError
from layercache.methods import Universal
from layercache.planning.front import Point
from layercache.planning.search import PICTURES
from layercache.schedule.schedule import Schedule
from layercache.tools import demo, doctor
from layercache.tools.cli import app, common, pipelines, search
from layercache.tools.cli.following import generate_with
from layercache.tools.cli.options import CallOptions
from layercache.tools.report.front import order_sentence, rows_of
from support import tiny
from support.commands import done, printed

COMMANDS = ("demo", "calibrate", "plan", "generate", "show", "doctor")
STEPS = 8
pytestmark = pytest.mark.usefixtures("short_searches")


def invoke(*arguments: object):
    return CliRunner().invoke(app.app, [str(a) for a in arguments], env={"COLUMNS": "100", "LAYERCACHE_DEBUG": ""})


def refused(code: int, *arguments: object) -> str:
    """What the user reads when the command fails as it should: words, no traceback."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def tiny_demo(monkeypatch):
    """The pipeline that ``--model demo`` gets."""
    return loaded(monkeypatch, tiny.tiny_pipeline())


@pytest.fixture
def small_demo(monkeypatch):
    """The same of two layers, for what generates many pictures."""
    return loaded(monkeypatch, tiny.tiny_pipeline(2))


def loaded(monkeypatch, pipe):
    monkeypatch.setattr(pipeline, "load_demo_pipeline", lambda device=None: pipe)
    return pipe


@pytest.fixture
def schedule_file(tmp_path):
    schedule = tiny.schedule_for(tiny.tiny_pipeline(), tiny.mixed_cells(STEPS))
    return schedule.save(tmp_path / "schedule.json")


# --- help, version, import -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"layercache {command}" in result.stdout


def test_general_help_names_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert invoke().exit_code == 2  # no command: the help, as a usage error


def test_version():
    assert invoke("--version").stdout.strip() == f"layercache {layercache.__version__}"


def test_help_loads_nothing_heavy():
    code = (
        "import sys, layercache.tools.cli.app; "
        "print([m for m in ('torch', 'diffusers', 'numpy', 'matplotlib', 'skimage') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "layercache", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"layercache {layercache.__version__}")


# --- mistakes ------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    assert "does not exist" in refused(2, "show", tmp_path / "nowhere.json")
    assert "does not exist" in refused(2, "plan", tmp_path / "nowhere.safetensors", "--budget", 0.5)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "layercache schedule", "version": 1}', "\x00\xff"])
def test_damaged_schedule(tmp_path, content):
    path = tmp_path / "damaged.json"
    path.write_text(content, encoding="latin-1")
    assert "damaged.json" in refused(1, "show", path)


def test_schedule_cut_off(schedule_file):
    schedule_file.write_text(schedule_file.read_text()[:-100])
    assert "not whole" in refused(1, "show", schedule_file)


def test_damaged_profile(tmp_path):
    path = tmp_path / "profile.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header ")
    assert "profile.safetensors" in refused(1, "show", path)
    assert "profile.safetensors" in refused(1, "plan", path, "--budget", 0.5)


@pytest.mark.parametrize("budget", ["0", "-0.1", "1.01", "nan", "much"])
def test_budget_out_of_range(schedule_file, budget):
    assert "--budget" in refused(2, "plan", schedule_file, "--budget", budget)
    assert "--budget" in refused(2, "demo", "--budget", budget)


def test_plan_wants_budget_or_speedup(schedule_file):
    assert "either --budget, --speedup" in refused(2, "plan", schedule_file)
    assert "either --budget, --speedup" in refused(2, "plan", schedule_file, "--budget", 0.5, "--speedup", 2)


@pytest.mark.parametrize("spans", ["1,x", "0", "1,,2", "1,-2"])
def test_spans_that_are_none(schedule_file, spans):
    assert "--spans" in refused(2, "plan", schedule_file, "--budget", 0.5, "--spans", spans)


@pytest.mark.parametrize(("text", "spans"), [("1,2,3", (1, 2, 3)), (" 4 ", (4,)), ("none", ()), ("", ())])
def test_spans(text, spans):
    assert common.parse_spans(text) == spans


def test_unknown_class_of_the_demo_model(tiny_demo, tmp_path):
    assert "'unicorn' is not one of astronaut" in refused(2, "generate", "-p", "unicorn", "-o", tmp_path / "x.png")
    assert "'unicorn' is not one of astronaut" in refused(2, "calibrate", "-p", "unicorn")


def test_arguments_the_pipeline_refuses(tiny_demo, tmp_path):
    text = refused(1, "generate", "-p", "cat", "--steps", 2, "--height", 30, "-o", tmp_path / "x.png")
    assert "multiples of 4" in text
    assert not list(tmp_path.iterdir())


def test_generate_options_that_do_not_fit(tmp_path):
    assert "--schedule" in refused(2, "generate", "-p", "cat", "--compare")
    assert ".png" in refused(2, "generate", "-p", "cat", "-o", tmp_path / "picture.txt")


def test_a_model_that_is_not_there(tmp_path):
    text = refused(1, "generate", "--model", tmp_path / "nothing", "-p", "a fox", "--device", "cpu")
    assert "cannot load the model" in text
    assert "--prompt" in refused(2, "calibrate", "--model", tmp_path / "nothing")


def test_an_installation_without_the_bundled_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CHECKOUT", tmp_path)
    monkeypatch.setattr(weights, "PACKAGE", "layercache_demo_of_nowhere")
    assert 'pip install "layercache[demo]"' in refused(1, "demo", "--quick", "-o", tmp_path / "out", "--device", "cpu")
    assert 'pip install "layercache[demo]"' in refused(1, "generate", "-p", "cat", "-o", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["toaster", "cuda"])
def test_a_device_that_is_not_there(monkeypatch, device):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device" in refused(2, "generate", "-p", "cat", "--device", device)


def test_schedule_for_another_model(tmp_path, schedule_file, monkeypatch):
    monkeypatch.setattr(pipeline, "load_demo_pipeline", lambda device=None: tiny.tiny_pipeline(layers=4))
    text = refused(1, "generate", "-p", "cat", "--schedule", schedule_file, "-o", tmp_path / "x.png")
    assert "6 blocks" in text and "4 blocks" in text


def test_full_disk(schedule_file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "figures.json")

    monkeypatch.setattr("layercache.tools.report.machine.write_json", full)
    text = refused(1, "show", schedule_file, "--json", "figures.json")
    assert text == "Error: No space left on device: figures.json."


def test_an_interrupted_command_says_what_was_kept(tiny_demo, schedule_file, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("layercache.tools.report.tables.schedule_sentences", interrupt)
    monkeypatch.setattr(type(tiny_demo), "__call__", interrupt)
    for words, kept in (
        (("show", schedule_file), "Stopped; nothing was written."),
        (("generate", "-p", "cat", "--schedule", schedule_file), "Stopped; nothing was written."),
        (("calibrate", "--steps", STEPS), "Stopped; nothing was written."),
        (("search", "--steps", STEPS), "kept in front.search; the same command goes on"),
        (("compare", "--steps", STEPS, "--methods", "uniform"), "is in comparison; the same command"),
        (("train-router", "--steps", STEPS), "in router.pt; the same command goes on"),
    ):
        result = invoke(*words)
        assert result.exit_code == 130 and kept in " ".join(result.stderr.split()), (words, result.output)


def test_debug_brings_the_traceback_back(schedule_file, monkeypatch):
    schedule_file.write_text("{")
    result = CliRunner().invoke(app.app, ["show", str(schedule_file)], env={"LAYERCACHE_DEBUG": "1"})
    assert isinstance(result.exception, layercache.LayerCacheError)


# --- show and doctor -----------------------------------------------------------------------------------------


def test_show_explains_a_schedule(schedule_file, tmp_path):
    result = invoke("show", schedule_file, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0
    schedule = Schedule.load(schedule_file)
    assert f"{schedule.used:.1%} of the block time" in result.stdout
    assert "blocks 0-1: computed at" in result.stdout
    assert sum(line.split()[:1] == [str(step)] for step in range(STEPS) for line in result.stdout.splitlines()) == STEPS
    assert PIL.Image.open(tmp_path / "plot.png").width > 300


def test_json_on_standard_output_is_alone(schedule_file):
    result = invoke("show", schedule_file, "--json", "-")
    figures = json.loads(result.stdout)
    assert figures["num_steps"] == STEPS
    assert figures["used"] == pytest.approx(Schedule.load(schedule_file).used)
    assert "blocks 0-1" in result.stderr


def test_step_mask(schedule_file, tmp_path):
    assert "in part" in refused(1, "show", schedule_file, "--step-mask")
    prints = Schedule.load(schedule_file).fingerprint
    path = tmp_path / "universal.json"
    Universal(budget=0.6).schedule(prints).save(path)
    figures = json.loads(invoke("show", path, "--step-mask", "--json", "-").stdout)
    assert f"--scm-mask: {','.join(map(str, figures['steps']))}\n" in invoke("show", path, "--step-mask").stdout
    assert figures["steps"] == [int(not skipped) for skipped in map(Schedule.load(path).is_skipped, range(STEPS))]


def test_doctor(tmp_path):
    result = invoke("doctor", "--ops", "--json", tmp_path / "doctor.json")
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert (result.exit_code == 0) == found["usable"]
    assert {"torch", "diffusers", "compiled core", "GPU", "triton"} <= {check["name"] for check in found["checks"]}
    from layercache import ops

    assert [op["op"] for op in found["ops"] if op["device"] == "cpu"] == list(ops.OP_NAMES)
    assert all(op["backend"] and op["reason"] for op in found["ops"])


def test_doctor_without_the_compiled_core(monkeypatch):
    monkeypatch.setitem(sys.modules, "layercache._core", None)
    result = invoke("doctor", "--json", "-")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and not found["usable"]
    assert next(c for c in found["checks"] if c["name"] == "compiled core")["state"] == "broken"


def test_doctor_without_extras(monkeypatch):
    for name in ("skimage", "matplotlib", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    states = {check.name: check for check in doctor.diagnose().checks}
    assert states["triton"].state == states["[figures]"].state == "optional"
    assert "scikit-image, matplotlib" in states["[figures]"].detail
    assert "layercache[figures]" in invoke("doctor").output.replace("\n", " ")


# --- messages by the options that were typed ------------------------------------------------------------------


@pytest.fixture
def profile_file(tmp_path):
    path = tmp_path / "max_run and full_steps=3.safetensors"
    return tiny_profile().save(path)


@functools.cache
def tiny_profile():
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    return layercache.calibrate(tiny.tiny_pipeline(), [["cat"]], progress=False, **call)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budget", 0.01), "budget 0.01 cannot be met"),
        (("--speedup", 90), "cannot be reached"),
        (("--full-steps", 40), "full_steps must be above 0 and at most 8, got 40"),
        (("--min-psnr", 40), "min_psnr needs a front of measured schedules"),
        (("--max-cache-mb", 0.001, "--budget", 0.7), "1000 bytes (max_cache_bytes) are too little"),
        (("--tau", "inf", "--budget", 0.7), "tau must be a number from 0 to below 1, got inf"),
        (("--gamma", 0, "--budget", 0.7), "gamma must be a number above 0, got 0.0"),
        (("--order", 9, "--budget", 0.7), "order must be at most 7, got 9"),
    ],
)
def test_plan_names_the_option_that_is_refused(profile_file, tmp_path, options, said):
    text = refused(1, "plan", profile_file, "-o", tmp_path / "s.json", *options)
    assert text.startswith(f"Error: Invalid value for {options[0]}: ") and said in text
    assert not (tmp_path / "s.json").exists()


def test_names_of_files_stay_as_they_are(profile_file):
    text = refused(1, "generate", "-p", "cat", "--schedule", profile_file)
    assert text.startswith(f"Error: {profile_file} is a layercache profile file, ")
    profile_file.write_text("")
    assert text.startswith("Error: ") and f"{profile_file} is empty" in refused(1, "plan", profile_file, "--budget", 1)


def test_no_memory_limit_and_large_numbers(profile_file, tmp_path):
    more = ("--max-cache-mb", "inf", "--spans", "1,99999999999999999999", "--history", 10**20, "--max-run", 10**20)
    assert invoke("plan", profile_file, "--budget", 0.7, *more, "-o", tmp_path / "s.json").exit_code == 0


def test_a_search_that_can_find_nothing_says_so(tiny_demo, tmp_path):
    text = refused(1, "search", "--steps", STEPS, "--budgets", 0.01, "-o", tmp_path / "f.json")
    assert "Invalid value for --budgets: budgets of a run of" in text and "which leaves one step" in text
    assert not (tmp_path / "f.json").exists()


def test_generate_names_its_steps(tiny_demo, schedule_file, tmp_path):
    text = refused(1, "generate", "-p", "cat", "--schedule", schedule_file, "--steps", 5, "-o", tmp_path / "x.png")
    assert "this run has 5; run with" in text and "--steps" in text


def test_the_demo_names_no_arguments_that_it_does_not_take(tiny_demo, tmp_path):
    text = refused(1, "demo", "--steps", 3, "--seeds", 1, "--budget", 0.1, "-o", tmp_path / "out")
    assert text.startswith("Error: Invalid value for --budget: ") and "protect fewer steps" in text


def test_a_router_names_its_options(tiny_demo, tmp_path):
    more = ("--rounds", 1, "--batch", 1, "-o", tmp_path / "r.json")
    assert refused(1, "train-router", "--learning-rate", 0, *more) == (
        "Error: Invalid value for --learning-rate: learning_rate must be a number above 0, got 0.0."
    )
    assert "Error: Invalid value for --penalty: penalty must be a finite number" in refused(
        1, "train-router", "--penalty", "inf", *more
    )
    assert "at least 3 steps" in refused(1, "train-router", "--steps", 2, "--shifted", *more)
    text = refused(1, "train-router", "--steps", 4, "--budget", 0.1, *more)
    assert "a budget of 0.1 cannot be met: caching every second step needs 0.500 at least" in text


def test_errors_of_bench_name_their_option(monkeypatch):
    def fail(*_):
        raise BudgetError("rounds must be at least 1", argument="rounds")

    monkeypatch.setattr("layercache.tools.bench.cases.find_cases", fail)
    assert refused(1, "bench", "kernels") == "Error: Invalid value for --rounds: rounds must be at least 1."


def test_a_folder_in_the_place_of_a_file(schedule_file, tmp_path):
    assert refused(1, "show", schedule_file, "--json", tmp_path) == (
        f"Error: Invalid value for --json: {tmp_path} cannot be written: it is a folder; name a file."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["schedule.json"]
    assert "--output" in refused(2, "compare", "-o", schedule_file)


# --- names of arguments in other pipelines ---------------------------------------------------------------------


class QwenLike:
    transformer = SimpleNamespace(config=SimpleNamespace(guidance_embeds=False))

    def __call__(self, prompt, negative_prompt=None, true_cfg_scale=4.0, height=None, guidance_scale=None): ...


class FluxLike:
    transformer = SimpleNamespace(config=SimpleNamespace(guidance_embeds=True))

    def __call__(self, prompt, negative_prompt=None, true_cfg_scale=1.0, guidance_scale=3.5): ...


@pytest.mark.parametrize(
    ("pipe", "expected"),
    [
        (QwenLike(), {"true_cfg_scale": 4.0, "negative_prompt": " "}),
        (FluxLike(), {"guidance_scale": 4.0}),
    ],
)
def test_guidance_goes_by_the_pipelines_own_name(pipe, expected):
    assert pipelines.call_arguments(pipe, CallOptions(guidance_scale=4.0)) == expected


def test_no_second_forward_without_guidance():
    found = pipelines.call_arguments(QwenLike(), CallOptions(guidance_scale=1.0, height=64))
    assert found == {"true_cfg_scale": 1.0, "height": 64}
    assert pipelines.call_arguments(QwenLike(), CallOptions()) == {}


def test_an_option_the_pipeline_lacks():
    with pytest.raises(UnsupportedModelError, match="takes no height"):
        pipelines.call_arguments(FluxLike(), CallOptions(height=64))


def test_prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# animals\n\n a red fox \ncafé\n", encoding="utf-8")
    found = common.read_prompts(["typed"], path, seed=3)
    assert [(one.sample, one.seed) for one in found] == [("typed", 3), ("a red fox", 4), ("café", 5)]


# --- the whole way -------------------------------------------------------------------------------------------


def test_calibrate_plan_generate_show(tiny_demo, tmp_path):
    profile, schedule, picture = tmp_path / "p.safetensors", tmp_path / "s.json", tmp_path / "cat.png"
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("category,prompt,guidance_scale\nfood,coffee,2.5\n")
    calibrated = invoke(
        *("calibrate", "-p", "cat", "--prompts-file", prompts, "--samples", 3, "--seed", 5, "--steps", STEPS),
        *("--guidance", 2),
        *("-o", profile, "--json", "-"),
    )
    assert calibrated.exit_code == 0, calibrated.output
    samples = json.loads(calibrated.stdout)["samples"]
    assert samples == ["seed 5: cat", "seed 6: coffee", "seed 7: cat"]

    planned = invoke("plan", profile, "--budget", 0.7, "-o", schedule, "--spans", "1,2", "--json", "-")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["used"] == pytest.approx(Schedule.load(schedule).used)
    assert Schedule.load(schedule).used <= 0.7
    assert "guidance_scale 2 to 2.5" in str(Schedule.load(schedule).fingerprint.settings)

    drawn = invoke(
        *("generate", "-p", "cat", "--seed", 3, "--guidance", 2, "--schedule", schedule, "-o", picture),
        *("--compare", "--json", tmp_path / "figures.json"),
    )
    assert drawn.exit_code == 0, drawn.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    full, cached = figures["comparison"]["runs"]
    assert cached["used"] == pytest.approx(figures["cache"]["used"]) == pytest.approx(Schedule.load(schedule).used)
    assert figures["cache"]["forwards"] == 2 * STEPS
    assert cached["psnr"]["count"] == 1 and full["psnr"] is None
    assert PIL.Image.open(picture).size == (32, 32)
    assert PIL.Image.open(tmp_path / "cat-comparison.png").width > 3 * 96

    # the same seed without the command line
    with layercache.enabled(tiny_demo, Schedule.load(schedule)):
        again = tiny.generate(tiny_demo, ["cat"], STEPS, seed=3, guidance_scale=2, output_type="np")
    assert np.array_equal(np.asarray(PIL.Image.open(picture)), (again[0] * 255).round().astype(np.uint8))

    shown = invoke("show", profile, "--plot", tmp_path / "profile.png")
    assert shown.exit_code == 0 and "measured on 3 samples" in shown.stdout
    assert (tmp_path / "profile.png").exists()


def test_every_printed_command_runs_as_it_stands(small_demo, tmp_path, monkeypatch):
    """From two beginnings on, at 60 columns, until nothing is printed to go on with."""
    monkeypatch.chdir(tmp_path)
    few_pictures = functools.partial(search._pictures, samples=2, validation=1)
    monkeypatch.setattr(search, "_pictures", lambda pipe, prompts, *_: few_pictures(pipe, prompts, seed=0))
    monkeypatch.setitem(PICTURES, "normal", 2)
    monkeypatch.setattr(small_demo, "set_progress_bar_config", lambda **_: None)
    fast = ("--steps", 6, "--guidance", 2.5)
    waiting = [
        ["calibrate", *fast, "-p", "cat", "-p", "coffee", "-o", "a profile.safetensors"],
        ["train-router", *fast, "--rounds", 1, "--batch", 1, "-p", "cat", "-o", "router.json"],
    ]
    ran = []
    while waiting:
        words = waiting.pop(0)
        ran.append(words[0])
        waiting += printed(done(*words, width=60))
    assert ran == ["calibrate", "train-router", "search", "plan", "generate", "plan", "generate", "generate"]


def test_a_schedule_that_does_not_say_its_model_proposes_no_command(profile_file, tmp_path):
    output = done("plan", profile_file, "--budget", 0.7, "-o", tmp_path / "s.json")
    assert not printed(output) and "with the model it was made for" in " ".join(output.split())


def test_what_is_handed_on_says_nothing_of_this_machine(searched, tmp_path):
    _, front = searched
    assert '"command"' in front.read_text()
    layercache.Front.load(front).save_pretrained(tmp_path / "repo")
    written = [path.read_text() for path in (tmp_path / "repo").rglob("*") if path.is_file()]
    assert len(written) == 3 and not any("command" in text for text in written)


def test_what_a_file_says_of_its_command_cannot_run_another(tiny_demo, tmp_path):
    """A schedule may come from a stranger."""
    schedule = tiny.schedule_for(tiny_demo, tiny.mixed_cells(STEPS))
    given = {"model": "x; rm -rf ~", "prompt": "$(id)", "lora": ["a b", 3], "device": 7, "height": True, "arg": "x=1"}
    settings = {**schedule.fingerprint.settings, "command": {**given, "dtype": "int4", "output": "/etc/passwd"}}
    marked = dataclasses.replace(schedule.fingerprint, settings=settings)
    words = generate_with(tmp_path / "s.json", marked)
    assert shlex.join(map(str, words)) == (
        f"generate --model 'x; rm -rf ~' --prompt '$(id)' --schedule {tmp_path / 's.json'}"
    )
    settings["command"] = {"prompt": "a\nlayercache demo"}
    assert generate_with(tmp_path, dataclasses.replace(marked, settings=settings)) is None


def test_generate_without_a_schedule(tiny_demo, tmp_path):
    words = ("generate", "-p", "cat", "--steps", 3, "-o", tmp_path / "x.png")
    result = invoke(*words, "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["cache"] is None
    picture = (tmp_path / "x.png").read_bytes()
    result = invoke(*words, "--fold-timesteps", "--json", "-")
    tables = json.loads(result.stdout)["timestep_tables"]
    assert (tables["projections"], tables["rows"]) == (14, 3) and tables["after"] < tables["before"]
    assert (tmp_path / "x.png").read_bytes() == picture


def test_plan_that_cannot_be_reached(tiny_demo, tmp_path):
    profile = tmp_path / "p.safetensors"
    assert invoke("calibrate", "-p", "cat", "--steps", 4, "-o", profile).exit_code == 0
    assert refused(1, "plan", profile, "--budget", 0.01, "-o", tmp_path / "s.json").startswith("Error: ")
    assert not (tmp_path / "s.json").exists()


# --- the demonstration ---------------------------------------------------------------------------------------


def check_demo(output, figures, seeds: int) -> None:
    assert sorted(p.name for p in output.iterdir()) == [
        "comparison.png",
        "profile.safetensors",
        "report.json",
        "schedule.json",
        "searched.json",
        "stability.png",
    ]
    assert json.loads((output / "report.json").read_text()) == figures
    full, layer, searched, whole = figures["methods"]
    names = ["full", "LayerCache", "LayerCache, searched", "whole-step reuse"]
    assert [method["name"] for method in figures["methods"]] == names
    assert full["used"] == 1.0 and max(m["used"] for m in (layer, searched, whole)) <= 0.6
    assert Schedule.load(output / "searched.json").used == pytest.approx(searched["used"])
    for method in figures["methods"]:
        assert method.get("cache", {"fallback_rows": 0})["fallback_rows"] == 0
        assert method["seconds"] == pytest.approx(sum(method["seconds_per_batch"]))
        assert method["speedup"] == pytest.approx(full["seconds"] / method["seconds"])
    assert [p["seed"] for p in figures["pictures"]] == list(range(seeds))
    values = [float(p["LayerCache"]["psnr"]) for p in figures["pictures"]]
    assert layer["psnr"]["mean"] == pytest.approx(np.mean(values))
    assert Schedule.load(output / "schedule.json").used == pytest.approx(layer["used"])
    assert figures["settings"]["steps"] == 10 and figures["machine"]["versions"]["torch"]


def test_demo_on_a_tiny_model(small_demo, tmp_path):
    result = demo.run_demo(tmp_path, steps=10, seeds=3, batch=2, calibration_samples=2, pipe=small_demo)
    check_demo(tmp_path, json.loads((tmp_path / "report.json").read_text()), seeds=3)
    assert len(result.profile.samples) == 2
    # the seeds that are compared are not among those that were calibrated on
    assert [sample.split(":")[0] for sample in result.profile.samples] == ["seed 3", "seed 4"]
    assert [len(m["seconds_per_batch"]) for m in result.figures["methods"]] == [2, 2, 2, 2]
    assert result.measured[1].psnr == pytest.approx(psnr_one_by_one(small_demo, result), abs=0.05)


def psnr_one_by_one(pipe, result) -> list[float]:
    """Each picture generated alone: neither batch nor order nor the other runs may have mattered."""
    values = []
    for picture in result.figures["pictures"]:
        call = {"seed": picture["seed"], "guidance_scale": 4.0, "output_type": "np"}
        full = tiny.generate(pipe, [picture["class"]], 10, **call)
        with layercache.enabled(pipe, result.schedule):
            cached = tiny.generate(pipe, [picture["class"]], 10, **call)
        values.append(-10 * np.log10(((full - cached).astype(np.float64) ** 2).mean()))
    return values


@pytest.mark.parametrize(
    ("seconds", "warns"), [([1.0, 1.4, 0.2], False), ([1.0, 1.6, 0.2], True), ([1.0], False), ([], False)]
)
def test_unsteady_times_are_pointed_out(seconds, warns):
    settings = demo.Settings(seeds=20, batch=8)  # two full batches and a smaller one
    note = demo._timing_note(settings, {"cached": demo._Run(np.empty(0), seconds, None)})
    assert bool(note) == warns
    assert not warns or "cached 1.00 to 1.60 s" in note


def test_demo_refuses_before_it_works(tmp_path):
    with pytest.raises(BudgetError):
        demo.run_demo(tmp_path / "out", budget=1.5, pipe=object())
    assert not (tmp_path / "out").exists()


def test_demo_into_a_file(tmp_path, tiny_demo):
    (tmp_path / "taken").write_text("")
    assert "taken" in refused(1, "demo", "--quick", "-o", tmp_path / "taken")


@pytest.mark.slow
@pytest.mark.skipif(not (weights.CHECKOUT / weights.FILE).is_file(), reason="the bundled weights are not here")
def test_demo_with_the_bundled_model(tmp_path):
    result = invoke("demo", "--quick", "-o", tmp_path / "out", "--json", "-")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    check_demo(tmp_path / "out", figures, seeds=4)
    # a trained model: the cached pictures resemble the full ones, those of whole-step reuse least
    planned, searched, reused = (method["psnr"]["median"] for method in figures["methods"][1:])
    assert 20 < reused < min(planned, searched)
    assert "whole-step reuse" in result.stderr


# --- fronts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory, short_searches):
    """What the command printed, and the front that it wrote, on the model of `small_demo`."""
    front = tmp_path_factory.mktemp("search") / "front.json"
    words = ("--samples", 2, "--validation", 2, "--budgets", "0.75,0.5", "--steps", STEPS, "--effort", "quick")
    with pytest.MonkeyPatch.context() as patch:
        loaded(patch, tiny.tiny_pipeline(2))
        result = invoke("search", "-p", "cat", "-o", front, *words, "--json", front.with_name("figures.json"))
    assert result.exit_code == 0, result.output
    return result.stdout, front


def test_front_from_search_to_picture(small_demo, searched, tmp_path):
    result_of_search, front = searched
    assert "PSNR in dB of 2 held-out pictures" in result_of_search
    points = json.loads(front.with_name("figures.json").read_text())["points"]
    loaded = layercache.Front.load(front)
    assert [p["used"] for p in points] == [p.used for p in reversed(loaded.points)]
    assert points[0]["held_out"]["mean"] == pytest.approx(loaded.points[-1].validation.mean)
    assert front.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "What each schedule computes" in front.with_suffix(".html").read_text()

    schedule = tmp_path / "schedule.json"
    result = invoke("plan", front, "--budget", 0.5, "-o", schedule)
    assert result.exit_code == 0, result.output
    assert Schedule.load(schedule) == layercache.plan(loaded, 0.5)
    shown = invoke("show", schedule, "--plot", tmp_path / "s.png").stdout
    assert "skipped whole" in shown
    assert "skip" in shown
    shown = " ".join(invoke("show", front, "--plot", tmp_path / "f.png").stdout.split())
    assert f"{order_sentence(rows_of(loaded))} 'layercache plan' takes one out by --budget" in shown
    assert order_sentence(rows_of(loaded)) in " ".join(result_of_search.split())
    assert (tmp_path / "f.png").exists()
    result = invoke("generate", "-p", "cat", "--schedule", schedule, "-o", tmp_path / "cat.png")
    assert result.exit_code == 0, result.output


def test_what_a_search_says_and_leaves(small_demo, tmp_path):
    front = tmp_path / "front.json"
    settings = ("--steps", STEPS, "--effort", "quick", "--samples", 2, "--validation", 1, "--budgets", "0.5")
    result = invoke("search", "-o", front, *settings)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert re.search(r"([0-9.]+) full generations in all: 2 pictures in full, .*2 pictures, \1 full generations", said)
    assert layercache.Front.load(front).points[-1].schedule.used <= 0.5
    assert not front.with_suffix(".search").exists()  # what it could have gone on from
    assert "goes on from" in " ".join(invoke("search", "-o", front, *settings, "--time-limit", 0).stdout.split())
    assert (front.with_suffix(".search") / "runs.json").exists()


def test_refit_of_a_schedule_from_a_front(small_demo, searched, tmp_path):
    _, front = searched
    schedule, refitted = tmp_path / "schedule.json", tmp_path / "refitted.json"
    least = f"{min(layercache.Front.load(front).points[-1].likely) - 1:.2f}"
    assert invoke("plan", front, "--min-psnr", least, "--percentile", 0, "-o", schedule).exit_code == 0
    result = invoke("refit", schedule, "--samples", 2, "--guidance", 3, "-o", refitted)
    assert result.exit_code == 0 and "expected of others" in " ".join(result.stdout.split()), result.output
    before, after = Schedule.load(schedule), Schedule.load(refitted)
    assert before.used == after.used and before.velocities != after.velocities


def test_mistakes_with_fronts(tiny_demo, tmp_path, schedule_file, profile_file):
    front = tmp_path / "front.json"
    layercache.Front((Point(Schedule.load(schedule_file), "by hand", (40.0,)),), (1.0, 0.1, 0.0)).save(front)
    assert "no schedule of this front" in refused(1, "plan", front, "--min-psnr", 500)
    assert "schedule already" in refused(2, "plan", schedule_file, "--budget", 0.5)
    profile = profile_file
    assert "--budgets takes shares" in refused(2, "search", "--budgets", "0.5,2")
    assert "front of measured schedules" in refused(1, "plan", profile, "--min-psnr", 30)
    assert "not one of astronaut" in refused(2, "search", "-p", "unicorn")
    text = front.read_text()
    front.write_text(text[:-200])
    assert "not whole" in refused(1, "plan", front, "--budget", 0.5)


def test_the_search_by_its_old_name_still_runs(small_demo, profile_file, tmp_path):
    more = ("--samples", 1, "--validation", 0, "--steps", STEPS, "--effort", "quick", "-o", tmp_path / "f.json")
    result = invoke("plan", profile_file, "--pareto", "--budgets", "0.75", *more)
    assert result.exit_code == 0 and "is 'layercache search' now" in result.output
    assert layercache.Front.load(tmp_path / "f.json").points
