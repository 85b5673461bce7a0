"""`Crew`: processes that run the same program, share out its samples, and hold the results of all of them.

Every process takes its share of the samples. What is summed over samples is gathered first, as terms, and added in
sample order by every process, so that the sums have the same bits however many processes there are.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from layercache._utils.processes import cpu_model
from layercache._version import __version__
from layercache.errors import CalibrationError, CrewError, LayerCacheError, ScheduleMismatchError

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = 3600.0
"""Seconds that processes wait for each other, longer than one sample takes; one that died is noticed at once."""

BLOCK = 4096
"""Bytes of every process that are exchanged in few rounds; of longer values the rest follows."""

MEETING = 600.0
"""Seconds that they wait for the last of them to start."""

ATTEMPT = "LAYERCACHE_ATTEMPT"
"""Environment variable of the number of restarts so far; torch's own is taken where it is not set."""


class Crew:
    """Processes that share out samples; ``Crew()`` is this process alone, which communicates with nobody.

    All processes must make the same calls in the same order. An error inside `together` is raised by all of them.

    Args:
        group: a process group of torch.distributed on CPUs (gloo), whose ranks are the crew's. Where several processes
            run one generation together, a crew is the group of those with the same place in it, such as
            ``mesh["samples"].get_group()`` where processes began with ``init_process_group("cpu:gloo,cuda:nccl")``.

    Attributes:
        rank: of this process, from 0.
        world: how many processes there are.

    Raises:
        CrewError: by every method that communicates, where another process is gone.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.rank, self.world = 0, 1
        if group is not None:
            import torch.distributed as dist

            self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._owns_group = False
        self._lost: CrewError | None = None
        self._shared_error: BaseException | None = None

    def __repr__(self) -> str:
        return "Crew()" if self.world == 1 else f"Crew(rank {self.rank} of {self.world})"

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def check_samples(self, count: int) -> None:
        """Refuses to share out fewer samples than there are processes.

        Raises:
            CalibrationError: some would have none.
        """
        if count < self.world:
            raise CalibrationError(
                f"{self.world} processes cannot share {count} sample{'s' if count > 1 else ''}: start at most {count}, "
                "or give more prompts",
                argument="workers",
            )

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's items: every `world`-th from its rank on."""
        return list(items[self.rank :: self.world])

    def gather(self, own: Sequence[T]) -> list[T]:
        """The items of all processes in sample order, of `share`'s own ones, on every process."""
        if self.world == 1:
            return list(own)
        shares = self._exchange(list(own))
        return [shares[k % self.world][k // self.world] for k in range(sum(map(len, shares)))]

    def agree(self, value: T) -> T:
        """The leader's value, on every process."""
        return value if self.world == 1 else self._exchange(value if self.leads else None)[0]

    def map(
        self,
        function: Callable[[int], R],
        tasks: Sequence[int],
        done: Callable[[int, R], object] | None = None,
        keep: bool = True,
    ) -> list[R]:
        """Results of all tasks in their order, computed in rounds of one task per process.

        Args:
            function: gives the result of a task, which is sent to all processes.
            tasks: numbers of samples, the same on all processes.
            done: called by the leader with every task and its result, in order, after its round.
            keep: whether results are sent to all processes and returned. Without, they are sent to the leader, for
                ``done``, and nothing is returned: for results that are large, or many.

        Raises:
            BaseException: the first that a task raised, in the order of the tasks, on all processes.
        """
        results: list[R] = []
        for start in range(0, len(tasks), self.world):
            tried = [_outcome(function, task) for task in tasks[start : start + self.world][self.rank :][:1]]
            with self.together():
                for task, (result, error) in zip(tasks[start:], self._outcomes(tried, keep), strict=False):
                    if error is not None:
                        raise error
                    if done is not None and self.leads:
                        done(task, result)
                    if keep:
                        results.append(result)
        return results

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context whose errors are raised by all processes: by the others where they next communicate, or leave it."""
        try:
            yield
        except BaseException as error:
            if self.world > 1 and error is not self._shared_error and not isinstance(error, CrewError):
                self._exchange(None, error)
            raise
        if self.world > 1:
            self._exchange(None)

    def check_same(self, own: Any, what: str) -> None:
        """Refuses processes of which one holds something else than the first, such as another model.

        Raises:
            ScheduleMismatchError: names the process, and ``what`` differs.
        """
        found = self.gather([own])
        others = [rank for rank, one in enumerate(found) if one != found[0]]
        if others:
            raise ScheduleMismatchError(
                f"process {others[0]} has {what} than process 0; give all of them the same, and start again"
            )

    def differences(self) -> list[str]:
        """A sentence for everything that differs between the processes, and lets their results differ in bits."""
        if self.world == 1:
            return []
        found = self._exchange(surroundings())
        return [
            f"the processes have different {name}: {', '.join(sorted({str(one[name]) for one in found}))}"
            for name in found[0]
            if any(one[name] != found[0][name] for one in found)
        ]

    def close(self) -> None:
        """Waits for all processes, and ends the group if `crew_of_environment` made it."""
        if not self._owns_group:
            return
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError):  # another one is gone already
            dist.barrier(self.group)
        self._end_group()

    def _end_group(self) -> None:
        if not self._owns_group:
            return
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group(self.group)
        self.group, self._owns_group = None, False

    def _outcomes(self, own: Sequence[tuple[Any, BaseException | None]], keep: bool) -> list[tuple[Any, Any]]:
        """The outcomes of all processes' tasks, one each at most, in their order; unless kept, on the leader alone."""
        if self.world == 1:
            return list(own)
        sent = [(result, error and sendable(error)) for result, error in own]
        if keep:
            return self.gather(sent)
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.world if self.leads else None
        with self._connected() as interrupts:
            leader = dist.get_global_rank(self.group, 0)
            dist.gather_object([pickle.dumps(one) for one in sent], found, dst=leader, group=self.group)
        if interrupts:
            raise KeyboardInterrupt
        return [pickle.loads(one) for share in found or () for one in share]

    def _exchange(self, value: Any, error: BaseException | None = None) -> list[Any]:
        """The values of all processes, by rank; raises the first error among them, which goes before a Ctrl-C here."""
        own = pickle.dumps((value, error and sendable(error)))
        with self._connected() as interrupts:
            found = self._bytes_of_all(own)
        unpacked = [pickle.loads(one) for one in found]
        for _, raised in unpacked:
            if raised is not None:
                self._shared_error = raised if error is None else error
                raise self._shared_error
        self._shared_error = None  # it holds the frames that raised it
        if interrupts:
            raise KeyboardInterrupt
        return [one for one, _ in unpacked]

    @contextlib.contextmanager
    def _connected(self) -> Iterator[list[int]]:
        """Context of a collective call, whose failure means that another process is gone; gives `_no_interrupt`'s."""
        if self._lost is not None:
            raise self._lost
        with _no_interrupt() as interrupts:
            try:
                yield interrupts
            except RuntimeError as lost:
                self._lost = CrewError(
                    f"process {self.rank} of {self.world} lost the connection to another one, which was ended or "
                    f"stopped answering ({_first_sentence(lost)}); give the same command again"
                )
                self._end_group()  # which others notice that are still connected to this one
                raise self._lost from lost

    def _bytes_of_all(self, own: bytes) -> list[bytes]:
        """The bytes of all processes, by rank.

        Those of a step are short: the leader gathers them and sends them to all in as many rounds as the number of
        processes has binary digits. Gloo's gathering on all processes takes a round per process.
        """
        import torch
        import torch.distributed as dist

        leader = dist.get_global_rank(self.group, 0)
        block = torch.zeros(BLOCK, dtype=torch.uint8)
        begin = len(own).to_bytes(8, "little") + own[: BLOCK - 8]
        block[: len(begin)] = torch.frombuffer(bytearray(begin), dtype=torch.uint8)
        blocks = torch.empty(self.world, BLOCK, dtype=torch.uint8)
        dist.gather(block, list(blocks) if self.leads else None, dst=leader, group=self.group)
        dist.broadcast(blocks, src=leader, group=self.group)
        begins = [bytes(one) for one in blocks.numpy()]
        lengths = [int.from_bytes(one[:8], "little") for one in begins]
        rests = [b""] * self.world
        if (longest := max(lengths) - (BLOCK - 8)) > 0:
            rest = torch.zeros(longest, dtype=torch.uint8)
            if own[BLOCK - 8 :]:
                rest[: len(own) - BLOCK + 8] = torch.frombuffer(bytearray(own[BLOCK - 8 :]), dtype=torch.uint8)
            found = [torch.empty_like(rest) for _ in range(self.world)]
            dist.all_gather(found, rest, group=self.group)
            rests = [bytes(one.numpy()) for one in found]
        return [(one[8:] + more)[:length] for one, more, length in zip(begins, rests, lengths, strict=True)]


def crew_of_environment(timeout: float = TIMEOUT) -> Crew:
    """The crew of the processes that torchrun, or another launcher, started; of this one where nothing says so.

    Its process group is one of its own, on CPUs, beside any that the program makes.

    Args:
        timeout: seconds that a process waits for another one before it raises `CrewError`.

    Raises:
        CrewError: RANK, WORLD_SIZE, MASTER_ADDR or MASTER_PORT is missing beside the others, or the processes do not
            find each other.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name) for name in names}
    if not given["RANK"] and not given["WORLD_SIZE"]:
        return Crew()
    missing = [name for name in names if not given[name]]
    if missing:
        raise CrewError(f"{', '.join(missing)} is not set beside RANK or WORLD_SIZE; start the processes with torchrun")
    if given["WORLD_SIZE"] == "1":
        return Crew()
    attempt = os.environ.get(ATTEMPT) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return crew_at(
        str(given["MASTER_ADDR"]),
        int(str(given["MASTER_PORT"])),
        int(str(given["RANK"])),
        int(str(given["WORLD_SIZE"])),
        attempt,
        # torchrun's agent serves the store on that port already
        serves=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
    )


def crew_at(
    address: str, port: int, rank: int, world: int, attempt: str, serves: bool = True, timeout: float = TIMEOUT
) -> Crew:
    """The crew of the processes that meet at an address.

    Args:
        address, port: of the store in which they find each other.
        rank, world: of this process, and how many there are.
        attempt: what tells a restart's addresses from those of the processes that died before it.
        serves: whether rank 0 is to serve the store.
        timeout: seconds that a process waits for another one.

    Raises:
        CrewError: they do not find each other.
    """
    import torch.distributed as dist

    wait, meeting = (datetime.timedelta(seconds=seconds) for seconds in (timeout, min(timeout, MEETING)))
    try:
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=wait)
        else:
            store = dist.TCPStore(address, port, world, is_master=serves and rank == 0, timeout=meeting)
            prefixed = dist.PrefixStore(f"layercache {attempt}", store)
            dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=world, timeout=wait)
            group = dist.group.WORLD
    except (RuntimeError, ValueError) as error:
        raise CrewError(
            f"process {rank} of {world} did not find the others at {address}:{port} ({_first_sentence(error)})"
        ) from error
    crew = Crew(group)
    crew._owns_group = True
    return crew


def _first_sentence(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0]


def surroundings() -> dict[str, Any]:
    """What of a process decides about the bits of its results."""
    import torch

    return {
        "devices": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPUs",
        "CPUs": cpu_model(),
        "versions of torch": torch.__version__,
        "versions of layercache": __version__,
        "numbers of threads": torch.get_num_threads(),
    }


def _outcome(function: Callable[[int], R], task: int) -> tuple[Any, BaseException | None]:
    try:
        return function(task), None
    except CrewError:
        raise
    except BaseException as error:
        return None, error


def sendable(error: BaseException) -> BaseException:
    """An error that other processes can read: itself, or one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # some errors can be written and not read
    except Exception:
        # no `CrewError`, which says that a process is gone
        return LayerCacheError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def _no_interrupt() -> Iterator[list[int]]:
    """Context in which Ctrl-C is noted in the list that it gives: a process that left an exchange would part from all.

    Where Ctrl-C is ignored, it stays so.
    """
    caught: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield caught
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
