"""`/health`, `/health/generate`, `/ready`: what they say of an engine that works, sleeps, hangs or is dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import make_llm
from tests.server.live_server import LiveServer, live_server
from tokenmill import LLM, SamplingParams
from tokenmill.errors import QueueFullError

LONG = SamplingParams(max_tokens=3000, ignore_eos=True)


def get(server: LiveServer, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=30)


def wait_for(condition: Callable[[], bool], timeout: float = 20.0) -> float:
    """Seconds until `condition` holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout, "it does not happen"
        time.sleep(0.01)
    return time.monotonic() - started


@contextmanager
def stuck_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From now on no step of the in-process engine ends, until the context does."""
    goes_on = threading.Event()
    engine: Any = llm._executor._engine  # type: ignore[attr-defined]
    advance = engine.advance

    def blocked_advance() -> Any:
        goes_on.wait(30)
        return advance()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "advance", blocked_advance)
        yield
        goes_on.set()


@pytest.mark.spec("F2")
def test_a_stuck_engine_is_not_healthy_for_long(own_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    own_server.llm.generate("a", SamplingParams(max_tokens=4))
    with stuck_engine(own_server.llm, monkeypatch):
        result = own_server.llm.generate_async("a", LONG)
        assert get(own_server, "/health").status_code == 200, "it has just been given work"
        wait_for(lambda: get(own_server, "/health").status_code == 503)
        response = get(own_server, "/health")
        body = response.json()
        assert body["error"]["code"] == "engine_stalled"
        assert body["status"] == "unhealthy"
        [engine] = body["processes"]
        assert engine["state"] == "stalled"
        assert 1.5 < engine["progress_age"] < 10
        assert get(own_server, "/ready").status_code == 503
        generate = get(own_server, "/health/generate")
        assert (generate.status_code, generate.json()["error"]["code"]) == (503, "engine_stalled")
        assert 'tokenmill:process_ready{model_name="tiny",process="engine"} 0.0' in get(own_server, "/metrics").text
    wait_for(lambda: get(own_server, "/health").status_code == 200)
    assert get(own_server, "/ready").status_code == 200
    result.abort()


@pytest.mark.spec("F2")
def test_a_probe_gives_up_on_an_engine_that_gives_no_token(
    own_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stuck_engine(own_server.llm, monkeypatch):
        started = time.monotonic()
        response = get(own_server, "/health/generate?timeout=0.3")
        assert time.monotonic() - started < 1.4, "long before the engine counts as stalled"
    assert response.status_code == 503
    assert "0.3 s" in response.json()["error"]["message"]
    own_server.wait_until_idle()
    assert get(own_server, "/health/generate").status_code == 200


def test_an_idle_engine_is_healthy_however_long_ago_its_last_step_was(server: LiveServer) -> None:
    server.llm.generate("a", SamplingParams(max_tokens=1))
    server.wait_until_idle()
    time.sleep(1.7)
    report = get(server, "/health").json()
    assert report["status"] == "healthy"
    assert report["processes"][0]["last_step_age"] > 1.5
    result = server.llm.generate_async("a", LONG)
    assert all(get(server, "/health").status_code == 200 for _ in range(20)), "work after a long rest is no stall"
    result.abort()


@pytest.mark.spec("F2")
def test_a_probe_makes_an_idle_engine_generate(server: LiveServer) -> None:
    server.wait_until_idle()
    before = server.llm.stats().num_generated_tokens
    assert get(server, "/health/generate").json() == {"status": "ok"}
    assert server.llm.stats().num_generated_tokens == before + 1
    server.wait_until_idle()


@pytest.mark.spec("F2")
def test_probes_at_the_same_time_share_one_request(own_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(8) as pool:
        with stuck_engine(own_server.llm, monkeypatch):
            probes = [pool.submit(get, own_server, "/health/generate") for _ in range(8)]
            wait_for(lambda: own_server.llm.health().processes[0].has_work)
            time.sleep(0.3)
            assert not any(probe.done() for probe in probes)
        assert all(probe.result().status_code == 200 for probe in probes)
    own_server.wait_until_idle()
    assert own_server.llm.stats().num_generated_tokens == 1


def test_tokens_for_others_are_proof_enough(own_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue has no room for the probe's request, but the engine works."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise QueueFullError("Full.")

    result = own_server.llm.generate_async("a", LONG)
    monkeypatch.setattr(own_server.llm, "generate_async", refuse)
    assert get(own_server, "/health/generate").status_code == 200
    result.abort()
    own_server.wait_until_idle()
    assert get(own_server, "/health/generate?timeout=0.2").status_code == 503, "now there is neither"


def test_a_dead_engine_is_not_healthy(own_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_schedule() -> Any:
        raise ZeroDivisionError("the scheduler is broken")

    engine: Any = own_server.llm._executor._engine  # type: ignore[attr-defined]
    monkeypatch.setattr(engine.scheduler, "schedule", broken_schedule)
    with own_server.client() as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="a")
    for path in ("/health", "/health/generate", "/ready"):
        response = get(own_server, path)
        assert response.status_code == 503, path
        assert response.json()["error"]["code"] == "engine_error"


@pytest.mark.spec("F3")
def test_a_full_queue_is_healthy_but_not_ready(model_dir: Any) -> None:
    llm = make_llm(model_dir, max_batch_size=1, max_queue_size=1)
    with llm, live_server(llm, served_model_name="tiny") as server, server.client() as client:
        results = [llm.generate_async("a", LONG) for _ in range(2)]
        ready = get(server, "/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "queue_full")
        assert get(server, "/health").status_code == 200
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="a")
        assert caught.value.code == "queue_full"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert 'tokenmill:queue_rejections_total{model_name="tiny"} 1.0' in get(server, "/metrics").text
        for result in results:
            result.abort()
        wait_for(lambda: get(server, "/ready").status_code == 200)


def test_query_parameters_are_checked(server: LiveServer) -> None:
    for value in ("0", "-1", "nan", "1e9", "soon"):
        response = get(server, f"/health/generate?timeout={value}")
        assert response.status_code == 400, value
        assert response.json()["error"]["param"] == "timeout"
