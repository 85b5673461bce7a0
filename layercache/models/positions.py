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
    given = config.get("patch_size") or config.get("all_patch_size", (1,))[0]
    time = config.get("patch_size_t") or config.get("temporal_patch_size") or config.get("all_f_patch_size", (1,))[0]
    if isinstance(given, int):
        return time, given, given
    sides = tuple(int(side) for side in given)
    return sides if len(sides) > 2 else (time, *sides)


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


def shrunk(
    name: str, arguments: Mapping[str, Any], config: Mapping[str, Any], factors: tuple[int, int]
) -> tuple[dict[str, Any], float]:
    """Arguments of a forward on a smaller picture, and its share of the tokens; every so-manieth token is kept.

    Tokens are left out and not averaged, so that the noise keeps its level. Their positions are those of a picture of
    that size; references and what a ControlNet adds are left out.

    Args:
        name: of the latents among the arguments.
        factors: by which time, and height and width, are divided, as far as there are tokens.

    Raises:
        UnsupportedModelError: latents of several sizes.
    """
    given = one_tensor(arguments[name])
    if given.dim() > 3:
        channels = next(_channel_axes(given, config))
        axes = [axis for axis in range(1, given.dim()) if axis != channels]
        patches = _patches(config)[-len(axes) :]
        grid = tuple(math.ceil(given.shape[axis] / p) for axis, p in zip(axes, patches, strict=True))
    else:
        axes, patches = [], ()
        grid = _said_grid(arguments) or (given.shape[1],)
    by = (factors[0], factors[1], factors[1])[-len(grid) :]
    small = tuple(max(1, tokens // factor) for tokens, factor in zip(grid, by, strict=True))
    kept = [_spaced(tokens, fewer) for tokens, fewer in zip(grid, small, strict=True)]
    if axes:
        for axis, patch, places in zip(axes, patches, kept, strict=True):
            within = (places[:, None] * patch + torch.arange(patch)).flatten().clamp(max=given.shape[axis] - 1)
            given = given.index_select(axis, within.to(given.device))
    else:
        given = given[:, _flat(kept, grid).to(given.device)]
    latents = list(given) if isinstance(arguments[name], (list, tuple)) else given
    corner = _flat([torch.arange(fewer) for fewer in small], grid)
    share = math.prod(small) / math.prod(grid)
    found = {**arguments, **_shrunk_places(arguments, small, corner), name: latents}
    mask = arguments.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] > math.prod(grid):  # of text and picture
        text = torch.arange(mask.shape[1] - math.prod(grid))
        found["attention_mask"] = mask[:, torch.cat([text, corner + len(text)]).to(mask.device)]
    return found, share


def _spaced(tokens: int, fewer: int) -> torch.Tensor:
    """So many of the tokens along an axis, evenly spaced."""
    return ((torch.arange(fewer) + 0.5) * tokens / fewer).long()


def _flat(places: Sequence[torch.Tensor], grid: Grid) -> torch.Tensor:
    """Numbers in the stream of the tokens at these places along each axis."""
    found = torch.zeros(1, dtype=torch.long)
    for along, side in zip(places, grid, strict=True):
        found = (found[:, None] * side + along).flatten()
    return found


def _shrunk_places(arguments: Mapping[str, Any], small: Grid, corner: torch.Tensor) -> dict[str, Any]:
    """The arguments that say where tokens lie, for a picture of fewer: those of a corner of the larger one."""
    found: dict[str, Any] = {name: None for name in arguments if "controlnet" in name}
    for name, value in arguments.items():
        if name == "img_shapes":
            nested = isinstance(value[0][0], Sequence)
            found[name] = [[small] if nested else small for _ in value]
        elif name == "img_ids" and isinstance(value, torch.Tensor):
            found[name] = value.index_select(-2, corner.to(value.device))
        elif name in ("num_frames", "height", "width") and len(small) == 3:
            found[name] = small[("num_frames", "height", "width").index(name)]
        elif name == "image_rotary_emb" and value is not None:
            found[name] = tuple(one.index_select(0, corner.to(one.device)) for one in value)
        elif name == "visual_rope_pos":
            found[name] = [one[:fewer] for one, fewer in zip(value, small, strict=True)]
    return found
