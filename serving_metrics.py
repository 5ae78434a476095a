"""What the server counts: Prometheus metrics in a registry of their own, and a summary of scores by day."""

from __future__ import annotations

import json
import math
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from errors import ConfigError
from runtime import write_json

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BINS = 20


class Metrics:
    """The counters behind /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("medimg_requests", "Requests by route and status", ("route", "status"), **common)
        self.latency = Histogram(
            "medimg_request_seconds", "From the first byte to the answer", ("route",), buckets=SECONDS, **common
        )
        self.queue_depth = Gauge("medimg_queue_depth", "Films waiting for the engine", **common)
        self.in_work = Gauge("medimg_films_in_work", "Films taken on and not yet answered", **common)
        self.batch_size = Histogram(
            "medimg_batch_size", "Films per engine batch", buckets=(1, 2, 4, 8, 16, 32, 64), **common
        )
        self.engine = Histogram("medimg_engine_seconds", "Engine time per batch", buckets=SECONDS, **common)
        self.waited = Histogram("medimg_wait_seconds", "Wait of a batch's oldest film", buckets=SECONDS, **common)
        self.decoding = Histogram("medimg_decode_seconds", "Decoding per film", buckets=SECONDS, **common)
        edges = [(index + 1) / BINS for index in range(BINS)]
        self.scores = Histogram(
            "medimg_score", "Probability of the positive class, else confidence", buckets=edges, **common
        )
        self.predictions = Counter("medimg_predictions", "Films by predicted class", ("prediction",), **common)
        self.unlike = Counter("medimg_out_of_distribution", "Films the input gate refused", **common)
        self.dropped = Counter("medimg_client_gone", "Requests whose client left before the answer", **common)

    def batch(self, count: int, seconds: float, waited: float) -> None:
        """Record one engine batch."""
        self.batch_size.observe(count)
        self.engine.observe(seconds)
        self.waited.observe(waited)

    def text(self) -> bytes:
        """The exposition format Prometheus reads."""
        return generate_latest(self.registry)


class ScoreRecord:
    """A histogram of scores for each day (UTC), in a JSON file that a restart goes on with: what drift is seen by."""

    EVERY_S = 60.0
    """At most this long a score is in memory only."""

    def __init__(self, path: Path, *, model_version: str) -> None:
        self.path, self.model_version = path, model_version
        self.days = self._read()
        self._written = time.monotonic()
        self.flush()

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            days, version = content["days"], content["model_version"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"--record-scores {self.path}: is no score record; name another file") from None
        if version != self.model_version:
            raise ConfigError(f"--record-scores {self.path}: is of model {version}; name one file a model")
        return days

    def add(self, score: float, *, positive: bool, in_distribution: bool | None) -> None:
        """Count one film."""
        today = datetime.now(timezone.utc).date().isoformat()
        day = self.days.setdefault(
            today,
            {
                "films": 0,
                "sum": 0.0,
                "sum_of_squares": 0.0,
                "positive": 0,
                "out_of_distribution": 0,
                "bins": [0] * BINS,
            },
        )
        day["films"] += 1
        day["sum"] += score
        day["sum_of_squares"] += score * score
        day["positive"] += positive
        day["out_of_distribution"] += in_distribution is False
        day["bins"][min(BINS - 1, int(score * BINS))] += 1
        if time.monotonic() - self._written > self.EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write the file; ConfigError when it cannot be."""
        self._written = time.monotonic()
        content = {
            "model_version": self.model_version,
            "bin_edges": [index / BINS for index in range(BINS + 1)],
            "days": {name: {**day, **_moments(day)} for name, day in self.days.items()},
        }
        try:
            write_json(self.path, content)
        except OSError as error:
            raise ConfigError(
                f"--record-scores {self.path}: cannot be written ({error.strerror}); name another file"
            ) from None


def _moments(day: dict[str, Any]) -> dict[str, float]:
    count = day["films"]
    mean = day["sum"] / count
    return {
        "mean": mean,
        "standard_deviation": math.sqrt(max(0.0, day["sum_of_squares"] / count - mean * mean)),
        "positive_share": day["positive"] / count,
    }
