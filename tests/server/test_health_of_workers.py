"""What the health endpoints say while a worker process is stopped, goes on, is killed and comes back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import make_llm
from tests.server.live_server import LiveServer, live_server
from tests.server.test_health import get, wait_for

UNHEALTHY_WITHIN = 2.0
SLACK = 1.0
"""For a busy machine; the soak measures the promise itself."""


@pytest.fixture(scope="module")
def served(model_dir: Path) -> Iterator[LiveServer]:
    with make_llm(model_dir, num_replicas=1) as llm, live_server(llm, served_model_name="tiny") as running:
        yield running


def worker_pid(server: LiveServer) -> int:
    [worker] = server.llm.health().processes
    assert worker.pid is not None
    return worker.pid


def complete(server: LiveServer) -> httpx.Response:
    body = {"prompt": "a", "max_tokens": 3, "timeout": 30}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


@pytest.mark.spec("F2")
@pytest.mark.parametrize("is_busy", [False, True])
def test_a_stopped_worker_is_not_healthy_for_long(served: LiveServer, is_busy: bool) -> None:
    assert complete(served).status_code == 200
    wait_for(lambda: get(served, "/health").status_code == 200)
    pid = worker_pid(served)
    os.kill(pid, signal.SIGSTOP)
    try:
        result = served.llm.generate_async("a") if is_busy else None
        seconds = wait_for(lambda: get(served, "/health").status_code == 503)
        assert seconds < UNHEALTHY_WITHIN + SLACK
        body = get(served, "/health").json()
        assert (body["error"]["code"], body["processes"][0]["state"]) == ("engine_stalled", "silent")
        assert get(served, "/ready").status_code == 503
        assert get(served, "/health/generate").status_code == 503
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: get(served, "/health").status_code == 200)
    assert get(served, "/health/generate").status_code == 200
    if result is not None:
        assert len(result.result(timeout=30).outputs[0].token_ids) > 0


@pytest.mark.spec("F2")
def test_a_killed_worker_is_not_healthy_until_it_is_back(served: LiveServer) -> None:
    os.kill(worker_pid(served), signal.SIGKILL)
    wait_for(lambda: get(served, "/health").status_code == 503, timeout=UNHEALTHY_WITHIN + SLACK)
    assert get(served, "/ready").json()["error"]["code"] == "worker_died"
    assert complete(served).status_code == 200, "it waits for the next worker"
    assert get(served, "/health/generate").status_code == 200
    metrics = get(served, "/metrics").text
    assert 'tokenmill:worker_restarts_total{model_name="tiny"} 1.0' in metrics
    assert 'tokenmill:process_restarts_total{model_name="tiny",process="worker-0"} 1.0' in metrics
