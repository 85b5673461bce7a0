"""The surrogate of cached runs: what a schedule of whole steps gives, predicted from full runs and earlier cached ones.

Every steered run lives, but for the model's answer to its drift, in the span of the full run's first latents and
velocities. Their inner products and the measured answers simulate a schedule, forecasts and all, without
running the model (`layercache._core.Surrogate`). Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from layercache.errors import CalibrationError
from layercache.planning.fit import Forecast, inner_products
from layercache.planning.rollout import PSNR_LIMIT, Rollout, Rollouts
from layercache.planning.sampler import LinearSampler
from layercache.planning.trace import Trace, near

if TYPE_CHECKING:
    from layercache._core import Surrogate

Measured = tuple[np.ndarray, np.ndarray]


def pictures_of(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """A sample's latents as one row per picture, ``[B, elements]``.

    A sampler that steps both guidance branches at once (DiT's) has several batches of them.
    """
    rows = tensor.flatten(1)
    if len(rows) == count:
        return rows
    return rows.unflatten(0, (-1, count)).transpose(0, 1).flatten(1)


def factors_of(grams: np.ndarray) -> np.ndarray:
    """A of inner products ``A A^T``, ``[P, T, T]``; the last columns are of the largest eigenvalues."""
    values, vectors = np.linalg.eigh(grams)
    return np.asarray(vectors * np.sqrt(np.maximum(values[:, None], 0.0)))


@dataclass(frozen=True, eq=False)
class FullRuns:
    """What the surrogate knows of pictures: their full runs, and their samplers' steps.

    Attributes:
        sigmas: N + 1 noise levels, of all of them.
        vectors: first latents and velocities, in a basis that keeps their inner products, mean over the elements,
            ``[P, N + 1, rank]``; of `FullRuns.of` the last ones hold most.
        samplers: per picture.
        folds: per picture; those of one fold are left out together.
    """

    sigmas: tuple[float, ...]
    vectors: np.ndarray
    samplers: tuple[LinearSampler, ...]
    folds: tuple[int, ...]

    @classmethod
    def of(cls, rollouts: Rollouts) -> FullRuns:
        """Of calibration pictures, each a fold of its own.

        Raises:
            CalibrationError: a full run is not finite.
        """
        own = list[np.ndarray]()
        for trace, pictures in zip(rollouts.full, rollouts.pictures, strict=True):
            vectors = [pictures_of(v, len(pictures)) for v in (trace.latents[0], *trace.taken)]
            own.append(inner_products(vectors) / vectors[0].shape[1])
        of_samples = rollouts.crew.gather(own)
        # a sampler that is not linear is not steered, and simulated as if it took Euler's steps
        known = rollouts.samplers or [LinearSampler.euler(rollouts.sigmas)] * len(of_samples)
        samplers = [sampler for sampler, grams in zip(known, of_samples, strict=True) for _ in grams]
        found = [gram for grams in of_samples for gram in grams]
        bad = [str(picture) for picture, gram in enumerate(found) if not np.isfinite(gram).all()]
        if bad:
            raise CalibrationError(
                f"the full run of picture {', '.join(bad)} holds NaN or infinity: leave it out, or run the model in a "
                "wider number format",
                argument="prompts",
            )
        return cls(rollouts.sigmas, factors_of(np.stack(found)), tuple(samplers), tuple(range(len(found))))

    def joined(self, others: FullRuns) -> FullRuns:
        """These and others between the same noise levels."""
        rank = max(self.vectors.shape[2], others.vectors.shape[2])
        vectors = [np.pad(v, ((0, 0), (0, 0), (rank - v.shape[2], 0))) for v in (self.vectors, others.vectors)]
        folds = (*self.folds, *(max(self.folds) + 1 + fold for fold in others.folds))
        return FullRuns(self.sigmas, np.concatenate(vectors), self.samplers + others.samplers, folds)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1


USUAL_SIGMAS = (0.0, 0.1, 0.56, 0.87, 1.0)
USUAL_KAPPA, USUAL_ETA = (0.1, 0.1, 0.5, 1.0, 2.0), (0.2, 0.2, 0.7, 1.4, 2.5)
"""kappa and eta times sigma as the bundled model and two others of 12 and 28 blocks answered, about their mean."""


@dataclass(frozen=True)
class Answers:
    """How the model answers a drift e of the latents: ``F_i = v_i + kappa_i e + eta_i |e| xi``.

    xi is a unit vector across e.

    Attributes:
        kappa: along the drift, ``[P, N]``.
        eta: across it, ``[P, N]``, at least 0.
    """

    kappa: np.ndarray
    eta: np.ndarray

    @classmethod
    def of(cls, measured: Sequence[Measured]) -> Answers | None:
        """From what runs have shown, `answers_of` each; ``None`` where none has.

        Over m runs the mean of kappa and of log eta is taken, and drawn to the median over the pictures by
        ``1 / (m + 1)``.
        """
        if not measured:
            return None
        kappa, log_eta = (np.mean([one[k] for one in measured], axis=0) for k in (0, 1))
        share = len(measured) / (len(measured) + 1)
        kappa, log_eta = (np.median(v, axis=0) + share * (v - np.median(v, axis=0)) for v in (kappa, log_eta))
        return cls(kappa, np.exp(log_eta))

    @classmethod
    def usual(cls, sigmas: Sequence[float], pictures: int) -> Answers | None:
        """What models are likely to answer between N + 1 noise levels of flow matching; ``None`` for other levels."""
        levels = np.asarray(sigmas[:-1], float)
        if levels.max() > 1.0 + 1e-6:
            return None
        kappa, eta = (np.interp(levels, USUAL_SIGMAS, v) / np.maximum(levels, 1e-2) for v in (USUAL_KAPPA, USUAL_ETA))
        return cls(np.tile(kappa, (pictures, 1)), np.tile(eta, (pictures, 1)))


def answers_of(rollouts: Rollouts, run: Rollout) -> Measured | None:
    """kappa and log eta of one run, each ``[P, N]``; ``None`` where it has not drifted at a computed step.

    Between computed steps they are interpolated.
    """
    computed = [step for step in range(rollouts.num_steps) if run.traces[0].raw[step] is not None]
    own = [
        np.stack([_answer(trace, full, step, len(pictures)).cpu().numpy() for step in computed])
        for trace, full, pictures in zip(run.traces, rollouts.full, rollouts.pictures, strict=True)
    ]
    answers = np.concatenate(rollouts.crew.gather(own), axis=2)  # [steps, 2, P]
    drifted = np.isfinite(answers).all(axis=(1, 2))  # all pictures
    if not drifted.any():
        return None
    every, steps, tables = np.arange(rollouts.num_steps), np.array(computed)[drifted], answers[drifted]
    kappa, log_eta = (np.stack([np.interp(every, steps, column) for column in tables[:, k].T]) for k in (0, 1))
    return kappa, log_eta


def _answer(trace: Trace, full: Trace, step: int, count: int) -> torch.Tensor:
    """kappa and log eta of a sample's pictures at a computed step, ``[2, B]``; not finite without a drift."""
    own = trace.raw[step]
    assert own is not None
    drift = trace.latents[step].double() - near(full.latents[step], own).double()
    answer = own.double() - near(full.taken[step], own).double()
    drift, answer = pictures_of(drift, count), pictures_of(answer, count)
    squared = drift.square().sum(1)
    kappa = (answer * drift).sum(1) / squared
    across = (answer - kappa[:, None] * drift).square().sum(1)
    return torch.stack([kappa, 0.5 * (across / squared).log()])


def surrogate_of(runs: FullRuns, answers: Answers, forecast: Forecast, stress: Sequence[float] = (1.0,)) -> Surrogate:
    """The simulator of full runs, every picture once per entry of ``stress``.

    Args:
        runs: the full runs.
        answers: to drift.
        forecast: steered everywhere, with latents and a free sum.
        stress: factors of eta. Few calibration pictures go astray; those above 1 stand for them.
    """
    from layercache._core import Surrogate

    return Surrogate(
        np.concatenate([runs.vectors] * len(stress)),
        np.concatenate([answers.kappa] * len(stress)),
        np.concatenate([factor * answers.eta for factor in stress]),
        np.stack([sampler.keep for sampler in runs.samplers] * len(stress)),
        np.stack([sampler.weights for sampler in runs.samplers] * len(stress)),
        terms=forecast.terms,
        ridge=forecast.ridge,
        weighting=forecast.weighting,
        folds=list(runs.folds) * len(stress),
    )


def expected_psnr(surrogate: Surrogate, computed: np.ndarray, psnr: Sequence[float]) -> tuple[float, ...]:
    """What a schedule that was run is expected to give on other pictures, from leaving each one out, in dB.

    A picture's forecasts were fitted to it too, so that what the run gave is too high for pictures they were not
    fitted to. By how much, the surrogate tells: it simulates the path with each picture in and out of the fit.

    Args:
        surrogate: of the same pictures, each once, and of others, to which the forecasts were fitted as well.
        computed: the path, ``[N]``.
        psnr: that its run gave, of the first pictures.

    Returns:
        psnr less the surrogate's difference, per picture, at most `PSNR_LIMIT`; empty of a single picture. The others
        are taken to have been simulated as much too well, or too badly, as the first pictures in the mean.
    """
    fitted = surrogate.simulate(computed[None])[0]
    if len(fitted) < 2:
        return ()
    left_out = surrogate.simulate(computed[None], leave_out=True)[0]
    beyond = np.asarray(psnr) - fitted[: len(psnr)]
    beyond = np.concatenate([beyond, np.full(len(fitted) - len(psnr), beyond.mean())])
    return tuple(np.minimum(left_out + beyond, PSNR_LIMIT).tolist())


def deviations(runs: FullRuns, max_length: int, max_span: int = 6) -> np.ndarray:
    """How far the mean velocity of an interval is from its forecast, ``[N, max_length + 1, max_span + 1]``.

    Entry ``[t, n, K]`` is the root mean square over the pictures of ``|mean_i (v_i - v_t - (sigma_i - sigma_t) D_K)|``,
    i from t to t + n - 1, D_K the secant over the K steps before t, none for K = 0. As MeanCache's stability deviation
    (docs/methods.md, MeanCache), in the norm that inner products give. Infinite where there is no such interval or
    secant. An interval of one step has none to forecast, and 0.
    """
    sigmas, steps = runs.sigmas, runs.num_steps
    lengths = np.diff(np.asarray(sigmas))
    table = np.full((steps, max_length + 1, max_span + 1), np.inf)
    velocities = runs.vectors[:, 1:]
    mean_gram = (velocities @ velocities.transpose(0, 2, 1)).mean(axis=0)
    for start in range(steps):
        for length in range(2, min(max_length, steps - start) + 1):
            for span in range(min(max_span, start) + 1):
                if span and sigmas[start] == sigmas[start - span]:
                    continue  # of Heun's second evaluations, that have no secant
                share = lengths[start : start + length] / lengths[start : start + length].sum()
                weights = np.zeros(steps)
                weights[start : start + length] += share
                weights[start] -= 1.0
                if span:
                    ahead = float(share @ (np.asarray(sigmas[start : start + length]) - sigmas[start]))
                    slope = ahead / (sigmas[start] - sigmas[start - span])
                    weights[start] -= slope
                    weights[start - span] += slope
                table[start, length, span] = np.sqrt(max(float(weights @ mean_gram @ weights), 0.0))
    table[:, 1] = 0.0
    return table


def starts(table: np.ndarray, sigmas: Sequence[float], count: int, dense: int) -> list[tuple[str, np.ndarray]]:
    """Paths of ``count`` computed steps to search from, each with a name; the first suppresses peaks of the deviation.

    Args:
        table: of `deviations`.
        sigmas: N + 1 noise levels.
        count: computed steps.
        dense: how many steps from the first on are computed in any case.
    """
    from layercache._core import shortest_path

    steps = len(sigmas) - 1
    ends = np.minimum(np.arange(steps)[:, None] + np.arange(table.shape[1]), steps)
    lengths = np.abs(np.asarray(sigmas)[ends] - np.asarray(sigmas[:-1])[:, None])
    lengths[:, 0] = 1.0  # of no interval, whose deviation is infinite
    drifts = table * lengths[:, :, None]
    found = [(f"deviations^{gamma:g}", shortest_path(table, count, gamma=gamma)) for gamma in (5.0, 2.0, 1.0)]
    found += [(f"drifts^{gamma:g}", shortest_path(drifts, count, gamma=gamma)) for gamma in (0.5, 1.0, 2.0)]
    paths = [(name, list(path.steps)) for name, path in found if path.feasible]
    paths.append(("evenly", [round(k * (steps - 1) / max(1, count - 1)) for k in range(count)]))
    paths.append(("dense start", list(range(dense))))
    paths.append(("dense end", _dense_end(steps, count)))
    return [(name, with_count(path, steps, count, dense)) for name, path in paths]


def _dense_end(steps: int, count: int) -> list[int]:
    """Every n-th step and the last ones: as few of these, with the least n, as give ``count`` steps or more."""
    for interval in range(2, steps + 1):
        if len(range(0, steps, interval)) <= count:
            for last in range(steps):
                path = {*range(0, steps - last, interval), *range(steps - last, steps)}
                if len(path) >= count:
                    return sorted(path)
    return list(range(steps))


def regular_paths(steps: int, count: int) -> list[np.ndarray]:
    """Paths of ``count`` computed steps: the first and last ones, any number of each, and others evenly between."""
    found = []
    for first in range(1, count + 1):
        for last in range(count - first + 1):
            between, length = count - first - last, steps - last - first
            path = np.zeros(steps, dtype=bool)
            path[:first] = path[steps - last :] = True
            path[[first + (k + 1) * length // (between + 1) for k in range(between)]] = True
            found.append(path)
    return list({path.tobytes(): path for path in found if path.sum() == count}.values())


def explored(
    surrogate: Surrogate,
    runs: FullRuns,
    begins: Sequence[np.ndarray],
    dense: int,
    limit: int,
    seed: int,
    tail: float,
) -> np.ndarray:
    """Paths that a local search simulates, the best first, ``[paths, N]``; each fold is left out of its own forecasts.

    Args:
        surrogate: of the full runs.
        runs: the full runs.
        begins: paths to begin with, of one number of computed steps.
        dense: how many steps from the first on stay computed.
        limit: paths.
        seed: of the order in which exchanges are tried.
        tail: weight of the 10 % quantile beside the mean.
    """
    fixed = np.arange(runs.num_steps) < dense
    leave_out = len(set(runs.folds)) > 1
    return np.asarray(surrogate.explore(np.array(begins), fixed, limit, seed, leave_out, tail)[0])


def with_count(path: Sequence[int], steps: int, count: int, dense: int) -> np.ndarray:
    """The path with its first steps dense and with so many computed ones: the most crowded go, the widest gaps fill."""
    computed = sorted({0, *range(dense), *path})
    while len(computed) > max(count, dense, 1):
        free = [k for k in range(1, len(computed)) if computed[k] >= dense]
        ends = [*computed, steps]
        computed.pop(min(free, key=lambda k: ends[k + 1] - ends[k - 1]))
    while len(computed) < count:
        ends = [*computed, steps]
        widest = max(range(len(computed)), key=lambda k: ends[k + 1] - ends[k])
        computed.insert(widest + 1, (ends[widest] + ends[widest + 1]) // 2)
    found = np.zeros(steps, dtype=bool)
    found[computed] = True
    return found
