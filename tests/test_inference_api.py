"""inference_api.py and serving_service.py: the answers of the command line, over HTTP, whatever is sent."""

from __future__ import annotations

import asyncio
import base64
import csv
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

import inference_api
import main
import predictor
import synthetic
from config import ServingConfig, resolve
from errors import ConfigError, ServingError
from gate import Gate, GateResult
from preprocess import apply, decode
from serving_security import SECURITY_HEADERS, ApiKeys
from serving_service import Service

KEY = "0123456789abcdef"


def make(trained: Path, *, keys: dict[str, str] | None = None, **settings: Any) -> Service:
    loaded = predictor.load(trained / "best_model.pth", device="cpu", precision="fp32")
    loaded.input_gate = None
    return Service(loaded, ServingConfig(**settings), source=trained / "best_model.pth", keys=ApiKeys(keys or {}))


def started(service: Service, **options: Any) -> TestClient:
    client = TestClient(inference_api.create_app(service), **options)
    client.__enter__()
    while not service.queue.ready:
        time.sleep(0.005)
    return client


@pytest.fixture(scope="module")
def service(trained: Path) -> Service:
    return make(trained)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    client = started(service)
    yield client
    client.__exit__(None, None, None)


@pytest.fixture
def serving(trained: Path) -> Iterator[Any]:
    """Starts a server of its own with the settings given."""
    running: list[TestClient] = []

    def start(**settings: Any) -> tuple[TestClient, Service]:
        service = make(trained, **settings)
        running.append(started(service, raise_server_exceptions=False))
        return running[-1], service

    yield start
    for client in running:
        client.__exit__(None, None, None)


def film(seed: int = 0, *, form: str = "PNG", size: int = 48) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(synthetic.film(pneumonia=bool(seed % 2), seed=seed, size=size)).save(stream, form)
    return stream.getvalue()


def upload(content: bytes, name: str = "film") -> dict[str, Any]:
    return {"file": (name, content)}


def hold(service: Service, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[int]]:
    """Let the engine compute only once the event is set; the sizes of the batches it was given."""
    let, seen = threading.Event(), list[int]()

    def compute(images: Any) -> Any:
        seen.append(len(images))
        assert let.wait(10)
        return service._compute(images)

    monkeypatch.setattr(service.queue, "_run", compute)
    return let, seen


# --- the answers ---


def test_the_published_fields_are_there(client: TestClient) -> None:
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["model_loaded"] is True and health["device"] == "cpu"
    answer = client.post("/predict", files=upload(film())).json()
    assert {"prediction", "confidence", "probabilities", "inference_time_ms", "model_version"} <= set(answer)
    assert answer["model_version"] == health["model_version"] == client.get("/model/info").json()["model_version"]
    assert answer["confidence"] == answer["probabilities"][answer["prediction"]]
    assert sum(answer["probabilities"].values()) == pytest.approx(1) and answer["inference_time_ms"] > 0
    assert answer["in_distribution"] is None and "features" not in answer


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_every_format_gets_the_answer_of_the_command_line(
    client: TestClient, trained: Path, tmp_path: Path, form: str
) -> None:
    contents = [film(seed, form=form, size=40 + seed) for seed in range(5)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.{form.lower()}").write_bytes(content)
    words = ["predict", str(tmp_path), "--checkpoint", str(trained / "best_model.pth"), "--device", "cpu"]
    assert main.main([*words, "--precision", "fp32", "--output-dir", str(tmp_path / "out"), "--quiet"]) == 0
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda content: client.post("/predict", files=upload(content)).json(), contents))
    require_equal(tmp_path / "out", answers)


def require_equal(folder: Path, answers: list[dict[str, Any]]) -> None:
    """The rows of `predictions.csv` say what the server answered."""
    rows = list(csv.DictReader(io.StringIO((folder / "predictions.csv").read_text())))
    for row, answer in zip(rows, answers, strict=True):
        assert row["prediction"] == answer["prediction"]
        for name, value in answer["probabilities"].items():
            assert row[f"probability_{name}"] == f"{value:.6f}"


@pytest.mark.parametrize(
    ("engine", "file"), [("onnxruntime", "model"), ("openvino", "model"), ("openvino", "model_int8")]
)
def test_every_engine_gives_many_clients_the_answer_of_the_command_line(
    optimized: Path, tmp_path: Path, engine: str, file: str
) -> None:
    bundle, films = tmp_path / "bundle", tmp_path / "films"
    shutil.copytree(optimized, bundle, ignore=shutil.ignore_patterns("triton"))
    films.mkdir()
    facts = json.loads((bundle / "bundle.json").read_text())
    facts |= {"engine": engine, "precision": "int8" if "int8" in file else "fp32", "file": f"{file}.onnx"}
    (bundle / "bundle.json").write_text(json.dumps(facts))
    contents = [film(seed, form=["JPEG", "PNG", "TIFF"][seed % 3], size=40 + seed) for seed in range(6)]
    for number, content in enumerate(contents):
        (films / f"{number}.png").write_bytes(content)
    words = ["predict", str(films), "--bundle", str(bundle), "--output-dir", str(tmp_path / "out"), "--quiet"]
    assert main.main(words) == 0
    loaded = predictor.load(bundle)
    assert loaded.engine.name.startswith(engine)
    loaded.input_gate = None
    client = started(Service(loaded, ServingConfig(), source=bundle, keys=ApiKeys({})))
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, "/predict", files=upload(content)) for content in contents * 5]
        answers = [future.result().json() for future in asked]
    client.__exit__(None, None, None)
    for number, answer in enumerate(answers):
        assert answer["probabilities"] == answers[number % 6]["probabilities"]
    require_equal(tmp_path / "out", answers[:6])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_neighbour_changes_a_bit_of_an_answer(trained: Path, precision: str) -> None:
    loaded = predictor.load(trained / "best_model.pth", device="cpu", precision=precision)
    rng = np.random.default_rng(0)
    side, channels = loaded.spec.image_size, loaded.spec.channels
    films = rng.integers(0, 256, (11, side, side, channels), dtype=np.uint8)
    alone = [loaded.exact_outputs(films[index : index + 1]) for index in range(11)]
    loaded.widen_calls()
    for count in (2, 3, 7, 11):
        for order in (np.arange(count), rng.permutation(11)[:count]):
            together = loaded.exact_outputs(films[order])
            for position, index in enumerate(order):
                assert np.array_equal(together[0][position], alone[index][0][0])
                assert np.array_equal(together[1][position], alone[index][1][0])


def test_a_call_shape_is_filled_up_with_black_films() -> None:
    films = np.ones((5, 2, 2, 1), dtype=np.uint8)
    assert [len(call) for call in predictor.call_shapes(films, (4, 2, 1))] == [4, 1]
    first, last = predictor.call_shapes(films, (3,))
    assert len(first) == len(last) == 3 and last[:2].all() and not last[2].any()


def test_features_are_those_of_the_network(client: TestClient, service: Service) -> None:
    answer = client.post("/predict?return_features=true", files=upload(film())).json()
    image = apply(service.predictor.spec, decode(film()))[None]
    assert answer["features"] == service.predictor.exact_outputs(image)[1][0].tolist()
    by_form = client.post("/predict", files=upload(film()), data={"return_features": "true"}).json()
    assert by_form["features"] == answer["features"]


def test_a_batch_answers_each_film_and_names_the_bad_one(client: TestClient) -> None:
    sent = [film(1), b"not a film", film(2), b""]
    answer = client.post("/predict/batch", files=[("files", (f"{i}", data)) for i, data in enumerate(sent)]).json()
    assert [entry["index"] for entry in answer["predictions"]] == [0, 1, 2, 3]
    assert answer["predictions"][1]["status"] == answer["predictions"][3]["status"] == 422
    assert "not an image" in answer["predictions"][1]["error"] and "0 bytes" in answer["predictions"][3]["error"]
    for index in (0, 2):
        alone = client.post("/predict", files=upload(sent[index])).json()
        assert answer["predictions"][index]["probabilities"] == alone["probabilities"]


def test_an_explanation_is_two_pictures_of_the_models_square(client: TestClient, service: Service) -> None:
    side = service.predictor.spec.image_size
    answer = client.post("/explain?target=NORMAL&opacity=0.3", files=upload(film())).json()
    assert answer["target"] == "NORMAL" and answer["method"] == "gradcam"
    for name, mode in (("heat_map_png", "L"), ("overlay_png", "RGB")):
        picture = Image.open(io.BytesIO(base64.b64decode(answer[name])))
        assert picture.size == (side, side) and picture.mode == mode
    for query, headers in (("?format=overlay", {}), ("", {"accept": "image/png"})):
        response = client.post(f"/explain{query}", files=upload(film()), headers=headers)
        assert response.headers["content-type"] == "image/png" and response.content[:4] == b"\x89PNG"


class Refusing:
    """An input gate that no film passes."""

    def check(self, pixels: Any, image_HWC: Any, features_F: Any) -> GateResult:
        assert pixels.shape == (48, 48) and image_HWC.ndim == 3 and features_F.ndim == 1
        return GateResult(False, "a colour photograph", 4.0)


def test_the_gate_speaks_in_the_answer_and_refuses_when_asked_to(serving: Any) -> None:
    client, service = serving()
    service.gate = Refusing()  # type: ignore[assignment]
    answer = client.post("/predict", files=upload(film())).json()
    assert answer["in_distribution"] is False and answer["reason"] == "a colour photograph"
    service.settings.abstain = True
    response = client.post("/predict", files=upload(film()))
    assert response.status_code == 422 and response.json() == {"detail": "not answered: a colour photograph"}
    assert "medimg_out_of_distribution_total 2.0" in client.get("/metrics").text


def test_an_answer_does_not_wait_behind_films_that_are_still_to_be_decoded(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = serving(decode_threads=1)
    service.gate = Refusing()  # type: ignore[assignment]
    let, seen = hold(service, monkeypatch)
    decoding = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/predict", files=upload(film()))
        while not seen:
            time.sleep(0.001)
        service.decoders.submit(decoding.wait)
        let.set()
        try:
            assert answer.result(timeout=10).json()["in_distribution"] is False
        finally:
            decoding.set()


def test_the_gate_of_the_checkpoint_is_asked(serving: Any, trained: Path) -> None:
    """The same verdict as the gate gives when called by hand."""
    stored = predictor.load(trained / "best_model.pth", device="cpu", precision="fp32").input_gate
    assert stored is not None
    client, service = serving()
    service.gate = Gate.from_state(stored)
    for content in (film(), film(3)):
        pixels = decode(content)
        image = apply(service.predictor.spec, pixels)
        verdict = service.gate.check(pixels, image, service.predictor.exact_outputs(image[None])[1][0])
        answer = client.post("/predict", files=upload(content)).json()
        assert (answer["in_distribution"], answer["reason"] or "") == (verdict.in_distribution, verdict.reason)


def test_a_checkpoint_without_a_gate_cannot_abstain(trained: Path) -> None:
    with pytest.raises(ServingError, match="has no input gate"):
        make(trained, abstain=True)


# --- refusals ---


@pytest.mark.parametrize(
    ("path", "files", "status", "reason"),
    [
        ("/predict", upload(b"text"), 422, "not an image"),
        ("/predict", upload(film()[:200]), 422, "damaged or truncated"),
        ("/predict", upload(b"%!PS-Adobe-3.0 EPSF-3.0\n"), 422, "not an image"),
        ("/predict", {"other": ("f", film())}, 422, "no file in the form field 'file'"),
        ("/predict", [("file", ("a", film())), ("file", ("b", film()))], 413, "more than 1 files"),
        ("/predict?return_features=maybe", upload(film()), 422, "return_features is true or false"),
        ("/predict/batch", upload(film()), 422, "no file in the form field 'files'"),
        ("/predict/batch", [("files", ("a", b"x"))] * 33, 413, "more than 32 files"),
        ("/explain?target=CAT", upload(film()), 422, "target is one of NORMAL, PNEUMONIA"),
        ("/explain?opacity=2", upload(film()), 422, "opacity is a number from 0 to 1"),
        ("/explain?opacity=nan", upload(film()), 422, "opacity is a number from 0 to 1"),
        ("/explain?format=svg", upload(film()), 422, "format is one of"),
    ],
)
def test_a_faulty_request_is_told_its_fault(
    client: TestClient, path: str, files: Any, status: int, reason: str
) -> None:
    response = client.post(path, files=files)
    assert response.status_code == status and reason in response.json()["detail"]


def test_limits_on_bytes_and_pixels_hold(serving: Any) -> None:
    client, _ = serving(max_body_mb=0.5, max_file_mb=0.1, max_pixels=10_000)
    for size in (600_000, 5_000_000):
        response = client.post("/predict", files=upload(b"x" * size))
        assert response.status_code == 413 and response.headers["connection"] == "close"
    assert "file is larger than 0.1 MiB" in client.post("/predict", files=upload(b"x" * 200_000)).json()["detail"]
    bomb = io.BytesIO()
    Image.new("1", (3000, 3000)).save(bomb, "PNG")
    response = client.post("/predict", files=upload(bomb.getvalue()))
    assert response.status_code == 422 and "3000x3000 pixels is more than 10,000" in response.json()["detail"]


def test_keys_are_asked_for_where_films_and_facts_are(serving: Any) -> None:
    client, _ = serving(keys={"ward": KEY})
    for path in ("/health", "/livez", "/readyz", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    for path in ("/model/info", "/metrics"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    refused = client.post("/predict", files=upload(film()), headers={"X-API-Key": "wrong"})
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert client.post("/predict", files=upload(film()), headers={"X-API-Key": KEY}).status_code == 200


def test_a_rate_limit_answers_429_with_the_time_to_come_back(serving: Any) -> None:
    client, _ = serving(rate_limit=0.01, rate_burst=2)
    answers = [client.post("/predict", files=upload(film())) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert int(answers[-1].headers["retry-after"]) > 50
    assert client.get("/readyz").status_code == 200


def test_a_full_queue_answers_503_at_once_and_then_recovers(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = serving(max_queue=3)
    let, _ = hold(service, monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(client.post, "/predict", files=upload(film(seed))) for seed in range(3)]
        while service.queue.admitted < 3:
            time.sleep(0.001)
        response = client.post("/predict", files=upload(film()))
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200
        let.set()
        assert [answer.result().status_code for answer in taken] == [200, 200, 200]
    assert client.post("/predict", files=upload(film())).status_code == 200


def test_a_deadline_that_passes_is_a_503_and_its_work_is_dropped(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = serving(deadline_s=0.05)
    let, seen = hold(service, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(client.post, "/predict", files=upload(film())) for _ in range(4)]
        for answer in answers:
            assert answer.result().status_code == 503 and "not answered within 0.05 s" in answer.result().text
        let.set()
    assert sum(seen) < 4 and service.queue.admitted == 0


def test_our_own_fault_is_a_bare_500_and_logs_no_message(
    serving: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, service = serving()
    message = "a patient's name in a library's message"

    def fail(images: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(service.queue, "_run", fail)
    monkeypatch.setattr(logging.getLogger("medimg"), "propagate", True)
    response = client.post("/predict", files=upload(film(), "Jane Doe.png"))
    assert response.status_code == 500 and response.text == "Internal Server Error"
    assert "RuntimeError" in caplog.text and "patient" not in caplog.text and "Jane" not in caplog.text


def test_the_engine_survives_clients_that_leave(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = serving()
    let, seen = hold(service, monkeypatch)
    app = inference_api.create_app(service)
    request = httpx.Request("POST", "http://x/predict", files=upload(film()))
    body = request.read()

    async def leave() -> list[int]:
        messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
        sent: list[int] = []

        async def receive() -> dict[str, Any]:
            if len(messages) == 1:
                await asyncio.sleep(0.05)
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message.get("status", 0))

        headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers, "query_string": b""}
        await app(scope, receive, send)
        return sent

    blocker = threading.Thread(target=client.post, args=("/predict",), kwargs={"files": upload(film())})
    blocker.start()
    while not seen:
        time.sleep(0.001)
    portal = client.portal
    assert portal is not None and portal.call(leave)[0] == 499
    let.set()
    blocker.join()
    assert client.post("/predict", files=upload(film())).status_code == 200
    assert sum(seen) == 2 and "medimg_client_gone_total 1.0" in client.get("/metrics").text


# --- what is written down ---


def test_answers_are_on_record_and_names_are_not(serving: Any, tmp_path: Path) -> None:
    audit, scores = tmp_path / "audit.jsonl", tmp_path / "scores.json"
    client, service = serving(keys={"ward": KEY}, audit_log=str(audit), record_scores=str(scores))
    headers = {"X-API-Key": KEY}
    answer = client.post("/predict", files=upload(film(), "Jane Doe.png"), headers=headers).json()
    (line,) = (json.loads(text) for text in audit.read_text().splitlines())
    assert line["key"] == "ward" and line["prediction"] == answer["prediction"] and "Jane" not in audit.read_text()
    assert line["probabilities"] == answer["probabilities"] and line["model_version"] == service.model_version
    assert service.scores is not None
    service.scores.flush()
    (day,) = json.loads(scores.read_text())["days"].values()
    assert day["films"] == 1 and day["mean"] == answer["probabilities"]["PNEUMONIA"]


def test_metrics_count_routes_and_never_paths_of_the_clients_choosing(client: TestClient) -> None:
    client.get("/Jane-Doe")
    text = client.get("/metrics").text
    assert 'medimg_requests_total{route="other",status="404"}' in text and "Jane" not in text
    assert 'medimg_requests_total{route="/predict",status="200"}' in text


def test_every_answer_carries_the_security_headers_and_allows_no_other_origin(client: TestClient) -> None:
    for response in (client.get("/health"), client.get("/none"), client.post("/predict")):
        assert {name: response.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    response = client.get("/health", headers={"origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in response.headers


def test_other_origins_are_allowed_by_name(serving: Any) -> None:
    client, _ = serving(cors_origins=["https://viewer.example"])
    for origin, allowed in (("https://viewer.example", True), ("https://elsewhere.example", False)):
        response = client.get("/health", headers={"origin": origin})
        assert (response.headers.get("access-control-allow-origin") == origin) is allowed


def test_the_documentation_asks_no_other_machine(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "/predict/batch" in page and "<script" not in page and "//" not in page.replace("<!doctype", "")
    document = client.get("/openapi.json").json()
    for path in ("/predict", "/predict/batch", "/explain"):
        operation = document["paths"][path]["post"]
        assert "multipart/form-data" in operation["requestBody"]["content"]
        assert operation["responses"]["200"]["content"]["application/json"]["example"]["model_version"]


def test_the_framework_reports_to_nobody(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    original = FastAPI.__init__
    monkeypatch.setattr(FastAPI, "__init__", lambda self, **options: seen.update(options) or original(self, **options))
    inference_api.create_app(service)
    assert set(seen["telemetry"].values()) == {False}


# --- the process ---


def test_a_port_in_use_and_a_foreign_address_are_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"--port {port}: cannot listen there"):
            inference_api.listen("127.0.0.1", port)
    with pytest.raises(ServingError, match="no such address"):
        inference_api.listen("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--checkpoint", "none.pth"], "no such checkpoint"),
        (["--checkpoint", "none.pth", "--api-keys-file", "none"], "--api-keys-file none: cannot be read"),
        (["--checkpoint", "none.pth", "--set", "serving.port=70000"], "serving.port"),
        ([], "one of the arguments --checkpoint --bundle is required"),
    ],
)
def test_a_mistake_ends_with_2_and_one_line(capsys: pytest.CaptureFixture[str], words: list[str], reason: str) -> None:
    try:
        code = main.main(["api", "--port", "0", *words])
    except SystemExit as stopped:
        code = stopped.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2 and reason in error and error.count("\n") == 1


def test_a_stated_threshold_decides(trained: Path) -> None:
    loaded = predictor.load(trained / "best_model.pth", device="cpu")
    inference_api._set_threshold(loaded, 0.123)
    assert loaded.threshold == 0.123
    with pytest.raises(ConfigError, match="--threshold 3: must be a probability"):
        inference_api._set_threshold(loaded, 3.0)


@pytest.mark.slow
def test_a_served_process_answers_under_load_until_it_is_told_to_stop(trained: Path, tmp_path: Path) -> None:
    """A real process, SIGTERM in the middle of the load: every request that was taken on is answered, then it ends."""
    command = [sys.executable, str(Path(main.__file__)), "api", "--checkpoint", str(trained / "best_model.pth")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu"], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    url = process.stderr.readline().split()[-1]
    outcomes: list[int | str] = []

    def ask(number: int) -> None:
        with httpx.Client() as client:
            while True:
                try:
                    response = client.post(f"{url}/predict", files=upload(film(number), "Jane Doe.png"), timeout=30)
                except httpx.ConnectError:
                    return
                except httpx.HTTPError as error:
                    outcomes.append(type(error).__name__)
                    return
                outcomes.append(response.status_code)

    while httpx.get(f"{url}/readyz").status_code != 200:
        time.sleep(0.05)
    clients = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in clients:
        thread.start()
    while len(outcomes) < 60:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    for thread in clients:
        thread.join(30)
    assert process.wait(30) == 0
    # A connection that idled between two requests may be closed under the next one: that one was never taken on.
    assert outcomes.count(200) > 60 and set(outcomes) <= {200, "ReadError", "RemoteProtocolError", "WriteError"}
    assert len([item for item in outcomes if item != 200]) <= 6
    assert process.communicate()[1] == ""


def test_settings_of_serving_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"serving\.max_queue: 0 is out of range"):
        resolve({"serving.max_queue": 0})
