"""Where the latents and tokens of a picture lie along time, height and width, class by class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from layercache.errors import UnsupportedModelError

Grid = tuple[int, ...]


def one_tensor(latents: Any) -> torch.Tensor:
    """The latents that a transformer is given, also where it is given a list of samples.

    Raises:
        UnsupportedModelError: they are of several sizes.
    """
    if isinstance(latents, (list, tuple)) and len({one.shape for one in latents}) == 1:
        return torch.stack(tuple(latents))
    if not isinstance(latents, torch.Tensor):
        raise _unknown("latents are of several sizes")
    return latents


def token_grid(latents: Any, arguments: Mapping[str, Any], config: Mapping[str, Any], tokens: int) -> Grid:
    """Tokens of the picture along its axes; their product is at most ``tokens``, further ones (references) follow it.

    Args:
        latents: the first argument of the transformer's forward.
        arguments: all of them, by name.
        config: of the transformer.
        tokens: length of the image stream.

    Raises:
        UnsupportedModelError: the stream holds other tokens than those of the latents, and nothing says which.
    """
    latents = one_tensor(latents)
    if latents.dim() > 3:
        patches = _patches(config)
        for channels in _channel_axes(latents, config):
            sides = _sides(latents, channels)
            grid = tuple(math.ceil(side / p) for side, p in zip(sides, patches[-len(sides) :], strict=True))
            if math.prod(grid) == tokens:
                return grid
        raise _unknown(f"blocks work on {tokens} tokens, which are not those of latents {tuple(latents.shape)} alone")
    said = _said_grid(arguments) or (tokens,)
    if math.prod(said) > tokens:
        raise _unknown(f"blocks work on {tokens} of the picture's {math.prod(said)} tokens")
    return said


def on_grid(latents: Any, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> torch.Tensor:
    """A view of the latents as ``[B, ..., C]``, with the picture's axes between; without tokens of references.

    Raises:
        UnsupportedModelError: they are of several sizes.
    """
    latents = one_tensor(latents)
    if latents.dim() > 3:
        return latents.movedim(next(_channel_axes(latents, config)), -1)
    width = config.get("in_channels")
    if latents.shape[1] == width != latents.shape[2]:
        return latents.movedim(1, -1)  # of sound
    return spread(latents, token_grid(latents, arguments, config, latents.shape[1]))


def spread(stream: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The tokens of the picture in a stream ``[B, S, D]``, as ``[B, *grid, D]``."""
    return stream[:, : math.prod(grid)].unflatten(1, grid)


def _unknown(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this model's {what}; methods that look at the picture's frequencies need to know where its tokens lie, "
        "take FBCache or TeaCache instead"
    )


def _patches(config: Mapping[str, Any]) -> Grid:
    """Latents per token along time, height and width."""
    given = config.get("patch_size") or 1
    if isinstance(given, int):
        return (config.get("patch_size_t") or config.get("temporal_patch_size") or 1, given, given)
    sides = tuple(int(side) for side in given)
    return sides if len(sides) > 2 else (config.get("patch_size_t") or 1, *sides)


def _channel_axes(latents: torch.Tensor, config: Mapping[str, Any]) -> Iterator[int]:
    """The axes that may be the channels', the likeliest first."""
    width = config.get("in_channels", config.get("in_visual_dim"))
    axes = [axis for axis in (1, 2, latents.dim() - 1) if latents.shape[axis] == width]
    yield from axes or [latents.dim() - 1 if "in_visual_dim" in config else 1]


def _sides(latents: torch.Tensor, channels: int) -> Grid:
    return tuple(side for axis, side in enumerate(latents.shape) if axis not in (0, channels))


def _said_grid(arguments: Mapping[str, Any]) -> Grid | None:
    """What the arguments of models with packed latents say; ``None`` where they say nothing."""
    shapes, ids = arguments.get("img_shapes"), arguments.get("img_ids")
    if shapes is not None:
        first = shapes[0]
        while isinstance(first[0], Sequence):
            first = first[0]
        return tuple(int(side) for side in first)
    if isinstance(ids, torch.Tensor):
        return _grid_of_ids(ids)
    sides = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    return None if None in sides else tuple(int(side) for side in sides)  # type: ignore[arg-type]


def _grid_of_ids(ids: torch.Tensor) -> Grid:
    """Of tokens that each have a position ``(number of the picture, row, column, ...)``; asks the device once."""
    places = (ids[0] if ids.dim() == 3 else ids).tolist()
    own = [place for place in places if place[0] == places[0][0]]
    return len({place[1] for place in own}), len({place[2] for place in own})
