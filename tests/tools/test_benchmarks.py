"""The benchmarks measure what they say: right results only, bytes by formula, results that know their kernels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import layercache
from layercache import ops
from layercache.errors import OpInputError
from layercache.tools.bench import results
from layercache.tools.bench.cases import CASES, find_cases
from layercache.tools.bench.clocks import HostClock
from layercache.tools.bench.measure import TOLERANCE, Timing, measure
from layercache.tools.cli.app import app

SHAPE, CPU = (1, 16, 64), torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_agrees_with_eager(case, dtype):
    inputs = case.inputs((2, 24, 64), dtype, CPU)
    assert case.error(inputs) <= TOLERANCE[dtype]
    # and again, on what the first call left behind
    assert case.error(inputs) <= TOLERANCE[dtype]


def test_every_op_is_measured():
    assert {case.op for case in CASES} == set(ops.OP_NAMES)
    assert len({case.name for case in CASES}) == len(CASES)


def test_bytes_are_those_of_the_ops():
    size = 16 * 64 * 2
    x = [torch.ones(1, 16, 64).bfloat16() for _ in range(9)]
    known = {
        "capture": ops.minimum_bytes("capture", x[:1], x[:1], x[:1]),
        "capture and change": ops.minimum_bytes("capture", x[:1], x[:1], x[:1], None, x[:1]),
        "pair statistics": ops.minimum_bytes("pair_statistics", x[:1], x[:1]),
        "JVP reuse": ops.minimum_bytes("linear_combination", x[:1], [x[:2]], [1.0, 2.0]),
        "alignment": ops.minimum_bytes("align", x[0], x[0], x[:2], x[:2]),
        "Taylor update, order 2": ops.minimum_bytes("linear_map", [x[:3]], [x[:3]]),
        "errors of ten spans": 12 * size,
        "guidance and norm": ops.minimum_bytes("combine_guidance", x[0], x[0]),
    }
    for case in CASES:
        if case.name in known:
            assert case.bytes(SHAPE, torch.bfloat16) == known.pop(case.name), case.name
    assert not known


def test_a_row_of_figures():
    (case,) = find_cases(["JVP reuse, two streams"])
    row = measure(case, SHAPE, torch.float32, CPU, rounds=2, compiled=False, clock=HostClock(1e-4))
    assert row.right and row.bytes == 4 * (16 + 2) * 64 * 4 and row.operators == {"ours": 1, "eager": 6}
    assert set(row.seconds) == {"ours", "eager", "copy"}
    data = row.to_json()
    assert data["speedup_over_eager"] == pytest.approx(row.seconds["eager"].median / row.seconds["ours"].median)
    assert data["speedup_over_compiled"] is None


def test_the_host_has_a_column_on_a_gpu():
    row = measure(find_cases(["reuse"])[0], SHAPE, torch.float32, CPU, rounds=1, compiled=False, clock=HostClock(1e-4))
    assert "host us" not in [column.heading for column in results.table([row]).columns]
    row = dataclasses.replace(row, host_seconds={"ours": 2.04e-6, "eager": 4.1e-6, "copy": 3e-6})
    table = results.table([row])
    assert (table.columns[-1].heading, str(table.rows[0][-1])) == ("host us", "2.0 : 4.1")


def test_no_speedup_is_claimed_for_a_wrong_result():
    (case,) = find_cases(["reuse"])[:1]
    wrong = dataclasses.replace(case, ours=lambda i: i.x[0] - i.x[1])
    row = measure(wrong, SHAPE, torch.float32, CPU, rounds=1, compiled=False, clock=HostClock(1e-4))
    assert not row.right and row.speedup("eager") is None


def test_a_wrong_result_fails_the_command(monkeypatch):
    wrong = dataclasses.replace(find_cases(["reuse"])[0], ours=lambda i: i.x[0] - i.x[1])
    monkeypatch.setattr("layercache.tools.bench.cases.CASES", (wrong,))
    done = CliRunner().invoke(app, ["bench", "kernels", "--no-compile", "--rounds", "1", "--shape", "1x4x16"])
    assert done.exit_code == 1 and "WRONG" in done.stdout


def test_a_failing_case_does_not_lose_the_others(monkeypatch, tmp_path):
    def fail(inputs):
        raise RuntimeError("out of memory")

    good = find_cases(["reuse"])[0]
    bad = dataclasses.replace(good, name="bad", ours=fail)
    monkeypatch.setattr("layercache.tools.bench.cases.CASES", (bad, good))
    arguments = ["--no-compile", "--rounds", "1", "--shape", "1x4x16", "--json", str(tmp_path / "f.json")]
    done = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert done.exit_code == 1 and "out of memory" in done.stdout
    data = json.loads((tmp_path / "f.json").read_text())
    assert [row["case"] for row in data["rows"]] == ["reuse"] and list(data["failures"]) == ["bad, 1x4x16"]


def test_no_case_is_begun_after_the_time_limit(tmp_path):
    arguments = ["--op", "gram", "--rounds", "1", "--shape", "1x4x16", "--time-limit", "0"]
    done = CliRunner().invoke(app, ["bench", "kernels", *arguments, "--json", str(tmp_path / "f.json")])
    assert done.exit_code == 1 and "not begun within 0 s: 1 of 1, from Gram matrix of four, 1x4x16 on" in done.stdout
    data = json.loads((tmp_path / "f.json").read_text())
    assert data["rows"] == [] and data["not_begun"] == ["Gram matrix of four, 1x4x16"]


def test_a_missing_term_is_noticed():
    """The tolerance is as narrow as the rounding."""
    case = dataclasses.replace(
        next(c for c in CASES if c.name == "JVP reuse"),
        ours=lambda i: ops.linear_combination(i.x[:1], [i.x[1:2]], [1.0]),
    )
    assert case.error(case.inputs((1, 64, 64), torch.bfloat16, CPU)) > TOLERANCE[torch.bfloat16]


def test_what_does_not_compile_is_left_out():
    def fail(inputs):
        raise RuntimeError("no compiler")

    case = dataclasses.replace(find_cases(["reuse"])[0], compiled=lambda: fail)
    with pytest.warns(UserWarning, match="left out: no compiler"):
        row = measure(case, SHAPE, torch.float32, CPU, rounds=1, clock=HostClock(1e-4))
    assert row.right and "compiled" not in row.seconds


def test_timing_is_by_quantiles():
    assert Timing.of([1.0]) == Timing(1.0, 1.0, 1.0)
    timing = Timing.of([5.0, 1.0, 2.0, 100.0, 3.0, 4.0])
    assert timing.median == 3.5 and timing.low == 2.0 and timing.high == 5.0


def test_command(tmp_path):
    file = tmp_path / "result.json"
    arguments = ["bench", "kernels", "--op", "gram", "--op", "reuse", "--no-compile", "--rounds", "1"]
    done = CliRunner().invoke(app, [*arguments, "--shape", "1x8x64", "--dtype", "float32", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "Gram matrix of four" in done.stdout and "1x8x64 float32 on cpu" in done.stdout
    data = json.loads(file.read_text())
    assert {row["case"] for row in data["rows"]} >= {"Gram matrix of four", "reuse"}
    assert data["kernel_hash"] == results.kernel_hash() and data["machine"]["versions"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4096x3072"], "is not a shape such as 1x4096x3072"),
        (["--dtype", "int8"], "is not one of 'bfloat16'"),
        (["--op", "nothing"], "there is no benchmark of 'nothing'; the ops are align"),
    ],
)
def test_bad_arguments(arguments, message):
    done = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert done.exit_code != 0 and message in " ".join(done.output.replace("│", " ").split())


def test_unknown_case():
    with pytest.raises(OpInputError, match="there is no benchmark of 'x'"):
        find_cases(["x"])


class TestStaleness:
    def write(self, folder, **data):
        path = folder / "gpu.json"
        path.write_text(json.dumps(data))
        return path

    def test_of_other_kernels(self, tmp_path):
        path = self.write(tmp_path, kernel_hash="0" * 12, rows=[1])
        assert results.stale_files(tmp_path) == [path]
        assert results.mark_stale(tmp_path) == [path]
        assert json.loads(path.read_text()) == {"stale": True, "kernel_hash": "0" * 12, "rows": [1]}
        assert results.stale_files(tmp_path) == []
        done = CliRunner().invoke(app, ["bench", "results", str(tmp_path)])
        assert done.stdout == "gpu.json: stale\n"

    def test_of_these_kernels(self, tmp_path):
        self.write(tmp_path, kernel_hash=results.kernel_hash())
        assert results.stale_files(tmp_path) == []
        assert CliRunner().invoke(app, ["bench", "results", str(tmp_path)]).stdout == "gpu.json: current\n"

    def said(self, *arguments):
        done = CliRunner().invoke(app, ["bench", "results", *map(str, arguments)], env={"LAYERCACHE_DEBUG": ""})
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
        return done.stderr.strip()

    def test_outside_of_a_checkout(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert self.said() == (
            "Error: there is no folder bench/results here; results are stored in a checkout of layercache: run this in "
            "one, or name a folder of results."
        )

    @pytest.mark.parametrize("name", ["kernels", "layercache/kernels"])
    def test_installed_without_sources(self, tmp_path, monkeypatch, name):
        """Also where another package has the name of our kernels."""
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "capture.py").write_text("")
        monkeypatch.setattr(layercache, "__file__", str(tmp_path / "layercache" / "__init__.py"))
        self.write(tmp_path, kernel_hash="0" * 12)
        for more in ([], ["--mark-stale"]):
            text = self.said(tmp_path, *more)
            assert "results are compared with the sources of the kernels" in text and "pip install -e" in text
        assert results.hash_or_none() is None
        assert json.loads((tmp_path / "gpu.json").read_text()) == {"kernel_hash": "0" * 12}

    def test_files_that_are_no_results(self, tmp_path):
        self.write(tmp_path, kernel_hash=results.kernel_hash())
        for name, content in (("a.json", b""), ("b.json", b"[1]"), ("c.json", b"\x89PNG\r\n")):
            (tmp_path / name).write_bytes(content)
        assert results.mark_stale(tmp_path) == []
        assert CliRunner().invoke(app, ["bench", "results", str(tmp_path)]).stdout.splitlines() == [
            "a.json: no result, it is empty",
            "b.json: no result, it is JSON of another kind",
            "c.json: no result, it is neither JSON nor a file of tensors (safetensors)",
            "gpu.json: current",
        ]

    def test_no_results_at_all(self, tmp_path):
        assert CliRunner().invoke(app, ["bench", "results", str(tmp_path)]).stdout == f"no results in {tmp_path}\n"

    def test_committed_results(self):
        """A result older than the kernels it measured says that it is stale."""
        stale = [path.name for path in results.stale_files(ROOT / "bench" / "results")]
        assert not stale, f"measure again, or run: layercache bench results --mark-stale  ({', '.join(stale)})"
