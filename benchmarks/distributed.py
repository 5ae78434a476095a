"""Two processes with one thread each against one process with two threads, fine-tuning a network on a CPU.

    python benchmarks/distributed.py --model resnet50 --batch-size 16 --repeats 3

Both take the same films a step (batch 16: two processes of 8), in turns A B A B, each in processes of its own. Printed
is the ratio of films per second, medians of the steps after the first two, for batch norm kept local (what torch's DDP
does unasked), synchronised and frozen. On one GPU, `--gpu` compares DDP with one process with the plain loop instead.
Films are synthetic: their content does not change the time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import process_group
import synthetic
import train
from config import Config, resolve
from process_group import Group
from runtime import resolve_device, resolve_precision


def configured(arguments: argparse.Namespace, *, each: int) -> Config:
    """The run, `each` films in every process' part of a step."""
    folder = Path(arguments.folder)
    return resolve(
        {
            "data.data_dir": str(folder / "films"),
            "data.cache_dir": str(folder),
            "data.batch_size": each,
            "data.test_fraction": 0.0,
            "data.val_fraction": 0.05,
            "model.model_type": arguments.model,
            "model.pretrained": False,
            "training.batch_norm": arguments.batch_norm,
            "runtime.device": "cuda" if arguments.gpu else "cpu",
            "runtime.output_dir": str(folder / "run"),
        }
    )


def steps(arguments: argparse.Namespace, group: Group) -> list[float]:
    """Seconds of each step of one process of `group`, loading and augmentation included; the first two are warm-up."""
    config = configured(arguments, each=arguments.batch_size // group.size)
    device = resolve_device(config.runtime.device)
    precision = resolve_precision(config.runtime.precision, device)
    torch.manual_seed(0)
    prepared = group.from_node(lambda: train.prepare(config), what="the films")
    folder = Path(config.runtime.output_dir)
    fit = train.Fit(config, prepared, folder=folder, device=device, precision=precision, group=group)
    fit._open_stages()
    if arguments.one_rank_ddp:
        fit.network = torch.nn.parallel.DistributedDataParallel(
            fit.network, gradient_as_bucket_view=True, static_graph=True
        )
    requests = fit._begin_epoch()
    own = [fit._part(number).request for number in range(len(requests))]
    seconds: list[float] = []
    started = time.perf_counter()
    for batch in fit._batches(own[: arguments.steps + 2]):
        with fit._reducing(True):
            fit._backward(batch, share=1.0)
        fit._step()
        fit.standing.batch += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return seconds[2:]


def films_per_s(arguments: argparse.Namespace, *, processes: int, threads: int, ddp: bool = False) -> float:
    """Median films per second of a fresh start."""
    own = [word for word in sys.argv[1:] if word != "--compare"]
    own += ["--worker", "--folder", arguments.folder, "--batch-norm", arguments.batch_norm]
    own += ["--one-rank-ddp"] if ddp else []
    start = [sys.executable]
    if processes > 1 or ddp:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*start, __file__, *own], env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    if not found:
        raise SystemExit(f"a start failed:\n{done.stderr}")
    return arguments.batch_size / float(found[0].split()[1])


def compare(arguments: argparse.Namespace) -> None:
    """Print the ratio for one way of batch norm."""
    a, b = [], []
    for _ in range(arguments.repeats):
        if arguments.gpu:
            a.append(films_per_s(arguments, processes=1, threads=1, ddp=True))
            b.append(films_per_s(arguments, processes=1, threads=1))
        else:
            a.append(films_per_s(arguments, processes=2, threads=1))
            b.append(films_per_s(arguments, processes=1, threads=2))
    ratios = [x / y for x, y in zip(a, b)]
    what = ("DDP, one process", "plain") if arguments.gpu else ("2 processes x 1 thread", "1 process x 2 threads")
    print(
        f"{arguments.model}, batch {arguments.batch_size}, batch norm {arguments.batch_norm}: {what[0]} "
        f"{statistics.median(a):.2f} films/s, {what[1]} {statistics.median(b):.2f}: ratio "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} of {len(ratios)} pairs)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=16, help="films a step, all processes together")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a start")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-norm", nargs="+", default=["local", "sync", "frozen"])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one-rank-ddp", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ways = arguments.batch_norm
    if arguments.worker:
        arguments.batch_norm = ways[-1]
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        arguments.folder = name
        patients = {"train": arguments.batch_size * (arguments.steps + 3) // 4 + 8}
        synthetic.write_dataset(Path(name) / "films", patients_per_class=patients, size=arguments.size)
        for way in ways:
            arguments.batch_norm = way
            compare(arguments)


def work(arguments: argparse.Namespace) -> None:
    """One process of a start; the first prints the median step."""
    device = "cuda" if arguments.gpu else "cpu"
    if arguments.one_rank_ddp:
        torch.cuda.set_device(0)
        torch.distributed.init_process_group("nccl")
    with process_group.joined(device, timeout_s=300) as group:
        seconds = steps(arguments, group)
    if group.is_main:
        print(f"step {statistics.median(seconds)}", flush=True)


if __name__ == "__main__":
    main()
