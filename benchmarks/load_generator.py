"""Post films to a server from a process of its own, with as little processor time as can be.

    python benchmarks/load_generator.py http://127.0.0.1:8000 film.jpeg --clients 16 --seconds 10
    python benchmarks/load_generator.py http://127.0.0.1:8000 film.jpeg --rate 30 --arrivals poisson --seconds 10

Without --rate each client posts as soon as it was answered; with it, requests leave at that rate whatever comes back,
over as many connections as that takes. Prints one JSON line: answers by status, latencies in seconds, requests lost
without an answer, and the processor time used here.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gc
import json
import random
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit


def request_bytes(host: str, path: str, field: str, film: bytes) -> bytes:
    """A whole HTTP request with one file."""
    head = f'--XX\r\nContent-Disposition: form-data; name="{field}"; filename="f"\r\n'
    body = head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + film + b"\r\n--XX--\r\n"
    lines = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=XX\r\n"
    return (lines + f"Content-Length: {len(body)}\r\n\r\n").encode() + body


class Client(asyncio.Protocol):
    """One connection: posts a request, waits for its answer."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.buffer = b""
        self.started = 0.0
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def post(self, started: float) -> None:
        self.started, self.waiting, self.buffer = started, True, b""
        self.transport.write(self.load.next_request())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(self.buffer) >= end + 4 + length:
            self.waiting = False
            self.load.answered(self, int(head[9:12]), time.perf_counter() - self.started)

    def connection_lost(self, error: Exception | None) -> None:
        if self.waiting:
            self.waiting = False
            self.load.lost += 1
        self.load.closed(self)


class Load:
    """Requests in flight and what became of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        url = urlsplit(arguments.url)
        self.address = url.hostname, url.port
        host = f"{url.hostname}:{url.port}"
        films = [Path(name).read_bytes() for name in arguments.films]
        self.requests = [request_bytes(host, arguments.path, arguments.field, film) for film in films]
        self.closed_loop = arguments.rate is None
        self.sent = self.lost = 0
        self.statuses: collections.Counter[int] = collections.Counter()
        self.latencies: list[tuple[float, float]] = []
        """(when answered, seconds) of each 200."""
        self.idle: list[Client] = []
        self.stopped = False

    def next_request(self) -> bytes:
        self.sent += 1
        return self.requests[self.sent % len(self.requests)]

    def answered(self, client: Client, status: int, seconds: float) -> None:
        self.statuses[status] += 1
        if status == 200:
            self.latencies.append((time.perf_counter(), seconds))
        if self.closed_loop and not self.stopped:
            client.post(time.perf_counter())
        else:
            self.idle.append(client)

    def closed(self, client: Client) -> None:
        if client in self.idle:
            self.idle.remove(client)

    async def connect(self) -> Client:
        _, client = await asyncio.get_running_loop().create_connection(lambda: Client(self), *self.address)
        return client

    async def closed_clients(self, count: int, seconds: float) -> None:
        clients = [await self.connect() for _ in range(count)]
        for client in clients:
            client.post(time.perf_counter())
        await asyncio.sleep(seconds)

    async def open_arrivals(self, rate: float, seconds: float, *, poisson: bool) -> None:
        rng, due = random.Random(0), time.perf_counter()
        end = due + seconds
        while (due := due + (rng.expovariate(rate) if poisson else 1 / rate)) < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            client = self.idle.pop() if self.idle else await self.connect()
            # The latency counts from when the request was due: a late generator must not flatter the server.
            client.post(due)

    async def drain(self, patience_s: float) -> None:
        """Wait for the last answers; what has none by then is lost."""
        self.stopped = True
        deadline = time.perf_counter() + patience_s
        while self.open_requests and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)

    @property
    def open_requests(self) -> int:
        return self.sent - sum(self.statuses.values()) - self.lost


async def run(arguments: argparse.Namespace) -> dict[str, object]:
    load = Load(arguments)
    gc.disable()
    cpu, started = time.process_time(), time.perf_counter()
    if arguments.rate is None:
        await load.closed_clients(arguments.clients, arguments.seconds)
    else:
        await load.open_arrivals(arguments.rate, arguments.seconds, poisson=arguments.arrivals == "poisson")
    cpu, spent = time.process_time() - cpu, time.perf_counter() - started
    in_time = sum(answered - started <= spent for answered, _ in load.latencies)
    await load.drain(arguments.patience)
    return {
        "seconds": spent,
        "films_per_s": in_time / spent,
        "statuses": load.statuses,
        "lost": load.lost + load.open_requests,
        "latencies": [round(seconds, 6) for _, seconds in load.latencies],
        "cpu_s": cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("films", nargs="+")
    parser.add_argument("--path", default="/predict")
    parser.add_argument("--field", default="file")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rate", type=float, default=None, help="requests a second; without it a closed loop")
    parser.add_argument("--arrivals", choices=("even", "poisson"), default="even")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--patience", type=float, default=40, help="seconds the last answers may take")
    arguments = parser.parse_args()
    try:
        import uvloop

        runner = uvloop.run
    except ImportError:
        runner = asyncio.run
    json.dump(runner(run(arguments)), sys.stdout)


if __name__ == "__main__":
    main()
