"""Serve a checkpoint or an optimised bundle over HTTP.

    python main.py api --checkpoint checkpoints/best_model.pth --port 8000

Reads the model, the keys and web/; writes only the audit log and the score record, when asked for. Handlers translate:
bytes in, predictor, JSON out. A film walks decode → apply → gate and engine as on the command line, with the same
answer to the last bit. Never logs a file name, a pixel or a tag; never shows a trace; asks no other machine anything.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import predictor as prediction
import serving_docs as docs
from config import Config
from errors import ConfigError, RequestError, ServingError
from predictor import Predictor
from runtime import Interrupted, log
from serving_connection import BoundedProtocol
from serving_form import ClientGone, Part
from serving_security import SECURITY_HEADERS, read_keys
from serving_service import Service

WEB = Path(__file__).resolve().parent / "web"
OPEN_ROUTES = frozenset({"/", "/health", "/livez", "/readyz", "/docs", "/openapi.json", "/favicon.ico"})
"""Answered without a key: the page, its documentation and the probes."""
ENGINE_ROUTES = frozenset({"/predict", "/predict/batch", "/explain"})
"""Refused before anything else is done for them while the queue is full."""
NO_TELEMETRY: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)

# --- parameters -------------------------------------------------------------------------------------------------


def files(parts: Sequence[Part], name: str) -> list[memoryview]:
    """The contents of the files sent under `name`; RequestError 422 when there is none."""
    contents = [part.content for part in parts if part.name == name and part.is_file]
    if not contents:
        raise RequestError(422, f"no file in the form field {name!r}")
    return contents


def note(parts: Sequence[Part], columns: Sequence[str]) -> dict[str, str]:
    """What a form says beside its film, of the `columns` that the model reads; RequestError 422 where it reads none."""
    sent = {part.name: bytes(part.content).decode("utf-8", "replace") for part in parts if not part.is_file}
    if "text" in sent and "text" not in columns:
        raise RequestError(422, "this model reads no text: send the film alone")
    return {name: sent[name] for name in columns if name in sent}


def notes(parts: Sequence[Part], columns: Sequence[str], count: int) -> list[dict[str, str]]:
    """The same of several films: the field `cases`, a JSON list with an object for each; RequestError 422."""
    sent = [bytes(part.content) for part in parts if part.name == "cases" and not part.is_file]
    if not sent:
        return [{}] * count
    try:
        listed = json.loads(sent[0])
    except ValueError:
        raise RequestError(422, "cases is not JSON") from None
    if not (isinstance(listed, list) and len(listed) == count and all(isinstance(item, dict) for item in listed)):
        raise RequestError(422, f"cases is a JSON list of {count} objects, one for each file")
    return [{name: str(item[name]) for name in columns if item.get(name) is not None} for item in listed]


def flag(request: Request, name: str, parts: Sequence[Part] = ()) -> bool:
    """A parameter of the query, or of the form, that is true or false; RequestError 422."""
    fields = [bytes(part.content).decode("latin-1") for part in parts if part.name == name and not part.is_file]
    text = [*fields, request.query_params.get(name, "false")][0].strip().lower()
    if text not in ("true", "false", "1", "0"):
        raise RequestError(422, f"{name} is true or false")
    return text in ("true", "1")


def number(request: Request, name: str, default: float) -> float:
    """A query parameter in [0, 1]; RequestError 422."""
    try:
        value = float(request.query_params.get(name, default))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise RequestError(422, f"{name} is a number from 0 to 1")
    return value


def choice(request: Request, name: str, choices: Sequence[str]) -> str | None:
    """A query parameter that is one of `choices`, or None when absent; RequestError 422."""
    text = request.query_params.get(name)
    if text is not None and text not in choices:
        raise RequestError(422, f"{name} is one of {', '.join(choices)}")
    return text


# --- routes -----------------------------------------------------------------------------------------------------


def json_response(content: Mapping[str, Any], status: int = 200) -> Response:
    """Compact strict JSON."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Response(text.encode(), status_code=status, media_type="application/json")


def refusal(error: RequestError) -> Response:
    """The answer to a request that is refused."""
    response = json_response({"detail": str(error)}, error.status)
    if error.retry_after is not None:
        response.headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        response.headers["connection"] = "close"
    return response


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return refusal(error)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def create_app(service: Service) -> ASGIApp:
    """The ASGI application of one service."""
    api = FastAPI(
        title="Medical image classification",
        description=docs.DESCRIPTION,
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=service.lifespan,
        # Newer versions would start reporting when the environment names a collector; older ones ignore the setting.
        telemetry=NO_TELEMETRY,
        exception_handlers={RequestError: _refused, ClientGone: _gone},
    )
    _add_probes(api, service)
    _add_predictions(api, service)
    _add_explanation(api, service)
    _add_pages(api)
    app: ASGIApp = Front(api, service)
    if service.settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "x-api-key", "content-type"],
        )
    return app


def _add_probes(api: FastAPI, service: Service) -> None:
    @api.get(
        "/health", summary="Whether the server is up, and with which model", responses={200: {"model": docs.Health}}
    )
    async def health() -> Response:
        return json_response(service.health())

    @api.get("/livez", summary="200 while the process answers")
    async def livez() -> Response:
        return json_response({"status": "alive"})

    @api.get("/readyz", summary="200 once the model is warm", responses=docs.refused(503))
    async def readyz() -> Response:
        service.queue.require_room(0)
        return json_response({"status": "ready"})

    @api.get(
        "/model/info",
        summary="Classes, operating point, preprocessing and limits",
        responses=docs.refused(401, 429),
    )
    async def info() -> Response:
        return json_response(service.info())

    @api.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **docs.refused(401, 429)},
    )
    async def metrics() -> Response:
        service.metrics.queue_depth.set(service.queue.depth)
        service.metrics.in_work.set(service.queue.admitted)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


REFUSALS = (400, 401, 408, 413, 415, 422, 429, 503)


def _add_predictions(api: FastAPI, service: Service) -> None:
    @api.post(
        "/predict",
        summary="Predict one film",
        responses=docs.answers(docs.PredictionOut, docs.EXAMPLE, *REFUSALS),
        openapi_extra=docs.upload("file") | {"parameters": [docs.FEATURES]},
    )
    async def predict(request: Request) -> Response:
        with service.bodies.holding() as body:
            parts = await service.form(request, body, max_files=1)
            content, features = files(parts, "file")[0], flag(request, "return_features", parts)
            with service.queue.admit():
                said = note(parts, service.columns)
                work = service.predict(content, key=request.scope["key"], features=features, note=said)
                return json_response(await service.while_connected(request, work))

    @api.post(
        "/predict/batch",
        summary="Predict several films",
        responses=docs.answers(docs.BatchOut, docs.BATCH_EXAMPLE, *REFUSALS),
        openapi_extra=docs.upload("files", many=True) | {"parameters": [docs.FEATURES]},
    )
    async def predict_batch(request: Request) -> Response:
        started = time.perf_counter()
        with service.bodies.holding() as body:
            parts = await service.form(request, body, max_files=service.settings.max_files)
            contents, features = files(parts, "files"), flag(request, "return_features", parts)
            said = notes(parts, service.columns, len(contents))
            work = service.predict_many(contents, key=request.scope["key"], features=features, notes=said)
            entries = await service.while_connected(request, work)
        spent = round((time.perf_counter() - started) * 1000, 3)
        return json_response(
            {"predictions": entries, "inference_time_ms": spent, "model_version": service.model_version}
        )


def _add_explanation(api: FastAPI, service: Service) -> None:
    example = docs.EXAMPLE | {"method": "gradcam", "target": "PNEUMONIA", "opacity": 0.5}
    example |= {"heat_map_png": "iVBORw0KGgo…", "overlay_png": "iVBORw0KGgo…"}

    @api.post(
        "/explain",
        summary="Predict one film and show where the model looked",
        responses=docs.answers(docs.ExplanationOut, example, *REFUSALS, image=True),
        openapi_extra=docs.upload("file") | {"parameters": docs.EXPLAIN_PARAMETERS},
    )
    async def explain(request: Request) -> Response:
        wanted = choice(request, "format", ("json", "overlay", "heat_map"))
        target = choice(request, "target", service.predictor.classes)
        opacity = number(request, "opacity", 0.5)
        with service.bodies.holding() as body:
            parts = await service.form(request, body, max_files=1)
            content, said = files(parts, "file")[0], note(parts, service.columns)
            with service.queue.admit():
                work = service.explain(content, key=request.scope["key"], target=target, opacity=opacity, note=said)
                result = await service.while_connected(request, work)
        if wanted is None:
            wanted = "overlay" if request.headers.get("accept", "").startswith("image/png") else "json"
        if wanted != "json":
            return Response(result[f"{wanted}_png"], media_type="image/png")
        for name in ("heat_map_png", "overlay_png"):
            result[name] = base64.b64encode(result[name]).decode()
        return json_response(result)


def _add_pages(api: FastAPI) -> None:
    @api.get("/docs", include_in_schema=False)
    async def documentation() -> Response:
        return HTMLResponse(docs.page(api.openapi()))

    @api.get("/", include_in_schema=False)
    async def index() -> Response:
        if not (WEB / "index.html").is_file():
            raise RequestError(404, "this installation has no page; see /docs")
        return FileResponse(WEB / "index.html")

    api.mount("/static", StaticFiles(directory=WEB, check_dir=False))


class Front:
    """What every request passes: key, rate limit, room in the queue, headers, counting, a bare 500 for our faults."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        self.app, self.service = app, service
        self.routes = {route.path for route in app.routes if hasattr(route, "path")}
        self._headers = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def secured(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        try:
            scope["key"] = self._admit(scope)
            await self.app(scope, receive, secured)
        except RequestError as error:
            await refusal(error)(scope, receive, secured)
        except Exception as error:
            self._note(error)
            if status == 500:
                with contextlib.suppress(RuntimeError):  # the 500 may already be on its way
                    await json_response({"detail": "Internal Server Error"}, 500)(scope, receive, secured)
        self._count(scope["path"], status, time.perf_counter() - started)

    def _admit(self, scope: Scope) -> str:
        """The name of the key; RequestError 401, 429 or 503."""
        path = scope["path"]
        if path in OPEN_ROUTES or path.startswith("/static/"):
            return ""
        name = self.service.keys.name_of(dict(scope["headers"])) if self.service.keys else ""
        self.service.limiter.take(name)
        if path in ENGINE_ROUTES and scope["method"] == "POST":
            self.service.queue.require_room()
        return name

    def _count(self, path: str, status: int, seconds: float) -> None:
        route = path if path in self.routes else "other"
        self.service.metrics.requests.labels(route, str(status)).inc()
        self.service.metrics.latency.labels(route).observe(seconds)
        if status == 499:
            self.service.metrics.dropped.inc()

    @staticmethod
    def _note(error: Exception) -> None:
        # Not the message: a library may have put a file's content or name into it.
        where = "".join(traceback.format_tb(error.__traceback__))
        log.error("a request failed: %s\n%s", type(error).__name__, where.rstrip())


# --- the process ------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; ServingError when the address is not ours or the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ServingError(f"--host {host}: no such address; use 127.0.0.1, or 0.0.0.0 for every interface") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ServingError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); use another --port"
        ) from None
    return listener


def serve(path: Path, config: Config, *, model_type: str | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C, then finish what was taken on; the exit code."""
    settings = config.serving
    keys = read_keys(
        os.environ.get("MEDIMG_API_KEYS"), Path(settings.api_keys_file) if settings.api_keys_file else None
    )
    with contextlib.closing(listen(settings.host, settings.port)) as listener:
        one_thread_a_core(config.runtime.threads)
        predictor = prediction.load(
            path, device=config.runtime.device, precision=config.runtime.precision, model_type=model_type
        )
        _set_threshold(predictor, config.evaluation.threshold)
        service = Service(predictor, settings, source=path, keys=keys)
        host, port = listener.getsockname()[:2]
        _announce(service, host, port)
        return _run(service, listener)


def one_thread_a_core(threads: int) -> None:
    """Engine, decoders and event loop share the cores; libraries with pools of their own would fight over them."""
    cv2.setNumThreads(1)
    if threads:
        torch.set_num_threads(threads)
    # The event loop waits for the interpreter at most this long while the engine's thread holds it.
    sys.setswitchinterval(0.001)


def _set_threshold(predictor: Predictor, threshold: float | None) -> None:
    if threshold is None:
        return
    if predictor.positive_class is None or not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold {threshold:g}: must be a probability, for a model with a positive class")
    predictor.operating_point = {**predictor.operating_point, "threshold": threshold, "method": "stated"}


def _announce(service: Service, host: str, port: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    log.info("serving %s (%s) at http://%s:%d", service.model_version, service.predictor.engine.name, shown, port)
    if host not in ("127.0.0.1", "::1") and not service.keys:
        log.warning("anyone who reaches %s may ask: set MEDIMG_API_KEYS or --api-keys-file, and TLS before it", host)


def _run(service: Service, listener: socket.socket) -> int:
    settings = service.settings
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            http=BoundedProtocol,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=math.ceil(settings.deadline_s + settings.body_timeout_s),
        )
    )
    failed = threading.Event()

    def stop() -> None:
        failed.set()
        server.should_exit = True

    service.on_failure = stop
    # uvicorn raises the signal it stopped for once more: here that is the ordinary end.
    with contextlib.suppress(Interrupted, KeyboardInterrupt):
        server.run(sockets=[listener])
    return 1 if failed.is_set() else 0
