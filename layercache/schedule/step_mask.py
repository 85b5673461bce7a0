"""`StepMask`: which steps of a schedule are computed, for engines that take nothing else."""

from __future__ import annotations

from itertools import groupby


class StepMask(tuple[int, ...]):
    """Per step of a run 1 where it is computed and 0 where it is reused; ``Schedule.to_step_mask`` makes one.

    Examples:
        >>> mask = schedule.to_step_mask()
        >>> cache_dit.DBCacheConfig(steps_computation_mask=list(mask), steps_computation_policy="static")
        >>> mask.to_text()  # stable-diffusion.cpp: --scm-mask
        '1,1,0,1,0,0,1'
        >>> mask.to_bins()  # SGLang: SGLANG_CACHE_DIT_SCM_COMPUTE_BINS and ..._CACHE_BINS
        ((2, 1, 1), (1, 2))
    """

    __slots__ = ()

    def to_text(self) -> str:
        """As stable-diffusion.cpp takes it (``scm_mask``, ``--scm-mask``): numbers with commas between them."""
        return ",".join(map(str, self))

    def to_bins(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths of the runs of computed steps, and of the runs of reused steps between and behind them.

        As cache-dit (``steps_mask``) and SGLang take them; with no reused step the second is empty, and no mask is
        needed.
        """
        lengths = [(value, sum(1 for _ in run)) for value, run in groupby(self)]
        return tuple(n for value, n in lengths if value), tuple(n for value, n in lengths if not value)
