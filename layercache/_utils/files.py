"""Files that are written whole or not at all, and paths that are checked before there is something to write."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layercache._utils.text import shown
from layercache.errors import OutputError

NAME_BYTES = 255

_followers: list[Callable[[Path, str | None], object]] = []


@contextmanager
def followed(call: Callable[[Path, str | None], object]) -> Iterator[None]:
    """Context in which ``call`` is given every path that is written or removed in this process, afterwards.

    Beside it stands the line that was added to the file; ``None`` where it was written whole, or removed.
    """
    _followers.append(call)
    try:
        yield
    finally:
        _followers.remove(call)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Lets ``write`` fill a temporary file beside ``path``, then renames it over ``path``.

    When ``write`` fails (disk full, interrupted), ``path`` keeps its former content and the
    temporary file is removed. A link stays, and the file it names is written.

    Raises:
        OutputError: ``path`` is a folder, a pipe or a device, or cannot be written.
    """
    with _refusals(path, ""):
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_file(target.parent, target.suffix) as temporary:
            write(temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            # mkstemp makes the file private; give it the permissions an ordinary new file would have
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, target)
        for call in _followers:
            call(Path(path), None)
    return Path(path)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Adds a line to a file and returns when it is on the disk; where that fails, the file may end in part of it.

    Raises:
        OutputError: the file cannot be written.
    """
    with _refusals(path, ""):
        with _target(path).open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        for call in _followers:
            call(Path(path), line)


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file, or a folder with everything in it, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)
    for call in _followers:
        call(Path(path), None)


def saved_anyway(path: str | os.PathLike[str], save: Callable[[Path], object]) -> Path:
    """Lets ``save`` write a result that took long to a file; where that fails, to another one.

    The other file lies in the folder for temporary files, which may be on another disk, or in the home folder.

    Raises:
        OutputError: it is not in ``path``; the message says where it is instead, if anywhere.
    """
    wanted = Path(path)
    try:
        save(wanted)
    except OSError as error:
        for folder in (Path(tempfile.gettempdir()), Path.home()):
            place = _saved_in(folder, wanted, save)
            if place is not None:
                raise OutputError(f"{error}; the result is in {shown(place)} instead") from error
        raise
    return wanted


def _saved_in(folder: Path, wanted: Path, save: Callable[[Path], object]) -> Path | None:
    """The file of a result under a name of its own in a folder; ``None`` where it cannot be written there either."""
    try:
        inside = Path(tempfile.mkdtemp(prefix="layercache-", dir=folder))
    except OSError:
        return None
    place = inside / wanted.name
    try:
        save(place)
    except OSError:
        shutil.rmtree(inside, ignore_errors=True)
        return None
    return place


def check_output(path: str | os.PathLike[str], argument: str | None = None) -> None:
    """Checks that a file could be written, before the work whose result it is to hold; nothing is left behind.

    Args:
        path: of the file; folders that are missing are made when it is written.
        argument: the argument that named it, for the message.

    Raises:
        OutputError: it is a folder, a pipe or a device, or there is no way to make a file there.
    """
    with _refusals(path, argument):
        target = _target(path)
        _check_folder(target.parent)
        if len(os.fsencode(target.name)) > NAME_BYTES:
            raise OutputError(f"its name is longer than {NAME_BYTES} bytes")


def check_output_folder(path: str | os.PathLike[str], argument: str | None = None) -> None:
    """The same of a folder that files are to be written into.

    Raises:
        OutputError: it is a file, or no file can be made in it.
    """
    with _refusals(path, argument):
        _check_folder(Path(os.path.realpath(path)))


def _target(path: str | os.PathLike[str]) -> Path:
    """The file that a path names, behind links; refused where it is no regular file."""
    target = Path(os.path.realpath(path))
    if not Path(path).name:
        raise OutputError("it is a folder; name a file")
    try:
        mode = Path(path).stat().st_mode  # of what a link of /dev/fd stands for, too
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise OutputError("it is a folder; name a file")
    if not stat.S_ISREG(mode):
        raise OutputError("it is a pipe or a device; name a regular file")
    return target


def _check_folder(folder: Path) -> None:
    """Makes a file in the folder, or in the nearest one above it that is there, and removes it again."""
    missing = []
    while not folder.exists():
        missing.append(folder.name)
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{shown(folder)} is no folder")
    if any(len(os.fsencode(name)) > NAME_BYTES for name in missing):
        raise OutputError(f"the name of a folder is longer than {NAME_BYTES} bytes")
    with _temporary_file(folder, ""):
        pass


@contextmanager
def _temporary_file(folder: Path, suffix: str) -> Iterator[Path]:
    """An empty file, which is gone at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".layercache-", suffix=suffix[:32])
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _refusals(path: str | os.PathLike[str], argument: str | None) -> Iterator[None]:
    """Context whose failures to write become one sentence that names the file."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # torch.save raises a RuntimeError where the disk is full
        reason = str(error) if isinstance(error, OutputError) else _reason(error)
        refused = OutputError(f"{shown(os.fspath(path))} cannot be written: {reason}", argument=argument or None)
        refused.errno = getattr(error, "errno", None)
        raise refused from error


def _reason(error: Exception) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
