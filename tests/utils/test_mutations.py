"""Files that were changed at random: an error of the library, or what was written; never something else."""

from __future__ import annotations

import random
import warnings

import pytest

from layercache._utils.formats import CHECKED_SINCE, INDEX, JOURNAL, KINDS, PROFILE, SAMPLE
from layercache.errors import FileFormatError, LayerCacheError
from layercache.planning.plan import plan
from layercache.planning.profile import StabilityProfile
from support.mutations import equal, formats, has_checksum, loaded, mutated

OTHER_VALUES = {  # of files of tensors
    PROFILE: (b'\\"num_steps\\": 6', b'\\"num_steps\\": 7'),
    SAMPLE: (b'\\"steps\\": [0', b'\\"steps\\": [1'),
}
CHECKED = [name for name in KINDS if name != INDEX]  # an index is edited by hand


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return {made.name: made for made in formats(tmp_path_factory.mktemp("formats"))}


def test_every_format_is_tried(files):
    assert set(files) == set(CHECKED)


@pytest.mark.parametrize("number", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHECKED)
def test_a_changed_file_is_refused_or_the_same(files, tmp_path, name, number):
    made, path = files[name], tmp_path / "file"
    path.write_bytes(made.content)
    whole, chance, refused = made.load(path), random.Random(number), 0
    for turn in range(number):
        content = mutated(made.content, chance)
        path.write_bytes(content)
        try:
            found = loaded(made.load, path)
        except LayerCacheError:
            refused += 1
            continue
        except BaseException as error:
            raise AssertionError(f"change {turn}: {type(error).__name__}: {error}") from error
        assert not has_checksum(content) or equal(found, whole), turn
    assert refused > number / 3


def test_what_loads_can_be_planned_with(files, tmp_path):
    """Without a checksum, whatever is in a profile that loads: planning gives a schedule or an error of the library."""
    chance, path, planned = random.Random(7), tmp_path / "profile.safetensors", 0
    for _ in range(150):
        path.write_bytes(mutated(files[PROFILE].content, chance))
        for options in ({"budget": 0.7}, {"budget": 0.7, "forecast": "fitted"}, {"speedup": 1.1, "forecast": "newton"}):
            try:
                profile = loaded(StabilityProfile.load, path)
                plan(profile, protect_first=1, protect_last=1, spans=(1, 2), **options).to_json()
                profile.stability()
                planned += 1
            except LayerCacheError:
                pass
    assert planned > 20


@pytest.mark.parametrize("name", CHECKED)
def test_a_changed_value_is_said_and_a_removed_checksum_warns(files, tmp_path, name):
    content, path = files[name].content, tmp_path / "file"
    old, new = OTHER_VALUES.get(name, (b": ", b":  "))
    assert old in content
    path.write_bytes(content.replace(old, new))
    if name in OTHER_VALUES:
        with pytest.raises(LayerCacheError, match="changed after it was written.*schedule edit"):
            files[name].load(path)
        return
    files[name].load(path)  # spaces are no content
    lines = content.splitlines(keepends=True)
    assert lines[1].startswith(b'  "checksum": "sha256:')
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.warns(UserWarning, match="has no checksum"):
        files[name].load(path)


@pytest.mark.parametrize("name", CHECKED)
def test_files_of_older_versions_have_no_checksum(files, tmp_path, name):
    import json

    if name == PROFILE:
        pytest.skip("see tests/planning/test_profile_files.py")
    if name == SAMPLE:
        pytest.skip("has had one from its first version on")
    data, path = json.loads(files[name].content), tmp_path / "file"
    del data["checksum"]
    data["version"] = CHECKED_SINCE[name] - 1
    path.write_text(json.dumps(data))
    if name == JOURNAL:
        with pytest.raises(FileFormatError, match="earlier version.*remove it"):
            files[name].load(path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files[name].load(path)
