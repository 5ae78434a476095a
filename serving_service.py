"""One model in memory and what stands between a request's bytes and its answer; knows no route and no status page.

A film walks decode → apply → engine → gate as on the command line, with the same answer to the last bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
from starlette.requests import Request

import predictor as prediction
from config import ServingConfig
from engines import TorchEngine
from errors import ConfigError, DataError, RequestError, ServingError, UserError, first_line
from gate import Gate
from predictor import Predictor
from preprocess import Pixels, apply, decode
from serving_form import BodyReader, ClientGone, Part, parse_form
from serving_metrics import Metrics, ScoreRecord
from serving_queue import EngineQueue
from serving_security import ApiKeys, AuditLog, RateLimiter

MIB = 2**20
BODIES_TOGETHER = 4
"""All bodies held at one time stay below this many times the largest one."""
PARSE_IN_THREAD = 2**20
"""Bodies from this many bytes on are taken apart in a thread, so that others are answered meanwhile."""
MAX_EXPLANATIONS = 4
"""Explanations taken on at one time: each stops the engine for about three predictions."""
PROVENANCE_SHOWN = ("code_version", "seed", "epoch", "libraries", "manifest_digest")

NO_NOTE: Mapping[str, str] = MappingProxyType({})

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Film:
    """One decoded upload."""

    pixels: Pixels | None
    """As stored, for the input gate; None where there is no gate."""
    image_HWC: npt.NDArray[np.uint8]
    case: Any
    """What the engine takes: the film, or for a model that reads notes the film with its note."""
    note: Mapping[str, str]
    """What was sent beside the film, by column."""


@dataclass(frozen=True)
class Row:
    """What the engine says of one film."""

    probabilities_C: npt.NDArray[np.float64]
    features_F: npt.NDArray[np.float32]


class Service:
    """The one model in memory, with all that stands between a request and its answer."""

    def __init__(self, predictor: Predictor, settings: ServingConfig, *, source: Path, keys: ApiKeys) -> None:
        self.predictor, self.settings, self.source, self.keys = predictor, settings, source, keys
        self.model_version = model_version(predictor, source)
        self.gate = Gate.from_state(predictor.input_gate) if predictor.input_gate is not None else None
        if settings.abstain and self.gate is None:
            raise ServingError(
                f"--abstain: {source} has no input gate to refuse films by; train again or drop the flag"
            )
        self.metrics = Metrics()
        self.limiter = RateLimiter(per_second=settings.rate_limit, burst=settings.rate_burst)
        self.bodies = BodyReader(
            max_body=int(settings.max_body_mb * MIB),
            budget=int(BODIES_TOGETHER * settings.max_body_mb * MIB),
            timeout_s=settings.body_timeout_s,
        )
        self.audit = AuditLog(Path(settings.audit_log)) if settings.audit_log else None
        record = settings.record_scores
        self.scores = ScoreRecord(Path(record), model_version=self.model_version) if record else None
        self.decoders = ThreadPoolExecutor(decode_threads(settings), thread_name_prefix="decode")
        # An answer must not wait behind films that are still to be decoded.
        self.finishers = ThreadPoolExecutor(1, thread_name_prefix="finish")
        self.queue = EngineQueue(
            self._compute,
            max_queue=settings.max_queue,
            # Films that have a core each need not wait for one another.
            max_batch=1 if predictor.lanes > 1 else settings.max_batch,
            lanes=predictor.lanes,
            budget_s=settings.latency_budget_ms / 1000,
            max_wait_s=settings.max_wait_ms / 1000,
            least_queue=2 * settings.max_batch,
            warm_up=self._warm_up,
            on_batch=self.metrics.batch,
            on_failure=lambda: self.on_failure(),
        )
        self.on_failure: Callable[[], None] = lambda: None
        self._explaining = 0
        self._explained: tuple[Any, torch.device] | None = None

    @property
    def columns(self) -> list[str]:
        """What the model reads beside a film: fields of a form."""
        return [] if self.predictor.reader is None else self.predictor.reader.columns

    # --- in the engine's threads ---

    def _warm_up(self) -> None:
        """Compile, allocate and find out how many films a call may hold, before the first request pays for it."""
        self.predictor.widen_calls(most=self.settings.max_batch)
        for count in sorted({1, self.settings.max_batch}) * 2:
            started = time.perf_counter()
            self.predictor.exact_outputs(self.predictor.blank(count))
            self.queue.times.observe(count, time.perf_counter() - started)
        # What lives as long as the process need not be looked at by every collection.
        gc.collect()
        gc.freeze()

    def _compute(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[Row]:
        probabilities_BC, features_BF = self.predictor.exact_outputs(np.stack(images))
        return [Row(*row) for row in zip(probabilities_BC, features_BF)]

    def _evidence(self, film: Film, target: int) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """The heat map, and of a model that reads notes the evidence of each word."""
        if self.predictor.reader is None:
            return self._heat_map(film.image_HWC, target), {}
        from case_engine import CaseTorchEngine
        from word_attribution import film_map, words

        engine = self.predictor.engine
        if not isinstance(engine, CaseTorchEngine):
            raise UserError("explanations of notes need the checkpoint, and an optimised bundle is served")
        found = words(engine, film.case, film.note.get("text", ""), target=target)
        listed = [{"word": item.word, "evidence": item.evidence} for item in found]
        return film_map(engine, film.case, target=target), {"words": listed}

    def _heat_map(self, image_HWC: npt.NDArray[np.uint8], target: int) -> npt.NDArray[np.float32]:
        """Runs between two batches: the maps hang hooks into the network that other films must not pass."""
        from explain import heat_map, torch_model

        if self._explained is None:
            engine = self.predictor.engine
            if isinstance(engine, TorchEngine):
                self._explained = engine.model, engine.device
            else:
                explained = torch_model(self.source, device="cpu")
                self._explained = explained.model, explained.device
        model, device = self._explained
        return heat_map(model, self.predictor.spec, image_HWC[None], target=target, device=device)[0]

    # --- in the decoders' threads ---

    def decode(self, content: memoryview, note: Mapping[str, str] = NO_NOTE) -> Film:
        """The film in these bytes, whatever they were called, with its note; RequestError 413 or 422."""
        if len(content) > self.settings.max_file_mb * MIB:
            raise RequestError(413, f"a file is larger than {self.settings.max_file_mb:g} MiB")
        started = time.perf_counter()
        try:
            pixels = decode(bytes(content), self.predictor.spec, max_pixels=self.settings.max_pixels)
            image_HWC = apply(self.predictor.spec, pixels)
            case = image_HWC if self.predictor.reader is None else self.predictor.case(image_HWC, note)
        except DataError as error:
            raise RequestError(422, first_line(error)) from None
        self.metrics.decoding.observe(time.perf_counter() - started)
        return Film(pixels if self.gate is not None else None, image_HWC, case, note)

    # --- in the event loop ---

    async def form(self, request: Request, body: bytearray, *, max_files: int) -> list[Part]:
        """The form a request sends, in views of `body`, which is filled with the request's; RequestError."""
        declared = request.headers.get("content-length", "")
        await self.bodies.read(body, request.receive, int(declared) if declared.isdecimal() else None)
        kind = request.headers.get("content-type", "")
        if len(body) < PARSE_IN_THREAD:
            return parse_form(body, kind, max_files=max_files)
        return await in_thread(self.decoders, lambda: parse_form(body, kind, max_files=max_files))

    async def while_connected(self, request: Request, work: Awaitable[Answer]) -> Answer:
        """The result of `work`, given up when the client leaves (ClientGone) or the deadline passes (503)."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.settings.deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            raise RequestError(503, f"not answered within {self.settings.deadline_s:g} s; try again", retry_after=5)
        finally:
            task.cancel()
            gone.cancel()

    async def predict(
        self, content: memoryview, *, key: str, features: bool = False, note: Mapping[str, str] = NO_NOTE
    ) -> dict[str, Any]:
        """The answer to one film that has a place in the queue; RequestError."""
        started = time.perf_counter()
        film = await in_thread(self.decoders, self.decode, content, note)
        return await self._answer(film, content, started, key=key, features=features)

    async def _answer(
        self, film: Film, content: memoryview, started: float, *, key: str, features: bool
    ) -> dict[str, Any]:
        row: Row = await self.queue.submit(film.case)
        in_distribution, reason = await self._gate(film, row)
        result = self.result(row)
        result |= {"in_distribution": in_distribution, "reason": reason}
        self._record(result, row, content, key)
        if in_distribution is False and self.settings.abstain:
            raise RequestError(422, f"not answered: {reason}")
        result["inference_time_ms"] = round((time.perf_counter() - started) * 1000, 3)
        if features:
            result["features"] = [float(value) for value in row.features_F]
        return result

    async def _gate(self, film: Film, row: Row) -> tuple[bool | None, str | None]:
        if self.gate is None:
            return None, None
        verdict = await in_thread(self.finishers, self.gate.check, film.pixels, film.image_HWC, row.features_F)
        return verdict.in_distribution, verdict.reason or None

    def result(self, row: Row) -> dict[str, Any]:
        """The published fields, without the time."""
        predictor = self.predictor
        said = predictor.prediction("", row.probabilities_C)
        result = {
            "prediction": said.prediction,
            "confidence": said.confidence,
            "probabilities": said.probabilities,
            "inference_time_ms": 0.0,
            "model_version": self.model_version,
            "positive_class": predictor.positive_class,
            "threshold": predictor.threshold if predictor.positive_class is not None else None,
        }
        if said.called is not None:
            result["findings"] = [name for name, called in said.called.items() if called]
            result["thresholds"] = dict(zip(predictor.classes, predictor.thresholds.tolist()))
        return result

    def _leading(self, result: Mapping[str, Any]) -> str:
        """The class predicted; of several findings the one that stands highest above its threshold."""
        p_C = np.array([result["probabilities"][name] for name in self.predictor.classes])
        return self.predictor.classes[int(self.predictor.decide(p_C[None])[0])]

    def _record(self, result: dict[str, Any], row: Row, content: memoryview, key: str) -> None:
        positive = self.predictor.positive_class
        score = result["probabilities"][positive] if positive is not None else result["confidence"]
        accepted = result["in_distribution"]
        self.metrics.scores.observe(score)
        for said in result.get("findings") or [result["prediction"]]:
            self.metrics.predictions.labels(said).inc()
        if accepted is False:
            self.metrics.unlike.inc()
        if self.scores is not None:
            with contextlib.suppress(ConfigError):  # a full disk must not stop the answers; it is written again later
                called = result["prediction"] == positive or bool(result.get("findings"))
                self.scores.add(score, positive=called, in_distribution=accepted)
        if self.audit is not None:
            said = {name: result[name] for name in ("prediction", "probabilities", "in_distribution")}
            self.audit.write(key=key, content=content, result=said, model_version=self.model_version)

    async def predict_many(
        self,
        contents: Sequence[memoryview],
        *,
        key: str,
        features: bool,
        notes: Sequence[Mapping[str, str]] | None = None,
    ) -> list[dict[str, Any]]:
        """One entry a file, in order; a file that cannot be answered has its own error."""
        places = asyncio.Semaphore(self.settings.max_batch)

        async def one(index: int, content: memoryview) -> dict[str, Any]:
            async with places:
                try:
                    with await self.queue.place():
                        note = NO_NOTE if notes is None else notes[index]
                        return {"index": index, **await self.predict(content, key=key, features=features, note=note)}
                except RequestError as error:
                    return {"index": index, "error": str(error), "status": error.status}

        tasks = [asyncio.ensure_future(one(index, content)) for index, content in enumerate(contents)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def explain(
        self,
        content: memoryview,
        *,
        key: str,
        target: str | None,
        opacity: float,
        note: Mapping[str, str] = NO_NOTE,
    ) -> dict[str, Any]:
        """A prediction with its heat map and overlay as PNG bytes; RequestError 503 while too many are under way."""
        if self._explaining >= MAX_EXPLANATIONS:
            raise RequestError(503, "too many explanations are under way; try again", retry_after=5)
        self._explaining += 1
        try:
            started = time.perf_counter()
            film = await in_thread(self.decoders, self.decode, content, note)
            result = await self._answer(film, content, started, key=key, features=False)
            wanted = target or self._leading(result)
            index = self.predictor.classes.index(wanted)
            try:
                heat_HW, words = await self.queue.submit(lambda: self._evidence(film, index), is_call=True)
            except UserError as error:
                raise RequestError(422, f"no heat map: {_without_path(error, self.source)}") from None
            heat_png, overlay_png = await in_thread(self.finishers, _pictures, film.image_HWC, heat_HW, opacity)
            extra = {"method": "gradcam", "target": wanted, "opacity": opacity, **words}
            return result | extra | {"heat_map_png": heat_png, "overlay_png": overlay_png}
        finally:
            self._explaining -= 1

    def info(self) -> dict[str, Any]:
        """What a client may want to know of the model and the limits."""
        predictor, settings = self.predictor, self.settings
        return {
            "model_version": self.model_version,
            "model_type": predictor.config.model.model_type,
            "engine": predictor.engine.name,
            "device": prediction.engine_device(predictor.engine),
            "classes": list(predictor.classes),
            "reads": self.columns,
            "positive_class": predictor.positive_class,
            "threshold": predictor.threshold if predictor.positive_class is not None else None,
            "operating_point": dict(predictor.operating_point),
            "temperature": predictor.temperature,
            "preprocess": predictor.spec.to_dict(),
            "provenance": {
                name: predictor.provenance[name] for name in PROVENANCE_SHOWN if name in predictor.provenance
            },
            "input_gate": dict(self.gate.facts) if self.gate is not None else None,
            "abstain": settings.abstain,
            "formats": ["JPEG", "PNG", "TIFF", "DICOM"],
            "limits": {
                name: getattr(settings, name)
                for name in ("max_file_mb", "max_body_mb", "max_files", "max_pixels", "max_queue", "deadline_s")
            },
        }

    def health(self) -> dict[str, Any]:
        """The published fields of /health."""
        return {
            "status": "ok" if self.queue.ready and not self.queue.stopping else "starting",
            "model_loaded": self.queue.ready,
            "device": prediction.engine_device(self.predictor.engine),
            "model_version": self.model_version,
        }

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """The engine's thread runs from before the first request until the last one taken on is answered."""
        self.queue.start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, self.queue.close)
        self.decoders.shutdown()
        self.finishers.shutdown()
        if self.scores is not None:
            with contextlib.suppress(ConfigError):
                self.scores.flush()
        if self.audit is not None:
            self.audit.close()


def decode_threads(settings: ServingConfig) -> int:
    """How many threads decode: as set, else one for every two cores."""
    return settings.decode_threads or max(1, (os.cpu_count() or 1) // 2)


def model_version(predictor: Predictor, source: Path) -> str:
    """The architecture, and the first digits of the SHA-256 of the checkpoint, or of a folder's description."""
    with prediction.described_by(source).open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(MIB):
            digest.update(block)
    return f"{predictor.config.model.model_type}-{digest.hexdigest()[:12]}"


async def in_thread(pool: ThreadPoolExecutor, function: Callable[..., Answer], *arguments: Any) -> Answer:
    """What `function` returns, run by a thread of `pool`."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _pictures(
    image_HWC: npt.NDArray[np.uint8], heat_HW: npt.NDArray[np.float32], opacity: float
) -> tuple[bytes, bytes]:
    """PNG bytes of the grey heat map and of the overlay."""
    from explain import overlay

    overlay_BGR = np.ascontiguousarray(overlay(image_HWC, heat_HW, opacity=opacity)[..., ::-1])
    grey = np.round(np.clip(heat_HW, 0, 1) * 255).astype(np.uint8)
    return cv2.imencode(".png", grey)[1].tobytes(), cv2.imencode(".png", overlay_BGR)[1].tobytes()


def _without_path(error: Exception, source: Path) -> str:
    return first_line(error).replace(str(source), "the model")
