"""A caching method of one's own as a policy of the executor: what to look at, and when to reuse.

    python examples/method_as_policy.py

The executor does the rest: probes, stored residuals, guidance branches, other shapes, ControlNet, reports, and the
export of what was decided as a schedule. This one reuses while the cosine between the probe's residual and that of the
last computed step stays high, but never more than three times in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

import layercache
from layercache import ops
from layercache.demo.pipeline import load_demo_pipeline
from layercache.runtime.policy import Decider, DynamicMethod, Observation, Run, check_range


class CosineDecider(Decider):
    def __init__(self, method: CosineCache, run: Run):
        super().__init__(method, run)
        self.in_a_row, self.has_reference = 0, False

    def must_compute(self, step: int) -> bool:
        return step < 2 or self.is_last(step) or self.in_a_row >= 3

    def observe(self, step: int, observation: Observation) -> torch.Tensor | None:
        fresh = self.memory("fresh", observation.probe)
        previous = [self.memory("reference", observation.probe)] if self.has_reference else None
        return ops.capture([observation.probe], [observation.start], [fresh], previous=previous)

    def may_reuse(self, step: int, numbers: Sequence[float]) -> bool:
        squared, product, squared_before = numbers[1], numbers[6], numbers[5]
        return product >= self.method.cosine * (squared * squared_before) ** 0.5

    def record(self, step: int, computed: bool) -> None:
        self.in_a_row = 0 if computed else self.in_a_row + 1
        if computed:
            self.swap("fresh", "reference")
            self.has_reference = True


@dataclass(frozen=True)
class CosineCache(DynamicMethod):
    cosine: float = 0.99
    name: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("cosine", self.cosine, -1.0, 1.0)

    @property
    def probe(self) -> int:
        return 1

    def decider(self, run: Run) -> Decider:
        return CosineDecider(self, run)


def main() -> None:
    pipe = load_demo_pipeline("cpu")
    call = {"num_inference_steps": 30, "guidance_scale": 4.0}
    with layercache.enabled(pipe, CosineCache(cosine=0.98)) as cache:
        pipe(["cat"], generator=torch.Generator().manual_seed(0), **call)
        print(cache.report())
        print("computed:", "".join("#" if computed else "." for computed in cache.decisions["cond"]))
        print(f"as a schedule: {cache.export_schedule().used:.1%} of block time used")


if __name__ == "__main__":
    main()
