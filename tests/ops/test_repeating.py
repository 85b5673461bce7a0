"""Calls on a GPU that are repeated without Triton's launcher hand the driver what Triton would have handed it.

`repeated_calls` makes the calls in a child process, where a libcuda that does nothing stands in for the driver.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import fake_driver  # noqa: E402
from layercache.kernels import launching  # noqa: E402

from layercache.ops import repeating  # noqa: E402

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="the stand-in for libcuda needs a C compiler"
)

# more streams or tensors than one launch takes are put together by PyTorch; the terms of an error depend on numbers
LONG = {"nine_streams", "ten_tensors", "errors", "case errors of ten spans"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = fake_driver.run_child(ROOT / "tests" / "support" / "repeated_calls.py", tmp_path_factory.mktemp("cuda"))
    return json.loads(output.splitlines()[-1])


def test_every_other_form_is_repeated(report):
    calls = report["calls"]
    assert len(calls) > 50
    for name, call in calls.items():
        assert call["launches"] > 0 and call["by_triton"][1] == call["launches"], name
        assert all(call["parameters"]), name  # the stand-in knew every kernel, so parameters were compared
    assert {name for name, call in calls.items() if call["by_triton"][0]} == LONG


def test_the_driver_is_handed_the_same(report):
    """Kernels, grids, threads, shared memory, every parameter, and what the call returns."""
    repeated = {name: call for name, call in report["calls"].items() if name not in LONG}
    assert {name: call.get("difference") for name, call in repeated.items() if not call["same"]} == {}


def test_only_the_same_call_is_repeated(report):
    found = report["refusals"]
    assert [name for name, who in found.items() if who == "repeated"] == ["alike"]
    by_triton = {
        "watched",
        "another shape",
        "another dtype",
        "wrong dtype",
        "strided",
        "misaligned",
        "in place",
        "subclass",
        "another device is current",
        "a view of the base",
    }
    assert {name for name, who in found.items() if who == "Triton"} == by_triton


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("wrong shape", "residuals[0][0] is of shape (2, 24, 32)"),
        ("overlapping", "results[0] is in the same memory as one of bases"),
        ("into the residual", "results[0] is in the same memory as one of residuals"),
        ("not finite", "coefficients is [nan]"),
        ("no number", "coefficients is ['half']"),
        ("gradient", "a tensor requires grad and grad mode is on"),
        ("eps", "eps is -1e-06; expected a positive number"),
    ],
)
def test_bad_input_is_refused_as_before(report, call, message):
    assert message in report["refusals"][call]


class TestParameters:
    """A launch is written down only if PTX declares just the parameters that its arguments would give."""

    def compiled(self, ptx, **metadata):
        plain = {"num_warps": 4, "shared": 0, "num_ctas": 1, "launch_pdl": False}
        return SimpleNamespace(asm={"ptx": ptx}, metadata=SimpleNamespace(**plain | metadata))

    PTX = (
        ".visible .entry k(\n.param .u64 .ptr .global .align 1 k_0,\n.param .f32 k_1,\n.param .u32 k_2\n)\n"
        "{ ld.param.u32 }"
    )

    def test_they_are_read_from_the_head(self):
        assert launching.declared_parameters(self.compiled(self.PTX)) == ["u64", "f32", "u32"]
        assert launching.declared_parameters(SimpleNamespace(asm={"amdgcn": "s_endpgm"})) == []

    def test_matching_ones_are_written_down(self):
        import torch

        arguments = (torch.zeros(1), None, (0.5, (7,)))
        found = launching._record(self.compiled(self.PTX), (3,), arguments)
        assert found is not None
        assert (found.grid, found.hidden, found.threads) == ((3, 1, 1), 0, 128)
        assert found.arguments[1:] == (0.5, 7)

    @pytest.mark.parametrize(
        ("ptx", "metadata"),
        [
            (PTX.replace(".f32", ".u32"), {}),
            (PTX.replace(",\n.param .u32 k_2", ""), {}),
            (PTX.replace(".u32 k_2", ".align 8 .b8 k_2[16]"), {}),
            (PTX, {"num_ctas": 2}),
            (PTX, {"launch_pdl": True}),
            (PTX, {"global_scratch_size": 64}),
        ],
    )
    def test_others_are_not(self, ptx, metadata):
        import torch

        arguments = (torch.zeros(1), 0.5, 7)
        assert launching._record(self.compiled(self.PTX), (1,), arguments) is not None
        assert launching._record(self.compiled(ptx, **metadata), (1,), arguments) is None


def test_the_stream_is_what_torch_tells(report):
    """Of the CPU, whose tensors stand in for those of a GPU, it tells that there is none."""
    assert report["stream"] == 0


def test_why_calls_are_not_repeated_here(monkeypatch):
    repeating.trouble.cache_clear()
    monkeypatch.setenv("LAYERCACHE_LAUNCH", "triton")
    assert repeating.trouble() == "LAYERCACHE_LAUNCH=triton is set"
    repeating.trouble.cache_clear()
    monkeypatch.delenv("LAYERCACHE_LAUNCH")
    with pytest.raises(RuntimeError, match=r"cannot load no-such-library\.so"):
        repeating.open_calls("no-such-library.so")
    repeating.trouble.cache_clear()


@pytest.mark.parametrize(("known", "follows"), [([0, 7], True), ([0, 0], False), ([7, 7], False)])
def test_a_build_that_does_not_tell_the_current_stream_is_found_out(monkeypatch, known, follows):
    """A launch on another stream than torch's would read what is not there yet."""
    import torch

    current = [SimpleNamespace(cuda_stream=0)]

    @contextlib.contextmanager
    def enter(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", enter)
    told = iter(known)
    assert repeating.follows_streams(SimpleNamespace(stream=lambda device: next(told))) is follows
