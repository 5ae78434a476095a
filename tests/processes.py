"""Several processes of one run, for tests: started in milliseconds from a clean process that has imported everything.

A test's function runs in each of them with the group it has joined; what it returns, or the error it raises, comes back
in order of rank. The store they meet at lives in the test process, on a free port. Nothing outlives LIMIT_S.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

LIMIT_S = 120
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def run(size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> list[Any]:
    """`function(group, *arguments)` in `size` processes; a result or an exception of each, None of a process that died.

    `function` has to be importable: top level in a module of the tests.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30), wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(size):
        here, there = CONTEXT.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MEDIMG_CACHE_DIR": os.environ["MEDIMG_CACHE_DIR"],
        }
        target = CONTEXT.Process(target=_work, args=(environment, timeout_s, there, function, arguments), daemon=True)
        target.start()
        there.close()
        pipes.append(here)
        processes.append(target)
    try:
        return [_received(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        for pipe in pipes:
            pipe.close()


def _received(pipe: Connection) -> Any:
    if not wait([pipe], LIMIT_S):
        return TimeoutError(f"nothing came within {LIMIT_S} s")
    try:
        return pipe.recv()
    except EOFError:
        return None


def _work(
    environment: dict[str, str], timeout_s: float, pipe: Connection, function: Callable[..., Any], arguments: Any
) -> None:
    import torch

    import process_group
    import runtime

    os.environ.update(environment)
    torch.set_num_threads(1)
    runtime.setup_logging(quiet=True, speaks=False)
    try:
        with process_group.joined("cpu", timeout_s=timeout_s) as group:
            result = function(group, *arguments)
        pipe.send(result)
    except BaseException as error:  # told to the test, which says what it expected
        pipe.send(error)
