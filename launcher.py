"""Start the processes of a distributed run on this machine, and start them again when one of them is lost.

    python main.py distributed --model resnet50 --epochs 50
    python main.py distributed --nproc-per-node 2 --device cpu --model resnet50

torchrun's own engine starts `distributed_train.py` once for each visible GPU, watches, and ends all when one fails.
Then all are started anew and go on from the newest checkpoint, unless the user's mistake or a signal ended them.
Several machines: torchrun itself, see docs/distributed.md.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from errors import ConfigError
from runtime import log, resolve_device

SCRIPT = Path(__file__).with_name("distributed_train.py")
ENDED = (0, 2, 130, 143)
"""Exit codes after which nothing is started again: done, the user's mistake, stopped after saving."""
HANDLED = (
    signal.SIGTERM,
    signal.SIGINT,
    *(getattr(signal, name) for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name)),
)


def process_count(wanted: int | None, device: str) -> int:
    """How many processes to start: `wanted`, else one for each visible GPU, else one."""
    gpus = torch.cuda.device_count() if resolve_device(device).type == "cuda" else 0
    if wanted is None:
        return max(1, gpus)
    if wanted < 1:
        raise ConfigError(f"--nproc-per-node {wanted}: start at least one process")
    if gpus and wanted > gpus:
        raise ConfigError(f"--nproc-per-node {wanted}: {gpus} GPUs are visible; start at most as many, or --device cpu")
    return wanted


def launch(words: Sequence[str], *, processes: int, max_restarts: int) -> int:
    """Run `distributed_train.py` with `words` in `processes` processes; the exit code of the program."""
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts {max_restarts}: give 0 or more")
    if processes == 1:
        log.info("one process, with all cores (several: --nproc-per-node N)")
    # Each process a share of the cores: more threads than cores make processes wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failing process says why itself
    name = uuid.uuid4().hex
    for left in range(max_restarts, -1, -1):
        code, what = _start(words, processes=processes, name=name)
        if code in ENDED:
            return code
        log.warning("%s; %s", what, f"starting all again, {left - 1} more times at most" if left else "giving up")
    return 1


def _start(words: Sequence[str], *, processes: int, name: str) -> tuple[int, str]:
    """One start of all processes: (exit code, what ended it)."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        elastic_launch(config, sys.executable)("-u", str(SCRIPT), *words)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        rank, first = error.get_first_failure()
        how = f"was killed by signal {-first.exitcode}" if first.exitcode < 0 else f"ended with {first.exitcode}"
        return verdict(codes), f"process {rank} {how}"
    except SignalException as stopped:
        return 128 + int(stopped.sigval), "stopped by a signal"
    finally:
        for number, handler in handlers.items():  # the engine leaves its own behind
            signal.signal(number, handler)
    return 0, "done"


def verdict(codes: Sequence[int]) -> int:
    """What the processes' exit codes say of the run: 2, 130 or 143 to end with, or 1 when one of them was lost.

    The engine stops the others with SIGTERM as soon as one has failed: what they say then is not why.
    """
    if 2 in codes:
        return 2
    if any(code not in (*ENDED, -signal.SIGTERM) for code in codes):
        return 1
    return next((code for code in codes if code in ENDED), 1)


def own_words(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`words` without `flags` and their values."""
    kept: list[str] = []
    waiting = False
    for word in words:
        if waiting:
            waiting = False
        elif word in flags:
            waiting = True
        elif not word.startswith(tuple(f"{flag}=" for flag in flags)):
            kept.append(word)
    return kept


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
