"""Request bodies: read with a limit while they arrive, and taken apart as multipart/form-data.

A file's declared name and type are thrown away here: they are believed nowhere, kept nowhere and logged nowhere.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from errors import RequestError

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

MAX_PART_HEADERS = 8192
"""Bytes of headers one part may have."""
MAX_FIELDS = 16
"""Parts that are not files a form may have."""
DRAIN_FACTOR = 2
"""A body up to this many times too large is read to its end, so that its sender gets to see the answer."""

BOUNDARY = re.compile(r';\s*boundary=(?:"([^"\r\n]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
NAME = re.compile(rb';\s*name=(?:"((?:[^"\\\r\n]|\\.)*)"|([^\s;"]+))', re.IGNORECASE)
FILE_NAME = re.compile(rb";\s*filename\*?=", re.IGNORECASE)
DISPOSITION = re.compile(rb"(?:^|\r\n)content-disposition:\s*form-data\s*(;[^\r\n]*)", re.IGNORECASE)


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a form."""

    name: str
    is_file: bool
    content: memoryview
    """A view of the body."""


class BodyReader:
    """Reads request bodies, each up to a limit and all of them together up to a budget."""

    def __init__(self, *, max_body: int, budget: int, timeout_s: float) -> None:
        self.max_body, self.budget, self.timeout_s = max_body, budget, timeout_s
        self.held = 0
        """Bytes of all bodies in memory."""

    @contextmanager
    def holding(self) -> Iterator[bytearray]:
        """An empty body whose bytes count against the budget until the block ends."""
        body = bytearray()
        try:
            yield body
        finally:
            self.held -= len(body)

    async def read(self, body: bytearray, receive: Receive, declared: int | None) -> None:
        """Fill `body`; RequestError 413 over the limit, 503 over the budget, 408 when too slow; ClientGone."""
        if declared is not None and declared > DRAIN_FACTOR * self.max_body:
            raise self._too_large()
        try:
            await asyncio.wait_for(self._read(body, receive), self.timeout_s)
        except asyncio.TimeoutError:
            raise RequestError(408, f"the body did not arrive within {self.timeout_s:g} s") from None

    async def _read(self, body: bytearray, receive: Receive) -> None:
        surplus, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk, more = message.get("body", b""), message.get("more_body", False)
            if surplus or len(body) + len(chunk) > self.max_body:
                surplus += len(chunk)
                if surplus > (DRAIN_FACTOR - 1) * self.max_body:
                    break
                continue
            if self.held + len(chunk) > self.budget:
                raise RequestError(503, "too much data is being received at once; try again", retry_after=1)
            self.held += len(chunk)
            body += chunk
        if surplus:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body is larger than {self.max_body / 2**20:g} MiB")


def parse_form(body: bytearray, content_type: str, *, max_files: int) -> list[Part]:
    """The parts of a multipart/form-data body; RequestError 415, 400 or 413 (too many files)."""
    kind, _, _ = content_type.partition(";")
    if kind.strip().lower() != "multipart/form-data":
        raise RequestError(415, "send the film as multipart/form-data, for example: curl -F file=@film.jpeg")
    found = BOUNDARY.search(content_type)
    if found is None:
        raise RequestError(400, "multipart/form-data without a boundary")
    parts: list[Part] = []
    for head, content in _split(body, (found[1] or found[2]).encode("latin-1", "replace")):
        parts.append(_part(head, content))
        if sum(part.is_file for part in parts) > max_files:
            raise RequestError(413, f"more than {max_files} files in one request")
        if sum(not part.is_file for part in parts) > MAX_FIELDS:
            raise RequestError(400, f"more than {MAX_FIELDS} fields in one form")
    return parts


def _split(body: bytearray, boundary: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(headers, content) of each part."""
    opening, divider = b"--" + boundary, b"\r\n--" + boundary
    position = 0 if body.startswith(opening) else body.find(divider) + 2
    if position == 1:
        raise _malformed("its boundary does not occur in it")
    position += len(opening)
    while not body.startswith(b"--", position):
        start = _end_of_line(body, position)
        blank = body.find(b"\r\n\r\n", start - 2, start + MAX_PART_HEADERS)
        end = body.find(divider, max(blank + 4, start))
        if blank < 0 or end < 0:
            raise _malformed("a part has no end")
        yield bytes(body[start:blank]), memoryview(body)[blank + 4 : end]
        position = end + len(divider)


def _end_of_line(body: bytearray, position: int) -> int:
    """Where the line after a boundary starts; blanks may stand before its end."""
    end = body.find(b"\r\n", position, position + 64)
    if end < 0 or bytes(body[position:end]).strip(b" \t"):
        raise _malformed("a boundary is not followed by a line end")
    return end + 2


def _part(head: bytes, content: memoryview) -> Part:
    disposition = DISPOSITION.search(head)
    name = NAME.search(disposition[1]) if disposition else None
    if disposition is None or name is None:
        raise _malformed("a part has no name")
    return Part((name[1] or name[2] or b"").decode("utf-8", "replace"), bool(FILE_NAME.search(disposition[1])), content)


def _malformed(reason: str) -> RequestError:
    return RequestError(400, f"malformed multipart body: {reason}")
