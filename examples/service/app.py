"""Pictures over HTTP, each with a schedule of its own, over one transformer.

uvicorn app:app --port 8000 --timeout-graceful-shutdown 120
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request, Response
from pictures import Cancelled, Device, Job, Picture
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from layercache.errors import LayerCacheError

LIMIT = int(os.environ.get("LAYERCACHE_QUEUE", "16"))
LOOK_SECONDS = 0.1  # after which it is looked whether a client is still there


class Wanted(BaseModel):
    """The body of POST /generate: a budget, or the name of a schedule."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(min_length=1, max_length=2000)
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1)
    budget: float = Field(0.5, gt=0, le=1)
    schedule: str | None = None


class Service:
    """The queue of limited length in front of the thread that owns the device."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.thread = ThreadPoolExecutor(1, "device")
        self.queue: asyncio.Queue[tuple[Job, asyncio.Future[Picture]] | None] = asyncio.Queue()
        self.names = map(str, itertools.count())
        self.is_stopping = False
        self.answers = Counter("service_answers", "Answers to POST /generate.", ["status"], registry=self.registry)
        self.seconds = Histogram("service_answer_seconds", "From request to picture.", registry=self.registry)
        waiting = Gauge("service_waiting", "Requests in the queue.", registry=self.registry)
        waiting.set_function(self.queue.qsize)

    async def start(self) -> None:
        self.device = await asyncio.get_running_loop().run_in_executor(self.thread, Device, self.registry)
        self.working = asyncio.create_task(self.work())

    async def stop(self) -> None:
        """Finishes what was accepted."""
        self.is_stopping = True
        self.queue.put_nowait(None)
        await self.working
        await asyncio.get_running_loop().run_in_executor(self.thread, self.device.close)
        self.thread.shutdown()

    async def work(self) -> None:
        while (entry := await self.queue.get()) is not None:
            job, done = entry
            try:
                picture = await asyncio.get_running_loop().run_in_executor(self.thread, self.device.generate, job)
            except Exception as error:  # of this job alone
                if not done.cancelled():
                    done.set_exception(error)
            else:
                if not done.cancelled():
                    done.set_result(picture)

    def choose(self, wanted: Wanted) -> str:
        """The schedule that is named, or the one that computes most within the budget at this number of steps."""
        known = self.device.schedules
        if wanted.schedule is not None:
            fitting = [name for name in known if name == wanted.schedule]
        else:
            steps = wanted.steps or next(iter(known.values())).num_steps
            fitting = [n for n, one in known.items() if one.num_steps == steps and one.used <= wanted.budget + 1e-9]
        if not fitting:
            raise HTTPException(422, f"no schedule fits; known: {', '.join(known)}")
        return max(fitting, key=lambda name: known[name].used)

    async def answer(self, wanted: Wanted, request: Request) -> Response:
        if self.is_stopping:
            raise HTTPException(503, "the service is stopping")
        name = self.choose(wanted)
        if self.queue.qsize() >= LIMIT:
            seconds = math.ceil(self.device.usual_seconds)  # until a place in the queue is free
            raise HTTPException(429, "too many requests are waiting", {"Retry-After": str(seconds)})
        job = Job(next(self.names), wanted.prompt, wanted.seed, self.device.schedules[name])
        done: asyncio.Future[Picture] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((job, done))
        try:
            while not (await asyncio.wait([done], timeout=LOOK_SECONDS))[0]:
                if await request.is_disconnected():
                    raise Cancelled
            picture = done.result()
        except Cancelled:
            raise HTTPException(499, "the client hung up") from None
        except (ValueError, LayerCacheError) as error:
            status = 500 if isinstance(error, LayerCacheError) else 422  # what the pipeline refuses
            raise HTTPException(status, str(error)) from error
        finally:
            job.is_left.set()  # whatever ended the wait; once there is a picture it changes nothing
            done.cancel()
        headers = {"x-schedule": name, "x-seconds": f"{picture.seconds:.4f}", "x-share-computed": f"{picture.used:.4f}"}
        return Response(picture.png, media_type="image/png", headers=headers)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.service = service = Service()
    await service.start()
    yield
    await service.stop()


app = FastAPI(title="layercache", lifespan=lifespan)


@app.post("/generate", response_class=Response)
async def generate(wanted: Wanted, request: Request) -> Response:
    """A picture as PNG; headers say the schedule, the seconds on the device and the share computed."""
    service: Service = request.app.state.service
    status = 500
    try:
        with service.seconds.time():
            response = await service.answer(wanted, request)
        status = 200
        return response
    except HTTPException as error:
        status = error.status_code
        raise
    finally:
        service.answers.labels(status).inc()


@app.get("/schedules")
async def schedules(request: Request) -> dict[str, dict[str, float]]:
    """What may be asked for: number of steps and share computed, by name."""
    found = request.app.state.service.device.schedules
    return {name: {"steps": one.num_steps, "used": round(one.used, 4)} for name, one in found.items()}


@app.get("/healthz")
async def healthz(request: Request) -> dict[str, int]:
    service: Service = request.app.state.service
    if service.is_stopping:
        raise HTTPException(503, "the service is stopping")
    return {"waiting": service.queue.qsize()}


@app.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(generate_latest(request.app.state.service.registry), media_type=CONTENT_TYPE_LATEST)
