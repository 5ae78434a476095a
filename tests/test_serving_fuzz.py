"""The server under schemathesis and under mutated films and forms: it answers or refuses, and never fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.fuzz_api import bodies, fuzz
from inference_api import create_app, listen
from tests.test_inference_api import make

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def url(trained: Path) -> Iterator[str]:
    """Where a real server listens, in a thread of this process."""
    service = make(trained)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not service.queue.ready:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_mutated_films_and_forms_are_answered_or_refused(url: str) -> None:
    with httpx.Client(base_url=url, headers={"content-type": "multipart/form-data; boundary=XX"}) as client:
        wrong = fuzz(lambda body: client.post("/predict", content=body).status_code, bodies(1000, seed=1), hang_s=20)
    assert wrong == []


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_what_is_answered_is_what_the_openapi_document_says(url: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json").json())
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and operation.method.upper() == "GET":
            continue  # nothing to get wrong
        seen.add(operation.path)

        @settings(
            max_examples=30,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(mode))
        def ask(case: Any) -> None:
            case.validate_response(case.call(base_url=url), checks=CHECKS)

        ask()
    assert {"/predict", "/predict/batch", "/explain"} <= seen
