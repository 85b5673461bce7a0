"""The surrogate of cached runs, against a few lines of NumPy and against runs of the model."""

import numpy as np
import pytest

from layercache import _core
from support.weighted_fit import weighted


def full_runs(pictures=3, steps=9, elements=40, seed=0):
    """Sigmas, first latents and velocities that change slowly; the latents follow by Euler steps."""
    random = np.random.default_rng(seed)
    sigmas = np.linspace(1.0, 0.0, steps + 1) ** 1.3
    start = random.normal(size=(pictures, elements))
    kinds = random.normal(size=(3, pictures, elements))
    times = np.linspace(0.0, 1.0, steps)[:, None, None]
    velocities = (
        kinds[0]
        + times * kinds[1]
        + np.sin(3 * times) * kinds[2]
        + 0.05 * random.normal(size=(steps, pictures, elements))
    )
    return sigmas, start, np.moveaxis(velocities, 1, 0)


def grams_of(start, velocities):
    vectors = np.concatenate([start[:, None], velocities], axis=1)
    return vectors @ np.swapaxes(vectors, 1, 2)


def simulated(sigmas, start, velocities, kappa, eta, computed, terms, ridge, weighting):
    """The same run in vectors: the directions across are further elements of the latents."""
    pictures, steps, elements = velocities.shape
    wide = np.zeros((pictures, steps, elements + steps))
    wide[:, :, :elements] = velocities
    across = np.concatenate([np.zeros((steps, elements)), np.eye(steps)], axis=1)
    full = np.concatenate([start, np.zeros((pictures, steps))], axis=1)
    latents, made = full.copy(), []
    for step in range(steps):
        drift = latents - full
        if computed[step]:
            size = np.linalg.norm(drift, axis=1)
            answer = kappa[:, step, None] * drift + (eta[:, step] * size)[:, None] * across[step]
            made = [wide[:, step] + answer, *made][:terms]
        length = sigmas[step + 1] - sigmas[step]
        taken = made[0].copy()
        if not (computed[step] and not drift.any()):
            matrices = [
                np.stack([*(f[p] - made[0][p] for f in made[1:]), made[0][p], latents[p]]) for p in range(pictures)
            ]
            targets = [wide[p, step] - drift[p] / length - made[0][p] for p in range(pictures)]
            solution = weighted(matrices, targets, ridge, weighting)
            taken += np.stack([solution @ m for m in matrices])
        full = full + length * wide[:, step]
        latents = latents + length * taken
    return -10 * np.log10(np.sum((latents - full) ** 2, axis=1) / (4 * elements))


@pytest.mark.parametrize("weighting", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("terms", [1, 3])
def test_it_agrees_with_vectors(terms, weighting):
    sigmas, start, velocities = full_runs()
    random = np.random.default_rng(1)
    kappa, eta = random.normal(size=(3, 9)), random.uniform(0, 3, size=(3, 9))
    surrogate = _core.Surrogate(grams_of(start, velocities), kappa, eta, sigmas, 40, terms, 1e-5, weighting)
    paths = random.random((20, 9)) < 0.5
    paths[:, 0] = True
    expected = [simulated(sigmas, start, velocities, kappa, eta, path, terms, 1e-5, weighting) for path in paths]
    np.testing.assert_allclose(surrogate.simulate(paths), np.minimum(expected, 100), rtol=1e-9, atol=1e-8)


def test_computing_everything_is_the_full_run():
    sigmas, start, velocities = full_runs()
    surrogate = _core.Surrogate(grams_of(start, velocities), np.ones((3, 9)), np.ones((3, 9)), sigmas, 40)
    assert (surrogate.simulate(np.ones((1, 9), bool)) == 100).all()


def test_the_search_finds_the_best_of_all_paths_of_a_small_run():
    sigmas, start, velocities = full_runs()
    surrogate = _core.Surrogate(grams_of(start, velocities), np.ones((3, 9)), np.ones((3, 9)), sigmas, 40)
    masks = [[bool(k >> s & 1) for s in range(9)] for k in range(512)]
    paths = np.array([m for m in masks if m[0] and m[1] and sum(m) == 5])
    psnr = surrogate.simulate(paths)
    scores = (psnr.mean(axis=1) + np.quantile(psnr, 0.1, axis=1)) / 2
    fixed = np.zeros(9, bool)
    fixed[:2] = True
    found, found_scores = surrogate.explore(paths[:3], fixed, limit=1000)
    assert (found[:, :2]).all() and (found.sum(axis=1) == 5).all() and len(np.unique(found, axis=0)) == len(found)
    assert (np.diff(found_scores) <= 0).all()
    assert found_scores[0] == pytest.approx(scores.max(), abs=0.5)  # of a local search
    table = {tuple(path): score for path, score in zip(paths.tolist(), scores, strict=True)}
    assert found_scores == pytest.approx([table[tuple(path)] for path in found.tolist()], abs=1e-9)


def test_the_search_keeps_to_its_limit_and_its_seed():
    sigmas, start, velocities = full_runs()
    surrogate = _core.Surrogate(grams_of(start, velocities), np.ones((3, 9)), np.ones((3, 9)), sigmas, 40)
    path = np.array([[True, True, False] * 3])
    runs = [surrogate.explore(path, np.zeros(9, bool), limit=12, seed=seed)[0] for seed in (3, 3, 4)]
    assert [len(run) for run in runs] == [12, 12, 12]
    assert (runs[0] == runs[1]).all() and not (runs[0] == runs[2]).all()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"grams": np.full((3, 10, 10), np.nan)}, "grams must be finite"),
        ({"grams": np.ones((3, 9, 10))}, "grams must have shape"),
        ({"kappa": np.ones((3, 8))}, "kappa must have shape"),
        ({"sigmas": np.ones(10)}, "sigmas must change at every step"),
        ({"terms": 9}, "terms must be from 1 to 8"),
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"weighting": -1.0}, "weighting must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(changed, message):
    sigmas, start, velocities = full_runs()
    given = {"grams": grams_of(start, velocities), "kappa": np.ones((3, 9)), "eta": np.ones((3, 9)), "sigmas": sigmas}
    with pytest.raises(ValueError, match=message):
        _core.Surrogate(**{**given, "elements": 40.0, **changed})


def test_a_path_that_begins_with_a_skipped_step_is_refused():
    sigmas, start, velocities = full_runs()
    surrogate = _core.Surrogate(grams_of(start, velocities), np.ones((3, 9)), np.ones((3, 9)), sigmas, 40)
    with pytest.raises(ValueError, match="must compute step 0"):
        surrogate.simulate(np.zeros((1, 9), bool))
