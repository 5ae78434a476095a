"""The machine a run finds: logging, progress, device, precision, seeds, the run folder, signals.

Importing it configures nothing. `setup_logging` is called once, by `main.py`. torch is imported where it is
needed only, so that verbs without a model stay light.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, TypeVar

from errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("medimg")
Item = TypeVar("Item")

RUN_PATTERNS = (
    "best_model.pth",
    "checkpoint_*.pth",
    "config.yaml",
    "split.csv",
    "history.csv",
    "head_search.csv",
    "training_curves.png",
    "environment.json",
)
LIBRARIES = ("torch", "torchvision", "timm", "albumentations", "numpy", "scikit-learn", "pillow")


def setup_logging(*, quiet: bool, speaks: bool = True) -> None:
    """Plain lines on stderr; `quiet` keeps warnings only. stdout stays free for results.

    A process that does not speak, one of many, logs errors alone.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    # A damaged file is reported as an error of its own; Pillow's remarks on the way there help nobody.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # Nor do matplotlib's on fonts that lack a sign, or torch's on a pickle that is refused a moment later.
    warnings.filterwarnings("ignore", message="Glyph .* missing from font|constrained_layout not applied")
    warnings.filterwarnings("ignore", message="Detected pickle protocol")
    log.setLevel(logging.ERROR if not speaks else logging.WARNING if quiet else logging.INFO)


# --- files -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file written beside `path`, flushed to disk and renamed over it; on any error `path` is untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def require_writable(folder: Path, *, flag: str = "--output-dir") -> None:
    """Make `folder`, which `flag` names, and try a file in it, before long work; ConfigError when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {folder}: cannot be written ({error.strerror}); name another folder") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_write(path) as stream:
        stream.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON atomically: NaN and infinity become null."""
    write_text(path, to_json(value) + "\n")


def to_json(value: Any) -> str:
    """Strict JSON text of nested plain values; NaN and infinity become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def run_files(folder: Path) -> list[Path]:
    """The files of `folder` that a training run writes."""
    return sorted(item for pattern in RUN_PATTERNS for item in folder.glob(pattern))


def archive(folder: Path, files: Sequence[Path]) -> Path | None:
    """Move `files` of the run in `folder` to folder/archive/<start>-<model>; None when there are none."""
    if not files:
        return None
    label = _run_label(folder)
    target, repeat = folder / "archive" / label, 1
    while target.exists():
        repeat += 1
        target = target.with_name(f"{label}-{repeat}")
    target.mkdir(parents=True)
    for item in files:
        shutil.move(str(item), target / item.name)
    return target


def _run_label(folder: Path) -> str:
    try:
        facts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        return f"{facts['started'].replace(':', '').replace('-', '')[:15]}-{facts['model']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{datetime.now(timezone.utc).strftime('%Y%m%dT%H%M%S')}-unknown"


# --- device and precision --------------------------------------------------------------------------------------


def silence_openvino() -> None:
    """Keep OpenVINO, and NNCF with it, from reporting to their maker: they do so unless their reporter is missing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def resolve_device(name: str) -> torch.device:
    """The torch device `name` stands for; 'auto' takes CUDA, then MPS, then the CPU."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"runtime.device: {name!r} is no device; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"runtime.device: {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device: {name!r} is not here ({torch.cuda.device_count()} CUDA devices visible); use cpu or auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("runtime.device: 'mps' is not available on this machine; use cpu or auto")
    return device


def resolve_precision(name: str, device: torch.device, *, use_amp: bool = True) -> str:
    """'fp32', 'bf16' or 'fp16'. 'auto' takes bf16 where the device computes in it, fp16 on older GPUs, else fp32."""
    import torch

    if not use_amp:
        if name in ("bf16", "fp16"):
            raise ConfigError(f"runtime.precision: {name!r} contradicts training.use_amp=false; drop one of the two")
        return "fp32"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("runtime.precision: fp16 training needs a GPU; on this CPU use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and cpu_flags() & {"amx_bf16", "avx512_bf16"}:
        return "bf16"
    return "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a resolved precision; disabled for fp32."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if precision == "fp32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: of the GPU where one is used, else resident memory of this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@contextlib.contextmanager
def memory_advice(batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error into one line that says which batch size to try."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(batch_size) from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise _out_of_memory(batch_size) from error
        raise


def _out_of_memory(batch_size: int) -> UserError:
    if batch_size == 1:
        return UserError("out of memory with one film a batch; use a smaller --model or --image-size")
    half = max(1, batch_size // 2)
    return UserError(
        f"out of memory at batch size {batch_size}; try --batch-size {half} --set training.accumulation_steps="
        f"{-(-batch_size // half)}, which keeps the effective batch"
    )


# --- words for the terminal ------------------------------------------------------------------------------------

COLUMNS = 80


def labelled(label: str, words: str) -> str:
    """`label` and what it says, in at most 80 columns, further lines below the first; paths stay whole."""
    indent = " " * len(label)
    return textwrap.fill(
        words, COLUMNS, initial_indent=label, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


# --- progress --------------------------------------------------------------------------------------------------


def progress(items: Iterable[Item], *, total: int, label: str, unit: str = "films", step: int = 1) -> Iterator[Item]:
    """Yield `items` while showing rate and time left; each item counts `step` of `total` units.

    A bar on a terminal; elsewhere one plain line every ten seconds. Silent when logging is quiet.
    """
    if not log.isEnabledFor(logging.INFO):
        yield from items
        return
    if sys.stderr.isatty():
        yield from _progress_bar(items, total=total, label=label, unit=unit, step=step)
    else:
        yield from _progress_lines(items, total=total, label=label, unit=unit, step=step)


def _progress_bar(items: Iterable[Item], *, total: int, label: str, unit: str, step: int) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started, done = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, rate="")
        for item in items:
            yield item
            done = min(total, done + step)
            rate = done / (time.perf_counter() - started)
            bar.update(task, completed=done, rate=f"{rate:.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s")


def _progress_lines(items: Iterable[Item], *, total: int, label: str, unit: str, step: int) -> Iterator[Item]:
    started = spoken = time.perf_counter()
    done = 0
    for item in items:
        yield item
        done = min(total, done + step)
        now = time.perf_counter()
        if now - spoken > 10 and done < total:
            spoken, rate = now, done / (now - started)
            log.info("%s: %d/%d %s, %.1f/s, %.0f s left", label, done, total, unit, rate, (total - done) / rate)


# --- signals ---------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """A run ended by a signal after saving; `number` is the signal's."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)  # both: an exception crosses to other processes as its arguments
        self.number, self.message = number, message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """Set by Ctrl-C or SIGTERM while active; the loop looks at it between steps. A second signal ends at once.

    Not with `of_many`: a scheduler and torchrun may each send one to a process of many, and torchrun ends what lingers.
    """

    def __init__(self, *, of_many: bool = False) -> None:
        self.signal: int | None = None
        self._of_many = of_many
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        import threading

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if self._of_many:
                return
            raise KeyboardInterrupt
        self.signal = number
        log.warning("%s: finishing this step, then saving (again to stop at once)", signal.Signals(number).name)


# --- facts for the record --------------------------------------------------------------------------------------


def library_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Installed versions by distribution name; absent ones are left out."""
    from importlib import metadata

    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def code_version() -> str:
    """The commit of the program (with '+' for local changes), or 'unknown' outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """What a run ran on: start time, code, libraries, processor, device, precision."""
    import torch

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "code_version": code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_sets": sorted(
            cpu_flags() & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}
        ),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "libraries": library_versions(),
    }
