"""serving_connection.py: a connection that dawdles over its headers, or has too many, is closed; others are not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

import serving_connection
from serving_connection import BoundedProtocol

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Reads the whole body, then answers with its length."""
    body, more = b"", scope["type"] == "http"
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(length))]})
    await send({"type": "http.response.body", "body": length})


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    patch = pytest.MonkeyPatch()
    patch.setattr(serving_connection, "HEADER_TIMEOUT_S", 0.3)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(answer, http=BoundedProtocol, lifespan="off", log_config=None, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()
    patch.undo()


def dribble(address: tuple[str, int], text: bytes, *, before: bytes = b"") -> float:
    """Seconds until the server closes on a client that sends `before`, reads, then `text` byte by byte."""
    with socket.create_connection(address) as client:
        client.settimeout(5)
        if before:
            client.sendall(before)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        started = time.perf_counter()
        client.settimeout(0.05)
        for byte in text:
            try:
                client.sendall(bytes([byte]))
                if client.recv(1000) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        return time.perf_counter() - started


@pytest.mark.parametrize("before", [b"", REQUEST])
def test_headers_that_trickle_in_end_the_connection(address: tuple[str, int], before: bytes) -> None:
    slow = b"GET / HTTP/1.1\r\nX: " + b"a" * 80
    assert 0.25 < dribble(address, slow, before=before) < 3


def test_a_silent_connection_is_closed(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.settimeout(5)
        assert client.recv(1) == b""


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\n",
        REQUEST + b"GET / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
    ],
    ids=["headers", "headers of a further request", "trailers"],
)
@pytest.mark.parametrize("line", [b"X: " + b"a" * 8000 + b"\r\n", b"a" * 8000], ids=["many", "one"])
def test_headers_and_trailers_without_end_are_cut_off(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch, start: bytes, line: bytes
) -> None:
    monkeypatch.setattr(serving_connection, "HEADER_TIMEOUT_S", 60.0)
    with socket.create_connection(address) as client:
        client.sendall(start)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.sendall(line * 2000)


@pytest.mark.parametrize(("size", "count"), [(10, 20_000), (5000, 1000)])
def test_a_body_in_chunks_is_none_of_it(address: tuple[str, int], size: int, count: int) -> None:
    chunk = b"%x\r\n" % size + b"a" * size + b"\r\n"
    with socket.create_connection(address) as client:
        client.settimeout(5)
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall(chunk * count + b"0\r\n\r\n")
        assert client.recv(1000).endswith(b"\r\n\r\n%d" % (count * size))


def test_a_body_may_be_large_and_take_longer_than_headers_may(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.settimeout(5)
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + b"a" * 100_000)
        time.sleep(0.6)
        client.sendall(b"a" * 100_000)
        assert client.recv(1000).endswith(b"\r\n\r\n200000")


def test_requests_follow_one_another_on_one_connection(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.settimeout(5)
        for _ in range(3):
            client.sendall(REQUEST)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(0.2)
