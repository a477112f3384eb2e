"""A small HTTP server of one model: scores, retrieval, health and metrics.

    POST /v1/score      candidates of one request → their scores
    POST /v1/retrieve   the best items of the corpus
    GET  /health        200 while requests are taken, 503 from SIGTERM on
    GET  /metrics       for Prometheus

Errors are JSON: 400 no JSON, 404 and 405 no such place, 413 too large, 422 a request that makes no sense, 503 too many
wait or the server stops, 504 no answer in time, 500 a fault of the server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from hstu_dist.errors import UserError
from hstu_dist.inference.batching import Batcher, LateError, Limits, OverloadedError
from hstu_dist.inference.config import ServeConfig
from hstu_dist.inference.inputs import Inputs
from hstu_dist.inference.messages import Ask, BadJsonError, Reader, RetrieveAsk, ScoreAsk, error_body, requests_of
from hstu_dist.inference.model import Model
from hstu_dist.inference.requests import RequestError, Requests
from hstu_dist.inference.retrieval import RetrievalModel
from hstu_dist.inference.server_metrics import Metrics

logger = logging.getLogger(__name__)

_RETRY_SECONDS = "1"
_POLL_SECONDS = 0.02

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served.

    Attributes:
        model: scores; used by one thread.
        inputs: what it reads of a request.
        description: of the model, which every answer carries.
    """

    model: Model
    inputs: Inputs
    description: Mapping[str, Any]


@dataclass(frozen=True)
class _Job:
    """A request; `k` is None for scores."""

    requests: Requests
    k: int | None = None
    exclude_seen: bool = True


class Server:
    """Handlers and state of one server."""

    def __init__(self, served: Served, config: ServeConfig) -> None:
        self.served = served
        self.config = config
        self.metrics = Metrics(served.model.cache)
        self.stopping = False
        self.under_way = 0
        self._score, self._retrieve = Reader(ScoreAsk), Reader(RetrieveAsk)
        limits = Limits(
            pending=config.max_pending,
            jobs=config.max_batch,
            cost=config.max_batch_tokens,
            seconds=config.timeout_seconds,
        )
        # threads are counted for each thread that starts some
        threads = torch.get_num_threads()
        self.batcher: Batcher[_Job, Mapping[str, Any]] = Batcher(
            self._compute, limits, self.metrics.batch, lambda: torch.set_num_threads(threads)
        )
        self.metrics.watch_line(lambda: self.batcher.pending)

    def application(self) -> web.Application:
        """Routes and middleware."""

        async def answered(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._answered(request, handler)

        app = web.Application(client_max_size=self.config.max_body_bytes, middlewares=[web.middleware(answered)])
        app.router.add_post("/v1/score", self.score)
        app.router.add_post("/v1/retrieve", self.retrieve)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.show_metrics)
        app.on_startup.append(self._start)
        app.on_cleanup.append(self._stop)
        return app

    async def score(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/score."""
        ask = self._score.read(await request.read())
        requests = self._prepared(ask, ask.candidates)
        return self._reply(await self._submit(_Job(requests)))

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/retrieve."""
        if not isinstance(self.served.model, RetrievalModel):
            raise web.HTTPNotFound(reason="the model was trained to rank: it scores candidates")
        ask = self._retrieve.read(await request.read())
        job = _Job(self._prepared(ask, ()), ask.k or self.config.k, ask.exclude_seen)
        return self._reply(await self._submit(job))

    async def health(self, request: web.Request) -> web.StreamResponse:
        """GET /health."""
        state = "stopping" if self.stopping else "ok"
        return self._reply({"status": state, "pending": self.batcher.pending}, 503 if self.stopping else 200)

    async def show_metrics(self, request: web.Request) -> web.StreamResponse:
        """GET /metrics."""
        return web.Response(body=self.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _prepared(self, ask: Ask, candidates: Sequence[Any]) -> Requests:
        inputs, config = self.served.inputs, self.config
        requests = requests_of(ask, candidates, inputs, (config.max_events, config.max_candidates))
        return inputs.ready(requests, config.unknown)

    async def _submit(self, job: _Job) -> Mapping[str, Any]:
        if self.stopping:
            raise OverloadedError
        self.under_way += 1
        try:
            return await self.batcher.submit(job, len(job.requests.item_ids) + len(job.requests.candidate_ids))
        finally:
            self.under_way -= 1

    def _compute(self, jobs: Sequence[_Job]) -> list[Mapping[str, Any]]:
        """Answers of a batch, in order; runs in the scoring thread."""
        answers: dict[int, Mapping[str, Any]] = {}
        scored = [place for place, job in enumerate(jobs) if job.k is None]
        if scored:
            joined = Requests.joined([jobs[place].requests for place in scored])
            scores = self.served.model.score(joined, self.config.micro_batch)
            for index, place in enumerate(scored):
                first, end = joined.candidate_offsets[index : index + 2]
                answers[place] = {name: _numbers(values[first:end]) for name, values in scores.items()}
        for place, job in enumerate(jobs):
            if job.k is not None:
                assert isinstance(self.served.model, RetrievalModel)
                best = self.served.model.retrieve(job.requests, job.k, job.exclude_seen)
                found = best.ids[0] >= 0
                items = self.served.inputs.items.decode(best.ids[0][found])
                answers[place] = {"items": items, "scores": _numbers(best.scores[0][found])}
        return [answers[place] for place in range(len(jobs))]

    def _reply(self, content: Mapping[str, Any], status: int = 200) -> web.Response:
        body = json.dumps({**content, "model": self.served.description}, allow_nan=False)
        return web.Response(text=body, status=status, content_type="application/json")

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every outcome as JSON, counted and timed."""
        start = time.monotonic()
        response = await self._outcome(request, handler)
        known = request.match_info.route.resource
        place = known.canonical if known is not None else "other"
        self.metrics.request(place, response.status, time.monotonic() - start)
        return response

    async def _outcome(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            status, kind, shown = self._refusal(request, error)
        headers = {"Retry-After": _RETRY_SECONDS} if status == 503 else None
        body = json.dumps(error_body(kind, shown))
        return web.Response(text=body, status=status, content_type="application/json", headers=headers)

    def _refusal(self, request: web.Request, error: Exception) -> tuple[int, str, UserError]:
        """Status, type and text of an error."""
        where = f"{request.method} {request.path}"
        match error:
            case BadJsonError():
                refusal = 400, "bad_json", UserError(error.problem, error.remedy)
            case RequestError():
                refusal = 422, "bad_request", error
            case OverloadedError():
                reason = "the server stops" if self.stopping else f"{self.batcher.pending} requests wait already"
                refusal = 503, "overloaded", UserError(reason, "try again later, or another server")
            case LateError():
                problem = f"no answer within {self.config.timeout_seconds:g} s"
                refusal = 504, "late", UserError(problem, "send less at once, or try again later")
            case web.HTTPRequestEntityTooLarge():
                problem = f"body: expected at most {self.config.max_body_bytes} bytes"
                refusal = 413, "too_large", UserError(problem, "send fewer candidates at once")
            case web.HTTPException():
                refusal = error.status, "no_such_place", UserError(f"{where}: {error.reason}", "see docs/inference.md")
            case _:
                logger.error("%s failed", where, exc_info=error)
                refusal = 500, "fault", UserError("the server failed", "its log has the reason")
        return refusal

    async def _start(self, app: web.Application) -> None:
        # the first computation of a process takes seconds: libraries are loaded, threads are started
        num_contextual = len(self.served.inputs.contextual)
        first = Requests(
            offsets=np.array([0, 1]),
            item_ids=np.zeros(1, dtype=np.int64),
            timestamps=np.zeros(1, dtype=np.int64),
            actions=np.zeros(1, dtype=np.int64),
            candidate_offsets=np.array([0, 1]),
            candidate_ids=np.zeros(1, dtype=np.int64),
            times=np.zeros(1, dtype=np.int64),
            contextual=np.zeros((1, num_contextual), dtype=np.int64) if num_contextual else None,
        )
        jobs = [_Job(first)]
        if isinstance(self.served.model, RetrievalModel):
            jobs.append(_Job(first, k=1))
        await self.batcher.start(jobs)

    async def _stop(self, app: web.Application) -> None:
        await self.batcher.stop()


def _numbers(values: Any) -> list[float | None]:
    """JSON knows neither NaN nor infinity: null stands for no score."""
    return [float(value) if np.isfinite(value) else None for value in values]


def serve(served: Served, config: ServeConfig, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; requests in flight are answered, later ones refused.

    Args:
        served: what is served.
        config: settings.
        say: told where, once requests are taken, and at the end.

    Raises:
        UserError: the address cannot be listened on.
    """
    asyncio.run(_serve(Server(served, config), say))


async def _serve(server: Server, say: Callable[[str], None]) -> None:
    config = server.config
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=config.stop_seconds / 2)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port)
        try:
            await site.start()
        except OSError as error:
            raise UserError(
                f"{config.host}:{config.port}: cannot be listened on ({error.strerror})", "choose another host or port"
            ) from error
        host, port = runner.addresses[0][:2]
        say(f"listening on http://{host}:{port}")
        await stop.wait()
        server.stopping = True
        # while somebody is waited for, whoever comes hears why; afterwards nobody listens
        deadline = loop.time() + config.stop_seconds / 2
        while server.under_way and loop.time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        await runner.cleanup()
    say("stopped")
