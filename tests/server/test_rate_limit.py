"""A client's requests a minute: the count alone, and over a socket."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.server.live_server import LiveServer, live_server
from tokenmill.errors import InvalidParameterError
from tokenmill.server import rate_limit
from tokenmill.server.rate_limit import RateLimiter

pytestmark = pytest.mark.spec("F3")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_requests_pass_at_once_and_then_evenly() -> None:
    clock = Clock()
    limiter = RateLimiter(6, clock)  # one every ten seconds
    assert [limiter.take("a") for _ in range(6)] == [0.0] * 6
    assert limiter.take("a") == pytest.approx(10.0)
    assert limiter.take("a") == pytest.approx(10.0)  # what was refused was not counted
    clock.now += 9.5
    assert limiter.take("a") == pytest.approx(0.5)
    clock.now += 0.5
    assert limiter.take("a") == 0.0
    assert limiter.take("a") == pytest.approx(10.0)
    clock.now += 3600
    assert [limiter.take("a") for _ in range(7)] == [*[0.0] * 6, pytest.approx(10.0)]  # patience is not saved up


def test_never_more_than_twice_the_limit_in_any_minute() -> None:
    clock = Clock()
    limiter = RateLimiter(30, clock)
    passed = []
    for _ in range(4000):
        clock.now += 0.05
        if limiter.take("a") == 0.0:
            passed.append(clock.now)
    assert max(sum(start <= time < start + 60 for time in passed) for start in passed) <= 60
    assert len(passed) == pytest.approx(30 + 200 / 2, abs=1)  # the first at once, then one every two seconds


def test_clients_do_not_touch_each_other() -> None:
    limiter = RateLimiter(1, Clock())
    assert limiter.take("a") == 0.0
    assert limiter.take("b") == 0.0
    assert limiter.take("a") > 0.0


def test_clients_that_are_even_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "_MAX_CLIENTS", 10)
    clock = Clock()
    limiter = RateLimiter(60, clock)
    limiter.take("first")
    clock.now += 30
    for number in range(1000):
        clock.now += 1.0
        assert limiter.take(f"client {number}") == 0.0
        assert len(limiter._even_at) <= 11


@pytest.mark.parametrize("limit", [0, -1])
def test_no_limit_below_one(limit: int) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        RateLimiter(limit)
    assert caught.value.field == "requests_per_minute"


def test_server_refuses_and_says_when_to_come_back(server: LiveServer) -> None:
    with (
        live_server(server.llm, served_model_name="tiny", requests_per_minute=2) as limited,
        limited.client() as client,
    ):
        for _ in range(2):
            assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="a", max_tokens=1)
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
        assert caught.value.response.headers["x-ratelimit-limit-requests"] == "2"
        assert client.models.list().data  # reading is free, and so is looking after the server
        assert httpx.get(f"{limited.url}/health").status_code == 200
        assert 'status="429"' in httpx.get(f"{limited.url}/metrics").text
