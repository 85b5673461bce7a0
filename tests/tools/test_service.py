"""The service in examples/service: answers, refusals, clients that hang up, the end, the load test."""

import asyncio
import io
import json
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import layercache
from support.tiny import tiny_pipeline

FOLDER = Path(__file__).parents[2] / "examples" / "service"
MODULES = ("app", "pictures", "load_test")
pytestmark = pytest.mark.slow
for needed in ("fastapi", "uvicorn", "httpx", "prometheus_client"):
    pytest.importorskip(needed)
import httpx  # noqa: E402


@pytest.fixture
def service(monkeypatch):
    """Its module ``load_test``, and by it the others, on a tiny model."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("LAYERCACHE_STEPS", "4,6")
    monkeypatch.setenv("LAYERCACHE_BUDGETS", "0.5")
    import load_test
    import pictures

    for module in (pictures, load_test):
        monkeypatch.setattr(module, "load_pipeline", lambda: tiny_pipeline(layers=2))
    yield load_test
    for name in MODULES:
        sys.modules.pop(name, None)


def device_of(service):
    return service.app.state.service.device


def slowed(device, seconds: float) -> list[float]:
    """Every forward takes so long from now on; when they were."""
    found: list[float] = []

    def wait(*_: object) -> None:
        found.append(time.monotonic())
        time.sleep(seconds)

    device.pipe.transformer.register_forward_hook(wait)
    return found


def test_answers_and_refusals(service):
    with service.Server() as url, httpx.Client(base_url=url, timeout=60) as http:
        known = http.get("/schedules").json()
        assert list(known) == ["universal-4-0.500", "universal-6-0.500", "full-4", "full-6"]
        wanted = {"prompt": "cat", "seed": 5, "steps": 6}
        for more, name in (
            ({}, "universal-6-0.500"),
            ({"budget": 0.9}, "universal-6-0.500"),
            ({"budget": 1}, "full-6"),
            ({"steps": None}, "universal-4-0.500"),
            ({"schedule": "full-4"}, "full-4"),
        ):
            answer = http.post("/generate", json=wanted | more)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-schedule"] == name and answer.headers["content-type"] == "image/png"
            assert float(answer.headers["x-share-computed"]) == known[name]["used"]
            schedule, pipe = device_of(service).schedules[name], tiny_pipeline(layers=2)
            with layercache.enabled(pipe, schedule):
                alone = pipe(**service.call_arguments("cat", 5, schedule.num_steps)).images[0]
            assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(answer.content))), np.asarray(alone))
        for more, said in (
            ({"steps": 5}, "no schedule fits; known: universal-4"),
            ({"budget": 0.1}, "no schedule fits"),
            ({"schedule": "best"}, "no schedule fits"),
            ({"prompt": "dog"}, "'dog' is not one of"),
            ({"prompt": ""}, "at least 1 character"),
            ({"budgte": 0.5}, "not permitted"),
        ):
            answer = http.post("/generate", json=wanted | more)
            assert answer.status_code == 422 and said in answer.text, answer.text
        assert http.get("/healthz").json() == {"waiting": 0}
        text = http.get("/metrics").text
        cache = device_of(service).cache
        assert f"layercache_forwards_total {float(cache.metrics()['forwards'])}" in text
        assert 'service_answers_total{status="200"} 5.0' in text and "layercache_requests 0.0" in text
        expressions = re.findall(r"(?:service|layercache)_\w+", (FOLDER / "dashboard.json").read_text())
        assert len(set(expressions)) > 8
        assert {name for name in expressions if name not in text} == set()
    assert json.loads((FOLDER / "dashboard.json").read_text())["panels"]


def test_a_full_queue_and_clients_that_hang_up(service, monkeypatch):
    monkeypatch.setattr(sys.modules["app"], "LIMIT", 2)

    async def ask(http, seconds: float | None = None) -> httpx.Response | None:
        try:
            async with asyncio.timeout(seconds):
                return await http.post("/generate", json={"prompt": "cat", "steps": 6, "budget": 1})
        except TimeoutError:
            return None

    async def ask_all(url: str) -> list[httpx.Response | None]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            first = asyncio.create_task(ask(http, 0.5))
            await asyncio.sleep(0.25)
            return await asyncio.gather(first, *[ask(http) for _ in range(6)])

    with service.Server() as url:
        device = device_of(service)
        forwards = slowed(device, 0.1)
        before = device.cache.metrics()["forwards"]
        first, *others = asyncio.run(ask_all(url))
        statuses = sorted(one.status_code for one in others)
        assert first is None and statuses.count(200) >= 2 and statuses.count(429) >= 3
        assert {one.headers["retry-after"] for one in others if one.status_code == 429} == {"1"}
        metrics = device.cache.metrics()
        assert metrics["requests"] == 0 and metrics["fallback_rows"] == 0
        assert len(forwards) == metrics["forwards"] - before < 12 * statuses.count(200) + 12, "it was not finished"
        assert 'status="499"} 1.0' in httpx.get(f"{url}/metrics").text


def test_at_the_end_what_was_accepted_is_finished_and_nothing_new(service):
    found: list[httpx.Response] = []
    with service.Server() as url:
        device = device_of(service)
        forwards = slowed(device, 0.05)

        def ask() -> None:
            found.append(httpx.post(f"{url}/generate", json={"prompt": "cat", "steps": 6, "budget": 1}, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        while len(forwards) < 2:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in found] == [200, 200]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")
    assert not device.pipe.transformer.is_cache_enabled


def test_the_load_test_compares_every_picture(service, capsys, monkeypatch):
    assert service.main(["--seconds", "1", "--hang-up", "0.2"]) == 0
    said = capsys.readouterr().out
    count, differ = map(int, re.search(r"(\d+) different pictures .*: (\d+) differ", said).groups())
    assert count > 1 and differ == 0 and "layercache_requests: 0" in said
    # with another seed than was asked for, every picture is another one
    monkeypatch.setattr(service, "call_arguments", lambda prompt, seed, steps: CALL(prompt, seed + 1, steps))
    CALL = sys.modules["pictures"].call_arguments
    assert service.main(["--seconds", "0.4", "--hang-up", "0"]) == 1
    assert "differs: " in capsys.readouterr().out
