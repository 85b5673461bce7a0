"""Files in folders and on the Hub: many of one model in a place, found by what they are for."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

import layercache
from layercache import Front, Schedule, StabilityProfile
from layercache.errors import ArgumentError, FileFormatError, HubError, OutputError
from layercache.planning.front import Point
from layercache.schedule import ModuleSchedule
from support.hub_server import hub_server
from support.profiles import made_profile

BASE = "Qwen/Qwen-Image"


@pytest.fixture(scope="module")
def profile() -> StabilityProfile:
    made = made_profile(steps=12, groups=2, distance=6, span=6)
    settings = {"guidance": ["guidance_scale 1", "true_cfg_scale 4"], "size": ["height 64", "width 32"]}
    return replace(made, fingerprint=replace(made.fingerprint, settings=settings))


@pytest.fixture(scope="module")
def schedules(profile) -> dict[float, Schedule]:
    return {budget: layercache.plan(profile, budget) for budget in (0.5, 0.75)}


@pytest.fixture(scope="module")
def front(schedules) -> Front:
    return Front((Point(schedules[0.5], "a", (30.0, 40.0)), Point(schedules[0.75], "b", (50.0, 50.0))), (1.0, 0.1, 0.0))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with hub_server() as server:
        point_at(server.url, monkeypatch)
        yield server


def point_at(url, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_a_folder_holds_files_of_every_kind(tmp_path, profile, schedules, front):
    modules = ModuleSchedule(profile.fingerprint, ("a", "b"), ((True, True),) * 6 + ((False, True),) * 6)
    items = (*schedules.values(), front, profile, modules)
    names = [item.save_pretrained(tmp_path / "many").relative_to(tmp_path / "many").as_posix() for item in items]
    used = [f"{schedule.used:.3g}" for schedule in schedules.values()]
    assert names == [
        *(f"schedules/12-steps-cfg4-b{share}.json" for share in used),
        "fronts/12-steps-cfg4.json",
        "profiles/12-steps-cfg4.safetensors",
        "modules/12-steps-cfg4-b0.75.json",
    ]
    assert Front.from_pretrained(tmp_path / "many") == front
    assert ModuleSchedule.from_pretrained(tmp_path / "many") == modules
    assert StabilityProfile.from_pretrained(tmp_path / "many").to_bytes() == profile.to_bytes()
    chosen = Schedule.from_pretrained(tmp_path / "many", num_steps=12, guidance=4, budget=0.6)
    assert chosen == schedules[0.5] == Schedule.from_pretrained(tmp_path / "many", filename=names[0])
    for wanted, said in (({}, "more than one"), ({"num_steps": 30}, "num_steps=30"), ({"guidance": 1}, "guidance=1")):
        with pytest.raises(HubError, match=said) as refused:
            Schedule.from_pretrained(tmp_path / "many", **wanted)
        assert all(name in str(refused.value) for name in names[:2])
    with pytest.raises(ArgumentError, match="has no budget"):
        Front.from_pretrained(tmp_path / "many", budget=0.5)


def test_one_place_tells_apart_what_is_valid_for_other_settings(tmp_path, schedules):
    schedule = schedules[0.5]
    larger = {**schedule.fingerprint.settings, "size": ["height 128", "width 32"]}
    other = replace(schedule, fingerprint=replace(schedule.fingerprint, settings=larger))
    first, second = (item.save_pretrained(tmp_path) for item in (schedule, other))
    assert first != second and schedule.save_pretrained(tmp_path) == first
    listed = json.loads((tmp_path / "index.json").read_text())["files"]
    assert {entry["size"] for entry in listed} == {"32x64", "32x128"} and len(listed) == 2


def test_a_card_says_what_it_is_and_keeps_what_people_wrote(tmp_path, front):
    planned = layercache.plan(front, 0.6)
    planned.save_pretrained(tmp_path, base_model=BASE)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("---\nbase", "---\nlicense: mit\nbase", 1) + "\nAsk me anything.\n")
    front.save_pretrained(tmp_path)
    card = ModelCard(path.read_text())
    assert card.data.base_model == BASE and card.data.library_name == "layercache" and card.data.license == "mit"
    assert {"diffusers", "layercache-schedule", "layercache-front"} <= set(card.data.tags)
    assert card.text.count("layercache: begin") == 1 and card.text.endswith("Ask me anything.\n")
    row = next(line for line in card.text.splitlines() if line.startswith("| schedules/"))
    assert [cell.strip() for cell in row.split("|")[3:9]] == ["12", "4", "32x64", f"{planned.used:.3f}", "35.0", "31.0"]
    compile(card.text.split("```python")[1].split("```")[0], "card", "exec")
    assert "true_cfg_scale=4" in card.text


def test_names_and_texts_of_strangers_stay_text(tmp_path, schedules):
    schedule = schedules[0.5]
    named = replace(schedule.fingerprint, model_class="<script>|`x`", settings={"size": ["height 1) + evil("]})
    replace(schedule, fingerprint=named).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "<script>" not in text and r"&lt;script&gt;\|\`x\`" in text and "evil(" not in text.split("```")[1]
    with pytest.raises(ArgumentError, match="base_model"):
        schedule.save_pretrained(tmp_path, base_model='a"b](javascript:x)')


@pytest.mark.parametrize("name", ["../a.json", "/tmp/a.json", "a/../../b.json", "a\\b.json", "c:/a.json", "a.py", ""])
def test_no_name_leads_outside(tmp_path, schedules, name):
    folder = tmp_path / "folder"
    schedules[0.75].save_pretrained(folder)
    for attempt in (schedules[0.5].save_pretrained, Schedule.from_pretrained):
        with pytest.raises(HubError):
            attempt(folder, filename=name)
    index = json.loads((folder / "index.json").read_text())
    index["files"][0]["file"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises((HubError, FileFormatError)):
        Schedule.from_pretrained(folder)


def test_links_in_a_folder_do_not_lead_outside(tmp_path, schedules):
    folder, outside = tmp_path / "folder", tmp_path / "outside.json"
    schedules[0.5].save(outside)
    folder.mkdir()
    (folder / "index.json").symlink_to(outside)
    before = outside.read_bytes()
    with pytest.raises(HubError, match="leads outside"):
        schedules[0.5].save_pretrained(folder)
    assert outside.read_bytes() == before


def test_folders_without_an_index_and_damaged_ones(tmp_path, schedules):
    schedules[0.5].save(tmp_path / "one" / "mine.json")
    assert Schedule.from_pretrained(tmp_path / "one") == schedules[0.5]
    schedules[0.75].save(tmp_path / "one" / "more.json")
    with pytest.raises(HubError, match=r"filename=, one of mine\.json, more\.json"):
        Schedule.from_pretrained(tmp_path / "one")
    with pytest.raises(HubError, match="holds no layercache front"):
        Front.from_pretrained(tmp_path / "one")
    (tmp_path / "one" / "index.json").write_text('{"format": "layercache index", "version": 1, "files": [{}]}')
    for attempt in (Schedule.from_pretrained, schedules[0.5].save_pretrained):
        with pytest.raises(FileFormatError, match="index"):
            attempt(tmp_path / "one")
    with pytest.raises(HubError, match="no folder that is there"):
        Schedule.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(HubError, match="load"):
        Schedule.from_pretrained(tmp_path / "one" / "mine.json")
    (tmp_path / "file").write_text("")
    with pytest.raises((OutputError, HubError)):
        schedules[0.5].save_pretrained(tmp_path / "file")


def test_pushed_and_read_back(hub, tmp_path, schedules, front, profile):
    """One commit holds file, index and card; what others push stays."""
    url = schedules[0.5].push_to_hub("me/qwen", base_model=BASE, private=True, token="hf_test")
    assert url.startswith(hub.url) and hub.private["me/qwen"] and len(hub.repos["me/qwen"]["main"]) == 2
    assert set(hub.files("me/qwen")) == {"index.json", "README.md", f"schedules/12-steps-cfg4-b{_used(schedules)}.json"}
    assert Schedule.from_pretrained("me/qwen") == schedules[0.5]

    theirs = dict(hub.files("me/qwen"))
    hub.before_commit = lambda: (hub.put("me/qwen", theirs | {"note.md": b"x"}), setattr(hub, "before_commit", int))
    schedules[0.75].push_to_hub("me/qwen")
    front.push_to_hub("me/qwen")
    assert "note.md" in hub.files("me/qwen") and "base_model: " + BASE in hub.files("me/qwen")["README.md"].decode()
    assert Schedule.from_pretrained("me/qwen", budget=0.9) == schedules[0.75]
    assert Front.from_pretrained("me/qwen", num_steps=12) == front

    profile.push_to_hub("me/qwen", revision="trial", filename="p.safetensors")
    assert StabilityProfile.from_pretrained("me/qwen", revision="trial").groups == profile.groups
    assert "p.safetensors" not in hub.files("me/qwen")
    assert "/discussions/" in schedules[0.5].push_to_hub("me/qwen", create_pr=True, filename="new.json")
    assert "new.json" in hub.proposals[0] and "new.json" not in hub.files("me/qwen")


def test_what_was_read_once_is_there_without_a_server(hub, schedules, monkeypatch):
    schedules[0.5].push_to_hub("me/qwen")
    Schedule.from_pretrained("me/qwen")
    point_at("http://127.0.0.1:9", monkeypatch)
    assert Schedule.from_pretrained("me/qwen") == schedules[0.5]
    assert Schedule.from_pretrained("me/qwen", local_files_only=True) == schedules[0.5]
    with pytest.raises(HubError, match="not in the cache"):
        Schedule.from_pretrained("me/other", local_files_only=True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the tries of huggingface_hub
    for attempt in (Schedule.from_pretrained, schedules[0.5].push_to_hub):
        with pytest.raises(HubError, match="offline"):
            attempt("me/other")


def test_what_the_hub_refuses_is_said(hub, schedules):
    schedules[0.5].push_to_hub("me/qwen", filename="a.json")
    hub.put("me/gated", {"index.json": b"{}"})
    hub.put("me/plain", {"a.json": b"{}"})
    hub.gated.add("me/gated")
    hub.put("me/damaged", {**hub.files("me/qwen"), "a.json": b'{"format": "layercache schedule", "version'})
    for repo, given, said in (
        ("me/nothing", {}, "no repository me/nothing"),
        ("me/gated", {}, "gated: ask for access"),
        ("me/qwen", {"revision": "v9"}, "no branch, tag or commit v9"),
        ("me/qwen", {"filename": "b.json"}, "has no file b.json"),
        ("me/plain", {}, "give filename=, one of a.json"),
        ("no/such/name", {}, "no name of a repository"),
    ):
        with pytest.raises(HubError, match=said):
            Schedule.from_pretrained(repo, **given)
    with pytest.raises(FileFormatError, match="a.json of me/damaged: .*not whole"):
        Schedule.from_pretrained("me/damaged")
    hub.before_commit = lambda: hub.put("me/qwen", {"b.md": str(len(hub.repos["me/qwen"]["main"])).encode()})
    with pytest.raises(HubError, match="changed by others"):
        schedules[0.75].push_to_hub("me/qwen")


def _used(schedules) -> str:
    return f"{schedules[0.5].used:.3g}"
