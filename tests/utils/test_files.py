"""Files that are written whole or not at all, where they may be written."""

import errno
import os
import stat
from pathlib import Path

import pytest

from layercache._utils.files import check_output, check_output_folder, saved_anyway, write_atomically
from layercache._utils.text import cleaned, shown
from layercache.errors import LayerCacheError, OutputError


def write(path, text="new"):
    return write_atomically(path, lambda temporary: temporary.write_text(text))


PLACES = (
    "below a file",
    "a folder",
    "a pipe",
    "a device",
    "a loop",
    "a long name",
    "a long folder",
    "a null character",
)


def places(folder: Path) -> dict[str, Path]:
    """Where no file can be made."""
    (folder / "file").write_text("not a folder")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    return {
        "below a file": folder / "file" / "x.json",
        "a folder": folder,
        "a pipe": folder / "pipe",
        "a device": Path("/dev/null"),
        "a loop": folder / "loop",
        "a long name": folder / ("n" * 300),
        "a long folder": folder / "new" / ("n" * 300) / "x.json",
        "a null character": folder / "a\0b",
    }


@pytest.mark.parametrize("name", PLACES)
def test_what_cannot_be_written_is_said_beforehand_and_afterwards(tmp_path, name):
    path = places(tmp_path)[name]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="cannot be written: ") as caught:
        check_output(path, "output")
    assert caught.value.argument == "output" and isinstance(caught.value, LayerCacheError)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(OutputError):
        write(path)
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode) and Path("/dev/null").is_char_device()


def test_what_can_be_written_is_checked_without_a_trace(tmp_path):
    for path in (tmp_path / "x.json", tmp_path / "a" / "b" / "x.json", tmp_path / ("n" * 250 + ".json")):
        check_output(path)
        check_output_folder(path.parent)
        assert not list(tmp_path.iterdir())
    assert write(tmp_path / ("n" * 250 + ".json")).read_text() == "new"


def test_a_link_stays_and_its_file_is_written(tmp_path):
    write(tmp_path / "file", "old")
    (tmp_path / "link").symlink_to("file")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed\nmore"), KeyError("x")]
)
def test_what_fails_leaves_the_old_file(tmp_path, error):
    path = write(tmp_path / "file", "old")

    def fail(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(KeyError if isinstance(error, KeyError) else OutputError) as caught:
        write_atomically(path, fail)
    assert isinstance(error, KeyError) or len(str(caught.value).splitlines()) == 1
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_names_are_shown_as_text():
    assert shown("a [b]red[/b] $x$ \N{FOX FACE} ü") == "a [b]red[/b] $x$ \N{FOX FACE} ü"
    assert shown("\x1b]0;x\x07\n\r\x9b") == r"\x1b]0;x\x07\n\r\x9b"
    assert shown("\u202etxt\u2066 \udc80") == r"\u202etxt\u2066 \udc80"
    assert cleaned("two\nlines\x1b") == "two\nlines\\x1b"


def test_a_result_goes_elsewhere_where_its_place_is_gone(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    (tmp_path / "file").write_text("in the way")
    assert saved_anyway(tmp_path / "x.json", write) == tmp_path / "x.json"
    with pytest.raises(OutputError, match="x.json cannot be written: .*; the result is in (.+) instead") as caught:
        saved_anyway(tmp_path / "file" / "x.json", write)
    (kept,) = elsewhere.rglob("x.json")
    assert kept.read_text() == "new" and str(kept) in str(caught.value)


def test_a_result_that_fits_nowhere_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space left on device") as caught:
        saved_anyway(tmp_path / "x.json", full)
    assert caught.value.filename == str(tmp_path / "x.json") and not list(tmp_path.iterdir())
