"""How long a million predictions take to evaluate, report included, and how much memory.

    python benchmarks/evaluate_million.py --films 1000000 --columns age,sex

Writes a made-up predictions.csv (two films a patient, 30 % positive) into a temporary folder, runs
`main.py evaluate --predictions` on it in a process of its own with one thread, and prints seconds and peak memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
MAKERS = {
    "age": lambda rng, n: rng.integers(18, 95, n),
    "sex": lambda rng, n: rng.choice(["F", "M"], n),
    "view": lambda rng, n: rng.choice(["AP", "PA"], n),
    "site": lambda rng, n: rng.choice(["north", "south", "west"], n),
}


def write_predictions(path: Path, *, films: int, columns: list[str]) -> None:
    """A predictions.csv of `films` films with calibrated scores of an AUROC near 0.92."""
    rng = np.random.default_rng(0)
    positive = rng.random(films) < 0.3
    score = 1 / (1 + np.exp(-(3 * positive - 1.8 + rng.normal(0, 1.3, films))))
    table = {
        "path": [f"films/{number}.png" for number in range(films)],
        "patient_id": [f"p{number // 2}" for number in range(films)],
        "label": np.where(positive, "PNEUMONIA", "NORMAL"),
        "probability_NORMAL": np.round(1 - score, 6),
        "probability_PNEUMONIA": np.round(score, 6),
        **{name: MAKERS[name](rng, films) for name in columns},
    }
    pd.DataFrame(table).to_csv(path, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=1_000_000)
    parser.add_argument("--columns", default="", help=f"of {', '.join(MAKERS)}, separated by commas; none by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "predictions.csv"
        write_predictions(table, films=arguments.films, columns=[name for name in arguments.columns.split(",") if name])
        command = [sys.executable, str(ROOT / "main.py"), "evaluate", "--predictions", str(table), "--quiet"]
        started = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--output-dir", f"{folder}/out"], check=True, env=environment)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{arguments.films:,} films, subgroups {arguments.columns or 'none'}: {seconds:.1f} s, {peak:.2f} GiB")


if __name__ == "__main__":
    main()
