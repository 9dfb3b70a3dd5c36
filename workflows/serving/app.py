"""The picture server on Ray Serve: requests in, batches of pictures drawn, PNG out; it follows the champion.

    POST /draw      {"seed": 7, "n": 4, "class": "flags", "steps": 16}, every key optional; also style, text and map
                    (a PNG in base64) where the model was trained with them
    GET  /health    which version draws, and what keeps a newer one from it
    GET  /metrics   counters for Prometheus, of the replica that answers

What is asked is checked in `requests`, which model draws is decided in `models`; here is only what speaks HTTP and Ray.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from infra.errors import InputError
from infra.models import Registry
from infra.tracking import Tracker
from workflows.config import ServeSettings
from workflows.drawing.asking import Asked
from workflows.drawing.bundle import SERVED_BATCH
from workflows.drawing.sample import seeds_for
from workflows.release.registry import load_version
from workflows.serving.batching import Batcher
from workflows.serving.models import Holder, Item, ServedModel, try_out
from workflows.serving.requests import BadRequest, DrawRequest, Limits, read_request, too_large

_log = logging.getLogger(__name__)
APPLICATION = "hvqd"
_ROUTES = {"/draw": "POST", "/health": "GET", "/metrics": "GET"}
_OPTION = re.compile(r"--(class|style|text|map)\b")
"""The command line's messages speak of options; here they are keys."""
_LATENCIES = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Served:
    """What a server serves; sent to its replicas."""

    tracker: Tracker
    model: str
    settings: ServeSettings
    version: str | None = None
    """A version that stays, whoever is champion; None follows the champion."""

    @property
    def limits(self) -> Limits:
        """The most that one request may ask for."""
        return Limits(self.settings.max_pictures, self.settings.max_steps, self.settings.max_body_bytes)

    def load(self, version: str) -> ServedModel:
        """A version in memory."""
        return ServedModel.of(version, load_version(self.tracker, self.model, f"models:/{self.model}/{version}"))

    def champion(self) -> str | None:
        """The version that is to draw."""
        return self.version or Registry(self.tracker.uri).alias(self.model, "champion")


class Meter:
    """What a replica has done, for Prometheus."""

    def __init__(self) -> None:
        self._started = time.time()
        self._requests: Counter[int] = Counter()
        self._latencies: Counter[float] = Counter()
        self._seconds = 0.0
        self.batches = 0
        self.pictures = 0

    def answered(self, status: int, seconds: float) -> None:
        """Count a request to /draw."""
        self._requests[status] += 1
        if status == 200:
            self._seconds += seconds
            for bound in _LATENCIES:
                self._latencies[bound] += seconds <= bound

    def as_text(self, holder: Holder, waiting: int) -> str:
        """Prometheus' text format."""
        drawn = self._requests[200]
        lines = [
            f'hvqd_requests_total{{status="{status}"}} {count}' for status, count in sorted(self._requests.items())
        ]
        lines += [f'hvqd_request_seconds_bucket{{le="{bound:g}"}} {self._latencies[bound]}' for bound in _LATENCIES]
        lines += [f'hvqd_request_seconds_bucket{{le="+Inf"}} {drawn}']
        lines += [f"hvqd_request_seconds_sum {self._seconds:.6f}", f"hvqd_request_seconds_count {drawn}"]
        lines += [f"hvqd_batches_total {self.batches}", f"hvqd_pictures_total {self.pictures}"]
        lines += [f"hvqd_pictures_waiting {waiting}", f'hvqd_version_info{{version="{holder.current.version}"}} 1']
        lines += [f"hvqd_swaps_total {holder.swaps}", f"hvqd_returns_total {holder.returns}"]
        lines += [f"hvqd_version_refused {len(holder.refused)}", f"hvqd_started_seconds {self._started:.0f}"]
        return "\n".join(lines) + "\n"


class Pictures:
    """One replica: the models, a thread that draws, and a thread that looks for another champion."""

    def __init__(self, served: Served) -> None:
        """Load what is champion now and draw with it once.

        Raises:
            InputError: there is no champion.
        """
        import torch

        torch.set_num_threads(served.settings.threads)
        self._served = served
        version = served.champion()
        if version is None:
            raise InputError(f"no version of the model {served.model} has the alias champion\nhint: `hvqd promote`")
        first = served.load(version)
        try_out(first)
        self._holder = Holder(first, served.load)
        self._meter = Meter()
        self._waiting = 0
        self._away: str | None = None
        self._batcher = Batcher(self._draw, SERVED_BATCH, served.settings.batch_wait_seconds)
        if served.version is None:
            threading.Thread(target=self._follow, daemon=True, name="follow").start()

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request; whatever comes in, the answer is a status and two lines."""
        path, started = request.url.path.rstrip("/") or "/", time.monotonic()
        if path not in _ROUTES:
            return _refusal(BadRequest(f"no such path: {path[:80]}", f"there are {', '.join(_ROUTES)}", 404))
        if request.method != _ROUTES[path]:
            return _refusal(BadRequest(f"{path} answers {_ROUTES[path]} alone", f"send a {_ROUTES[path]}", 405))
        if path == "/health":
            return JSONResponse(self._health())
        if path == "/metrics":
            return PlainTextResponse(self._meter.as_text(self._holder, self._waiting))
        try:
            answer = JSONResponse(await self._answer(read_request(await self._body(request), self._served.limits)))
        except BadRequest as error:
            answer = _refusal(error)
        except Exception as error:  # the log has it; the server goes on
            _log.exception("a draw failed")
            answer = _refusal(BadRequest(f"drawing failed: {type(error).__name__}", "the server's log says more", 500))
        self._meter.answered(answer.status_code, time.monotonic() - started)
        return answer

    async def _body(self, request: Request) -> bytes:
        limits, body = self._served.limits, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.body_bytes:
                raise too_large(limits)
        return bytes(body)

    async def _answer(self, asked: DrawRequest) -> dict[str, Any]:
        model = self._holder.current
        seeds, steps = seeds_for(asked.seed, asked.count), asked.steps or model.sampling.steps
        if steps > self._served.settings.max_steps:
            steps = self._served.settings.max_steps
        async with self._place_for(asked.count):
            try:
                items = await self._items(model, asked.asked, seeds, steps)
            except InputError as error:
                problem, _, hint = _OPTION.sub(r"\1", str(error)).partition("\nhint: ")
                raise BadRequest(problem, hint) from error
            drawn = await asyncio.gather(*[self._batcher.ask(item) for item in items])
        pictures = [base64.b64encode(png).decode() for png in drawn]
        return {
            "model": self._served.model,
            "version": model.version,
            "seed": asked.seed,
            "steps": steps,
            "class": [item.asked.label for item in items],
            "images": pictures,
        }

    async def _items(self, model: ServedModel, asked: Asked, seeds: Sequence[int], steps: int) -> list[Item]:
        if asked.text is None and asked.map_png is None:
            return model.items(asked, seeds, steps)
        # A caption goes through a network of its own, which other requests need not wait for.
        return await asyncio.get_running_loop().run_in_executor(None, model.items, asked, seeds, steps)

    @contextlib.asynccontextmanager
    async def _place_for(self, count: int) -> AsyncIterator[None]:
        most = self._served.settings.max_waiting
        if self._waiting + count > most:
            raise BadRequest(f"{self._waiting} pictures wait, {most} may", "ask again in a few seconds", 503)
        self._waiting += count
        try:
            yield
        finally:
            self._waiting -= count

    def _draw(self, items: Sequence[Item]) -> list[bytes]:
        """A PNG for each."""
        drawn = self._holder.draw(items)
        self._meter.batches += 1
        self._meter.pictures += len(items)
        return drawn

    def _health(self) -> dict[str, Any]:
        return {
            "status": "ok",
            "model": self._served.model,
            "version": self._holder.current.version,
            "follows": "champion" if self._served.version is None else None,
            "refused": self._holder.refused,
            "registry": self._away or "answers",
            "waiting": self._waiting,
        }

    def _follow(self) -> None:
        """Look for another champion as long as the process lives; a registry that is away changes nothing."""
        while True:
            time.sleep(self._served.settings.follow_seconds)
            try:
                self._holder.follow(self._served.champion())
                self._away = None
            except Exception as error:  # the server outlives its registry
                self._away = " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _refusal(error: BadRequest) -> JSONResponse:
    headers = {"Retry-After": "2"} if error.status == 503 else None
    return JSONResponse(error.as_json(), status_code=error.status, headers=headers)


def start(served: Served) -> None:
    """Begin to serve on the Ray cluster that this process is connected to, and return when it answers.

    Raises:
        RuntimeError: no replica came up.
    """
    settings = served.settings
    serve.start(http_options={"host": settings.host, "port": settings.port})
    options = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(settings.threads)}}}
    deployment = serve.deployment(
        Pictures,
        name="pictures",
        num_replicas=settings.replicas,
        max_ongoing_requests=1_000,
        ray_actor_options=options,
    )
    serve.run(deployment.bind(served), name=APPLICATION, route_prefix="/")


def stop() -> None:
    """Stop serving."""
    serve.shutdown()
