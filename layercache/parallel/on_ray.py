"""Processes on a Ray cluster, or on an embedded Ray of this machine, that share out samples.

Where a process dies, all are started again, and go on from what the function kept on the disk. Files are those of the
driver, the process that calls `launch_on_ray`: what the processes read is sent to them, and what the leader writes (by
`layercache._utils.files`) is sent back, so that the machines need no disk in common.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from layercache._utils.files import append_line, followed, saved_anyway, write_atomically
from layercache._utils.processes import HOSTED
from layercache.errors import CrewError, LayerCacheWarning, MissingExtraError
from layercache.parallel.crew import ATTEMPT, TIMEOUT, Crew, crew_at
from layercache.parallel.launching import INTERFACE, gave_up, threads_of

R = TypeVar("R")

LOCAL = "local"
POLL = 0.2  # seconds between two looks at what the processes wrote and printed
PATIENCE = 60.0  # seconds in which processes that nobody keeps waiting have started
LOOPBACK = "127.0.0.1"


def launch_on_ray(
    function: Callable[[Crew], R],
    workers: int,
    *,
    address: str | None = None,
    gpus: float | None = None,
    cpus: int | None = None,
    restarts: int = 3,
    runtime_env: Mapping[str, Any] | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    timeout: float = TIMEOUT,
) -> list[R]:
    """Runs a function in several processes on Ray, and gives their results by rank.

    What the leader prints is printed here; what the others print stays in Ray's logs.

    Args:
        function: of a module, or a partial of one; it takes the crew, and loads the model by its name.
        workers: how many processes, each of which is an actor.
        address: ``"local"`` embeds Ray in this machine; ``"auto"`` and addresses are those of ``ray.init``; RAY_ADDRESS
            by default, else ``"local"``. Where Ray is initialised already, that is used.
        gpus: of each process; one where the cluster has any, else none.
        cpus: of each process, and its number of threads; 1, or embedded the cores divided by ``workers``, by default.
        restarts: how often all of them are started again where one died.
        runtime_env: of the actors, as Ray takes it.
        files: files and folders that the processes read, as far as they are there; sent to other machines before
            every start.
        timeout: seconds that a process waits for another one.

    Raises:
        MissingExtraError: Ray is not installed.
        CrewError: no cluster answers, it has too few GPUs or CPUs, or a process died after every restart.
        Exception: what the function raised.
    """
    ray = _import_ray()
    place = address or os.environ.get("RAY_ADDRESS") or LOCAL
    threads = cpus or (threads_of(workers) if place == LOCAL else 1)
    with _connected(ray, place, workers * threads):
        needs = _resources(ray, workers, gpus, threads)
        died = (
            CrewError,
            ray.exceptions.RayActorError,
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.ObjectLostError,
        )
        options: dict[str, Any] = {**needs, **({"runtime_env": dict(runtime_env)} if runtime_env else {})}
        reason, launch = "", uuid.uuid4().hex[:12]
        for number in range(restarts + 1):
            attempt = _Attempt(ray, place == LOCAL, threads, timeout, options, launch)
            try:
                return attempt.results(function, workers, number, files)
            except died as error:
                reason = _end_of(error)
            finally:
                attempt.end()
    raise CrewError(gave_up(f"one of {workers} processes on Ray {reason}", restarts))


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingExtraError(
            'processes on Ray need Ray, which is not installed: pip install "layercache[ray]"', argument="ray"
        ) from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, place: str, cpus: int) -> Iterator[None]:
    """Context in which Ray is initialised; an embedded one has no dashboard and sends no statistics of its use."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of the processes behind the first that failed
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if place == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings |= {"include_dashboard": False, "num_cpus": max(cpus, os.cpu_count() or 1)}
    try:
        ray.init(address=place, **settings)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = f"Ray cannot be reached at {place!r} ({_first_line(error)})"
        if _wants_token(error):
            advice = "it wants a token: set RAY_AUTH_MODE=token, as on its machines, which have the token in ~/.ray"
        else:
            advice = "'ray start --head' starts a cluster, 'local' needs none"
        raise CrewError(f"{reason}; {advice}", argument="ray") from error
    try:
        yield
    finally:
        ray.shutdown()


def _wants_token(error: BaseException | None) -> bool:
    """Whether a cluster refused a connection without its token."""
    return error is not None and ("AuthToken" in str(error) or _wants_token(error.__cause__ or error.__context__))


def _resources(ray: Any, workers: int, gpus: float | None, cpus: int) -> dict[str, float]:
    """What each actor needs; refused where the cluster has less, since Ray would wait for ever."""
    found = ray.cluster_resources()
    has = {"GPU": float(found.get("GPU", 0)), "CPU": float(found.get("CPU", 0))}
    wants = {"GPU": gpus if gpus is not None else float(has["GPU"] > 0), "CPU": float(cpus)}
    for name in wants:
        if wants[name] * workers > has[name]:
            each = f"{wants[name]:g} {name}{'' if wants[name] == 1 else 's'}"
            raise CrewError(
                f"{workers} processes with {each} each need {wants[name] * workers:g}, and the Ray cluster has "
                f"{has[name]:g}; take fewer processes",
                argument="workers",
            )
    return {"num_gpus": wants["GPU"], "num_cpus": wants["CPU"]}


def _end_of(error: Exception) -> str:
    if isinstance(error, CrewError):
        return f"lost the others ({_first_line(error)})"
    return f"died ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@dataclass
class _Attempt:
    """One start of all processes.

    Attributes:
        ray: the module.
        is_local: whether Ray is embedded in this machine.
        threads: of each process.
        timeout: seconds that a process waits for another one.
        options: of the actors.
        launch: the same of all starts of one call, and of no other.
    """

    ray: Any
    is_local: bool
    threads: int
    timeout: float
    options: dict[str, Any]
    launch: str
    hosts: list[Any] = field(default_factory=list)
    desk: Any = None

    def results(
        self, function: Callable[[Crew], R], workers: int, number: int, files: Sequence[str | os.PathLike[str]]
    ) -> list[R]:
        """The results of all processes, by rank; raises the first error, or the first death."""
        ray = self.ray
        self.desk = ray.remote(_Desk).options(num_cpus=0).remote()
        self.hosts = [ray.remote(_Host).options(**self.options).remote() for _ in range(workers)]
        with tempfile.TemporaryDirectory(prefix=".layercache-", dir=os.getcwd()) as folder:
            mark, content = Path(folder, "mark"), str(uuid.uuid4())
            mark.write_text(content)
            asked = [host.place.remote(str(mark), content) for host in self.hosts]
            if len(ray.wait(asked, num_returns=workers, timeout=PATIENCE)[0]) < workers:
                warnings.warn(
                    f"the Ray cluster has not started all of {workers} processes yet; others may be using its machines",
                    LayerCacheWarning,
                    stacklevel=3,
                )
            places = ray.get(asked)
        size = shutil.get_terminal_size()
        place = _Place(
            address=LOOPBACK if self.is_local else places[0][0],
            port=places[0][1],
            world=workers,
            attempt=number,
            threads=self.threads,
            timeout=self.timeout,
            folder=os.getcwd(),
            environment={"COLUMNS": str(size.columns), "LINES": str(size.lines)} | self._interface(),
            is_terminal=sys.stderr.isatty(),
            desk=self.desk,
            launch=self.launch,
        )
        sent = ray.put(_contents(files)) if not all(sees for *_, sees in places) else None
        waiting = {
            host.run.remote(rank, place, function, None if places[rank][2] else [sent]): rank
            for rank, host in enumerate(self.hosts)
        }
        found: dict[int, R] = {}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL)
            self._serve()
            for one in done:
                try:
                    found[waiting.pop(one)] = ray.get(one)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
        self._serve()
        return [found[rank] for rank in range(workers)]

    def _interface(self) -> dict[str, str]:
        """The network that the processes meet in: inside of one machine, the loopback."""
        given = os.environ.get(INTERFACE)
        if given:
            return {INTERFACE: given}
        return {INTERFACE: "lo"} if self.is_local and sys.platform == "linux" else {}

    def _serve(self) -> None:
        """Prints and writes what the processes have sent."""
        for name, *values in self.ray.get(self.desk.take.remote()):
            if name == "print":
                number, text = values
                stream = sys.stdout if number == 1 else sys.stderr
                stream.write(text)
                stream.flush()
            elif name == "append":
                append_line(*values)
            else:
                _write_here(*values)

    def end(self) -> None:
        """Ends all processes."""
        for actor in (*self.hosts, *([self.desk] if self.desk is not None else [])):
            with contextlib.suppress(Exception):  # it is gone already
                self.ray.kill(actor)


def _write_here(path: str, content: bytes | None) -> None:
    """A file that a process on another machine wrote, or, without content, removed."""
    if content is not None:
        saved_anyway(path, lambda place: write_atomically(place, lambda new: new.write_bytes(content)))
    elif os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        Path(path).unlink(missing_ok=True)


def _contents(files: Sequence[str | os.PathLike[str]]) -> dict[str, bytes]:
    """The files, and those in the folders, by their paths as they were given."""
    paths = [
        inside
        for path in map(Path, files)
        for inside in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if inside.is_file()
    ]
    return {str(path): path.read_bytes() for path in paths}


# --- in the actors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where the processes meet, and what they know of the driver."""

    address: str
    port: int
    world: int
    attempt: int
    threads: int
    timeout: float
    folder: str
    environment: dict[str, str]
    is_terminal: bool
    desk: Any
    launch: str


class _Desk:
    """What the processes have written and printed, until the driver takes it."""

    def __init__(self) -> None:
        self.items: list[tuple[Any, ...]] = []

    def put(self, *item: Any) -> None:
        """Of a process: ``("print", 1 or 2, text)``, ``("append", path, line)``, ``("write", path, bytes or None)``."""
        self.items.append(item)

    def take(self) -> list[tuple[Any, ...]]:
        """Everything since the last call, in order."""
        items, self.items = self.items, []
        return items


class _Host:
    """An actor that is one of the processes."""

    def place(self, mark: str, content: str) -> tuple[str, int, bool]:
        """Its address, a free port, and whether it sees the driver's files."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        path = Path(mark)
        sees = path.is_file() and path.read_text() == content
        return ray.util.get_node_ip_address(), port, sees

    def run(self, rank: int, place: _Place, function: Callable[[Crew], R], sent: list[Any] | None) -> R:
        """What the function gives on this rank; ``sent``: the driver's files, where this machine does not see them."""
        about = {"RANK": str(rank), "WORLD_SIZE": str(place.world), ATTEMPT: str(place.attempt), HOSTED: "1"}
        os.environ |= about | place.environment
        if rank == 0:
            sys.stdout, sys.stderr = (_Sent(place.desk, number, place.is_terminal) for number in (1, 2))
        import torch

        torch.set_num_threads(place.threads)
        with _folder_of(place, sent, leads=rank == 0):
            crew = Crew()
            if place.world > 1:
                crew = crew_at(place.address, place.port, rank, place.world, str(place.attempt), timeout=place.timeout)
            with crew.together():
                result = function(crew)
            crew.close()
        return result


@contextlib.contextmanager
def _folder_of(place: _Place, sent: list[Any] | None, leads: bool) -> Iterator[None]:
    """Context whose current folder is the driver's, or stands for it on another machine.

    What the leader writes there is sent to the driver; what the others write are copies of their own samples, to go on
    from, which are large.
    """
    if sent is None:
        os.chdir(place.folder)
        yield
        return
    import ray

    temporary, prefix = Path(tempfile.gettempdir()), f"layercache-{place.launch}-"
    for number in range(place.attempt):  # of processes that were killed
        for left in temporary.glob(f"{prefix}{number}-*"):
            shutil.rmtree(left, ignore_errors=True)
    root = Path(tempfile.mkdtemp(prefix=f"{prefix}{place.attempt}-"))
    inside = _below(root, place.folder)
    inside.mkdir(parents=True)
    os.chdir(inside)
    for name, content in ray.get(sent[0]).items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def send(path: Path, line: str | None) -> None:
        absolute = os.path.abspath(path)
        there = os.path.relpath(absolute, root)
        wanted = absolute if there.startswith("..") else str(_below(Path(Path(place.folder).anchor), f"/{there}"))
        if line is not None:
            ray.get(place.desk.put.remote("append", wanted, line))
            return
        content = Path(absolute).read_bytes() if os.path.isfile(absolute) else None
        ray.get(place.desk.put.remote("write", wanted, content))

    try:
        with followed(send) if leads else contextlib.nullcontext():
            yield
    finally:
        os.chdir(tempfile.gettempdir())
        shutil.rmtree(root, ignore_errors=True)


def _below(root: Path, path: str) -> Path:
    """An absolute path as one below another folder."""
    return root / Path(path).relative_to(Path(path).anchor)


class _Sent(io.TextIOBase):
    """Standard output or error of the leader, which the driver prints."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, desk: Any, number: int, is_terminal: bool):
        self.desk, self.number, self.is_terminal = desk, number, is_terminal

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # some try whether a stream takes bytes
            raise TypeError(f"text is expected, not {type(text).__name__}")
        self.desk.put.remote("print", self.number, text)
        return len(text)
