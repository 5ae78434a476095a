"""Ways of running a classifier, timed side by side: network × engine × precision.

    python candidates.py '{"engine": "openvino", ...}'     # one of them from a cold start, in a process of its own

The candidates take turns (A B C A B C …), so that whatever else the machine does meets them all; medians are
reported. Cold start is from the start of a fresh process to the first film's answer, libraries included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engines import Engine, TorchEngine, onnx_engine
from errors import first_line
from models import Classifier
from preprocess import PreprocessSpec, spec_from_dict
from runtime import log, peak_memory_mb, resolve_device

Films = npt.NDArray[np.uint8]

BATCH = 16
"""Films of the batch that throughput is measured with."""
SINGLES = 6
"""Films timed one by one in each turn, for latency."""
COLD_START_LIMIT_S = 300.0


@dataclass(frozen=True)
class Candidate:
    """One way of running one network."""

    network: str
    """full, or pruned."""
    engine: str
    """torch, compile (torch.compile), or an engine of `engines.ONNX_ENGINES`."""
    precision: str
    model: Path
    """The file it is started from: a checkpoint for torch, else ONNX."""
    device: str = "cpu"

    @property
    def name(self) -> str:
        """As in 'openvino int8 pruned'."""
        kind = "torch.compile" if self.engine == "compile" else self.engine
        return f"{kind} {self.precision}" + ("" if self.network == "full" else f" {self.network}")

    @property
    def compressed(self) -> bool:
        """Whether it is another model than the one trained: rounded to INT8 or pruned."""
        return "int8" in self.precision or self.network != "full"

    def build(self, spec: PreprocessSpec, model: Classifier | None = None) -> Engine:
        """Its engine; torch runs `model`."""
        if self.engine in ("torch", "compile"):
            assert model is not None, "torch runs a model in memory"
            device = resolve_device(self.device)
            compiled = self.engine == "compile"
            return TorchEngine(model, spec, device=device, precision=self.precision, compiled=compiled)
        return onnx_engine(self.engine, self.model, spec, precision=self.precision)


@dataclass(frozen=True)
class Speed:
    """How fast a candidate is here."""

    throughput: float
    """Films per second in batches of `BATCH`, median."""
    p50_ms: float
    """One film, median."""
    p95_ms: float
    batches: int
    singles: int


def measure(engines: dict[str, Engine], films: Films, *, rounds: int) -> dict[str, Speed]:
    """The speed of every engine, measured in turns on `films` (N, S, S, C), N at least `BATCH`."""
    batch = np.resize(films, (BATCH, *films.shape[1:]))
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            engine.outputs(batch[:1])  # not timed: its caches were another's a moment ago
            batch_s = _seconds(engine, batch)
            singles = [_seconds(engine, batch[k : k + 1]) for k in range(SINGLES)]
            if turn:  # the first turn warms up
                seconds[name][0].append(batch_s)
                seconds[name][1].extend(singles)
    return {name: _speed(*timed) for name, timed in seconds.items()}


def _seconds(engine: Engine, films: Films) -> float:
    started = time.perf_counter()
    engine.outputs(films)
    return time.perf_counter() - started


def _speed(batches: Sequence[float], singles: Sequence[float]) -> Speed:
    return Speed(
        throughput=BATCH / float(np.median(batches)),
        p50_ms=1000 * float(np.median(singles)),
        p95_ms=1000 * float(np.percentile(singles, 95)),
        batches=len(batches),
        singles=len(singles),
    )


def batches_of(films: Films, size: int = BATCH) -> Iterator[Films]:
    """`films` (N, S, S, C) cut into batches of `size`, the last one shorter."""
    for start in range(0, len(films), size):
        yield films[start : start + size]


# --- from a cold start -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColdStart:
    """A fresh process up to its first answer; NaN where it failed."""

    seconds: float
    memory_mb: float
    """Peak resident memory after a batch of `BATCH`."""
    reason: str = ""


def cold_start(candidate: Candidate, spec: PreprocessSpec, *, threads: int) -> ColdStart:
    """Start `candidate` in a process of its own."""
    facts = {**asdict(candidate), "model": str(candidate.model.resolve()), "spec": spec.to_dict(), "threads": threads}
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(facts)]
    started = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COLD_START_LIMIT_S, check=True)
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        return ColdStart(answer["answered"] - started, answer["memory_mb"])
    except subprocess.TimeoutExpired:
        reason = f"no answer within {COLD_START_LIMIT_S:g} s"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1][:120]
    log.info("%s did not start in a process of its own: %s", candidate.name, reason)
    return ColdStart(float("nan"), float("nan"), reason)


def start_cold(facts: dict[str, Any]) -> dict[str, float]:
    """In the fresh process: the clock at the first answer, and memory after a batch."""
    torch.set_num_threads(facts.pop("threads"))
    spec = spec_from_dict(facts.pop("spec"))
    candidate = replace(Candidate(**facts), model=Path(facts["model"]))
    engine = candidate.build(
        spec, _from_checkpoint(candidate.model) if candidate.engine in ("torch", "compile") else None
    )
    films = np.zeros((BATCH, spec.image_size, spec.image_size, spec.channels), dtype=np.uint8)
    engine.outputs(films[:1])
    answered = time.time()
    engine.outputs(films)
    return {"answered": answered, "memory_mb": _own_peak_mb()}


def _own_peak_mb() -> float:
    """Peak resident memory of this process in MiB; what getrusage says on Linux includes the parent's before exec."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    return peak_memory_mb(torch.device("cpu"))


def _from_checkpoint(path: Path) -> Classifier:
    from predictor import load

    engine = load(path, device="cpu", precision="fp32").engine
    assert isinstance(engine, TorchEngine)
    return engine.model


def try_build(candidate: Candidate, spec: PreprocessSpec, model: Classifier | None, film: Films) -> Engine | str:
    """The engine of `candidate` after its first film and batch, or why it does not run here."""
    try:
        engine = candidate.build(spec, model)
        engine.outputs(np.resize(film, (BATCH, *film.shape[1:])))
        engine.outputs(film[:1])
        return engine
    except Exception as error:  # a library's own failure: the candidate is skipped and named
        return f"{type(error).__name__}: {first_line(error)}"


if __name__ == "__main__":
    print(json.dumps(start_cold(json.loads(sys.argv[1]))))
