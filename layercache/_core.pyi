from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

class Result:
    """A solved schedule; the arrays are [steps, groups] and read-only."""

    @property
    def cells(self) -> NDArray[np.int32]:
        """-1 where computed, else the span K (0: plain reuse)."""
    @property
    def anchor(self) -> NDArray[np.int32]:
        """Computed step a whose residual the cell reads; -1 where computed."""
    @property
    def base(self) -> NDArray[np.int32]:
        """Older computed step b the cell reads; -1 where there is none."""
    @property
    def total_error(self) -> float: ...
    @property
    def spent(self) -> float:
        """Sum of the cells' seconds."""
    @property
    def feasible(self) -> bool:
        """Whether spent stays within the budget."""
    @property
    def method(self) -> Literal["removal", "addition", "exact", "lagrangian"]:
        """The solver that found it."""

def solve(
    errors: ArrayLike,
    compute_cost: ArrayLike,
    cached_cost: ArrayLike,
    budget: float,
    protected: ArrayLike,
    spans: Sequence[int],
    history: int = 3,
    max_run: int = 8,
    tau: float = 0.05,
    method: str = "best",
) -> Result: ...

class Path:
    """A shortest path over the steps."""

    @property
    def feasible(self) -> bool: ...
    @property
    def steps(self) -> list[int]:
        """The computed steps, ascending."""
    @property
    def choice(self) -> list[int]:
        """Which of the parallel edges starts at each of them."""
    @property
    def cost(self) -> float: ...
    @property
    def curve(self) -> list[float]:
        """The cost with k computed steps, for every k up to the budget or the number of steps."""

def shortest_path(
    errors: ArrayLike,
    budget: int,
    gamma: float = 5.0,
    mode: Literal["sum", "lexicographic"] = "sum",
    required: ArrayLike | None = None,
) -> Path: ...

class Surrogate:
    """Cached runs of whole-step schedules simulated from the full runs' velocities, without the model."""

    def __init__(
        self,
        vectors: ArrayLike,
        kappa: ArrayLike,
        eta: ArrayLike,
        keep: ArrayLike,
        weights: ArrayLike,
        terms: int = 3,
        ridge: float = 1e-5,
        weighting: float = 1.0,
        folds: Sequence[int] = (),
    ) -> None: ...
    def simulate(self, computed: ArrayLike, leave_out: bool = False) -> NDArray[np.float64]:
        """PSNR in dB of every path and picture, [paths, pictures]."""
    def forecasts(self, computed: ArrayLike) -> list[list[float]]:
        """Of one path, [1, steps], the coefficients fitted at every step: of the newest velocities, newest first, and
        of the latents; none where the full run is not left."""
    def explore(
        self,
        starts: ArrayLike,
        fixed: ArrayLike,
        limit: int = 900,
        seed: int = 0,
        leave_out: bool = False,
        tail: float = 0.5,
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """All paths that a local search simulates and their scores, the best first."""
