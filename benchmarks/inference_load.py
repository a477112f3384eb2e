"""A server on loopback under load: capacity, a steady rate, and twice what it can take."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.cells import Findings
from benchmarks.environment import ROOT
from benchmarks.harness import Samples
from hstu_dist.errors import UserError
from hstu_dist.report.results import Ratio, Row

log = logging.getLogger(__name__)

CASE = "serve, history 200, 100 candidates, HSTU-large (8 layers, D 50), threads=1, 2 cores shared with the clients"
ITEMS, HISTORY, CANDIDATES = 3_706, 200, 100
_RATE, _P99_SECONDS = 200.0, 0.1
_CLIENTS = 16


@dataclass
class Load:
    """What clients saw.

    Attributes:
        seconds: of the phase.
        latencies: of the answers with status 200.
        statuses: how often each came.
        unclear: refusals that are no 503 with JSON, and failed connections.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    unclear: int = 0

    @property
    def rate(self) -> float:
        """Answers with status 200 a second."""
        return self.statuses[200] / self.seconds

    def quantile(self, share: float) -> float:
        """Seconds below which so many answers came."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def serving(quick: bool) -> Findings:
    """Starts a server in a process of its own and measures it from this one."""
    seconds = 0.4 if quick else 8.0
    with _server() as url:
        capacity, steady, overload = asyncio.run(_phases(url, seconds))
    rows = [*_rows("as fast as 16 clients go", capacity), *_rows(f"{_RATE:g} requests/s offered", steady)]
    rows += _rows("twice the capacity offered", overload)
    answered = overload.statuses[200] + overload.statuses[503]
    total = sum(overload.statuses.values()) + overload.unclear
    clear = (answered - overload.unclear) / total
    ratios = [
        Ratio(case=CASE, metric="requests/s", a="server", b=f"{_RATE:g}", value=capacity.rate / _RATE, target=1.0),
        Ratio(
            case=CASE,
            metric=f"p99 at {_RATE:g} requests/s",
            a=f"{_P99_SECONDS * 1e3:g} ms",
            b="server",
            value=_P99_SECONDS / steady.quantile(0.99),
            target=1.0,
        ),
        Ratio(
            case=CASE, metric="200 or a clear 503 at twice the capacity", a="clear", b="all", value=clear, target=1.0
        ),
    ]
    return Findings(rows, ratios)


def _rows(contender: str, load: Load) -> list[Row]:
    def row(metric: str, value: float, unit: str) -> Row:
        return Samples((value,)).row(CASE, contender, metric, unit)

    return [
        row("answered", load.rate, "requests/s"),
        row("p50", load.quantile(0.5) * 1e3, "ms"),
        row("p99", load.quantile(0.99) * 1e3, "ms"),
        row("refused with 503", load.statuses[503] / load.seconds, "requests/s"),
        row("other outcomes", sum(load.statuses.values()) - load.statuses[200] - load.statuses[503], "requests"),
    ]


@contextlib.contextmanager
def _server() -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.inference_worker"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise UserError("the server did not start", "its messages are above")
            yield line.split()[-1]
        finally:
            process.terminate()
            # its last line must find somebody who reads
            process.wait(timeout=60)


async def _phases(url: str, seconds: float) -> tuple[Load, Load, Load]:
    asks = list(_asks())
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def one(load: Load) -> None:
            start = time.monotonic()
            headers = {"Content-Type": "application/json"}
            try:
                async with session.post(f"{url}/v1/score", data=random.choice(asks), headers=headers) as response:
                    body = await response.json()
                    load.statuses[response.status] += 1
            except (aiohttp.ClientError, TimeoutError, ValueError):
                load.unclear += 1
                return
            if response.status == 200:
                load.latencies.append(time.monotonic() - start)
                assert len(body["scores"]) == CANDIDATES
            elif response.status == 503 and body["error"]["type"] != "overloaded":
                load.unclear += 1

        await _as_fast_as_possible(one, seconds / 4)
        capacity = await _as_fast_as_possible(one, seconds)
        log.info("capacity: %.0f requests/s", capacity.rate)
        steady = await _at_rate(one, _RATE, seconds)
        overload = await _at_rate(one, 2 * capacity.rate, seconds)
    return capacity, steady, overload


async def _as_fast_as_possible(one: Callable[[Load], Awaitable[None]], seconds: float) -> Load:
    load, start = Load(), time.monotonic()

    async def client() -> None:
        while time.monotonic() - start < seconds:
            await one(load)

    await asyncio.gather(*(client() for _ in range(_CLIENTS)))
    load.seconds = time.monotonic() - start
    return load


async def _at_rate(one: Callable[[Load], Awaitable[None]], rate: float, seconds: float) -> Load:
    """Requests begin at random times, whether earlier ones are answered or not."""
    load, start, due = Load(), time.monotonic(), 0.0
    chance = random.Random(0)
    under_way: set[asyncio.Task[Any]] = set()
    while due < seconds:
        await asyncio.sleep(max(0.0, start + due - time.monotonic()))
        task = asyncio.ensure_future(one(load))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        due += chance.expovariate(rate)
    await asyncio.gather(*under_way)
    load.seconds = time.monotonic() - start
    return load


def _asks() -> Iterator[bytes]:
    """Requests of users that the server does not know: every history is computed."""
    chance = random.Random(1)
    for _ in range(200):
        times = sorted(chance.randrange(10**9, 10**9 + 10**7) for _ in range(HISTORY))
        items, candidates = ([chance.randrange(ITEMS) for _ in range(n)] for n in (HISTORY, CANDIDATES))
        text = f'{{"history": {{"item_ids": {items}, "timestamps": {times}}}, "candidates": {candidates}}}'
        yield text.encode()
