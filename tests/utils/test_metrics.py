from __future__ import annotations

import importlib.machinery
import math
import sys
import types

import numpy as np
import PIL.Image
import pytest
import torch

from layercache._utils import metrics
from layercache.errors import LayerCacheError, MissingExtraError


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.random((3, 24, 32, 3))
    return reference, np.clip(reference + 0.05 * rng.standard_normal(reference.shape), 0, 1)


def ssim_by_definition(a: np.ndarray, b: np.ndarray, window: int) -> float:
    """Mean over channels and all windows of the SSIM formula, with unbiased variances."""
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for channel in range(a.shape[-1]):
        u = np.lib.stride_tricks.sliding_window_view(a[..., channel], (window, window)).reshape(-1, window**2)
        v = np.lib.stride_tricks.sliding_window_view(b[..., channel], (window, window)).reshape(-1, window**2)
        mu, mv = u.mean(1), v.mean(1)
        covariance = ((u - mu[:, None]) * (v - mv[:, None])).sum(1) / (window**2 - 1)
        variances = u.var(1, ddof=1) + v.var(1, ddof=1)
        values.append(((2 * mu * mv + c1) * (2 * covariance + c2)) / ((mu**2 + mv**2 + c1) * (variances + c2)))
    return float(np.mean(values))


def test_psnr_of_a_constant_offset():
    assert metrics.psnr(np.full((1, 8, 8, 3), 0.4), np.full((1, 8, 8, 3), 0.5)) == pytest.approx([20.0])


def test_psnr_matches_its_definition(pictures):
    reference, noisy = pictures
    expected = [-10 * math.log10(((a - b) ** 2).mean()) for a, b in zip(reference, noisy, strict=True)]
    assert metrics.psnr(reference, noisy) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("side", "window"), [(32, 7), (7, 7), (6, 5), (4, 3), (3, 3)])
def test_ssim_matches_its_definition(pictures, side, window):
    reference, noisy = (p[:, :side, :side] for p in pictures)
    assert metrics.ssim_window(*reference.shape[1:3]) == window
    expected = [ssim_by_definition(a, b, window) for a, b in zip(reference, noisy, strict=True)]
    assert metrics.ssim(reference, noisy) == pytest.approx(expected, rel=1e-9)


def test_identical_pictures(pictures):
    reference, _ = pictures
    assert metrics.psnr(reference, reference) == [math.inf] * 3
    assert metrics.ssim(reference, reference) == pytest.approx([1.0] * 3)


def test_nan_is_not_hidden(pictures):
    reference, noisy = pictures
    noisy[1, 0, 0, 0] = math.nan
    values = metrics.psnr(reference, noisy)
    assert [math.isnan(v) for v in values] == [False, True, False]
    summary = metrics.summarise(values)
    assert math.isnan(summary.mean) and math.isnan(summary.median) and math.isnan(summary.quantile10)


def test_kinds_of_pictures_agree(pictures):
    reference = np.round(pictures[0] * 255).astype(np.uint8)
    noisy = np.round(pictures[1] * 255).astype(np.uint8)
    expected = metrics.psnr(reference / 255, noisy / 255)
    assert metrics.psnr(reference, noisy) == pytest.approx(expected)
    assert metrics.psnr([PIL.Image.fromarray(p) for p in reference], list(noisy)) == pytest.approx(expected)
    assert metrics.psnr(reference[0], noisy[0]) == pytest.approx(expected[:1])


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        ((2, 8, 8, 2), 0.5, "channels"),
        ((8, 8), 0.5, "channels"),
        ((1, 8, 8, 3), 1.5, "0..1"),
        ((1, 8, 8, 3), -0.5, "0..1"),
    ],
)
def test_unusable_pictures_are_refused(shape, value, message):
    with pytest.raises(ValueError, match=message):
        metrics.as_pictures(np.full(shape, value))


def test_pictures_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="references"):
        metrics.psnr(np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 4, 3)))
    with pytest.raises(ValueError, match="3x3"):
        metrics.ssim(np.zeros((1, 8, 2, 3)), np.zeros((1, 8, 2, 3)))


def test_summary_matches_numpy():
    values = np.random.default_rng(1).normal(40, 5, 23)
    summary = metrics.summarise(values)
    assert summary.mean == pytest.approx(values.mean())
    assert summary.median == pytest.approx(np.median(values))
    assert summary.quantile10 == pytest.approx(np.quantile(values, 0.1))
    assert (summary.count, summary.infinite) == (23, 0)


def test_summary_of_identical_pictures():
    some = metrics.summarise([math.inf, 30.0, 40.0, math.inf])
    assert (some.mean, some.median, some.count, some.infinite) == (35.0, math.inf, 4, 2)
    assert some.quantile10 == pytest.approx(33.0)
    every = metrics.summarise([math.inf] * 3)
    assert (every.mean, every.median, every.quantile10, every.infinite) == (math.inf, math.inf, math.inf, 3)


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        metrics.summarise([])


def test_missing_scikit_image_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    for call in (metrics.check_installed, lambda: metrics.psnr(np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 8, 3)))):
        with pytest.raises(MissingExtraError, match=r'pip install "layercache\[figures\]"') as caught:
            call()
        assert isinstance(caught.value, LayerCacheError) and isinstance(caught.value, ImportError)


def test_lpips_without_the_package(monkeypatch, pictures):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    values, reason = metrics.lpips(*pictures)
    assert values is None
    assert "lpips" in reason and "not installed" in reason


class MeanDifference:
    """In the place of the LPIPS network: checks what it is given, returns something that can be computed by hand."""

    made = 0

    def __init__(self, net: str, verbose: bool, pnet_rand: bool):
        assert pnet_rand  # else the package would fetch the weights
        type(self).made += 1
        self.net = torch.nn.ModuleDict({"slice2": torch.nn.ModuleDict({"3": torch.nn.Linear(2, 2)})})

    def eval(self) -> MeanDifference:
        return self

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert torch.equal(self.net["slice2"]["3"].weight, torch.full((2, 2), 3.0))
        assert a.shape == b.shape == (1, 3, 24, 32)
        assert a.min() < -0.9 and a.max() > 0.9
        return (a - b).abs().mean().reshape(1, 1, 1, 1)


@pytest.fixture
def fake_lpips(monkeypatch, tmp_path):
    """The two packages as far as they are used, and an empty folder where torch keeps downloaded weights."""

    def module(name: str, **content: object) -> None:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url="https://example.org/models/alexnet-1.pth"))
    module("lpips", LPIPS=MeanDifference)
    module("torchvision")
    module("torchvision.models", AlexNet_Weights=weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(MeanDifference, "made", 0)
    return tmp_path / "checkpoints" / "alexnet-1.pth"


def test_lpips_without_weights_downloads_nothing(fake_lpips, pictures):
    values, reason = metrics.lpips(*pictures)
    assert values is None
    assert str(fake_lpips) in reason
    # making the network is what would download the weights
    assert MeanDifference.made == 0


def test_lpips_with_weights(fake_lpips, pictures):
    fake_lpips.parent.mkdir()
    stored = {"features.3.weight": torch.full((2, 2), 3.0), "features.3.bias": torch.zeros(2), "classifier.1.bias": 0}
    torch.save(stored, fake_lpips)
    reference, noisy = pictures
    elsewhere = fake_lpips.rename(fake_lpips.parent.parent / "alex.pth")
    assert "not at" in metrics.lpips_unavailable() and not metrics.lpips_unavailable(elsewhere)
    torch.save(stored, fake_lpips)
    for weights in (None, elsewhere, fake_lpips.parent):
        values, reason = metrics.lpips(*pictures, weights)
        assert reason == ""
        assert values == pytest.approx(2 * np.abs(reference - noisy).mean(axis=(1, 2, 3)), rel=1e-5)


def test_figures_of_videos_are_over_their_frames(pictures):
    reference, noisy = (np.stack([one, 0.5 + 0.5 * one]) for one in pictures)  # two videos of three frames
    noisy[1, 2] = reference[1, 2]
    error = ((reference - noisy) ** 2).reshape(2, -1).mean(axis=1)
    assert metrics.psnr(reference, noisy) == pytest.approx(-10 * np.log10(error))
    frames = [metrics.ssim(a, b) for a, b in zip(reference, noisy, strict=True)]
    assert metrics.ssim(reference, noisy) == pytest.approx([np.mean(values) for values in frames])
    as_lists = [[PIL.Image.fromarray((frame * 255).astype(np.uint8)) for frame in video] for video in reference]
    assert metrics.as_pictures(as_lists) == pytest.approx(reference, abs=1 / 255)
    assert np.array_equal(metrics.stills(reference), reference[:, 1]) and metrics.stills(pictures[0]) is pictures[0]
