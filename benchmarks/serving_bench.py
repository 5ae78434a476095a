"""What the serving benchmarks share: a server in a process of its own, its CPU time and memory, and models to serve."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import TracebackType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from config import resolve
from models import model_from_config
from preprocess import PreprocessSpec

ROOT = Path(__file__).resolve().parent.parent


def untrained_checkpoint(folder: Path, *, model: str, image_size: int) -> Path:
    """A checkpoint of `model` with random weights: its answers mean nothing, its cost is that of a trained one."""
    config = resolve({"model.model_type": model, "model.pretrained": False, "data.image_size": image_size})
    torch.manual_seed(0)
    network = model_from_config(config.model, num_classes=2, image_size=image_size, random=True)
    path = folder / f"{model}.pth"
    checkpoint.save(
        path,
        {
            "model_state_dict": network.state_dict(),
            "config": config.to_dict(),
            "classes": ["NORMAL", "PNEUMONIA"],
            "preprocess": PreprocessSpec(image_size=image_size).to_dict(),
            "temperature": 1.0,
            "operating_point": {"threshold": 0.5, "positive_class": "PNEUMONIA"},
            "provenance": {"code_version": "benchmark", "seed": 0, "epoch": 0},
            "seen_films": torch.zeros(0, dtype=torch.int64),
        },
    )
    return path


class Server:
    """A server process that prints its address, is ready when it is entered and asked to stop when it is left."""

    def __init__(self, words: list[str], *, script: list[str] | None = None, ready: str = "/readyz") -> None:
        self.command = [sys.executable, *(script or [str(ROOT / "main.py"), "api", "--port", "0"]), *words]
        self.ready = ready
        self.url = ""

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stderr is not None
        line = ""
        while " at http" not in line:
            line = self.process.stderr.readline()
            if not line:
                raise SystemExit(f"the server did not start: {' '.join(self.command)}")
        # What it says from now on must not fill the pipe and stop it.
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.url = line.split()[-1]
        deadline = time.monotonic() + 300
        while not self._is_ready():
            self.require_alive()
            if time.monotonic() > deadline:
                raise SystemExit("the server was not ready after 300 s")
            time.sleep(0.1)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        # Servers of several processes may leave some behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + self.ready, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def require_alive(self) -> None:
        """SystemExit when the process has ended."""
        if self.process.poll() is not None:
            raise SystemExit(f"the server ended with {self.process.returncode}")

    def memory_mb(self) -> float:
        """Resident memory, in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def cpu_s(self) -> float:
        """Processor time the process has used, in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
