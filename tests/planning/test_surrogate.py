"""The surrogate of cached runs, against a few lines of NumPy and against runs of the model."""

import numpy as np
import pytest

from layercache import _core
from layercache.planning.surrogate import expected_psnr
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


def simulated(sigmas, start, velocities, kappa, eta, computed, terms, ridge, weighting, folds):
    """The same run in vectors: the directions across are further elements of the latents.

    Returns the PSNR of every picture with the forecasts fitted to all, and with those fitted to the other folds' alone.
    """
    pictures, steps, elements = velocities.shape
    wide = np.zeros((pictures, steps, elements + steps))
    wide[:, :, :elements] = velocities
    across = np.concatenate([np.zeros((steps, elements)), np.eye(steps)], axis=1)
    full = np.concatenate([start, np.zeros((pictures, steps))], axis=1)
    runs = [full.copy(), full.copy()]  # fitted to all, left out
    made = [[], []]
    for step in range(steps):
        drifted = runs[0] - full
        for k, latents in enumerate(runs if computed[step] else ()):
            drift = latents - full
            size = np.linalg.norm(drift, axis=1)
            answer = kappa[:, step, None] * drift + (eta[:, step] * size)[:, None] * across[step]
            made[k] = [wide[:, step] + answer, *made[k]][:terms]
        length = sigmas[step + 1] - sigmas[step]
        taken = [own[0].copy() for own in made]
        if not (computed[step] and not drifted.any()):
            matrices, others = (
                [np.stack([*(f[p] - own[0][p] for f in own[1:]), own[0][p], x[p]]) for p in range(pictures)]
                for own, x in zip(made, runs, strict=True)
            )
            targets = [wide[p, step] - drifted[p] / length - made[0][0][p] for p in range(pictures)]
            solution = weighted(matrices, targets, ridge, weighting)
            for p in range(pictures):
                taken[0][p] += solution @ matrices[p]
                kept = [q for q in range(pictures) if folds[q] != folds[p]]
                own = weighted([matrices[q] for q in kept], [targets[q] for q in kept], ridge, weighting)
                taken[1][p] += own @ others[p]
        full = full + length * wide[:, step]
        runs = [latents + length * own for latents, own in zip(runs, taken, strict=True)]
    return [-10 * np.log10(np.sum((latents - full) ** 2, axis=1) / (4 * elements)) for latents in runs]


@pytest.mark.parametrize("folds", [(), (0, 1, 0)], ids=["each alone", "two together"])
@pytest.mark.parametrize("weighting", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("terms", [1, 3])
def test_it_agrees_with_vectors(terms, weighting, folds):
    """Fitted to all pictures, and each left out of the fits."""
    sigmas, start, velocities = full_runs()
    random = np.random.default_rng(1)
    kappa, eta = random.normal(size=(3, 9)), random.uniform(0, 3, size=(3, 9))
    surrogate = _core.Surrogate(grams_of(start, velocities), kappa, eta, sigmas, 40, terms, 1e-5, weighting, folds)
    paths = random.random((20, 9)) < 0.5
    paths[:, 0] = True
    given = sigmas, start, velocities, kappa, eta
    expected = [simulated(*given, path, terms, 1e-5, weighting, folds or (0, 1, 2)) for path in paths]
    for k, leave_out in enumerate((False, True)):
        found = surrogate.simulate(paths, leave_out=leave_out)
        own = [np.minimum(pair[k], 100) for pair in expected]
        np.testing.assert_allclose(found, own, rtol=1e-9, atol=1e-8)


def test_what_is_expected_of_others_is_the_run_less_what_its_own_fit_gave():
    sigmas, start, velocities = full_runs()
    surrogate = _core.Surrogate(grams_of(start, velocities), np.ones((3, 9)), np.ones((3, 9)), sigmas, 40)
    path = np.array([True, True, False] * 3)
    fitted, left_out = (surrogate.simulate(path[None], leave_out=how)[0] for how in (False, True))
    found = expected_psnr(surrogate, path, (30.0, 99.9, 40.0))
    np.testing.assert_allclose(found, np.minimum(np.array([30.0, 99.9, 40.0]) - (fitted - left_out), 100.0))
    assert (fitted != left_out).all() and expected_psnr(surrogate, path, (30.0,)) == ()


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
        ({"folds": [0, 1]}, "folds must have an entry for every picture"),
        ({"folds": [0, 1, 3]}, "folds must be from 0"),
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
