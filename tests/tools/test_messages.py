"""Messages name the options that were typed in the place of the arguments that they set, and nothing else changes."""

from __future__ import annotations

import pytest

from layercache.tools.cli.messages import in_options

OPTIONS = {
    name: "--" + name.replace("_", "-")
    for name in (
        *("budget", "speedup", "full_steps", "min_psnr", "protect_first", "protect_last", "max_run", "max_cache_mb"),
        *("steps", "schedule", "model", "seed", "guidance", "groups", "sensitivity", "order", "penalty", "pareto"),
    )
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run with num_inference_steps=8, or plan for 30 steps", "run with --steps 8, or plan for 30 steps"),
        (
            "protect fewer steps (protect_first, protect_last), allow longer runs (max_run), or more",
            "protect fewer steps (--protect-first, --protect-last), allow longer runs (--max-run), or more",
        ),
        ("full_steps must be above 0 and at most 20, got 40", "--full-steps must be above 0 and at most 20, got 40"),
        ("budget must be a share of the block time", "--budget must be a share of the block time"),
        ("give budget=0.6 (a share), min_psnr=40.", "give --budget 0.6 (a share), --min-psnr 40."),
        ("calibrate with sensitivity='substitution'", "calibrate with --sensitivity substitution"),
        ("12 bytes (max_cache_bytes) are too little", "12 bytes (--max-cache-mb) are too little"),
        ("give num_groups=4; true_cfg_scale=4.0: no", "give --groups 4; --guidance 4.0: no"),
        ("with pareto=True", "with --pareto"),
        ("`num_inference_steps` must be even", "`--steps` must be even"),
        ("seed=-1", "--seed -1"),
        ("min_psnr: run layercache.search first", "--min-psnr: run 'layercache plan --pareto' first"),
        ("search first (layercache.search).", "search first ('layercache plan --pareto')."),
    ],
)
def test_arguments_become_options(text, expected):
    assert in_options(text, OPTIONS) == expected


@pytest.mark.parametrize(
    "text",
    [
        "budget 0.1 cannot be met: a model of 8 steps needs 0.4, the schedule has more; order them",
        "the budget must be smaller",  # a word in a sentence
        "my_protect_first, protect_firsts, xmax_run, max_runs",
        "x.max_run, max_run.x, max_run(), max_run[0], 'max_run', \"max_run\"",
        "a/max_run/b, c\\max_run, --max_run, max_run-2",
        "plan it: layercache.plan(profile, budget=0.6, full_steps=3) or f(g(max_run=2), steps=3)",
        "layercache.search.x, layercache.searching, layercache.plan(a), 'layercache.plan', a/layercache.plan",
        "steps=[1, 2], steps={}, steps==3, x=steps=4, total_steps=3",
        "/files/full_steps=3/x.json is empty",
        "",
    ],
)
def test_what_is_part_of_something_else_stays(text):
    assert in_options(text, OPTIONS) == text


def test_an_unclosed_call_is_left_alone_to_its_end():
    assert in_options("f(a, steps=3; steps=4", OPTIONS) == "f(a, steps=3; steps=4"
    assert in_options("f(a); steps=4", OPTIONS) == "f(a); --steps 4"


def test_only_options_of_the_command_are_named():
    assert in_options("run with num_inference_steps=8 or max_run=3", {"max_run": "--max-run"}) == (
        "run with num_inference_steps=8 or --max-run 3"
    )
    assert in_options("run with num_inference_steps=8", {}) == "run with num_inference_steps=8"


def test_a_remark_of_arguments_that_nothing_here_sets_is_left_out():
    text = "protect fewer steps (protect_first, protect_last), allow longer runs (max_run), or compile (its_blocks)"
    assert in_options(text, {"steps": "--steps"}, [], OPTIONS) == (
        "protect fewer steps, allow longer runs, or compile (its_blocks)"
    )
    assert in_options(text, {"max_run": "--max-run"}, [], OPTIONS) == (
        "protect fewer steps, allow longer runs (--max-run), or compile (its_blocks)"
    )
    typed = "a (max_run).json is empty"
    assert in_options(typed, {"steps": "--steps"}, ["a (max_run).json"], OPTIONS) == typed


def test_what_was_typed_is_not_reworded():
    text = "my max_run file.json has 4 groups, raise max_run or use steps=8"
    expected = "my max_run file.json has 4 groups, raise --max-run or use --steps 8"
    assert in_options(text, OPTIONS, ["my max_run file.json", "8", "--budget"]) == expected
