"""How much of the machine's decoding rate an audit keeps, and what memory it takes.

    python benchmarks/audit.py data/chest_xray --repeats 3
    python benchmarks/audit.py data/chest_xray --replicate 100000 --repeats 1

A is the bare loop: `preprocess.decode` of every film in as many threads, and in as many processes (already started).
B reads the films as an audit does (facts, thumbnails), and C is all of it: the reading, the search for copies, the
nuisances. Runs are interleaved (A B C A B C …) and ratios are medians over the rounds; those of CPU time hold on a busy
machine too, and pass over what is not shared out among cores. --replicate lists N distinct names for the films, by hard
links: their copies are then exact duplicates, so --search N also times the search for changed copies on N different
thumbnails (each the blend of two films, turned).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from duplicates import SIDE, near_pairs
from film_facts import CHUNK, scan_films
from preprocess import decode

# Worker processes load this file too: what brings torch along is imported where it is used.
if TYPE_CHECKING:
    from film_list import FilmList


def decode_all(paths: Sequence[str]) -> None:
    """Decode some films and drop them."""
    cv2.setNumThreads(1)
    for path in paths:
        decode(path)


def bare(films: FilmList, pool: Executor) -> None:
    """Decode every film and drop it."""
    parts = [films.path[start : start + CHUNK] for start in range(0, len(films.path), CHUNK)]
    for _ in pool.map(decode_all, parts):
        pass


def reading(films: FilmList, workers: int, scratch: Path) -> None:
    """What the audit does film by film."""
    with tempfile.TemporaryFile(dir=scratch) as stream:
        thumbnails = np.memmap(stream, np.uint8, "w+", shape=(len(films.path), SIDE, SIDE))
        scan_films(films.path, thumbnails, workers=workers)


def whole(films: FilmList, workers: int, scratch: Path) -> None:
    """The audit without its report."""
    import audit_findings
    from audit import examine

    evidence = examine(films, workers=workers, scratch=scratch)
    classes = sorted(set(films.label) - {""})
    audit_findings.tried_nuisances(evidence, classes, None)


def measured(run: Callable[[], None], films: int) -> tuple[float, float]:
    """Films per second, and per second of CPU time (of this process and of those it started that have ended)."""
    started, before = time.perf_counter(), sum(os.times()[:4])
    run()
    return films / (time.perf_counter() - started), films / (sum(os.times()[:4]) - before)


def replicated(films: FilmList, count: int, folder: Path) -> FilmList:
    """`count` names for the same films, in the same class folders."""
    import film_list

    for number in range(count):
        row = number % len(films.path)
        source = Path(films.path[row])
        target = folder / (films.split[row] or ".") / films.label[row] / f"{number // len(films.path)}_{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target) if source.stat().st_dev == folder.stat().st_dev else target.symlink_to(source)
    return film_list.list_films(folder)


def different_thumbnails(films: FilmList, count: int, folder: Path) -> np.ndarray:
    """(count, 64, 64) of blended, turned and shifted films, memory-mapped."""
    sample = np.empty((min(2000, len(films.path)), SIDE, SIDE), np.uint8)
    scan_films(films.path[: len(sample)], sample)
    rng = np.random.default_rng(0)
    made = np.lib.format.open_memmap(folder / "thumbnails.npy", "w+", np.uint8, (count, SIDE, SIDE))
    for row in range(count):
        first, second = sample[rng.integers(len(sample), size=2)].astype(np.float32)
        turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), rng.uniform(-8, 8), rng.uniform(0.9, 1.15))
        turn[:, 2] += rng.uniform(-4, 4, 2)
        film = 0.6 * first + 0.4 * second[:, :: rng.choice([-1, 1])]
        made[row] = cv2.warpAffine(film, turn, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT).clip(0, 255)
    return made


def peak_memory() -> str:
    """Of this process."""
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"


def main() -> None:
    import audit  # noqa: F401 - loaded before anything is timed
    from film_list import list_films

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replicate", type=int, default=0, help="audit this many names of the films")
    parser.add_argument("--search", type=int, default=0, help="also search this many different thumbnails")
    arguments = parser.parse_args()
    workers = arguments.workers
    films = list_films(arguments.source)
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as name,
        ThreadPoolExecutor(workers) as threads,
        ProcessPoolExecutor(workers, mp_context=spawn) as processes,
    ):
        folder = Path(name)
        if arguments.replicate:
            films = replicated(films, arguments.replicate, folder / "films")
        n = len(films.path)
        list(processes.map(decode_all, [films.path[:CHUNK]] * (2 * workers)))
        rounds = []
        for _ in range(arguments.repeats):
            found = (
                measured(lambda: bare(films, threads), n),
                measured(lambda: bare(films, processes), n),
                measured(lambda: reading(films, workers, folder), n),
                measured(lambda: whole(films, workers, folder), n),
            )
            rounds.append(found)
            rates = [wall for wall, _ in found]
            print(
                "decode {:.0f} in threads, {:.0f} in processes; read {:.0f}, audit {:.0f} films/s".format(*rates),
                flush=True,
            )
        said = f"{n} films, {workers} workers: of the decoding rate in"
        for base, kind, column in ((0, "threads", 0), (1, "processes", 0), (0, "threads, by CPU time,", 1)):
            kept = [statistics.median(row[part][column] / row[base][column] for row in rounds) for part in (2, 3)]
            print(f"{said} {kind} reading keeps {kept[0]:.3f}, the audit {kept[1]:.3f}")
        print(peak_memory())
        if arguments.search:
            made = different_thumbnails(films, arguments.search, folder)
            started = time.perf_counter()
            found = near_pairs(made, workers=workers)
            print(f"search of {len(made)} films: {time.perf_counter() - started:.1f} s, {len(found)} pairs")
            print(peak_memory())


if __name__ == "__main__":
    main()
