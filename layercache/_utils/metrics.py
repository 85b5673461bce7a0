"""How close two sets of pictures or videos are: PSNR and SSIM (scikit-image), LPIPS where its weights are here.

A picture is compared with the picture of the same prompt and seed made without a cache, so these are
fidelity figures: they say how little caching changed, not how good a picture is.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layercache.errors import MissingExtraError

SSIM_WINDOW = 7
RANGE_TOLERANCE = 1e-4
LPIPS_NET = "alex"

Pictures = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """Mean, median and lower 10 % quantile of one figure over several pictures.

    The mean alone hides single pictures that went astray, the quantile shows them.

    Attributes:
        mean: over the finite values; identical pictures have an infinite PSNR, which no mean survives, so
            they are left out of it and counted in ``infinite``. ``inf`` when every value is.
        median: over all values, infinite ones included.
        quantile10: a tenth of all values lies at or below it (linear interpolation).
        count: number of values.
        infinite: how many of them were infinite.
    """

    mean: float
    median: float
    quantile10: float
    count: int
    infinite: int = 0


def summarise(values: Iterable[float]) -> Summary:
    """Summary of one figure per picture; NaN anywhere makes the three figures NaN, it is never dropped.

    Raises:
        ValueError: there is no value.
    """
    ordered = sorted(float(v) for v in values)
    if not ordered:
        raise ValueError("there is nothing to summarise: no values were given")
    infinite = sum(math.isinf(v) for v in ordered)
    if any(math.isnan(v) for v in ordered):
        return Summary(math.nan, math.nan, math.nan, len(ordered), infinite)
    finite = [v for v in ordered if math.isfinite(v)]
    mean = math.fsum(finite) / len(finite) if finite else math.inf
    return Summary(mean, _quantile(ordered, 0.5), _quantile(ordered, 0.1), len(ordered), infinite)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation like NumPy's, but an infinite neighbour gives inf and not NaN."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    fraction = position - below
    if fraction == 0 or ordered[below] == ordered[below + 1]:
        return ordered[below]
    return ordered[below] + fraction * (ordered[below + 1] - ordered[below])


def check_installed() -> None:
    """Raises `MissingExtraError` when `psnr` and `ssim` could not work, for callers with a long job ahead."""
    _scikit_image()


def as_pictures(images: Any) -> Pictures:
    """Pictures as a float64 array ``[N, H, W, C]`` in 0..1, videos as ``[N, F, H, W, C]``.

    Args:
        images: a NumPy array ``[N, H, W, C]``, ``[H, W, C]`` or, of videos, ``[N, F, H, W, C]``; or a sequence of PIL
            pictures or arrays, or of such sequences, one per video. Integers of 8 bit are divided by 255, floats must
            lie in 0..1 already.

    Raises:
        ValueError: another shape or range.
    """
    array = images if isinstance(images, np.ndarray) else np.stack([np.asarray(image) for image in images])
    if array.ndim == 3:
        array = array[None]
    if array.ndim not in (4, 5) or array.shape[-1] not in (1, 3, 4):
        raise ValueError(
            "expected pictures [N, H, W, C] or videos [N, F, H, W, C] with 1, 3 or 4 channels, got an array "
            f"{list(array.shape)}"
        )
    if array.dtype == np.uint8:
        return array / 255.0
    pictures = array.astype(np.float64)
    low, high = float(pictures.min()), float(pictures.max())
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(f"float pictures must lie in 0..1, these go from {low:.4g} to {high:.4g}")
    return pictures


def psnr(reference: Any, pictures: Any) -> list[float]:
    """Peak signal-to-noise ratio in dB of every picture; ``inf`` where it equals its reference.

    Of a video it is that of the squared error over all its frames, not a mean of decibels.

    Args:
        reference, pictures: see `as_pictures`; both of the same shape.
    """
    peak_signal_noise_ratio = _scikit_image().peak_signal_noise_ratio
    with np.errstate(divide="ignore"):
        return [float(peak_signal_noise_ratio(a, b, data_range=1.0)) for a, b in _pairs(reference, pictures)]


def ssim(reference: Any, pictures: Any) -> list[float]:
    """Mean structural similarity of every picture, 1.0 where it equals its reference.

    Of a video it is the mean over its frames.

    A flat window of 7x7 pixels per colour channel (scikit-image's default), or the largest odd window
    that fits into a smaller picture.

    Args:
        reference, pictures: see `as_pictures`; both of the same shape, 3 pixels a side at least.
    """
    structural_similarity = _scikit_image().structural_similarity

    def similarity(a: Pictures, b: Pictures) -> float:
        window = ssim_window(*a.shape[:2])
        return float(structural_similarity(a, b, win_size=window, data_range=1.0, channel_axis=-1))

    return [_mean_of_frames(similarity, a, b) for a, b in _pairs(reference, pictures)]


def ssim_window(height: int, width: int) -> int:
    """Side of the SSIM window for a picture of this size.

    Raises:
        ValueError: under 3 pixels a side, where a variance over a window means nothing.
    """
    side = min(SSIM_WINDOW, height, width)
    if side < 3:
        raise ValueError(f"SSIM needs pictures of 3x3 pixels or more, got {height}x{width}")
    return side if side % 2 else side - 1


def frame_psnr(reference: Any, videos: Any) -> list[list[float]]:
    """PSNR in dB of every frame of every video, ``inf`` where a frame equals its reference.

    Args:
        reference, videos: see `as_pictures`; both ``[N, F, H, W, C]``.
    """
    return [psnr(a, b) for a, b in _pairs(reference, videos)]


def frame_ssim(reference: Any, videos: Any) -> list[list[float]]:
    """SSIM of every frame of every video; arguments as of `frame_psnr`."""
    return [ssim(a, b) for a, b in _pairs(reference, videos)]


def temporal_psnr(reference: Any, videos: Any) -> list[float]:
    """PSNR in dB of the changes from frame to frame, of every video; ``inf`` where these equal the reference's.

    ``-10 log10(mean((D b - D a)^2))``, D being each frame minus the one before it, of the video and of its reference.
    The peak is 1, that of `psnr`: an error that stands still counts nothing, one that is drawn anew in every frame is
    3 dB below the PSNR, and one that changes its sign from frame to frame (flicker) 6 dB.

    Args:
        reference, videos: see `as_pictures`; both ``[N, F, H, W, C]``. A video of one frame gives ``inf``.
    """
    found = []
    for a, b in _pairs(reference, videos):
        errors = np.diff(b - a, axis=0)
        squared = float(np.mean(errors**2)) if errors.size else 0.0
        found.append(-10 * math.log10(squared) if squared != 0 else math.inf)
    return found


def lpips(reference: Any, pictures: Any, weights: Path | None = None) -> tuple[list[float] | None, str]:
    """LPIPS (AlexNet) of every picture (the mean over the frames of a video), or ``None`` and why there is none.

    Nothing is ever downloaded: the ``lpips`` package must be installed, and AlexNet's weights lie where torchvision
    keeps them, or where ``weights`` says.

    Args:
        reference, pictures: see `as_pictures`; both of the same shape, 31 pixels a side at least.
        weights: the file of AlexNet's weights, or the folder it lies in; by default torch's cache.

    Returns:
        ``(values, "")``, or ``(None, reason)``.
    """
    reason = lpips_unavailable(weights)
    if reason:
        return None, reason
    import torch

    network = _lpips_network(_alexnet_file(weights))

    def distance(*pair: Pictures) -> float:
        # the network expects -1..1, channels first
        a, b = (torch.from_numpy(in_colour(p)).float().permute(2, 0, 1)[None] * 2 - 1 for p in pair)
        return float(network(a, b))

    with torch.inference_mode():
        return [_mean_of_frames(distance, a, b) for a, b in _pairs(reference, pictures)], ""


@functools.cache
def _lpips_network(weights: Path) -> Any:
    """The network with AlexNet's weights from a file; the package itself would fetch them where they are missing."""
    import lpips as package
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision by names that were deprecated since
        network = package.LPIPS(net=LPIPS_NET, pnet_rand=True, verbose=False)
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    # its slices hold torchvision's layers under their numbers: slice2.3.weight is features.3.weight
    own = {name: stored["features." + name.partition(".")[2]] for name in network.net.state_dict()}
    network.net.load_state_dict(own)
    return network.eval()


def lpips_unavailable(weights: Path | None = None) -> str:
    """Why LPIPS cannot be computed here without a download; empty when it can."""
    missing = [name for name in ("lpips", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        return f'not installed: {", ".join(missing)} (pip install "layercache[lpips]")'
    try:
        path = _alexnet_file(weights)
    except Exception as error:  # a torchvision for another torch raises RuntimeError
        return f"torchvision does not load ({type(error).__name__}: {error})"
    if not path.is_file():
        return (
            f"the AlexNet weights are not at {path}, and layercache downloads nothing: fetch {_alexnet_url()} where "
            "there is a network and put the file there, or name another place"
        )
    return ""


def _alexnet_file(weights: Path | None) -> Path:
    """Where the weights are expected: in torch's cache, in a folder, or in the file that is named."""
    if weights is not None and not weights.is_dir():
        return weights
    from torch.hub import get_dir

    name = _alexnet_url().rsplit("/", 1)[-1]
    return (Path(get_dir()) / "checkpoints" if weights is None else weights) / name


def _alexnet_url() -> str:
    from torchvision.models import AlexNet_Weights

    return str(AlexNet_Weights.DEFAULT.url)


def in_colour(picture: Pictures) -> Pictures:
    """A picture ``[H, W, C]`` with three channels: grey ones three times, without transparency."""
    return np.repeat(picture, 3, axis=-1) if picture.shape[-1] == 1 else picture[..., :3]


def stills(pictures: np.ndarray) -> np.ndarray:
    """A picture of each to look at, ``[N, H, W, C]``: itself, or the frame in the middle of a video."""
    return pictures[:, pictures.shape[1] // 2] if pictures.ndim == 5 else pictures


def _mean_of_frames(figure: Callable[[Pictures, Pictures], float], a: Pictures, b: Pictures) -> float:
    """A figure of two pictures, or its mean over the frames of two videos."""
    if a.ndim == 3:
        return figure(a, b)
    return math.fsum(figure(one, other) for one, other in zip(a, b, strict=True)) / len(a)


def _pairs(reference: Any, pictures: Any) -> list[tuple[Pictures, Pictures]]:
    expected, found = as_pictures(reference), as_pictures(pictures)
    if expected.shape != found.shape:
        raise ValueError(f"the pictures have the shape {list(found.shape)}, their references {list(expected.shape)}")
    return list(zip(expected, found, strict=True))


def _scikit_image() -> Any:
    try:
        import skimage.metrics
    except ImportError as error:
        raise MissingExtraError(
            'PSNR and SSIM need scikit-image, which is not installed: pip install "layercache[figures]"'
        ) from error
    return skimage.metrics
