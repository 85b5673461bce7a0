"""Files of every format, and random changes of them."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from layercache._utils.checksum import sealed_json
from layercache._utils.formats import COMPARISON, FRONT, JOURNAL, MODULES, PROFILE, SAMPLE, SCHEDULE
from layercache.planning.front import Front, Point
from layercache.planning.plan import plan
from layercache.planning.profile import StabilityProfile
from layercache.planning.sample_statistics import SampleStatistics, read_sample
from layercache.planning.search_files import VERSION as JOURNAL_VERSION
from layercache.planning.search_files import read_runs
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.schedule import Schedule
from layercache.tools.compare.run import VERSION, read_comparison
from support.profiles import made_profile

VALUES = (
    None,
    True,
    0,
    -1,
    7,
    10**400,
    0.5,
    -0.0,
    1e300,
    float("inf"),
    float("nan"),
    "",
    "text",
    "compute",
    [],
    [[]],
    {},
)
TABLES = (0.0, -1.0, 1e300, float("inf"), float("nan"))


@dataclass(frozen=True)
class Format:
    """A format of files: how one is read, and the content of a right one."""

    name: str
    load: Callable[[Path], Any]
    content: bytes


def formats(folder: Path) -> list[Format]:
    """One small file of each format that layercache reads back."""
    profile = made_profile(steps=6, groups=2, distance=3, span=2)
    schedule = plan(profile, 0.7, spans=(1, 2), protect_first=1, protect_last=1)
    front = Front((Point(schedule, "by hand", (40.0, 41.5), (39.0,)),), (1.0, 0.1, 0.0), 3, ("a note",))
    modules = ModuleSchedule(profile.fingerprint, ("b.0.a", "b.1.a"), ((True, True),) * 5 + ((True, False),))
    made: list[tuple[str, Any, Any]] = [
        (SCHEDULE, Schedule.load, schedule),
        (MODULES, ModuleSchedule.load, modules),
        (PROFILE, StabilityProfile.load, profile),
        (FRONT, Front.load, front),
    ]
    found = [Format(name, load, content.save(folder / name).read_bytes()) for name, load, content in made]
    run = {
        "computed": [0, 1, 3],
        "forecast": "hold",
        "psnr": [40.0, 3.5],
        "velocities": [None, {"0": 1.0, "latents": 0.5}, None],
    }
    run["answers"] = [[[0.5, 1.0]], [[0.0, 2.0]]]
    journal = {"format": JOURNAL, "version": JOURNAL_VERSION, "search": "0123", "runs": [run]}
    outcome = {"method": "uniform", "setting": "interval 2", "budget": 0.5, "error": "", "cache_bytes": 7}
    numbers = dict.fromkeys(("used", "seconds", "speedup", "operators", "reads"), 0.5)
    outcome |= numbers | {"psnr": [40.0], "ssim": [0.9], "lpips": []}
    comparison = {"format": COMPARISON, "version": VERSION, "digest": "01", "pictures": {"a": "b"}}
    comparison |= {"outcomes": [outcome]}
    for name, load, data in ((JOURNAL, _runs, journal), (COMPARISON, read_comparison, comparison)):
        found.append(Format(name, load, sealed_json(json.dumps(data) + "\n").encode()))
    return [*found, Format(SAMPLE, _sample, _statistics().to_bytes("0123"))]


def _statistics() -> SampleStatistics:
    random_ = np.random.default_rng(0)
    known = {"sigmas": (1.0, 0.5, 0.0), "branches": ("a",), "steps": (0, 1), "stream_bytes": ((64, 32),)}
    names = [field.name for field in fields(SampleStatistics) if field.name not in known]
    return SampleStatistics(**known, **{name: random_.random((2, 1, 2)) for name in names})  # type: ignore[arg-type]


def _sample(path: Path) -> Any:
    """What `read_sample` found, as values that can be compared."""
    calibration, found = read_sample(path)
    values = [getattr(found, field.name) for field in fields(found)]
    return calibration, [(v.dtype.str, v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values]


def _runs(path: Path) -> Any:
    """What `read_runs` found, as values that can be compared."""
    search, runs = read_runs(path)
    return search, [run.to_json() for run in runs]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One random change: of bytes, or of what they say, with and without the checksum."""
    kind = chance.randrange(4)
    if kind == 0:
        return _with_other_bytes(content, chance)
    if content[:1] == b"{":
        return _with_other_entries(content, chance)
    return _with_other_tables(content, chance) if kind == 1 else _with_other_header(content, chance)


def has_checksum(content: bytes) -> bool:
    """Whether a file still holds one, however it reads."""
    return b'"checksum"' in content or b'\\"checksum\\"' in content


def equal(one: Any, other: Any) -> bool:
    """Whether two contents of files are the same to the last bit."""
    if isinstance(one, StabilityProfile):
        same = [getattr(one, f.name) == getattr(other, f.name) for f in fields(one) if f.name != "tables"]
        tables = one.tables.keys() == other.tables.keys()
        return all(same) and tables and all(np.array_equal(one.tables[k], other.tables[k]) for k in one.tables)
    return bool(one == other)


def loaded(load: Callable[[Path], Any], path: Path) -> Any:
    """What a file holds; that it lost its checksum is not told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(path)


def _with_other_bytes(content: bytes, chance: random.Random) -> bytes:
    at, until = chance.randrange(len(content)), chance.randrange(len(content))
    ways = (
        lambda: content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
        lambda: content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :],
        lambda: content[:at],
        lambda: content[:at] + content[at + chance.randrange(1, 9) :],
        lambda: content[:at] + content[until : until + chance.randrange(1, 40)] + content[at:],
    )
    return chance.choice(ways)()


def _with_other_entries(content: bytes, chance: random.Random) -> bytes:
    data = json.loads(content)
    if chance.random() < 0.5:
        del data["checksum"]
    text = json.dumps(data)
    if chance.random() < 0.15:  # a key that is there twice
        key = chance.choice(list(data))
        return (text[:-1] + f", {json.dumps(key)}: {json.dumps(chance.choice(VALUES))}}}").encode()
    _change_somewhere(data, chance)
    return json.dumps(data).encode()


def _change_somewhere(data: Any, chance: random.Random) -> None:
    """Another value, an entry less or an entry more, at some depth."""
    place = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = chance.choice(keys)
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and chance.random() < 0.8:
            place = inner
            continue
        break
    way = chance.randrange(5)
    if way == 0:
        del place[key]
    elif way == 1 and isinstance(place, list):
        place.insert(key, chance.choice(VALUES))
    elif way == 2 and isinstance(inner, (int, float)):
        place[key] = chance.choice((-inner, inner * 1e30, inner + 1, str(inner)))
    else:
        place[key] = chance.choice(VALUES)


def _parts(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        with safe_open(file.name, framework="numpy") as opened:
            tables = {name: opened.get_tensor(name) for name in opened.keys()}
            return json.loads(opened.metadata()["header"]), tables


def _with_other_header(content: bytes, chance: random.Random) -> bytes:
    header, tables = _parts(content)
    if chance.random() < 0.7:
        del header["checksum"]
    _change_somewhere(header, chance)
    return save(tables, {"header": json.dumps(header)})


def _with_other_tables(content: bytes, chance: random.Random) -> bytes:
    header, tables = _parts(content)
    if chance.random() < 0.7:
        del header["checksum"]
    name = chance.choice(sorted(tables))
    table = tables[name].copy()
    ways = (
        lambda: table.reshape(-1),
        lambda: table[..., :1].copy(),
        lambda: table[:, :1].copy(),
        lambda: table.astype(np.int32),
        lambda: table.astype(np.float16),
        lambda: np.zeros((0,)),
        lambda: np.where(np.random.default_rng(chance.randrange(99)).random(table.shape) < 0.1, value, table),
    )
    value = chance.choice(TABLES)
    changed = chance.choice(ways)()
    kept = {key: entry for key, entry in tables.items() if key != name}
    return save(kept if chance.random() < 0.1 else kept | {name: changed}, {"header": json.dumps(header)})
