"""What is installed, what works, and which backend every op will use.

Importing torch takes longer than a person waits for an answer. So its compiled library is loaded, which is what fails
where torch does not fit the machine, and other packages are looked for; `diagnose` imports everything where it is asked
to, or where only that tells.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercache._utils.text import shown
from layercache.tools.needs import EXTRAS, Inspection, inspect_model, installed, known_classes
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
    """Everything `diagnose` found.

    Attributes:
        checks: one per thing that was looked at.
        ops: per op and device; empty where that was not asked.
        machine: for the line below.
        model: the model that was asked of.
    """

    checks: tuple[Check, ...]
    ops: tuple[OpBackend, ...]
    machine: dict[str, Any]
    model: Inspection | None = None

    @property
    def usable(self) -> bool:
        """Whether calibrating, planning and generating work here, with the model that was asked of."""
        works = all(check.state != "broken" for check in self.checks)
        return works and (self.model is None or not self.model.lacking)

    def to_json(self) -> dict[str, Any]:
        return {
            **({} if self.model is None else {"model": self.model.to_json()}),
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
        parts: list[RenderableType] = [checks, ""]
        if self.ops:
            parts += [self._ops_table(), ""]
        if self.model is not None:
            parts += [*_model_lines(self.model), ""]
        return Group(*parts, self._verdict())

    def _ops_table(self) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in ("op", "device", "backend", "why"):
            table.add_column(heading)
        for op in self.ops:
            table.add_row(op.op, op.device, op.backend, Text(op.reason))
        return table

    def _verdict(self) -> Text:
        if self.usable:
            return Text("layercache can be used here.", style="green")
        if self.model is not None and self.model.lacking:
            return Text(f"{shown(self.model.model)} cannot be used as things stand; see above.", style="bold red")
        return Text("layercache cannot be used here; mend what is broken first.", style="bold red")


def _model_lines(model: Inspection) -> list[Text]:
    lines = [Text(f"{shown(model.model)}: {shown(model.what)}", style="bold")]
    for name, cls in model.transformers.items():
        known = "known to layercache" if cls in known_classes() else "not known to layercache"
        lines.append(Text(f"{shown(name)}: {shown(cls)}, {known}"))
    for need in model.needs:
        mark, style = ("lacking", "bold red") if need.blocks else ("note", "yellow")
        lines.append(Text.assemble((mark, style), f" {need.sentence}"))
    return lines if model.needs else [*lines, Text("nothing is lacking", style="green")]


def diagnose(model: str | None = None, ops: bool = False) -> Diagnosis:
    """Looks at packages, compiled core, GPU and demo model; changes nothing and downloads nothing.

    Args:
        model: also what this one needs (`layercache.tools.needs.inspect_model`).
        ops: import everything, and ask each op what it will run on.
    """
    checks = [
        _torch(ops),
        *(_found(name, needed=True) for name in ("diffusers", "numpy", "safetensors")),
        _compiled_core(),
        _cpu_kernels(ops),
        *([_attempt("ops", _ops_importable)] if ops else []),
        _gpu(),
        _triton(ops),
        *map(_extra, EXTRAS),
        _lpips(ops),
        _demo_model(),
    ]
    asked = "torch" in sys.modules
    found = machine_info(ask_torch=asked) | {"cpu_features": _cpu_features() if asked else None}
    return Diagnosis(
        tuple(checks), _op_backends() if ops else (), found, None if model is None else inspect_model(model)
    )


def _torch(ops: bool) -> Check:
    """Whether torch is there and its compiled library loads; where that fails, whether importing torch mends it."""
    found = None if sys.modules.get("torch", "") is None else _torch_folder()
    if found is None:
        return Check("torch", "broken", "not installed: pip install torch")
    if ops:
        return _package("torch", needed=True)
    if "torch" not in sys.modules:
        try:
            _load_libraries(found)
        except (OSError, ImportError):
            # torch knows more places to find the libraries of its GPU build
            return _package("torch", needed=True)
    return Check("torch", "ok", package_version("torch") or "version unknown")


def _torch_folder() -> Path | None:
    found = importlib.util.find_spec("torch")
    return None if found is None or not found.origin else Path(found.origin).parent


def _load_libraries(folder: Path) -> None:
    """Loads what ``import torch`` loads first; the compiled CPU kernels need its OpenMP."""
    ctypes.CDLL(str(folder / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    paths = [folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    own = next((path for path in paths if path.is_file()), None)
    if own is None:
        raise ImportError("torch has no compiled module for this Python")
    ctypes.CDLL(str(own))


def _found(name: str, module: str = "", *, needed: bool = False) -> Check:
    """Whether a package is installed; it is not imported."""
    if installed(module or name):
        return Check(name, "ok", package_version(name) or "version unknown")
    return Check(name, "broken" if needed else "optional", f"not installed: pip install {name}")


def _extra(extra: str) -> Check:
    """The packages of an extra."""
    packages, lost = EXTRAS[extra]
    missing = [name for name, module in packages.items() if not installed(module)]
    if missing:
        detail = f'not installed: {", ".join(missing)}; {lost}: pip install "layercache[{extra}]"'
        return Check(f"[{extra}]", "optional", detail)
    return Check(f"[{extra}]", "ok", ", ".join(f"{name} {package_version(name) or ''}".strip() for name in packages))


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


def _cpu_kernels(ops: bool) -> Check:
    name = "CPU kernels"
    try:
        if not ops and "torch" not in sys.modules and os.environ.get("LAYERCACHE_CPU") != "reference":
            with contextlib.suppress(ImportError):  # where OpenMP is not found, `native` looks further
                return Check(name, "ok", importlib.import_module("layercache._cpu").instruction_set())
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
    if "torch" not in sys.modules and (reason := _no_gpu()):
        return Check("GPU", "optional", f"{reason}: everything runs on the CPU")
    try:
        import torch

        if not torch.cuda.is_available():
            built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
            return Check("GPU", "optional", f"{built}: everything runs on the CPU")
        major, minor = torch.cuda.get_device_capability()
        return Check("GPU", "ok", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")
    except Exception as error:
        return Check("GPU", "optional", f"cannot be asked: {type(error).__name__}: {error}")


def _no_gpu() -> str:
    """Why torch will find no GPU, as far as its version file and the system's devices say; empty where it may."""
    folder = _torch_folder()
    text = (folder / "version.py").read_text(encoding="utf-8") if folder and (folder / "version.py").is_file() else ""
    has_driver = shutil.which("nvidia-smi") is not None
    if text and not re.search(r"^(cuda|hip|xpu)\b.*= '", text, re.MULTILINE):
        there = ", though there is a driver for one (see TORCH_ARGS in the README)" if has_driver else ""
        return f"this torch is built without CUDA{there}"
    devices = any(Path("/dev", name).exists() for name in ("nvidia0", "nvidiactl", "dxg", "kfd", "dri"))
    return "" if has_driver or devices else "torch sees no CUDA device"


def _triton(ops: bool) -> Check:
    lost = "caching on a GPU does not work (on the CPU nothing is lost)"
    if ops or not installed("triton"):
        return _package("triton", lost=lost, mend='pip install "layercache[triton]"')
    return _found("triton")


def _lpips(ops: bool) -> Check:
    if not ops and all(map(installed, ("lpips", "torchvision"))):
        return Check("LPIPS", "ok", f"lpips {package_version('lpips')}; --ops tells whether its weights are here")
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
