"""Caching primitives for the authors of other caches, and drop-in replacements for those of diffusers and cache-dit.

This module is a stable interface: names and signatures of `__all__` change only with the first number of
`API_VERSION`. Everything works on plain tensors, on CPUs and GPUs, and stops nothing unless its name says so.
"""

from __future__ import annotations

from layercache.backend.patching import accelerate as accelerate
from layercache.backend.patching import accelerated as accelerated
from layercache.backend.primitives import KINDS as KINDS
from layercache.backend.primitives import NewtonForecaster as NewtonForecaster
from layercache.backend.primitives import TaylorForecaster as TaylorForecaster
from layercache.backend.primitives import apply_residual as apply_residual
from layercache.backend.primitives import apply_residuals as apply_residuals
from layercache.backend.primitives import capture as capture
from layercache.backend.primitives import change as change
from layercache.backend.primitives import changes as changes
from layercache.backend.primitives import probe as probe
from layercache.ops import align as align
from layercache.ops import mean_velocity as mean_velocity
from layercache.ops import modulate as modulate
from layercache.ops.pending import Pending as Pending
from layercache.ops.pending import read_later as read_later

API_VERSION = "1.1"

__all__ = [
    "API_VERSION",
    "KINDS",
    "NewtonForecaster",
    "Pending",
    "TaylorForecaster",
    "accelerate",
    "accelerated",
    "align",
    "apply_residual",
    "apply_residuals",
    "capture",
    "change",
    "changes",
    "mean_velocity",
    "modulate",
    "probe",
    "read_later",
]
