"""Sends concurrent requests to the service and compares every picture with that of a run alone, bit for bit.

python load_test.py --seconds 120

It starts the service in this process, on a free port of the loopback. Prompts, seeds, steps and budgets are random, and
some clients hang up. Afterwards every picture is generated once more, on a pipeline of its own on which its schedule
alone is enabled. Exit code 1 if one differs, if an answer is an error, or if the cache still knows a request.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import PIL.Image
import uvicorn
from app import app
from pictures import call_arguments, load_pipeline

import layercache

PROMPTS = ("cat", "astronaut", "coffee", "rocket", "temple", "flower")  # words that the bundled model knows
SEEDS = 50
Key = tuple[str, str, int]  # schedule, prompt, seed


@dataclass
class Found:
    """What the clients got: pictures by what was asked for, seconds until each answer, counts of answers by status."""

    pictures: dict[Key, list[bytes]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    hung_up: int = 0


class Server:
    """The service in a thread of this process."""

    def __enter__(self) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            if not self.thread.is_alive():
                raise SystemExit("the service did not start")
            time.sleep(0.05)
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()


async def client(
    http: httpx.AsyncClient,
    schedules: dict[str, dict[str, Any]],
    until: float,
    chance: random.Random,
    hang_up: float,
    found: Found,
) -> None:
    while time.monotonic() < until:
        one = schedules[chance.choice(list(schedules))]
        body = {"prompt": chance.choice(PROMPTS), "seed": chance.randrange(SEEDS), "steps": one["steps"]}
        body["budget"] = min(1.0, one["used"] + chance.uniform(0.001, 0.05))
        patience = chance.uniform(0.0, 1.0) if chance.random() < hang_up else None
        start = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                answer = await http.post("/generate", json=body)
        except TimeoutError:
            found.hung_up += 1
            continue
        found.statuses[answer.status_code] += 1
        if answer.status_code == 429:
            await asyncio.sleep(float(answer.headers["retry-after"]))
        elif answer.status_code == 200:
            found.seconds.append(time.monotonic() - start)
            key = answer.headers["x-schedule"], body["prompt"], body["seed"]
            found.pictures.setdefault(key, []).append(answer.content)


async def load(url: str, seconds: float, clients: int, seed: int, hang_up: float) -> Found:
    found = Found()
    chances = [random.Random(1000 * seed + k) for k in range(clients)]
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits()) as http:
        schedules = (await http.get("/schedules")).json()
        until = time.monotonic() + seconds
        await asyncio.gather(*[client(http, schedules, until, chance, hang_up, found) for chance in chances])
    return found


def metrics_of(url: str) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/healthz").json()["waiting"] and time.monotonic() < deadline:
        time.sleep(0.1)  # of clients that hung up last
    text = httpx.get(f"{url}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(layercache\S+) (\S+)$", text, re.MULTILINE)}


def differing(found: Found, schedules: dict[str, layercache.Schedule]) -> list[Key]:
    """What was asked for and not answered with the picture of a run alone."""
    pipe, bad = load_pipeline(), []
    for key in sorted(found.pictures):
        name, prompt, seed = key
        schedule = schedules[name]
        with layercache.enabled(pipe, schedule):
            alone = np.asarray(pipe(**call_arguments(prompt, seed, schedule.num_steps)).images[0])
        pictures = [np.asarray(PIL.Image.open(io.BytesIO(content))) for content in found.pictures[key]]
        if not all(np.array_equal(picture, alone) for picture in pictures):
            bad.append(key)
    return bad


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="how long requests are sent")
    parser.add_argument("--clients", type=int, default=6, help="how many ask at a time")
    parser.add_argument("--hang-up", type=float, default=0.1, help="share of requests whose client hangs up")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with Server() as url:
        schedules = dict(app.state.service.device.schedules)
        found = asyncio.run(load(url, options.seconds, options.clients, options.seed, options.hang_up))
        metrics = metrics_of(url)
    count = len(found.seconds)
    rate = 60 * count / options.seconds
    print(f"{count} pictures in {options.seconds:g} s, {rate:.1f} a minute; {found.hung_up} clients hung up")
    print(f"answers by status: {dict(found.statuses)}")
    if count:
        named = zip((50, 90, 99), np.percentile(found.seconds, (50, 90, 99)), strict=True)
        print("seconds to an answer: " + ", ".join(f"{seconds:.2f} (p{share})" for share, seconds in named))
    for name in ('groups_total{result="computed"}', 'groups_total{result="reused"}', "fallback_rows_total", "requests"):
        print(f"layercache_{name}: {metrics[f'layercache_{name}']:g}")
    bad = differing(found, schedules)
    print(f"{len(found.pictures)} different pictures compared with runs alone: {len(bad)} differ")
    for key in bad:
        print("differs:", *key)
    errors = set(found.statuses) - {200, 429}
    left = metrics["layercache_requests"] + metrics["layercache_fallback_rows_total"]
    return int(bool(bad or errors or left or not count))


if __name__ == "__main__":
    sys.exit(main())
