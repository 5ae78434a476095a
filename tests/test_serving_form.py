"""serving_form.py: bodies are bounded while they arrive, and forms mean what other programs take them to mean."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from errors import RequestError
from serving_form import BodyReader, ClientGone, parse_form

KIND = "multipart/form-data; boundary=XX"


def form(*parts: str) -> bytearray:
    return bytearray("".join(f"--XX\r\n{part}\r\n" for part in parts).encode() + b"--XX--\r\n")


FILE = 'Content-Disposition: form-data; name="file"; filename="secret name.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'


def read(parts: list[Any]) -> list[tuple[str, bool, bytes]]:
    return [(part.name, part.is_file, bytes(part.content)) for part in parts]


def test_a_form_another_program_wrote_is_read_back() -> None:
    contents = [bytes(np.random.default_rng(seed).integers(0, 256, 5000, dtype=np.uint8)) for seed in range(3)]
    request = httpx.Request(
        "POST",
        "http://x",
        files=[("files", (f"ä {i}.jpg", io.BytesIO(data))) for i, data in enumerate(contents)],
        data={"note": "yes"},
    )
    parts = parse_form(bytearray(request.read()), request.headers["content-type"], max_files=3)
    assert sorted(read(parts)) == sorted([("note", False, b"yes"), *(("files", True, data) for data in contents)])


@pytest.mark.parametrize("content", [b"", b"\r\n", b"--XX", b"\r\n--X", b"--", b"a\r\n\r\nb", b"\x00" * 100])
def test_content_that_looks_like_a_boundary_survives(content: bytes) -> None:
    body = bytearray(b"--XX\r\n" + FILE.encode() + content + b"\r\n--XX--\r\n")
    assert read(parse_form(body, KIND, max_files=1)) == [("file", True, content)]


@pytest.mark.parametrize(
    "kind",
    [
        'multipart/form-data; boundary="XX"',
        "Multipart/Form-Data;BOUNDARY=XX",
        "multipart/form-data; charset=utf-8; boundary=XX",
    ],
)
def test_the_boundary_is_found_however_it_is_written(kind: str) -> None:
    assert read(parse_form(form(FILE + "x"), kind, max_files=1)) == [("file", True, b"x")]


def test_a_preamble_an_epilogue_and_blanks_after_a_boundary_are_allowed() -> None:
    body = bytearray(b"hello\r\n--XX \t\r\n" + FILE.encode() + b"x\r\n--XX--\r\nbye")
    assert read(parse_form(body, KIND, max_files=1)) == [("file", True, b"x")]


@pytest.mark.parametrize(
    ("body", "kind", "status", "reason"),
    [
        (b"x", "application/json", 415, "send the film as multipart"),
        (b"x", "", 415, "send the film as multipart"),
        (b"x", "multipart/form-data", 400, "without a boundary"),
        (b"", KIND, 400, "boundary does not occur"),
        (b"text", KIND, 400, "boundary does not occur"),
        (b"--XXjunk\r\n\r\n\r\n--XX--", KIND, 400, "not followed by a line end"),
        (b"--XX", KIND, 400, "not followed by a line end"),
        (b"--XX\r\n" + FILE.encode() + b"never ends", KIND, 400, "a part has no end"),
        (b"--XX\r\nno headers end\r\n--XX--", KIND, 400, "a part has no end"),
        (b"--XX\r\n\r\ncontent\r\n--XX--", KIND, 400, "a part has no name"),
        (b"--XX\r\nContent-Disposition: form-data\r\n\r\nx\r\n--XX--", KIND, 400, "a part has no name"),
        (b"--XX\r\nX: " + b"y" * 9000 + b"\r\n\r\nx\r\n--XX--", KIND, 400, "a part has no end"),
        (bytes(form(*[FILE + "x"] * 3)), KIND, 413, "more than 2 files"),
        (bytes(form(*['Content-Disposition: form-data; name="a"\r\n\r\nx'] * 17)), KIND, 400, "more than 16 fields"),
    ],
)
def test_a_malformed_form_is_refused_with_its_fault(body: bytes, kind: str, status: int, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        parse_form(bytearray(body), kind, max_files=2)
    assert caught.value.status == status


def test_no_mutated_form_does_anything_but_parse_or_be_refused() -> None:
    rng = np.random.default_rng(0)
    whole = np.frombuffer(bytes(form(FILE + "film", FILE + "other")), dtype=np.uint8)
    for _ in range(3000):
        body = whole.copy()
        body[rng.integers(0, len(body), rng.integers(1, 6))] = rng.choice(list(b'\r\n-X:;="\x00\xff'), 1)
        cut = body[: rng.integers(0, len(body) + 1)] if rng.random() < 0.3 else body
        try:
            parse_form(bytearray(cut.tobytes()), KIND, max_files=2)
        except RequestError as error:
            assert error.status in (400, 413)


def receiving(chunks: list[bytes], *, then: str = "http.request", delay: float = 0.0) -> Callable[[], Any]:
    waiting = list(chunks)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(delay)
        if not waiting:
            return {"type": then}
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting) or then != "http.request"}

    return receive


def body_of(reader: BodyReader, receive: Callable[[], Any], declared: int | None = None) -> bytes:
    async def main() -> bytes:
        with reader.holding() as body:
            await reader.read(body, receive, declared)
            assert reader.held == len(body)
            return bytes(body)

    try:
        return asyncio.run(main())
    finally:
        assert reader.held == 0


def test_a_body_in_pieces_is_joined() -> None:
    reader = BodyReader(max_body=100, budget=1000, timeout_s=5)
    assert body_of(reader, receiving([b"ab", b"", b"cd"])) == b"abcd"


@pytest.mark.parametrize("chunks", [[b"x" * 101], [b"x" * 60] * 2, [b"x" * 60] * 50])
def test_a_body_over_the_limit_is_refused_while_it_arrives(chunks: list[bytes]) -> None:
    reader = BodyReader(max_body=100, budget=1000, timeout_s=5)
    with pytest.raises(RequestError, match="larger than") as caught:
        body_of(reader, receiving(chunks))
    assert caught.value.status == 413


def test_a_body_declared_far_too_large_is_not_read_at_all() -> None:
    async def never() -> dict[str, Any]:
        raise AssertionError("read")

    with pytest.raises(RequestError, match="larger than"):
        body_of(BodyReader(max_body=100, budget=1000, timeout_s=5), never, 201)


def test_bodies_together_stay_below_their_budget() -> None:
    reader = BodyReader(max_body=100, budget=150, timeout_s=5)
    reader.held = 100
    with pytest.raises(RequestError, match="too much data") as caught, reader.holding() as body:
        asyncio.run(reader.read(body, receiving([b"x" * 60]), None))
    assert caught.value.status == 503 and reader.held == 100


def test_a_body_that_does_not_come_is_given_up_and_a_client_that_leaves_is_noticed() -> None:
    reader = BodyReader(max_body=100, budget=1000, timeout_s=0.05)
    with pytest.raises(RequestError, match=r"did not arrive within 0\.05 s") as caught:
        body_of(reader, receiving([b"x"] * 9, delay=0.02))
    assert caught.value.status == 408
    with pytest.raises(ClientGone):
        body_of(reader, receiving([b"x"], then="http.disconnect"))
