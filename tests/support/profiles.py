"""Profiles with made-up numbers."""

from __future__ import annotations

import numpy as np

from layercache.planning.profile import StabilityProfile, readable
from layercache.schedule.fingerprint import Fingerprint


def made_profile(seed=0, steps=20, groups=3, distance=8, span=9) -> StabilityProfile:
    rng = np.random.default_rng(seed)
    shape = (2, 2, steps, groups)
    exists = readable(steps, distance, span)[:, None]
    growth = 1 + np.arange(distance + 1)[:, None]
    tables = {}
    for name in ("image_error_l1", "image_error_l2", "text_error_l1"):
        tables[name] = rng.uniform(0.01, 0.1, (*shape, distance + 1, span + 1)) * growth * exists
    for name in ("image_norm_l1", "image_norm_l2", "text_norm_l1"):
        tables[name] = rng.uniform(0.5, 1.5, shape)
    sigmas = tuple(np.linspace(1, 0, steps + 1) ** 0.8)
    return StabilityProfile(
        fingerprint=Fingerprint("Model", "0", 2 * groups, sigmas, ("cond", "uncond"), "0"),
        groups=tuple((2 * g, 2 * g + 2) for g in range(groups)),
        group_seconds=tuple(rng.uniform(0.5, 1.5, groups)),
        reuse_seconds=(0.01,) * groups,
        fixed_seconds=0.4,
        samples=("a", "b"),
        tables=tables,
    )
