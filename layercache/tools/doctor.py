"""What is installed, what works, and which backend every op will use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercache.tools.report.machine import machine_info, package_version

STYLES = {"ok": "green", "optional": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: ``"ok"``, ``"optional"`` (absent, and something is lost by it) or ``"broken"``.
        detail: version, or what is lost and how to mend it.
    """

    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class OpBackend:
    """Which implementation an op uses on a device, and why."""

    op: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `diagnose` found."""

    checks: tuple[Check, ...]
    ops: tuple[OpBackend, ...]
    machine: dict[str, Any]

    @property
    def usable(self) -> bool:
        """Whether calibrating, planning and generating work here."""
        return all(check.state != "broken" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "usable": self.usable,
            "checks": [asdict(check) for check in self.checks],
            "ops": [asdict(op) for op in self.ops],
            "machine": self.machine,
        }

    def __rich__(self) -> RenderableType:
        checks = Table(box=None, show_header=False, pad_edge=False)
        for check in self.checks:
            # Text, not str: "layercache[demo]" would be taken for markup
            checks.add_row(check.name, Text(check.state, style=STYLES[check.state]), Text(check.detail))
        ops = Table(box=None, header_style="bold", pad_edge=False)
        for heading in ("op", "device", "backend", "why"):
            ops.add_column(heading)
        for op in self.ops:
            ops.add_row(op.op, op.device, op.backend, Text(op.reason))
        verdict = Text("layercache can be used here.", style="green")
        if not self.usable:
            verdict = Text("layercache cannot be used here; mend what is broken first.", style="bold red")
        return Group(checks, "", ops, "", verdict)


def diagnose() -> Diagnosis:
    """Looks at packages, compiled core, GPU, ops and demo model; changes nothing and downloads nothing."""
    checks = (
        *(_package(name, needed=True) for name in ("torch", "diffusers", "numpy", "safetensors")),
        _compiled_core(),
        _cpu_kernels(),
        _attempt("ops", _ops_importable),
        _gpu(),
        _triton(),
        _package("scikit-image", "skimage", lost="no PSNR and SSIM", mend='pip install "layercache[demo]"'),
        _package("matplotlib", lost="no figures", mend='pip install "layercache[demo]"'),
        _lpips(),
        _demo_model(),
    )
    return Diagnosis(checks, _op_backends(), machine_info() | {"cpu_features": _cpu_features()})


def _attempt(name: str, look: Callable[[], str]) -> Check:
    """``look`` describes what works; anything it raises is a finding, so that the others are still shown."""
    try:
        return Check(name, "ok", look())
    except Exception as error:
        return Check(name, "broken", f"{type(error).__name__}: {error}")


def _package(name: str, module: str = "", *, needed: bool = False, lost: str = "", mend: str = "") -> Check:
    try:
        importlib.import_module(module or name)
    except ImportError as error:
        if needed:
            return Check(name, "broken", f"cannot be imported ({error}): pip install {name}")
        return Check(name, "optional", f"not installed, {lost}: {mend}")
    except Exception as error:
        # a package that is there but fails to load, for example a binary for another CUDA
        return Check(name, "broken" if needed else "optional", f"fails to load: {type(error).__name__}: {error}")
    return Check(name, "ok", package_version(name) or "version unknown")


def _compiled_core() -> Check:
    try:
        core = importlib.import_module("layercache._core")
    except ImportError as error:
        return Check(
            "compiled core", "broken", f"does not load ({error}); schedules cannot be planned: reinstall layercache"
        )
    return Check("compiled core", "ok", Path(str(core.__file__)).name)


def _cpu_kernels() -> Check:
    name = "CPU kernels"
    try:
        from layercache.ops import native

        if native.UNAVAILABLE:
            return Check(name, "optional", f"{native.UNAVAILABLE}; PyTorch's own operations are used, which are slower")
        return Check(name, "ok", native.describe())
    except Exception as error:
        return Check(name, "optional", f"{type(error).__name__}: {error}")


def _ops_importable() -> str:
    from layercache import ops

    return ", ".join(ops.OP_NAMES)


def _gpu() -> Check:
    try:
        import torch

        if not torch.cuda.is_available():
            built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
            return Check("GPU", "optional", f"{built}: everything runs on the CPU")
        major, minor = torch.cuda.get_device_capability()
        return Check("GPU", "ok", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")
    except Exception as error:
        return Check("GPU", "optional", f"cannot be asked: {type(error).__name__}: {error}")


def _triton() -> Check:
    lost = "caching on a GPU does not work (on the CPU nothing is lost)"
    return _package("triton", lost=lost, mend='pip install "layercache[triton]"')


def _lpips() -> Check:
    from layercache._utils.metrics import lpips_unavailable

    try:
        reason = lpips_unavailable()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return Check("LPIPS", "optional", reason) if reason else Check("LPIPS", "ok", "AlexNet weights found")


def _demo_model() -> Check:
    weights = Path(__file__).parents[1] / "demo" / "weights" / "transformer"
    if not any(weights.glob("*.safetensors")):
        return Check("demo model", "optional", f"no weights in {weights}: layercache demo does not work")
    return Check("demo model", "ok", str(weights.parent))


def _op_backends() -> tuple[OpBackend, ...]:
    try:
        import torch

        from layercache import ops
    except Exception:
        return ()  # reported among the checks
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = []
    for device in devices:
        for name in ops.OP_NAMES:
            backend, reason = ops.backend_for(name, device)
            found.append(OpBackend(name, device, str(backend), str(reason)))
    return tuple(found)


def _cpu_features() -> str | None:
    try:
        import torch

        return str(torch.backends.cpu.get_cpu_capability())
    except Exception:
        return None
