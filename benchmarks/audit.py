"""How much of the machine's decoding rate an audit keeps, and what memory it takes.

    python benchmarks/audit.py data/chest_xray --repeats 3
    python benchmarks/audit.py data/chest_xray --replicate 100000 --repeats 1

A is the bare loop: `preprocess.decode` of every film in as many threads. B reads the films as an audit does (facts,
thumbnails), and C is all of it: the reading, the search for copies, the nuisances. Runs are interleaved (A B C A B C …)
and ratios are medians over the rounds. --replicate lists N distinct names for the films, by hard links: their copies
are then exact duplicates, so --search N also times the search for changed copies on N different thumbnails (each the
blend of two films, turned).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import audit_findings
from audit import examine
from duplicates import SIDE, near_pairs
from film_facts import scan_films
from film_list import FilmList, list_films
from preprocess import decode


def bare(films: FilmList, workers: int) -> None:
    """Decode every film and drop it."""
    paths = films.path
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), 4096):
            for _ in pool.map(lambda path: decode(path).shape, paths[start : start + 4096]):
                pass


def reading(films: FilmList, workers: int, scratch: Path) -> None:
    """What the audit does film by film."""
    with tempfile.TemporaryFile(dir=scratch) as stream:
        thumbnails = np.memmap(stream, np.uint8, "w+", shape=(len(films.path), SIDE, SIDE))
        scan_films(films.path, thumbnails, workers=workers)


def whole(films: FilmList, workers: int, scratch: Path) -> None:
    """The audit without its report."""
    evidence = examine(films, workers=workers, scratch=scratch)
    classes = sorted(set(films.label) - {""})
    audit_findings.tried_nuisances(evidence, classes, None)


def rate(run: Callable[[], None], films: int) -> float:
    """Films per second."""
    started = time.perf_counter()
    run()
    return films / (time.perf_counter() - started)


def replicated(films: FilmList, count: int, folder: Path) -> FilmList:
    """`count` names for the same films, in the same class folders."""
    for number in range(count):
        row = number % len(films.path)
        source = Path(films.path[row])
        target = folder / (films.split[row] or ".") / films.label[row] / f"{number // len(films.path)}_{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target) if source.stat().st_dev == folder.stat().st_dev else target.symlink_to(source)
    return list_films(folder)


def different_thumbnails(films: FilmList, count: int, folder: Path) -> np.ndarray:
    """(count, 64, 64) of blended, turned and shifted films, memory-mapped."""
    few = list_films(films.source)
    sample = np.empty((min(2000, len(few.path)), SIDE, SIDE), np.uint8)
    scan_films(few.path[: len(sample)], sample)
    rng = np.random.default_rng(0)
    made = np.lib.format.open_memmap(folder / "thumbnails.npy", "w+", np.uint8, (count, SIDE, SIDE))
    for row in range(count):
        first, second = sample[rng.integers(len(sample), size=2)].astype(np.float32)
        turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), rng.uniform(-8, 8), rng.uniform(0.9, 1.15))
        turn[:, 2] += rng.uniform(-4, 4, 2)
        film = 0.6 * first + 0.4 * second[:, :: rng.choice([-1, 1])]
        made[row] = cv2.warpAffine(film, turn, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT).clip(0, 255)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replicate", type=int, default=0, help="audit this many names of the films")
    parser.add_argument("--search", type=int, default=0, help="also search this many different thumbnails")
    arguments = parser.parse_args()
    workers = arguments.workers
    cv2.setNumThreads(1)
    films = list_films(arguments.source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.replicate:
            films = replicated(films, arguments.replicate, folder / "films")
        n = len(films.path)
        rounds = []
        for _ in range(arguments.repeats):
            a = rate(lambda: bare(films, workers), n)
            b = rate(lambda: reading(films, workers, folder), n)
            c = rate(lambda: whole(films, workers, folder), n)
            rounds.append((a, b, c))
            print(f"decode {a:.0f}, read {b:.0f}, audit {c:.0f} films/s", flush=True)
        kept = [statistics.median(row[column] / row[0] for row in rounds) for column in (1, 2)]
        print(
            f"{n} films, {workers} threads: reading keeps {kept[0]:.3f} of the decoding rate, the audit {kept[1]:.3f}"
        )
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
        if arguments.search:
            made = different_thumbnails(films, arguments.search, folder)
            started = time.perf_counter()
            found = near_pairs(made, workers=workers)
            print(f"search of {len(made)} films: {time.perf_counter() - started:.1f} s, {len(found)} pairs")
            print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
