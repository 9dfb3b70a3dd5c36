"""A picture server as a user starts it, and a client that asks it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.command_line import start_hvqd

_START_SECONDS = 180.0


@dataclass
class Running:
    """A server and its root."""

    process: subprocess.Popen[str]
    port: int
    root: Path

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def draw(self, **asked: object) -> dict[str, Any]:
        """The answer to a request that is in order."""
        status, body = self.ask("POST", "/draw", json.dumps(asked).encode())
        assert status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer

    def health(self) -> dict[str, Any]:
        status, body = self.ask("GET", "/health")
        assert status == 200
        answer: dict[str, Any] = json.loads(body)
        return answer

    def metrics(self) -> dict[str, float]:
        """Every counter by its name and labels."""
        lines = self.ask("GET", "/metrics")[1].decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@contextmanager
def serving(
    root: Path, port: int, folder: Path, env: Mapping[str, str], settings: Mapping[str, object]
) -> Iterator[Running]:
    """`hvqd serve` from when it answers until it has ended well.

    Args:
        folder: where it is started.
        settings: of `serve` in the configuration.
    """
    asked = [part for name, value in settings.items() for part in ("--set", f"serve.{name}={value}")]
    process = start_hvqd("serve", "--root", str(root), "--port", str(port), "--json", *asked, cwd=folder, env=env)
    try:
        running, deadline = Running(process, port, root), time.monotonic() + _START_SECONDS
        while True:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "not ready"
            with suppress(OSError):  # nobody listens yet
                if running.ask("GET", "/health")[0] == 200:  # the proxy answers before there is a replica behind it
                    break
            time.sleep(0.2)
        yield running
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert json.loads(out)["address"] == f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
