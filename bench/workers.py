"""Two processes that share samples against one, on this machine: calibration, search and batches of pictures.

    python bench/workers.py --json bench/results/workers.json

Three processes load the bundled model, one that works alone and two that work together, with one thread each. They take
turns, so that a machine that grows slower or faster favours neither; loading is not timed. Figures are ratios of the
seconds of pairs, one right behind the other.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from layercache.tools.report.machine import machine_info, write_json

WAYS = ("calibrate", "search", "generate")
GUIDANCE = {"guidance_scale": 4.0}


def calibrate(pipe: Any, crew: Any, names: list[str]) -> None:
    """Six samples of four pictures."""
    import layercache

    prompts = [[names[(k + j) % len(names)] for j in range(4)] for k in range(6)]
    layercache.calibrate(pipe, prompts, num_inference_steps=20, progress=False, crew=crew, **GUIDANCE)


def search(pipe: Any, crew: Any, names: list[str]) -> None:
    """Eight samples of one picture, five budgets."""
    import layercache

    settings = {"budgets": (0.7, 0.6, 0.5, 0.33, 0.2), "effort": "quick", "num_inference_steps": 30}
    layercache.search(pipe, names[:8], progress=False, crew=crew, **settings, **GUIDANCE)


def generate(pipe: Any, crew: Any, names: list[str]) -> None:
    """Sixteen pictures, uncached."""
    from layercache.tools.batch.entries import numbered
    from layercache.tools.batch.run import generate_all

    entries = numbered([names[k % len(names)] for k in range(16)])
    folder = Path(crew.agree(tempfile.mkdtemp() if crew.leads else ""))
    generate_all(pipe, entries, folder, {"num_inference_steps": 20, **GUIDANCE}, progress=False, crew=crew)


def work(rank: int, world: int, port: int, orders: Any, answers: Any) -> None:
    """A process: does what it is asked for, and says how long it took from the moment that all were ready."""
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch

    from layercache.demo.model import CLASS_NAMES
    from layercache.demo.pipeline import load_demo_pipeline
    from layercache.parallel.crew import crew_of_environment

    torch.set_num_threads(1)
    crew, pipe = crew_of_environment(), load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for way in iter(orders.get, None):
        crew.gather([rank])
        start = time.perf_counter()
        globals()[way](pipe, crew, list(CLASS_NAMES))
        crew.gather([rank])
        answers.put(time.perf_counter() - start)
    crew.close()


def started(world: int, port: int) -> tuple[list[Any], list[Any], Any]:
    context = mp.get_context("spawn")
    answers, orders = context.Queue(), [context.Queue() for _ in range(world)]
    processes = [
        context.Process(target=work, args=(rank, world, port, orders[rank], answers), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes, orders, answers


def seconds_of(way: str, group: tuple[list[Any], list[Any], Any]) -> float:
    processes, orders, answers = group
    for queue in orders:
        queue.put(way)
    return float(max(answers.get(timeout=600) for _ in processes))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--port", type=int, default=29731)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    alone, shared = started(1, args.port), started(2, args.port)
    rows = []
    for way in tqdm(args.ways):
        for group in (alone, shared):
            seconds_of(way, group)  # warm
        pairs = []
        for turn in range(args.repeats):
            both = {}
            for name in ("one", "two") if turn % 2 == 0 else ("two", "one"):
                both[name] = seconds_of(way, alone if name == "one" else shared)
            pairs.append([both["one"], both["two"]])
        speedups = sorted(one / two for one, two in pairs)
        rows.append({"way": way, "pairs": pairs, "speedup": median(speedups), "range": [speedups[0], speedups[-1]]})
    for processes, orders, _ in (alone, shared):
        for queue in orders:
            queue.put(None)
        for process in processes:
            process.join(timeout=60)
    table = Table("", "one process", "two", "speedup", "range", title="Seconds, one thread per process")
    for row in rows:
        one, two = (median(pair[k] for pair in row["pairs"]) for k in range(2))
        low, high = row["range"]
        table.add_row(row["way"], f"{one:.2f}", f"{two:.2f}", f"{row['speedup']:.2f}x", f"{low:.2f} to {high:.2f}")
    Console().print(table)
    if args.json:
        write_json(args.json, {"kind": "workers", "rows": rows, "machine": machine_info()})


if __name__ == "__main__":
    main()
