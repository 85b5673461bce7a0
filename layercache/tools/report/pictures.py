"""Pictures of full and cached runs for pages: reduced, encoded, and not too many."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layercache._utils.metrics import as_pictures
from layercache._utils.text import shown
from layercache.tools.report.plots import difference

# Pictures up to so many pixels a side are kept exactly, larger ones are reduced to the first size that fits.
EXACT, SIZES = 128, (512, 384, 256)
MOST_BYTES = 1_200_000
GAIN = 10.0  # of differences: one of 50 dB is still to be seen


@dataclass(frozen=True)
class PictureEntry:
    """What a method gave at a budget.

    Attributes:
        method: its name.
        budget, used: shares of the block time.
        pictures: ``[n, H, W, C]`` in 0..1.
        psnr, ssim: one figure per picture at least.
    """

    method: str
    budget: float
    used: float
    pictures: np.ndarray
    psnr: Sequence[float]
    ssim: Sequence[float]


def page_pictures(full: Any, entries: Sequence[PictureEntry], prompts: Sequence[str]) -> dict[str, Any]:
    """Data of a page's pictures, of as many prompts as the page can hold without growing large, at least one.

    Args:
        full: of the full run, ``[n, H, W, C]`` in 0..1.
        entries: one per method and budget, all of them with the same prompts.
        prompts: of the pictures, shown in a choice; pictures without one are left out.
    """
    full = as_pictures(full)
    count = min(len(full), len(prompts), *(len(entry.pictures) for entry in entries))
    for size in SIZES:
        encoded = _encoded(full, entries, 0, size)
        if _bytes(encoded) <= MOST_BYTES or size == SIZES[-1]:
            break
    columns, spent = [encoded], _bytes(encoded)
    for number in range(1, count):
        encoded = _encoded(full, entries, number, size)
        spent += _bytes(encoded)
        if spent > MOST_BYTES:
            break
        columns.append(encoded)
    return {
        "prompts": [f"{number + 1}: {shown(prompts[number])}" for number in range(len(columns))],
        "full": [column[0] for column in columns],
        "entries": [
            {
                "method": shown(entry.method),
                "budget": f"{entry.budget:g}",
                "used": f"{entry.used:.1%}",
                "pictures": [
                    {
                        "cached": column[1 + 2 * place],
                        "difference": column[2 + 2 * place],
                        "psnr": f"{entry.psnr[number]:.1f} dB",
                        "figures": f"{entry.psnr[number]:.2f} dB, SSIM {entry.ssim[number]:.4f}",
                    }
                    for number, column in enumerate(columns)
                ],
            }
            for place, entry in enumerate(entries)
        ],
    }


def _encoded(full: np.ndarray, entries: Sequence[PictureEntry], number: int, size: int) -> list[str]:
    """The full picture, then every entry's and its difference."""
    one = full[number : number + 1]
    found = [_data_address(one[0], size)]
    for entry in entries:
        own = as_pictures(entry.pictures[number : number + 1])
        found += [_data_address(own[0], size), _data_address(difference(one, own, GAIN)[0], size)]
    return found


def _bytes(texts: Sequence[str]) -> int:
    return sum(map(len, texts))


def _data_address(picture: np.ndarray, size: int) -> str:
    """A picture as an address that holds it: small ones exactly, large ones reduced."""
    from PIL import Image

    image = Image.fromarray((np.squeeze(picture) * 255).round().astype("uint8"))
    content, exact = io.BytesIO(), max(image.size) <= EXACT
    if not exact:
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
    image.save(content, format="WEBP", lossless=exact, quality=100 if exact else 88, method=4)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
