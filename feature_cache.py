"""Frozen layers run once: their outputs are computed for every film, kept in one file and read by every epoch.

A network whose first stages are frozen is cut where its first trainable module begins. The part before (the prefix)
runs once over K augmented views of each training film and the clean validation films, on the fastest engine that is
faithful; the part after (the tail) shares its modules with the whole network, so training it trains the network. The
view of epoch e is the one that uncached training would have drawn in epoch ((e - 1) mod K) + 1.

The file is keyed by the films' pixels, the augmentation, the prefix' weights and the precision. Where the cut is not
possible, or the file would not fit, `CannotCache` says why and training goes its ordinary way.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import array_cache
from data_preprocessing import Batch, FilmBatches, Request
from engines import FloatEngine, InputScaling, OpenVinoFloatEngine, TorchFloatEngine, openvino_version
from models import Classifier
from preprocess import PreprocessSpec
from process_group import ALONE, Group
from runtime import Interrupted, StopRequest, log, progress, write_text

FloatArray = npt.NDArray[np.floating[Any]]

FEATURES_VERSION = 1
"""Raised whenever what is stored changes, so that no stale features are read."""
FAITHFUL = 1.5
"""An engine is faithful when its error against fp32 torch is at most this many times that of torch at the run's own
precision, which is what training without the cache would compute with."""
ROUNDING = 1e-3
"""A relative error (L2) that counts as rounding whatever torch's own is."""
CLEARLY_FASTER = 1.2
"""An engine must beat the first candidate by this much to be chosen, so that noise does not decide."""
PROBE_FILMS = 16
EXTRACTION_BATCH = {"cpu": 16, "cuda": 128}
"""Films at a time, by device."""
SHARED = "the frozen layers' outputs, computed by all processes of this machine"


class CannotCache(Exception):
    """Why this network, on these films, trains without the cache."""


# --- the cut ---------------------------------------------------------------------------------------------------


class Prefix(nn.Module):
    """uint8 films (B, H, W, C) to the input of the tail: scaling, then the network up to the cut."""

    def __init__(self, backbone: nn.Module, boundary: nn.Module | None, spec: PreprocessSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self._boundary = [boundary]  # in a list, so that it is not registered a second time
        self.scaling = InputScaling(spec)

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Features (B, F) when the whole backbone is frozen, else activations (B, ...) at the cut."""
        inputs_BCHW = self.scaling(images_BHWC)
        boundary = self._boundary[0]
        if boundary is None:
            return self.backbone(inputs_BCHW)
        caught: list[Tensor] = []

        def catch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            caught.append(arguments[0])
            raise _Reached

        handle = boundary.register_forward_pre_hook(catch)
        try:
            self.backbone(inputs_BCHW)
        except _Reached:
            return caught[0]
        finally:
            handle.remove()
        raise CannotCache("the first trainable module is never run")


class _Reached(Exception):
    """The forward pass has come to the cut."""


class Tail(nn.Module):
    """The network after the cut; its parameters are those of the whole network, not copies."""

    def __init__(self, model: Classifier, position: int | None) -> None:
        super().__init__()
        self.head = model.head
        self.rest: nn.Module | None = None
        self._twins: list[nn.Module] = []
        if position is not None:
            self.rest, self._twins = _without_first(model.backbone, position)

    def train(self, mode: bool = True) -> Tail:
        """Set this module's and its twins' own flags; the shared modules follow the whole network."""
        self.training = mode
        for twin in self._twins:
            twin.training = mode
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(features if self.rest is None else self.rest(features))


def first_trainable(model: Classifier) -> int | None:
    """Position in the backbone's chain of modules where training begins; None when all of it is frozen.

    CannotCache when training begins at the very start, or with a parameter outside the chain.
    """
    backbone = model.backbone
    if not any(item.requires_grad for item in backbone.parameters()):
        return None
    chain = _chain(backbone)
    trainable = [any(item.requires_grad for item in module.parameters()) for _, module in chain]
    in_chain = {id(item) for _, module in chain for item in module.parameters()}
    if any(item.requires_grad and id(item) not in in_chain for item in backbone.parameters()):
        raise CannotCache("a parameter outside the chain of stages is trained")
    position = trainable.index(True)
    if not any(True for _, module in chain[:position] for _ in module.parameters()):
        raise CannotCache("no stage is frozen")
    return position


def _chain(backbone: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """(path, module) of the backbone's children in order, sequences opened one level deeper."""
    links: list[tuple[tuple[str, ...], nn.Module]] = []
    for name, child in backbone.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child):
            links += [((name, inner), module) for inner, module in child.named_children()]
        else:
            links.append(((name,), child))
    return links


def _without_first(backbone: nn.Module, position: int) -> tuple[nn.Module, list[nn.Module]]:
    """A shallow twin of `backbone` whose first `position` chain modules do nothing, and all twins made for it.

    The other modules are shared with `backbone`.
    """
    twin = _shallow(backbone)
    twins = [twin]
    for path, _ in _chain(backbone)[:position]:
        owner = twin
        for name in path[:-1]:
            if owner._modules[name] is backbone._modules[name]:
                twins.append(_shallow(backbone.get_submodule(name)))
                owner._modules[name] = twins[-1]
            owner = twin.get_submodule(name)
        owner._modules[path[-1]] = nn.Identity()
    if hasattr(twin, "_pos_embed"):  # timm's transformers add positions between two modules: done before the cut
        twin.__dict__["_pos_embed"] = lambda tokens: tokens
    return twin, twins


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    twin._modules = dict(module._modules)
    return twin


@dataclass(frozen=True)
class Cut:
    """Where a network is cut, and its frozen part."""

    position: int | None
    prefix: Prefix
    digest: str
    """Hash of the prefix' weights, of the cut and of the input scaling."""
    row_shape: tuple[int, ...]
    """Shape of what one film becomes."""


def cut_model(model: Classifier, spec: PreprocessSpec) -> Cut:
    """Cut `model` before its first trainable module; CannotCache when the two parts are not the whole.

    The cut is checked by running it: prefix then tail must give what the whole network gives.
    """
    position = first_trainable(model)
    whole = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
    frozen = whole.backbone
    boundary = None if position is None else _chain(frozen)[position][1]
    prefix = Prefix(frozen, boundary, spec).eval()
    generator = torch.Generator().manual_seed(0)
    side, channels = spec.image_size, spec.channels
    films = torch.randint(0, 256, (2, side, side, channels), generator=generator, dtype=torch.uint8)
    features, worked = _try_cut(prefix, whole, position, films)
    if not worked:
        raise CannotCache("this architecture does more between its stages than hand their output on")
    digest = _weights_digest(frozen, boundary, position, spec)
    return Cut(position, prefix, digest, tuple(features.shape[1:]))


@torch.no_grad()
def _try_cut(prefix: Prefix, whole: Classifier, position: int | None, films: Tensor) -> tuple[Tensor, bool]:
    try:
        features = prefix(films)
        parts = Tail(whole, position)(features)
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, AssertionError):
        return torch.empty(0), False
    expected = whole(prefix.scaling(films))
    return features, bool(torch.allclose(parts, expected, rtol=1e-3, atol=1e-4))


def _weights_digest(frozen: nn.Module, boundary: nn.Module | None, position: int | None, spec: PreprocessSpec) -> str:
    """Hash of the frozen weights that the features depend on; those after the cut change without changing them."""
    after: set[str] = set()
    if position is not None:
        for path, module in _chain(frozen)[position:]:
            after |= {".".join((*path, name)) for name in module.state_dict()}
    digest = hashlib.blake2b(repr((FEATURES_VERSION, position, spec)).encode(), digest_size=16)
    for name, value in frozen.state_dict().items():
        if name not in after:
            digest.update(name.encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- the engine ------------------------------------------------------------------------------------------------


def engine_candidates(
    cut: Cut, film_shape: tuple[int, ...], *, device: torch.device, precision: str
) -> dict[str, Callable[[], FloatEngine]]:
    """What could run the prefix here, by name; torch at the run's own precision comes first."""
    candidates: dict[str, Callable[[], FloatEngine]] = {
        f"torch {precision}": lambda: TorchFloatEngine(cut.prefix, device=device, precision=precision)
    }
    if device.type == "cpu" and openvino_version() is not None:
        for kind in dict.fromkeys((precision, "fp32")):
            candidates[f"openvino {kind}"] = partial(OpenVinoFloatEngine, cut.prefix, film_shape, precision=kind)
    return candidates


def choose_engine(
    cut: Cut, films_BHWC: npt.NDArray[np.uint8], *, device: torch.device, precision: str, wanted: str | None
) -> FloatEngine:
    """The fastest engine for the prefix that is as faithful to fp32 torch on these films as the run's own precision.

    `wanted` names an engine to take without a contest (that of the run being resumed).
    """
    candidates = engine_candidates(cut, films_BHWC.shape[1:], device=device, precision=precision)
    if wanted in candidates or len(candidates) == 1:
        return candidates[wanted if wanted in candidates else f"torch {precision}"]()
    exact = TorchFloatEngine(cut.prefix, device=torch.device("cpu"), precision="fp32")(films_BHWC)
    chosen, fastest, allowed = None, 0.0, np.inf
    for make in candidates.values():
        engine = make()
        error = relative_error(engine(films_BHWC), exact)
        seconds = min(_seconds(engine, films_BHWC) for _ in range(2))
        log.debug("%s: %.1f films/s, relative error %.4f", engine.name, len(films_BHWC) / seconds, error)
        if chosen is None:
            chosen, fastest, allowed = engine, seconds, max(ROUNDING, FAITHFUL * error)
        elif error <= allowed and seconds * CLEARLY_FASTER < fastest:
            chosen, fastest = engine, seconds
    assert chosen is not None
    return chosen


def relative_error(found: FloatArray, expected: FloatArray) -> float:
    """L2 norm of the difference over that of the expected values."""
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def _seconds(engine: FloatEngine, films_BHWC: npt.NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    engine(films_BHWC)
    return time.perf_counter() - started


# --- the features ----------------------------------------------------------------------------------------------


class FeatureCache:
    """Features of K views of every training film, then of every validation film, in one array."""

    def __init__(self, path: Path, *, views: int, train_set: FilmBatches, val_set: FilmBatches, engine: str) -> None:
        array = np.load(path, mmap_mode="r")
        self.path, self.engine, self.views = path, engine, views
        # Small enough features are read into memory, where a batch is a gather; large ones stay on disk.
        self.array: FloatArray = np.array(array) if array.nbytes < _free_memory() / 4 else array
        self.train_labels, self.val_labels = train_set.labels, val_set.labels

    def train_batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """The batches of an epoch's requests, each film in that epoch's view."""
        for request in requests:
            first = ((request.epoch - 1) % self.views) * len(self.train_labels)
            yield self._batch(first + request.positions, self.train_labels[request.positions], request.positions)

    def val_batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """The batches of the clean validation films."""
        first = self.views * len(self.train_labels)
        for request in requests:
            yield self._batch(first + request.positions, self.val_labels[request.positions], request.positions)

    def _batch(self, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], positions: Any) -> Batch:
        features = torch.from_numpy(self.array[rows].astype(np.float32))
        return Batch(features, torch.from_numpy(labels), torch.from_numpy(positions))


def open_features(
    model: Classifier,
    spec: PreprocessSpec,
    train_set: FilmBatches,
    val_set: FilmBatches,
    *,
    views: int,
    folder: Path,
    device: torch.device,
    precision: str,
    engine: str | None = None,
    stop: StopRequest | None = None,
    group: Group = ALONE,
) -> tuple[FeatureCache, int | None]:
    """The features of `model`'s frozen part, computed first if need be, and the position of the cut.

    The processes of a machine share the work and the file. CannotCache when the network cannot be cut, or neither disk
    nor policy allows the file.
    """
    cut = cut_model(model, spec)
    views = views if train_set.augmenter is not None else 1
    dtype = np.float32 if precision == "fp32" else np.float16
    shape = (views * len(train_set) + len(val_set), *cut.row_shape)
    key = [cut.digest, _films_digest(train_set, views), _films_digest(val_set, 1), np.dtype(dtype).name, precision]
    path = folder / "features" / f"{array_cache.key_of(key)}.npy"
    started = time.perf_counter()
    work = _Extraction(cut, train_set, val_set, views, dtype, device, precision, engine, stop)
    if group.local_size > 1 and group.from_node(lambda: array_cache.checked_facts(path) is None, what=SHARED):
        build = work.shared(path, group)
    else:
        build = work.alone

    def opened() -> dict[str, Any]:
        return array_cache.open_or_build(path, shape=shape, dtype=dtype, build=build, what="feature cache", remedy="")

    try:
        facts = group.from_node(opened, what=SHARED)
    except array_cache.DataError as error:
        raise CannotCache(str(error).rstrip("; ")) from None
    log.info(
        "feature cache: %.0f MiB, ready in %.0f s; every epoch now runs the tail alone",
        array_cache.size_of(shape, dtype) / 2**20,
        time.perf_counter() - started,
    )
    cache = FeatureCache(path, views=views, train_set=train_set, val_set=val_set, engine=facts["engine"])
    return cache, cut.position


class Chunk(NamedTuple):
    """Films that go through the frozen layers together."""

    dataset: FilmBatches
    view: int
    positions: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Extraction:
    """The frozen layers' work on the films of a run."""

    cut: Cut
    train_set: FilmBatches
    val_set: FilmBatches
    views: int
    dtype: Any
    device: torch.device
    precision: str
    wanted: str | None
    """Engine to take without a contest."""
    stop: StopRequest | None

    def alone(self, write: array_cache.Writer) -> dict[str, Any]:
        """All features, by this process."""
        engine = self._engine()
        self._run(engine, self._chunks(), write)
        return {"engine": engine.name}

    def shared(self, path: Path, group: Group) -> Callable[[array_cache.Writer], dict[str, Any]]:
        """What puts the array at `path` together, after each process of this machine has computed its part of it."""
        name = group.from_node(lambda: self._engine().name, what=SHARED)
        own = replace(self, wanted=name)
        chunks = self._chunks()
        start, stop = group.bounds_here(len(chunks))
        part = path.with_suffix(f".part{group.local_rank}")

        def computed() -> Path:
            engine = own._engine()
            try:
                part.parent.mkdir(parents=True, exist_ok=True)
                with part.open("wb") as stream:
                    own._run(engine, chunks[start:stop], lambda rows: stream.write(np.ascontiguousarray(rows).data))
            except OSError as error:
                part.unlink(missing_ok=True)
                raise CannotCache(f"{part.parent}: the feature cache cannot be written ({error.strerror})") from None
            return part

        parts = group.each(computed, what=SHARED, here=True)

        def assembled(write: array_cache.Writer) -> dict[str, Any]:
            for item in parts:
                with item.open("rb") as stream:
                    while block := stream.read(1 << 24):
                        write(np.frombuffer(block, dtype=np.uint8))
                item.unlink()
            return {"engine": name}

        return assembled

    def _engine(self) -> FloatEngine:
        sample = next(_films([Chunk(self.val_set, 1, np.arange(min(PROBE_FILMS, len(self.val_set))))], self.device))
        known = _choice_file(self.cut, self.precision)
        wanted = self.wanted or (known.read_text(encoding="utf-8") if known.exists() else None)
        chosen = choose_engine(self.cut, sample, device=self.device, precision=self.precision, wanted=wanted)
        with contextlib.suppress(OSError):
            write_text(known, chosen.name)
        return chosen

    def _chunks(self) -> list[Chunk]:
        """All there is to do, in the order of the array: view after view of the training films, then validation."""
        batch = EXTRACTION_BATCH.get(self.device.type, 16)
        return [
            Chunk(dataset, view, np.arange(start, min(start + batch, len(dataset))))
            for dataset, views in ((self.train_set, self.views), (self.val_set, 1))
            for view in range(1, views + 1)
            for start in range(0, len(dataset), batch)
        ]

    def _run(self, engine: FloatEngine, chunks: Sequence[Chunk], write: Callable[[FloatArray], object]) -> None:
        log.info("frozen layers run once on %s: %d films in %d views", engine.name, len(self.train_set), self.views)
        total, step = sum(len(item.positions) for item in chunks), len(chunks[0].positions) if chunks else 1
        films = progress(_films(chunks, self.device), total=total, label="frozen layers", step=step)
        for features in engine.stream(films):
            write(_storable(features, self.dtype))
            if self.stop is not None and self.stop.signal is not None:
                raise Interrupted(
                    self.stop.signal, "stopped while the frozen layers ran; the same command starts them again"
                )


def _choice_file(cut: Cut, precision: str) -> Path:
    """Where this machine notes the engine it chose: a contest of equals must not end otherwise the second time."""
    key = array_cache.key_of([cut.digest, precision, torch.__version__, str(openvino_version())])
    return array_cache.default_folder(None) / "engines" / f"{key}.txt"


def _storable(features: FloatArray, dtype: Any) -> FloatArray:
    with np.errstate(over="ignore"):
        stored = features.astype(dtype)
    if not np.isfinite(stored).all():
        raise CannotCache(f"the frozen layers' outputs do not fit {np.dtype(dtype).name}")
    return stored


def _films(chunks: Iterable[Chunk], device: torch.device) -> Iterator[npt.NDArray[np.uint8]]:
    """uint8 films (B, H, W, C) of each chunk."""
    for dataset, view, positions in chunks:
        films = dataset.finished(dataset[Request(view, positions)], epoch=view, device=device)
        yield films.cpu().numpy()


def _films_digest(dataset: FilmBatches, views: int) -> str:
    """Hash of a split's pixels and of how they are augmented."""
    digest = hashlib.blake2b(digest_size=16)
    if dataset.augmenter is not None:
        digest.update(repr((views, dataset.augmenter.settings, dataset.store_rows.tolist())).encode())
    for row in dataset.store_rows:
        digest.update(np.ascontiguousarray(dataset.pixels[int(row)]).data)
    return digest.hexdigest()


def _free_memory() -> int:
    """Bytes of memory to be had without swapping; a cautious 2 GiB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**31
