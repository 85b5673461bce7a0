"""What a pipeline's call gives, and its files: a picture, a video, a folder of frames."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from layercache._utils.text import shown
from layercache.errors import LayerCacheError, MissingExtraError
from layercache.tools.cli.pipelines import gives_video, parameters_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

VIDEO_ENDINGS, GIF = (".mp4", ".mov", ".mkv", ".webm"), ".gif"
PACKAGES = ("imageio", "imageio_ffmpeg")
FRAME_RATES = {"CogVideoX": 8.0, "HunyuanVideo": 15.0, "Mochi": 30.0}
"""Frames per second that models were trained at, by the beginning of their pipelines' names."""
FRAME_RATE = 16.0


def pixels_of(result: Any) -> NDArray[Any]:
    """The first picture ``[H, W, C]`` or video ``[F, H, W, C]`` of a call with ``output_type="np"``, in 0..1.

    Raises:
        LayerCacheError: the call gave something else.
    """
    import numpy as np

    from layercache.planning.samples import pictures_in

    has_sound = getattr(result, "audio", None) is not None
    pixels = pictures_in(result.frames if has_sound else result)[0]
    pixels = pixels / 255.0 if pixels.dtype == np.uint8 else pixels  # a pipeline that gives PIL pictures all the same
    if pixels.ndim == 4 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[1] in (1, 3, 4):
        pixels = pixels.transpose(0, 2, 3, 1)  # frames with their channels first
    if pixels.ndim not in (3, 4) or pixels.shape[-1] not in (1, 3, 4):
        raise LayerCacheError(f"the pipeline gave no picture and no video, but numbers of shape {list(pixels.shape)}")
    return np.clip(pixels, 0.0, 1.0)


def sound_of(result: Any) -> NDArray[Any] | None:
    """The first sound of a call ``[T, channels]`` in -1..1; ``None`` of a pipeline that makes none."""
    import numpy as np

    sound = getattr(result, "audio", None)
    if sound is None:
        return None
    samples = np.asarray(sound[0].float().cpu() if hasattr(sound[0], "cpu") else sound[0], dtype=np.float64)
    samples = samples[:, None] if samples.ndim == 1 else samples
    return samples.T if samples.shape[0] < samples.shape[1] else samples


def frame_rate_of(pipe: Any, wanted: float | None) -> float:
    """Frames per second: as wanted, or what the pipeline's call takes them for, or its model was trained at."""
    if wanted is not None:
        return wanted
    own = parameters_of(pipe).get("frame_rate")
    if own is not None and isinstance(own.default, (int, float)):
        return float(own.default)
    name = type(pipe).__name__
    return next((rate for start, rate in FRAME_RATES.items() if name.startswith(start)), FRAME_RATE)


def sampling_rate_of(pipe: Any) -> int:
    """Samples per second of the sound that a pipeline makes."""
    config = getattr(getattr(pipe, "vocoder", None), "config", None)
    return int(getattr(config, "output_sampling_rate", 24000))


# --- where it is written -----------------------------------------------------------------------------------------


def check_name(output: Path | None) -> None:
    """Refuses a name in whose format nothing can be saved, before anything is loaded.

    Raises:
        typer.BadParameter: no picture and no video ends so.
        MissingExtraError: a video that only ffmpeg writes, which is not installed.
    """
    if output is None or is_folder(output):
        return
    ending = output.suffix.lower()
    if ending in VIDEO_ENDINGS:
        if not has_ffmpeg():
            raise MissingExtraError(
                f'{shown(output.name)} needs imageio with ffmpeg: pip install "layercache[video]"; or name a .gif, or '
                "a folder for the frames",
                argument="output",
            )
        return
    from PIL import Image

    if ending not in Image.registered_extensions():
        raise typer.BadParameter(
            f"{shown(output)} does not end like a picture or a video; use .png, .mp4, .gif, or a folder for frames.",
            param_hint="--output",
        )


def output_for(pipe: Any, output: Path | None) -> Path:
    """Where the result of a pipeline goes; one that does not fit its kind is refused before anything runs.

    Raises:
        typer.BadParameter: a video in the file of a picture, or a picture in that of a video.
    """
    is_video = gives_video(pipe)
    if output is None:
        return Path(("video.mp4" if has_ffmpeg() else "video.gif") if is_video else "picture.png")
    ending = output.suffix.lower()
    if is_video and not is_folder(output) and ending not in (*VIDEO_ENDINGS, GIF, ".webp", ".apng"):
        raise typer.BadParameter(
            f"{type(pipe).__name__} makes videos; {shown(output)} should end with .mp4 or .gif, or be a folder for the "
            "frames.",
            param_hint="--output",
        )
    if not is_video and ending in VIDEO_ENDINGS:
        raise typer.BadParameter(
            f"{type(pipe).__name__} makes pictures; {shown(output)} should end with .png.", param_hint="--output"
        )
    return output


def is_folder(output: Path) -> bool:
    """Whether a name is that of a folder for frames: one that is there, or a name without an ending."""
    return output.is_dir() or not output.suffix


def has_ffmpeg() -> bool:
    """Whether videos can be written as MP4."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def save_pixels(pixels: NDArray[Any], output: Path, frame_rate: float) -> Path:
    """Writes a picture ``[H, W, C]`` or a video ``[F, H, W, C]`` in 0..1; a folder gets a PNG per frame.

    Raises:
        OutputError: it cannot be written.
    """
    from layercache._utils.files import write_atomically

    if is_folder(output):
        for number, picture in enumerate(_as_pictures(_as_frames(pixels))):
            write_atomically(output / f"{number:04d}.png", picture.save)
        return output
    return write_atomically(output, lambda path: _write_pixels(pixels, path, frame_rate))


def encoded(write: Callable[[Path], object], ending: str) -> bytes:
    """What a function writes into a file with this ending, such as ``.png``."""
    with tempfile.TemporaryDirectory(prefix="layercache-") as folder:
        path = Path(folder) / f"result{ending}"
        write(path)
        return path.read_bytes()


def encoded_pixels(pixels: NDArray[Any], ending: str, frame_rate: float) -> bytes:
    """A picture ``[H, W, C]`` or a video ``[F, H, W, C]`` in 0..1 as a file with this ending holds it."""
    return encoded(lambda path: _write_pixels(pixels, path, frame_rate), ending)


def _as_frames(pixels: NDArray[Any]) -> NDArray[Any]:
    frames = (pixels * 255).round().astype("uint8")
    return frames[None] if frames.ndim == 3 else frames


def _as_pictures(frames: NDArray[Any]) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame) for frame in frames]


def _write_pixels(pixels: NDArray[Any], path: Path, frame_rate: float) -> None:
    frames = _as_frames(pixels)
    if path.suffix.lower() in VIDEO_ENDINGS:
        _write_video(path, frames, frame_rate)
        return
    first, *rest = _as_pictures(frames)
    more: dict[str, Any] = (
        {"save_all": True, "append_images": rest, "duration": 1000 / frame_rate, "loop": 0} if rest else {}
    )
    first.save(path, **more)


def _write_video(path: Path, frames: NDArray[Any], frame_rate: float) -> None:
    import imageio
    import numpy as np

    # a block of 2: H.264 stores colours at half the resolution, so only odd sizes are scaled
    settings: dict[str, Any] = {"fps": frame_rate, "macro_block_size": 2, "quality": 8}
    writer: Any
    with imageio.get_writer(str(path), format="FFMPEG", **settings) as writer:
        for frame in frames:
            writer.append_data(frame if frame.shape[-1] == 3 else np.repeat(frame[..., :1], 3, axis=-1))


def save_sound(samples: NDArray[Any], output: Path, rate: int) -> Path:
    """Writes sound ``[T, channels]`` in -1..1 as a WAV file of 16 bit."""
    from layercache._utils.files import write_atomically

    return write_atomically(output, lambda path: _write_sound(samples, path, rate))


def encoded_sound(samples: NDArray[Any], rate: int) -> bytes:
    """The same as a WAV file holds it."""
    return encoded(lambda path: _write_sound(samples, path, rate), ".wav")


def _write_sound(samples: NDArray[Any], path: Path, rate: int) -> None:
    import wave

    import numpy as np

    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
