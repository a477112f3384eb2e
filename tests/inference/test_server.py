"""The server on loopback: what it answers, what it refuses, and how it stops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp")

from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer

from hstu_dist.commands.trained import Trained, load_trained, run_of
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.config import ModelUse, ServeConfig
from hstu_dist.inference.requests import Requests
from hstu_dist.inference.server import Served, Server, _serve

ROOT = Path(__file__).parents[2]
CONFIG = ServeConfig(max_candidates=50, max_events=40, max_body_bytes=20_000, timeout_seconds=20)

Client = TestClient[Any, Any]
Scenario = Callable[[Client, Server], Awaitable[None]]


@pytest.fixture(scope="session")
def trained(tiny_run: Path) -> Trained:
    return load_trained(*run_of(tiny_run, ()), ModelUse(device="cpu", threads=1), StateCache(1 << 20))


def played(trained: Trained, scenario: Scenario, **changes: Any) -> None:
    """Runs a scenario against a server of its own."""

    async def play() -> None:
        served = Served(model=trained.model, inputs=trained.inputs, description={"step": trained.step})
        server = Server(served, replace(CONFIG, **changes))
        async with TestClient(TestServer(server.application())) as client:
            await scenario(client, server)

    asyncio.run(play())


def ask(items: list[Any], candidates: list[Any], **more: Any) -> dict[str, Any]:
    times = list(range(100, 100 + 10 * len(items), 10))
    return {"history": {"item_ids": items, "timestamps": times}, "candidates": candidates, **more}


def expected(trained: Trained, items: list[int], candidates: list[int], at: int | None = None) -> list[float]:
    times = np.arange(100, 100 + 10 * len(items), 10)
    requests = Requests(
        offsets=np.array([0, len(items)]),
        item_ids=trained.inputs.items.encode(items),
        timestamps=times,
        actions=np.zeros(len(items), dtype=np.int64),
        candidate_offsets=np.array([0, len(candidates)]),
        candidate_ids=trained.inputs.items.encode(candidates),
        times=np.array([times[-1] if at is None else at]),
    )
    scores: list[float] = trained.model.score(requests.most_recent(trained.inputs.max_events), 1024)["scores"].tolist()
    return scores


@pytest.mark.distributed
def test_scores_and_retrieval(trained: Trained) -> None:
    async def scenario(client: Client, server: Server) -> None:
        asks = [
            (ask([1, 2, 3], [5, 6, 5]), expected(trained, [1, 2, 3], [5, 6, 5])),
            (ask([4], []), []),
            (ask([1, 2, 3], [5], user="u", time=10**9), expected(trained, [1, 2, 3], [5], 10**9)),
            (ask([1, 2, 3, 4], [5], user="u", time=10**9), expected(trained, [1, 2, 3, 4], [5], 10**9)),
            (ask(list(range(30)), [3], user=7), expected(trained, list(range(30)), [3])),
        ]
        # at once and one after another
        for answers in (
            await asyncio.gather(*(client.post("/v1/score", json=body) for body, _ in asks)),
            [await client.post("/v1/score", json=body) for body, _ in asks],
        ):
            for response, (_, scores) in zip(answers, asks, strict=True):
                content = await response.json()
                assert response.status == 200 and content["model"] == {"step": trained.step}
                assert content["scores"] == pytest.approx(scores, abs=1e-5)
        body = {"history": ask([1, 2], [])["history"], "k": 5}
        content = await (await client.post("/v1/retrieve", json=body)).json()
        assert len(content["items"]) == 5 and not {1, 2} & set(content["items"])
        assert content["scores"] == pytest.approx(expected(trained, [1, 2], content["items"]), abs=1e-5)
        text = await (await client.get("/metrics")).text()
        assert f'hstu_requests_total{{path="/v1/score",status="200"}} {2.0 * len(asks)}' in text
        assert "hstu_cache_hits" in text and "hstu_batch_seconds_bucket" in text
        assert await (await client.get("/health")).json() == {
            "status": "ok",
            "pending": 0,
            "model": {"step": trained.step},
        }

    played(trained, scenario)
    assert trained.model.cache is not None and trained.model.cache.statistics.hits >= 3


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"\xff\xfe", 400, None),
        (b"[" * 9_000, 400, None),
        (b"[]", 422, "body"),
        (b"{}", 422, "history"),
        (ask([1], [2], wrong=3), 422, "body"),
        (ask([1], [True]), 422, "candidates.0"),
        (ask([1], [1.5]), 422, "candidates.0"),
        (ask([1], ["a"]), 422, "candidates"),
        (ask([1], [10**30]), 422, "candidates"),
        (ask([1], [99]), 422, "candidates"),
        (ask([-1], [1]), 422, "item_ids"),
        (ask([], [1]), 422, "item_ids"),
        (ask([1], [1] * 51), 422, "candidates"),
        (ask([1] * 41, [1]), 422, "history"),
        ({**ask([1, 2], [1]), "history": {"item_ids": [1, 2], "timestamps": [1]}}, 422, "history.timestamps"),
        ({**ask([1, 2], [1]), "history": {"item_ids": [1, 2], "timestamps": [2, 1]}}, 422, "timestamps"),
        ({**ask([1, 2], [1]), "history": {"item_ids": [1], "timestamps": [-1]}}, 422, "history.timestamps.0"),
        ({**ask([1, 2], [1]), "history": {"item_ids": [1], "timestamps": [2**70]}}, 422, "history.timestamps.0"),
        (ask([1, 2], [1], time=50), 422, "timestamps"),
        (ask([1], [2], user="u" * 2000), 422, "user"),
        (b"1" * 20_001, 413, None),
    ],
)
def test_bad_requests_have_typed_errors(body: Any, status: int, field: str | None, trained: Trained) -> None:
    async def scenario(client: Client, server: Server) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await client.post("/v1/score", data=data)
        error = (await response.json())["error"]
        assert response.status == status and error.get("field") == field, error
        assert error["problem"] and error["type"] in ("bad_json", "bad_request", "too_large")
        assert "Traceback" not in json.dumps(error)
        # the next one is served as if nothing had been
        assert (await client.post("/v1/score", json=ask([1], [2]))).status == 200

    played(trained, scenario)


@pytest.mark.distributed
def test_unknown_items_may_be_skipped(trained: Trained) -> None:
    async def scenario(client: Client, server: Server) -> None:
        content = await (await client.post("/v1/score", json=ask([1, 99], [2, 98, 3]))).json()
        known = {"history": {"item_ids": [1], "timestamps": [100]}, "time": 110, "candidates": [2, 3]}
        plain = await (await client.post("/v1/score", json=known)).json()
        assert content["scores"][1] is None
        assert [content["scores"][0], content["scores"][2]] == pytest.approx(plain["scores"], abs=1e-6)
        content = await (await client.post("/v1/score", json=ask([99], [2]))).json()
        assert content["scores"] == [None]

    played(trained, scenario, unknown="skip")


@pytest.mark.distributed
def test_other_places_and_methods(trained: Trained) -> None:
    async def scenario(client: Client, server: Server) -> None:
        for method, path, status in (("GET", "/", 404), ("GET", "/v1/score", 405), ("POST", "/health", 405)):
            response = await client.request(method, path)
            assert response.status == status
            assert (await response.json())["error"]["type"] == "no_such_place"

    played(trained, scenario)


class Held:
    """A server whose batches wait for a word.

    Attributes:
        sizes: of the batches that were begun.
        go: lets them all end.
    """

    def __init__(self, server: Server) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()
        self._begun = threading.Event()
        self._compute = server.batcher._compute
        server.batcher._compute = self._wait_and_compute

    async def begun(self) -> None:
        """Returns once a batch is computed."""
        assert await asyncio.to_thread(self._begun.wait, 20)

    def _wait_and_compute(self, jobs: Any) -> Any:
        self.sizes.append(len(jobs))
        self._begun.set()
        assert self.go.wait(20)
        return self._compute(jobs)


@pytest.mark.distributed
def test_overload_is_refused_at_once_and_the_rest_answered_in_batches(trained: Trained) -> None:
    async def scenario(client: Client, server: Server) -> None:
        held = Held(server)
        first = asyncio.create_task(client.post("/v1/score", json=ask([1], [2])))
        await held.begun()
        others = [asyncio.create_task(client.post("/v1/score", json=ask([1], [2]))) for _ in range(29)]
        async with asyncio.timeout(20):
            while sum(other.done() for other in others) < 21:
                await asyncio.sleep(0.01)
        held.go.set()
        responses = await asyncio.gather(first, *others)
        statuses = [response.status for response in responses]
        assert statuses.count(200) == 9 and statuses.count(503) == 21
        refused = next(response for response in responses if response.status == 503)
        assert refused.headers["Retry-After"] == "1"
        assert (await refused.json())["error"]["problem"] == "8 requests wait already"
        assert held.sizes == [1, 4, 4]

    played(trained, scenario, max_pending=8, max_batch=4)


@pytest.mark.distributed
def test_a_late_answer_is_504_and_is_not_computed(trained: Trained) -> None:
    async def scenario(client: Client, server: Server) -> None:
        held = Held(server)
        first = asyncio.create_task(client.post("/v1/score", json=ask([1], [2])))
        await held.begun()
        responses = await asyncio.gather(first, *(client.post("/v1/score", json=ask([1], [2])) for _ in range(2)))
        assert [response.status for response in responses] == [504] * 3
        assert (await responses[0].json())["error"]["type"] == "late"
        held.go.set()
        # long enough for the other two
        await asyncio.sleep(0.5)
        # who waited for the first batch was late when its turn came
        assert held.sizes == [1]

    played(trained, scenario, timeout_seconds=1.0, max_batch=1)


@pytest.mark.distributed
def test_a_fault_is_told_to_those_it_hit(trained: Trained, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: Client, server: Server) -> None:
        compute = server.batcher._compute

        def failing(jobs: Any) -> Any:
            raise RuntimeError("secret of the machine")

        server.batcher._compute = failing
        response = await client.post("/v1/score", json=ask([1], [2]))
        assert response.status == 500 and "secret" not in await response.text()
        server.batcher._compute = compute
        assert (await client.post("/v1/score", json=ask([1], [2]))).status == 200

    played(trained, scenario)
    assert "secret of the machine" in caplog.text


def _post(url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    data = json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, method="POST"), timeout=30) as answer:
        return answer.status, json.loads(answer.read())


@pytest.mark.distributed
@pytest.mark.slow
def test_the_command_serves_until_it_is_asked_to_stop(tiny_run: Path, trained: Trained) -> None:
    command = [sys.executable, "-m", "hstu_dist", "serve", str(tiny_run), "port=0", "device=cpu", "threads=1"]
    command.append("timeout_seconds=20")
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        ExitStack() as stack,
    ):
        stack.callback(process.kill)
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline() for _ in range(2)]
        url = lines[1].split()[-1]
        assert lines[0].startswith(f"serving step {trained.step} of ") and url.startswith("http://127.0.0.1:")
        status, content = _post(f"{url}/v1/score", ask([1, 2, 3], [5, 6]))
        assert status == 200 and content["scores"] == pytest.approx(expected(trained, [1, 2, 3], [5, 6]), abs=1e-5)
        with pytest.raises(urllib.error.HTTPError, match="422") as refused:
            _post(f"{url}/v1/score", ask([1], [99]))
        refused.value.close()
        taken = [*command[:5], f"port={url.rpartition(':')[2]}", "device=cpu"]
        second = subprocess.run(taken, cwd=ROOT, capture_output=True, text=True, check=False)
        assert second.returncode == 2 and "cannot be listened on" in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stdout.read() == "stopped\n" and process.stderr.read() == ""


@pytest.mark.distributed
def test_whoever_comes_while_it_stops_hears_so(trained: Trained) -> None:
    async def scenario() -> tuple[list[int], str]:
        served = Served(model=trained.model, inputs=trained.inputs, description={"step": trained.step})
        server, said = Server(served, replace(CONFIG, port=0)), list[str]()
        serving = asyncio.create_task(_serve(server, said.append))
        while not said:
            await asyncio.sleep(0.02)
        url = said[0].split()[-1]
        async with ClientSession() as client:
            held = Held(server)
            under_way = asyncio.create_task(client.post(f"{url}/v1/score", json=ask([1], [2])))
            await held.begun()
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(20):
                while not server.stopping:
                    await asyncio.sleep(0.01)
            # connections of their own
            async with ClientSession() as late:
                statuses = [
                    (await late.get(f"{url}/health")).status,
                    (await late.post(f"{url}/v1/score", json=ask([1], [2]))).status,
                ]
            held.go.set()
            statuses.append((await under_way).status)
            await serving
        return statuses, said[-1]

    assert asyncio.run(scenario()) == ([503, 503, 200], "stopped")


@pytest.mark.distributed
def test_stopping_answers_what_is_under_way_and_refuses_the_rest(trained: Trained) -> None:
    async def scenario(client: Client, server: Server) -> None:
        held = Held(server)
        under_way = asyncio.create_task(client.post("/v1/score", json=ask([1], [2])))
        await held.begun()
        server.stopping = True
        refused = await client.post("/v1/score", json=ask([1], [2]))
        assert refused.status == 503 and (await refused.json())["error"]["problem"] == "the server stops"
        assert (await client.get("/health")).status == 503
        held.go.set()
        assert (await under_way).status == 200

    played(trained, scenario)
