"""How close pictures are to those of the full run, by every figure that was asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layercache._utils import metrics
from layercache.errors import ArgumentError, LayerCacheError, MissingExtraError
from layercache.tools.compare.clip import ClipScore

Pictures = NDArray[np.float32]
Curves = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Fidelity:
    """How close pictures are to those of the full run, picture by picture.

    Attributes:
        psnr: in dB; of a video over all its frames.
        ssim, lpips: of a video the means over its frames; ``lpips`` is empty where it is not available.
        clip: the CLIP scores of the pictures themselves, 0 to 100; empty where there is no CLIP model.
        frame_psnr, frame_ssim: of every frame of every video; empty of pictures.
        temporal_psnr: of the changes from frame to frame, per video (`layercache._utils.metrics.temporal_psnr`).
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    lpips: tuple[float, ...] = ()
    clip: tuple[float, ...] = ()
    frame_psnr: Curves = ()
    frame_ssim: Curves = ()
    temporal_psnr: tuple[float, ...] = ()


def joined(parts: Iterable[Fidelity]) -> Fidelity:
    """The figures of several batches, one after the other."""
    found = list(parts)
    together = {one.name: sum((getattr(part, one.name) for part in found), ()) for one in fields(Fidelity)}
    return Fidelity(**together)


@dataclass(frozen=True)
class Scorer:
    """Which figures are computed beside PSNR and SSIM, and with what.

    Attributes:
        lpips: whether LPIPS is computed.
        weights: of its AlexNet; ``None`` for those in torch's cache.
        clip: the CLIP model; ``None`` for no score.
        required: figures that were asked for by name, so that outcomes without them are not complete.
    """

    lpips: bool = False
    weights: Path | None = None
    clip: ClipScore | None = field(default=None, repr=False)
    required: tuple[str, ...] = ()

    @property
    def clip_model(self) -> str:
        """Folder or name of the CLIP model; empty without one."""
        return "" if self.clip is None else self.clip.name

    def fidelity(self, full: Pictures, pictures: Pictures, prompts: Sequence[Any] = ()) -> Fidelity:
        """Compares pictures or videos, see `PictureCalls.run`, with those of the full run.

        Args:
            full, pictures: ``[N, H, W, C]`` or ``[N, F, H, W, C]`` in 0..1.
            prompts: of the pictures, for the CLIP score.

        Raises:
            LayerCacheError: they have other sizes.
        """
        if full.shape != pictures.shape:
            sizes = f"{list(pictures.shape)}, the full run's {list(full.shape)}"
            raise LayerCacheError(f"the pictures have the shape {sizes}")
        lpips = metrics.lpips(full, pictures, self.weights)[0] if self.lpips else None
        clip = self.clip_scores(pictures, prompts)
        found = Fidelity(tuple(metrics.psnr(full, pictures)), (), tuple(lpips or ()), clip)
        if full.ndim == 4:
            return replace(found, ssim=tuple(metrics.ssim(full, pictures)))
        similar = _curves(metrics.frame_ssim(full, pictures))
        return replace(
            found,
            ssim=tuple(math.fsum(curve) / len(curve) for curve in similar),
            frame_psnr=_curves(metrics.frame_psnr(full, pictures)),
            frame_ssim=similar,
            temporal_psnr=tuple(metrics.temporal_psnr(full, pictures)),
        )

    def clip_scores(self, pictures: Pictures, prompts: Sequence[Any]) -> tuple[float, ...]:
        """The CLIP score of every picture; none without a model or prompts."""
        texts = [text_of(prompt) for prompt in prompts]
        return tuple(self.clip(pictures, texts)) if self.clip is not None and len(texts) == len(pictures) else ()


def _curves(values: Iterable[Iterable[float]]) -> Curves:
    return tuple(tuple(curve) for curve in values)


def text_of(prompt: Any) -> str:
    """The text of a prompt: itself, or what a mapping of the call's arguments has for one."""
    return str(prompt.get("prompt", "") if isinstance(prompt, Mapping) else prompt)


def scorer_of(lpips: bool | str | os.PathLike[str] | None = None, clip: str | os.PathLike[str] | None = None) -> Scorer:
    """What computes the figures, made and checked before anything runs.

    Args:
        lpips: ``None``: where its package and weights are here. ``True``: refused where they are not. ``False``: not
            at all. A path: the file of AlexNet's weights, or the folder it lies in.
        clip: see `layercache.tools.compare.clip.ClipScore`; ``None`` for no CLIP score.

    Raises:
        ArgumentError: LPIPS was asked for and its weights are not here, or the CLIP model is not.
        MissingExtraError: a package that was asked for is not installed.
    """
    metrics.check_installed()
    weights = None if lpips is None or isinstance(lpips, bool) else Path(lpips)
    reason = "" if lpips is False else metrics.lpips_unavailable(weights)
    if reason and lpips is not None:
        kind = MissingExtraError if reason.startswith("not installed") else ArgumentError
        raise kind(f"LPIPS cannot be computed: {reason}", argument="lpips")
    score = None if clip is None else ClipScore(clip)
    required = (("lpips",) if lpips not in (None, False) else ()) + (("clip",) if clip is not None else ())
    return Scorer(lpips is not False and not reason, weights, score, required)


def fidelity(full: Pictures, pictures: Pictures) -> Fidelity:
    """PSNR and SSIM, and LPIPS where it is available; see `Scorer.fidelity`."""
    return Scorer(lpips=True).fidelity(full, pictures)
