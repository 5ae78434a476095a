"""HTTP connections that may not linger: uvicorn's own protocol with a limit on the time and size of request headers.

uvicorn bounds how long a connection idles between two requests, but waits for ever for headers that trickle in, and
keeps headers and trailers without end. A connection that has not sent them in time, or sends too many, is closed
without an answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_TIMEOUT_S = 10.0
"""From the connection, or from the first byte of a further request, to the end of its headers."""
MAX_HEADER_BYTES = 65536
"""Headers, trailers and the framing of chunks together; as many bytes more as the body has."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._received = self._body = 0
        self._too_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Headers are awaited from now on."""
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Count what arrives and close when there is too much that is no body."""
        self._received += len(data)
        super().data_received(data)
        if self._received - 2 * self._body > MAX_HEADER_BYTES:
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        """A piece of the body, without the framing of its chunks."""
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next request starts anew."""
        self._received = self._body = 0
        super().on_message_complete()

    def on_message_begin(self) -> None:
        """The first byte of a request has arrived."""
        super().on_message_begin()
        self._await_headers()

    def on_headers_complete(self) -> None:
        """The request is the application's, whose own limits hold for its body."""
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        if self._too_late is None:
            self._too_late = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None
