"""Clients of the soak: good ones, rude ones and broken ones, over real connections. Each request leaves one record."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import httpx

Kind: TypeAlias = Literal["normal", "disconnect", "malformed"]
Outcome: TypeAlias = Literal["answer", "error", "disconnected", "broken"]
"""A whole answer; one error object, as the response or as the last event; our own departure; anything else."""

REQUEST_TIMEOUT = 120.0
WORDS = "the quick brown fox jumps over a lazy dog while rain in spain stays in the plain".split()  # noqa: SIM905
MALFORMED: tuple[Any, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"prompt": "\\ud800", "max_tokens": 4}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": ' + b"[" * 5000,
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "max_tokens": "many"},
    {"prompt": "a", "temperature": -1.0},
    {"prompt": "a", "top_p": 7},
    {"prompt": "a", "n": 0},
    {"prompt": [2**40]},
    {"prompt": []},
    {"prompt": {"text": "a"}},
    {"prompt": "a", "tempratur": 0.5},
    {"prompt": "a", "best_of": 2, "n": 3},
    {"prompt": "a " * 200_000, "max_tokens": 4},
    {"messages": [{"role": "user", "content": "a"}]},
    {"prompt": "a", "logit_bias": {"x": 1}},
    {"prompt": "a", "model": "no-such-model"},
)
"""Bodies for `/v1/completions` that have to be refused."""


@dataclass(slots=True)
class RequestRecord:
    """One request as its client saw it. Times are seconds of `time.monotonic`.

    Args:
        kind: what the client meant to do.
        start_time, end_time: of the request.
        outcome: how it ended.
        status: HTTP status; 0 if there was none.
        code: of the error, if it ended with one.
        num_terminal_events: `[DONE]` and error events of a stream, or whole responses.
        token_times: when pieces of the answer came.
        detail: what was wrong with it.
    """

    kind: Kind
    start_time: float
    end_time: float = 0.0
    outcome: Outcome = "broken"
    status: int = 0
    code: str | None = None
    num_terminal_events: int = 0
    token_times: list[float] = field(default_factory=list)
    detail: str = ""


@dataclass(frozen=True)
class Load:
    """What the clients send.

    Args:
        num_clients: each sends one request after the other.
        disconnect_share, malformed_share: of all requests.
        max_prompt_words, max_tokens: of the longest request; most are much shorter.
    """

    num_clients: int = 64
    disconnect_share: float = 0.2
    malformed_share: float = 0.05
    max_prompt_words: int = 300
    max_tokens: int = 96


async def run_clients(url: str, load: Load, stop: asyncio.Event, records: list[RequestRecord], seed: int = 0) -> None:
    """Run all clients until `stop`; requests under way then are finished. Records are added as requests end."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT, limits=limits) as http:
        choosers = [random.Random(f"{seed}-{index}") for index in range(load.num_clients)]
        await asyncio.gather(*(_run_client(http, load, stop, records, choose) for choose in choosers))


async def _run_client(
    http: httpx.AsyncClient, load: Load, stop: asyncio.Event, records: list[RequestRecord], choose: random.Random
) -> None:
    await asyncio.sleep(choose.random())
    while not stop.is_set():
        draw = choose.random()
        kind: Kind = "normal"
        if draw < load.malformed_share:
            kind = "malformed"
        elif draw < load.malformed_share + load.disconnect_share:
            kind = "disconnect"
        record = RequestRecord(kind, time.monotonic())
        try:
            await _send(http, load, record, choose)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            record.outcome, record.detail = "broken", f"{type(error).__name__}: {error}"
        record.end_time = time.monotonic()
        records.append(record)
        if record.outcome in ("error", "broken") and kind != "malformed":
            await asyncio.sleep(0.5 + choose.random())  # as clients do that try again later


async def _send(http: httpx.AsyncClient, load: Load, record: RequestRecord, choose: random.Random) -> None:
    if record.kind == "malformed":
        body = choose.choice(MALFORMED)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        _read_whole(record, response.status_code, response.content)
        return
    path, body = _valid_request(load, choose)
    if not body["stream"]:
        if record.kind == "disconnect":
            await _leave_whole(http, path, body, record, choose)
            return
        response = await http.post(path, json=body)
        _read_whole(record, response.status_code, response.content)
        return
    leave_after = choose.randrange(12) if record.kind == "disconnect" else None
    async with http.stream("POST", path, json=body) as response:
        record.status = response.status_code
        if response.status_code != 200:
            _read_whole(record, response.status_code, await response.aread())
            return
        await read_events(record, response.aiter_lines(), num_choices=body.get("n", 1), leave_after=leave_after)


def _valid_request(load: Load, choose: random.Random) -> tuple[str, dict[str, Any]]:
    """Mostly short, sometimes long: lengths are exponentially distributed."""
    num_words = min(load.max_prompt_words, 1 + int(choose.expovariate(4.0) * load.max_prompt_words))
    text = " ".join(choose.choices(WORDS, k=num_words))
    body: dict[str, Any] = {
        "max_tokens": min(load.max_tokens, 1 + int(choose.expovariate(3.0) * load.max_tokens)),
        "stream": choose.random() < 0.8,
        "temperature": choose.choice((0.0, 0.7, 1.0)),
        "ignore_eos": choose.random() < 0.5,
    }
    if body["temperature"] and choose.random() < 0.1:
        body["n"] = 2
    if choose.random() < 0.1:
        body["logprobs"] = True
    if choose.random() < 0.5:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {**body, "prompt": text, **({"logprobs": 2} if "logprobs" in body else {})}


async def _leave_whole(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], record: RequestRecord, choose: random.Random
) -> None:
    """Go away while a whole answer is being made, unless it is there before."""
    try:
        response = await asyncio.wait_for(http.post(path, json=body), choose.random())
    except TimeoutError:
        record.outcome = "disconnected"
    else:
        _read_whole(record, response.status_code, response.content)


def _read_whole(record: RequestRecord, status: int, content: bytes) -> None:
    """A response that is no stream."""
    record.status = status
    record.num_terminal_events = 1
    body = json.loads(content)
    if status == 200:
        complete = all(choice["finish_reason"] in ("stop", "length") for choice in body["choices"])
        record.outcome = "answer" if complete and body["choices"] else "broken"
        record.token_times = [time.monotonic()] * body["usage"]["completion_tokens"]
        return
    record.outcome, record.code, record.detail = "error", body["error"]["code"], body["error"]["message"]


async def read_events(
    record: RequestRecord, lines: AsyncIterator[str], *, num_choices: int, leave_after: int | None = None
) -> None:
    """Follow a stream to its end and judge it: one `[DONE]` after one reason to end for each choice, or one error.

    Args:
        lines: of the response.
        num_choices: that were asked for.
        leave_after: go away after this many events; None: stay.
    """
    ended: list[int] = []
    num_events = 0
    async for line in lines:
        if leave_after is not None and num_events >= leave_after and not record.num_terminal_events:
            record.outcome = "disconnected"
            return
        if not line.startswith("data: "):
            continue
        num_events += 1
        if record.num_terminal_events:
            record.num_terminal_events += line == "data: [DONE]"
            record.outcome, record.detail = "broken", f"after the end came {line[:200]}"
        elif line == "data: [DONE]":
            record.num_terminal_events = 1
            complete = sorted(ended) == list(range(num_choices))
            record.outcome = "answer" if complete else "broken"
            record.detail = "" if complete else f"choices {sorted(ended)} of {num_choices} ended"
        else:
            _read_event(record, json.loads(line.removeprefix("data: ")), ended)
    if not record.num_terminal_events:
        record.outcome, record.detail = "broken", f"the stream ended after {num_events} events without a terminal one"


def _read_event(record: RequestRecord, event: dict[str, Any], ended: list[int]) -> None:
    if "error" in event:
        record.num_terminal_events = 1
        record.outcome, record.code, record.detail = "error", event["error"]["code"], event["error"]["message"]
        return
    for choice in event["choices"]:
        if choice["finish_reason"] is not None:
            ended.append(choice["index"])
        if choice.get("text") or choice.get("delta", {}).get("content"):
            record.token_times.append(time.monotonic())
