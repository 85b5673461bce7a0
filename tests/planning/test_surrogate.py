"""The surrogate of cached runs, against a few lines of NumPy and against runs of the model."""

import numpy as np
import pytest

from layercache import _core
from layercache.planning.surrogate import expected_psnr, regular_paths
from support.weighted_fit import weighted


def full_runs(pictures=3, steps=9, elements=40, seed=0):
    """First latents and velocities that change slowly."""
    random = np.random.default_rng(seed)
    start = random.normal(size=(pictures, elements))
    kinds = random.normal(size=(3, pictures, elements))
    times = np.linspace(0.0, 1.0, steps)[:, None, None]
    velocities = (
        kinds[0]
        + times * kinds[1]
        + np.sin(3 * times) * kinds[2]
        + 0.05 * random.normal(size=(steps, pictures, elements))
    )
    return start, np.moveaxis(velocities, 1, 0)


def euler(pictures=3, steps=9):
    """keep and weights of Euler steps."""
    lengths = np.diff(np.linspace(1.0, 0.0, steps + 1) ** 1.3)
    return np.ones((pictures, steps)), np.stack([np.diag(lengths)] * pictures)


def multistep(pictures=3, steps=9):
    """Of a sampler that looks back on all steps, and steps every picture otherwise."""
    keep, weights = euler(pictures, steps)
    random = np.random.default_rng(5)
    back = np.tril(random.normal(scale=0.02, size=weights.shape), -1)
    return keep * random.uniform(0.9, 1.1, size=keep.shape), weights + back


def surrogate_of(start, velocities, sampler=None, **more):
    sampler = sampler or euler()
    return _core.Surrogate(vectors_of(start, velocities), np.ones((3, 9)), np.ones((3, 9)), *sampler, **more)


def vectors_of(start, velocities):
    return np.concatenate([start[:, None], velocities], axis=1) / np.sqrt(velocities.shape[2])


def simulated(keep, weights, start, velocities, kappa, eta, computed, terms, ridge, weighting, folds):
    """The same run in vectors: the directions across are further elements of the latents.

    Returns the PSNR of every picture with the forecasts fitted to all, and with those fitted to the other folds' alone,
    and the forecasts fitted to all, as coefficients of the velocities and the latents.
    """
    pictures, steps, elements = velocities.shape
    wide = np.zeros((pictures, steps, elements + steps))
    wide[:, :, :elements] = velocities
    across = np.concatenate([np.zeros((steps, elements)), np.eye(steps)], axis=1)
    full = np.concatenate([start, np.zeros((pictures, steps))], axis=1)
    runs = [full.copy(), full.copy()]  # fitted to all, left out
    made, forecasts = [[], []], []
    off = [np.zeros_like(wide), np.zeros_like(wide)]  # velocity taken less the full run's
    for step in range(steps):
        drifted = runs[0] - full
        for k, latents in enumerate(runs if computed[step] else ()):
            drift = latents - full
            size = np.linalg.norm(drift, axis=1)
            answer = kappa[:, step, None] * drift + (eta[:, step] * size)[:, None] * across[step]
            made[k] = [wide[:, step] + answer, *made[k]][:terms]
        lengths = weights[:, step, step, None]
        ahead = [
            keep[:, step, None] * (latents - full) + np.einsum("pk,pke->pe", weights[:, step, :step], own[:, :step])
            for latents, own in zip(runs, off, strict=True)
        ]
        taken = [own[0].copy() for own in made]
        forecasts.append([])
        if not (computed[step] and not drifted.any()):
            matrices, others = (
                [np.stack([*(f[p] - own[0][p] for f in own[1:]), own[0][p], x[p]]) for p in range(pictures)]
                for own, x in zip(made, runs, strict=True)
            )
            targets = [wide[p, step] - ahead[0][p] / lengths[p] - made[0][0][p] for p in range(pictures)]
            solution = weighted(matrices, targets, ridge, weighting)
            forecasts[-1] = [1 + solution[-2] - sum(solution[:-2]), *solution[:-2], solution[-1]]
            for p in range(pictures):
                taken[0][p] += solution @ matrices[p]
                kept = [q for q in range(pictures) if folds[q] != folds[p]]
                own = weighted([matrices[q] for q in kept], [targets[q] for q in kept], ridge, weighting)
                taken[1][p] += own @ others[p]
        full = keep[:, step, None] * full + np.einsum("pk,pke->pe", weights[:, step, : step + 1], wide[:, : step + 1])
        for k in range(2):
            off[k][:, step] = taken[k] - wide[:, step]
            runs[k] = full + ahead[k] + lengths * off[k][:, step]
    return *(-10 * np.log10(np.sum((latents - full) ** 2, axis=1) / (4 * elements)) for latents in runs), forecasts


@pytest.mark.parametrize("sampler", [euler, multistep])
@pytest.mark.parametrize("folds", [(), (0, 1, 0)], ids=["each alone", "two together"])
@pytest.mark.parametrize("weighting", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("terms", [1, 3])
def test_it_agrees_with_vectors(terms, weighting, folds, sampler):
    """Fitted to all pictures, and each left out of the fits."""
    start, velocities = full_runs()
    random = np.random.default_rng(1)
    kappa, eta = random.normal(size=(3, 9)), random.uniform(0, 3, size=(3, 9))
    given = *sampler(), start, velocities, kappa, eta
    surrogate = _core.Surrogate(vectors_of(start, velocities), kappa, eta, *sampler(), terms, 1e-5, weighting, folds)
    paths = random.random((20, 9)) < 0.5
    paths[:, 0] = True
    expected = [simulated(*given, path, terms, 1e-5, weighting, folds or (0, 1, 2)) for path in paths]
    for k, leave_out in enumerate((False, True)):
        found = surrogate.simulate(paths, leave_out=leave_out)
        own = [np.minimum(one[k], 100) for one in expected]
        np.testing.assert_allclose(found, own, rtol=1e-9, atol=1e-8)
    for path, (_, _, own) in zip(paths, expected, strict=True):
        for found, coefficients in zip(surrogate.forecasts(path[None]), own, strict=True):
            np.testing.assert_allclose(found, coefficients, rtol=1e-6, atol=1e-8)


def test_what_is_expected_of_others_is_the_run_less_what_its_own_fit_gave():
    surrogate = surrogate_of(*full_runs())
    path = np.array([True, True, False] * 3)
    fitted, left_out = (surrogate.simulate(path[None], leave_out=how)[0] for how in (False, True))
    found = expected_psnr(surrogate, path, (30.0, 99.9, 40.0))
    np.testing.assert_allclose(found, np.minimum(np.array([30.0, 99.9, 40.0]) - (fitted - left_out), 100.0))
    assert (fitted != left_out).all()
    first = expected_psnr(surrogate, path, (30.0,))  # the others, that were not run, are as far off as it
    np.testing.assert_allclose(first, np.minimum(left_out + (30.0 - fitted[0]), 100.0))
    alone = _core.Surrogate(vectors_of(*full_runs(1)), np.ones((1, 9)), np.ones((1, 9)), *euler(1))
    assert expected_psnr(alone, path, (30.0,)) == ()


def test_regular_paths_are_dense_at_both_ends_and_even_between():
    found = ["".join(".x"[int(computed)] for computed in path) for path in regular_paths(7, 3)]
    assert sorted(found) == ["x....xx", "x..x..x", "x..x.x.", "xx....x", "xx..x..", "xxx...."]


def test_computing_everything_is_the_full_run():
    surrogate = surrogate_of(*full_runs())
    assert (surrogate.simulate(np.ones((1, 9), bool)) == 100).all()


def test_the_search_finds_the_best_of_all_paths_of_a_small_run():
    surrogate = surrogate_of(*full_runs())
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
    surrogate = surrogate_of(*full_runs())
    path = np.array([[True, True, False] * 3])
    runs = [surrogate.explore(path, np.zeros(9, bool), limit=12, seed=seed)[0] for seed in (3, 3, 4)]
    assert [len(run) for run in runs] == [12, 12, 12]
    assert (runs[0] == runs[1]).all() and not (runs[0] == runs[2]).all()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"vectors": np.full((3, 10, 10), np.nan)}, "vectors must be finite"),
        ({"weights": np.ones((3, 8, 9))}, "weights must have shape"),
        ({"keep": np.ones((2, 9))}, "keep must have shape"),
        ({"vectors": np.ones((3, 1, 10))}, "vectors must have shape"),
        ({"kappa": np.ones((3, 8))}, "kappa must have shape"),
        ({"weights": np.zeros((3, 9, 9))}, "weights must not be 0 on their diagonals"),
        ({"terms": 9}, "terms must be from 1 to 8"),
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"weighting": -1.0}, "weighting must be at least 0"),
        ({"folds": [0, 1]}, "folds must have an entry for every picture"),
        ({"folds": [0, 1, 3]}, "folds must be from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(changed, message):
    keep, weights = euler()
    given = {"vectors": vectors_of(*full_runs()), "kappa": np.ones((3, 9)), "eta": np.ones((3, 9))}
    given |= {"keep": keep, "weights": weights}
    with pytest.raises(ValueError, match=message):
        _core.Surrogate(**{**given, **changed})


def test_a_path_that_begins_with_a_skipped_step_is_refused():
    surrogate = surrogate_of(*full_runs())
    with pytest.raises(ValueError, match="must compute step 0"):
        surrogate.simulate(np.zeros((1, 9), bool))
