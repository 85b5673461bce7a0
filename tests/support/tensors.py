"""Tensors for tests of ops, exact values in fp64 to compare with, and how close a result has to be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def outlier_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Normal numbers with one channel a thousand times larger, as hidden states have."""
    values = torch.randn(shape)
    if values.numel():
        values[..., shape[-1] // 2] *= 1e3
    return values.to(dtype)


def streams(shapes: Sequence[Sequence[int]], dtype: torch.dtype, strided: bool) -> list[Tensor]:
    """Streams of their own, or (for three dims) slices along the rows of one [text; image] tensor."""
    if not strided:
        return [outlier_tensor(shape, dtype) for shape in shapes]
    joined = outlier_tensor((shapes[0][0], sum(shape[1] for shape in shapes), shapes[0][2]), dtype)
    return list(joined.split([shape[1] for shape in shapes], dim=1))


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Distance of neighbouring numbers of ``dtype`` around ``values``."""
    info = torch.finfo(dtype)
    size = np.maximum(np.abs(values), info.tiny)
    return np.exp2(np.floor(np.log2(size))) * info.eps


def assert_close(found: Tensor, expected: np.ndarray, terms: np.ndarray | float = 0.0) -> None:
    """Within the rounding of the storage dtype, plus fp32 rounding of sums whose terms have these sizes in total."""
    allowed = ulp(expected, found.dtype) + 2.0**-22 * np.asarray(terms)
    difference = np.abs(exact(found) - expected)
    assert (difference <= allowed).all(), f"off by {(difference / allowed).max()} times the tolerance"


def pair_oracle(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight statistics in fp64, and for each the sum of the sizes of what is added (its rounding scale)."""
    d = a - b
    sums = [np.abs(d), np.abs(a), np.abs(b), d * d, a * a, b * b, a * b]
    values = [x.sum() for x in sums] + [np.abs(d).max() if d.size else 0.0]
    scales = [np.abs(x).sum() for x in sums] + [values[-1]]
    return np.array(values), np.array(scales)


def assert_sums_close(found: Tensor, values: np.ndarray, scales: np.ndarray) -> None:
    """Statistics are within 1e-5 of the size of what was summed."""
    assert found.dtype == torch.float32
    np.testing.assert_array_less(np.abs(exact(found) - values), 1e-5 * scales + 1e-30)
