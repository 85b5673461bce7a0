"""Schedules that were learnt, in the user's data folder: nothing of prompts or pictures is kept."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
from safetensors.numpy import load_file, save_file

from layercache._utils.files import write_atomically
from layercache.errors import FileFormatError, LayerCacheError, LayerCacheWarning
from layercache.planning.front import Front, Point
from layercache.planning.rollout_run import Products

HOME = "LAYERCACHE_HOME"
"""Environment variable that names another folder."""


@dataclass(frozen=True)
class Learnt:
    """A schedule that was learnt.

    Attributes:
        front: with one point, of the schedule.
        products: that its forecasts were solved from, by step; empty where they are not known.
    """

    front: Front
    products: Products

    @property
    def point(self) -> Point:
        return self.front.points[0]


class LearntFiles:
    """The files of what was learnt for one model and one kind of call.

    Args:
        model: its class, for the files' names.
        key: digest of everything that the schedule depends on.
    """

    def __init__(self, model: str, key: str):
        home = os.environ.get(HOME) or platformdirs.user_data_dir("layercache", appauthor=False)
        self._front = Path(home) / "learnt" / f"{model}-{key}.json"
        self._products = self._front.with_suffix(".safetensors")

    def load(self) -> Learnt | None:
        """What is known, if anything is.

        Warns:
            LayerCacheWarning: a file is damaged; it is learnt anew.
        """
        if not self._front.exists():
            return None
        try:
            front = Front.load(self._front)
            if len(front.points) != 1:
                raise FileFormatError(f"{self._front} holds {len(front.points)} schedules, not one")
            return Learnt(front, self._load_products())
        except LayerCacheError as error:
            warnings.warn(f"what was learnt before cannot be used: {error}", LayerCacheWarning, stacklevel=2)
            return None

    def _load_products(self) -> Products:
        try:
            return {int(step): values for step, values in load_file(self._products).items()}
        except Exception as error:  # safetensors raises classes of its own
            raise FileFormatError(f"{self._products} cannot be read ({error}); remove it") from error

    def save(self, found: Learnt) -> None:
        """Keeps it; where no files can be written, that is said and nothing else happens."""
        try:
            self._front.parent.mkdir(parents=True, exist_ok=True)
            tensors = {str(step): np.ascontiguousarray(values) for step, values in found.products.items()}
            write_atomically(self._products, lambda path: save_file(tensors, path))
            found.front.save(self._front)
        except (OSError, LayerCacheError) as error:
            warnings.warn(f"what was learnt is not kept: {error}", LayerCacheWarning, stacklevel=2)
