"""The CLIP score of pictures and their prompts, by a model of transformers that lies on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from layercache._utils import metrics
from layercache._utils.text import shown
from layercache.errors import ArgumentError, MissingExtraError

CALLED_WITH = 16  # pictures in a forward


class ClipScore:
    """How well pictures fit their prompts: 100 times the cosine of CLIP's embeddings, 0 where that is negative.

    Nothing is ever downloaded. It runs on the CPU, so that the memory and the times of what is compared stay as they
    are.

    Args:
        model: a folder with a CLIP model, its tokenizer and its image processor, or the name of one on the Hub that is
            in the Hub's cache here.

    Raises:
        ArgumentError: there is no such model here, or it is none of CLIP.
        MissingExtraError: transformers is not installed.
    """

    def __init__(self, model: str | os.PathLike[str]):
        self.name = os.path.realpath(model) if Path(model).is_dir() else os.fspath(model)
        with _quiet_transformers():
            self._model, self._processor = _loaded(self.name)

    def __call__(self, pictures: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """The score of every picture.

        Args:
            pictures: ``[N, H, W, C]`` in 0..1, or videos ``[N, F, H, W, C]``, whose score is the mean over the frames.
            prompts: N texts; what is longer than the model reads is cut off.

        Returns:
            N numbers of 0 to 100.
        """
        videos = pictures if pictures.ndim == 5 else pictures[:, None]
        frames = videos.shape[1]
        flat = [one for video in videos for one in video]
        texts = [prompt for prompt in prompts for _ in range(frames)]
        found: list[float] = []
        for k in range(0, len(flat), CALLED_WITH):
            found += self._cosines(flat[k : k + CALLED_WITH], texts[k : k + CALLED_WITH])
        scores = [100 * max(0.0, cosine) for cosine in found]
        return [float(np.mean(scores[k : k + frames])) for k in range(0, len(scores), frames)]

    def _cosines(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        import torch
        from PIL import Image

        images = [Image.fromarray((metrics.in_colour(p).clip(0, 1) * 255).round().astype(np.uint8)) for p in pictures]
        longest = self._model.config.text_config.max_position_embeddings
        words = {"padding": "max_length", "truncation": True, "max_length": longest}
        inputs = self._processor(text=list(texts), images=images, return_tensors="pt", **words)
        with torch.inference_mode():
            found = self._model(**inputs)
        a, b = (torch.nn.functional.normalize(one, dim=-1) for one in (found.image_embeds, found.text_embeds))
        return [float(cosine) for cosine in (a * b).sum(dim=-1)]


def _loaded(name: str) -> tuple[Any, Any]:
    """The model and what prepares its inputs."""
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise MissingExtraError(
            'the CLIP score needs transformers, which is not installed: pip install "layercache[diffusers]"',
            argument="clip",
        ) from error
    try:
        model = CLIPModel.from_pretrained(name, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(name, local_files_only=True)
    except Exception as error:  # whatever is in its files
        is_there = Path(name).exists()
        reason = f"is not a whole CLIP model ({shown(str(error).strip().splitlines()[0])})" if str(error) else "is none"
        raise ArgumentError(
            f"{shown(name)} {reason if is_there else 'is no folder here, and not in the cache of the Hub'}; layercache "
            "downloads nothing: give a folder with a CLIP model, its tokenizer and its image processor, or fetch one "
            "where there is a network (hf download openai/clip-vit-base-patch32)",
            argument="clip",
        ) from error
    return model.eval().float(), processor


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Context without its remarks on the versions of image processors."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
