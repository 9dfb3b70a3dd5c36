"""An HTTP proxy before an S3 server that breaks requests the way networks and object stores do.

Clients are pointed at the proxy; it forwards to the server what it does not break. `Host` stays as the client signed
it: the server checks the signature against that. One request a connection keeps the code small and the faults clean.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

Fault = Literal["503", "slow-down", "reset", "delay", "cut-body", "lost-response"]
FAULTS: tuple[Fault, ...] = ("503", "slow-down", "reset", "delay", "cut-body", "lost-response")
_DELAY_SECONDS = 1.0
_HEAD_LIMIT = 1 << 16


@dataclass
class FaultProxy:
    """What it does, changed while it runs; what it has done."""

    upstream: tuple[str, int]
    share: float = 0.0
    """Of the requests that are broken."""
    kinds: tuple[Fault, ...] = FAULTS
    outage_until: float = 0.0
    """`time.monotonic()` until which every connection is refused an answer."""
    seed: int = 0
    port: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by what was done with them: the fault's name, `outage` or `passed`; those that the server refused are
    counted under `refused` as well."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def begin_outage(self, seconds: float) -> None:
        """Be away for a while."""
        self.outage_until = time.monotonic() + seconds

    def _choose(self) -> Fault | None:
        return self._random.choice(self.kinds) if self._random.random() < self.share else None

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: one request."""
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            if time.monotonic() < self.outage_until:
                self.seen["outage"] += 1
                _abort(writer)
                return
            head = await reader.readuntil(b"\r\n\r\n")
            fault = self._choose()
            self.seen[fault or "passed"] += 1
            await self._serve(head, fault, reader, writer)
        writer.close()

    async def _serve(
        self, head: bytes, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if fault == "reset":
            _abort(writer)
            return
        fields = _fields(head)
        if fields.get(b"expect", b"").lower() == b"100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await writer.drain()
        body = await _body(fields, reader)
        match fault:
            case "503":
                _answer(writer, b"503 Service Unavailable", b"ServiceUnavailable")
                return
            case "slow-down":
                _answer(writer, b"503 Slow Down", b"SlowDown")
                return
            case "delay":
                await asyncio.sleep(_DELAY_SECONDS)
        answer = await self._forward(head, body)
        if answer.startswith(b"HTTP/1.1 403"):
            self.seen["refused"] += 1
        match fault:
            case "lost-response":  # the server has done it, and the client does not hear of it
                _abort(writer)
            case "cut-body":
                ends = answer.find(b"\r\n\r\n") + 4
                writer.write(answer[: ends + max(0, (len(answer) - ends) // 2)])
                await writer.drain()
                _abort(writer)
            case _:
                writer.write(answer)
                await writer.drain()

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        """The server's whole answer."""
        lines = [
            line for line in head.split(b"\r\n") if line and not line.lower().startswith((b"connection:", b"expect:"))
        ]
        reader, writer = await asyncio.open_connection(*self.upstream)
        writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
        await writer.drain()
        answer = await reader.read(-1)
        writer.close()
        # The client must not send another request on this connection.
        status, _, rest = answer.partition(b"\r\n")
        return status + b"\r\nConnection: close\r\n" + rest


def _fields(head: bytes) -> dict[bytes, bytes]:
    pairs = (line.partition(b":") for line in head.split(b"\r\n")[1:] if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _body(fields: dict[bytes, bytes], reader: asyncio.StreamReader) -> bytes:
    """The request's body as it came, chunked or not."""
    if b"chunked" in fields.get(b"transfer-encoding", b"").lower():
        found = b""
        while True:
            size = await reader.readuntil(b"\r\n")
            chunk = await reader.readexactly(int(size.split(b";")[0], 16) + 2)
            found += size + chunk
            if int(size.split(b";")[0], 16) == 0:
                return found
    return await reader.readexactly(int(fields.get(b"content-length", b"0")))


def _answer(writer: asyncio.StreamWriter, status: bytes, code: bytes) -> None:
    body = b"<?xml version='1.0'?><Error><Code>" + code + b"</Code><Message>a fault of the test</Message></Error>"
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: "
    writer.write(head + str(len(body)).encode() + b"\r\n\r\n" + body)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Reset instead of a polite end."""
    writer.transport.abort()


@contextmanager
def fault_proxy(host: str, port: int, seed: int = 0) -> Iterator[FaultProxy]:
    """A proxy before host:port, on a loopback port of its own, in a thread."""
    proxy = FaultProxy((host, port), seed=seed)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0, limit=_HEAD_LIMIT)
        proxy.port = server.sockets[0].getsockname()[1]
        started.set()
        async with server:
            await server.serve_forever()

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30), "the proxy did not start"
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        thread.join(30)
        loop.close()
