"""Long prompts are refused before they cost memory; few are tokenized at the same time."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import httpx
import openai
import pytest

from tests.server.live_server import LiveServer
from tokenmill.server.tokenizing import TokenizingPool


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "a" * 100_000}, "prompt"),
        ("completions", {"prompt": ["a", "a" * 100_000]}, "prompt"),
        ("completions", {"prompt": "a" * 100_000, "truncate_prompt_tokens": 4}, "prompt"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 50_000}] * 2}, "messages"),
    ],
)
def test_a_text_that_cannot_fit_is_not_tokenized(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    tokenizer: Any = server.llm.tokenizer
    encoded: list[int] = []
    encode = tokenizer._backend.encode

    def recording_encode(text: str, add_special_tokens: bool) -> Any:
        encoded.append(len(text))
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer._backend, "encode", recording_encode)
    response = httpx.post(f"{server.url}/v1/{path}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert not [length for length in encoded if length > 10]


def test_the_longest_text_that_can_fit_is_not_refused_for_its_length(server: LiveServer, client: openai.OpenAI) -> None:
    pool = TokenizingPool(server.llm)
    longest = max(
        len(server.llm.tokenizer.token_bytes(token_id)) for token_id in range(server.llm.tokenizer.vocab_size)
    )
    pool.check_length(longest * server.llm.max_seq_len, "prompt")
    with pytest.raises(ValueError, match="characters"):
        pool.check_length(longest * server.llm.max_seq_len + 1, "prompt")
    special = "<|endoftext|>"
    prompt = special * 3000
    assert len(special) == longest
    completion = client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 3000, "nine times as many characters as tokens that fit"


def test_few_are_tokenized_at_a_time(server: LiveServer) -> None:
    pool = TokenizingPool(server.llm)
    running, most = 0, 0
    lock, enough = threading.Lock(), threading.Event()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        enough.wait(0.05)
        with lock:
            running -= 1

    async def run_many() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(pool.run, work)

    anyio.run(run_many)
    assert 1 < most <= 4
