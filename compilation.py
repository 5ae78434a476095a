"""torch.compile where a short probe on a copy of the network finds it worth its time; eager everywhere else.

The compiled network wraps the one it was made from: parameters, and so the keys of a checkpoint, are the same.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from errors import first_line
from runtime import autocast, log

WORTH = 1.1
"""A compiled step must be this many times faster than the eager one."""
PROBE_STEPS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, eager and compiled, and of compiling."""

    eager: float
    compiled: float
    compiling: float

    def pays(self, steps: int) -> bool:
        """Whether `steps` steps are faster, compiling included."""
        return self.eager > WORTH * self.compiled and steps * (self.eager - self.compiled) > self.compiling


def compiled_network(
    network: nn.Module,
    inputs: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    *,
    wanted: str,
    steps: int,
    device: torch.device,
    precision: str,
) -> nn.Module:
    """`network` compiled, or itself when compiling fails or, with `wanted` auto, when it would not pay.

    `steps` is how many are still to come. Neither the network nor torch's random stream is changed.
    """
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            warnings.simplefilter("ignore")  # the compiler's remarks are about itself
            timing = _probe(network, inputs, loss_of, device=device, precision=precision)
    except Exception as error:  # the compiler's own, its C++ compiler's and the driver's errors share no base
        log.info("torch.compile does not work here (%s): training goes on without it", first_line(error))
        return network
    chosen = wanted == "on" or timing.pays(steps)
    log.info(
        "torch.compile: a step takes %.3f s eager, %.3f s compiled, after %.0f s of compiling: %s",
        timing.eager,
        timing.compiled,
        timing.compiling,
        "used" if chosen else "not used",
    )
    return cast(nn.Module, torch.compile(network)) if chosen else network


def _probe(
    network: nn.Module, inputs: Tensor, loss_of: Callable[[Tensor], Tensor], *, device: torch.device, precision: str
) -> Timing:
    twin = copy.deepcopy(network).train()
    for own, original in zip(twin.modules(), network.modules()):
        own.training = original.training  # what is frozen stands still
    compiled: Any = torch.compile(twin)

    def step(module: Callable[[Tensor], Tensor]) -> float:
        started = time.perf_counter()
        with autocast(device, precision):
            logits = module(inputs)
        loss_of(logits.float()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    step(twin)
    eager = statistics.median(step(twin) for _ in range(PROBE_STEPS))
    first = step(compiled)
    fast = statistics.median(step(compiled) for _ in range(PROBE_STEPS))
    return Timing(eager, fast, first)
