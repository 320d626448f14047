"""The server on the demo model: answers make sense, and are the same over every way to ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.live_server import LiveServer, live_server
from tokenmill import KvCacheConfig
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.errors import TokenmillError
from tokenmill.llm import LLM

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def demo_server() -> Iterator[LiveServer]:
    try:
        resolve_model("smollm2:135m")
    except (TokenmillError, OSError) as error:
        pytest.skip(f"the demo model cannot be fetched: {error}")
    cache = KvCacheConfig(max_tokens=4096)
    with (
        LLM("smollm2:135m", dtype="float32", max_seq_len=2048, kv_cache_config=cache) as llm,
        live_server(llm) as server,
    ):
        yield server
        server.wait_until_idle()


@pytest.mark.spec("A6")
def test_chat_answers_a_question(demo_server: LiveServer) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    with demo_server.client() as client:
        arguments: dict[str, Any] = {"model": "smollm2:135m", "messages": messages, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=3)
        assert "Paris" in whole.choices[0].message.content
        assert "<|im_end|>" not in whole.choices[0].message.content
        logprobs = whole.choices[0].logprobs.content
        assert "Paris" in "".join(item.token for item in logprobs)
        assert all(item.token == item.top_logprobs[0].token for item in logprobs)
        pieces = [
            choice.delta.content or ""
            for chunk in client.chat.completions.create(**arguments, stream=True)
            for choice in chunk.choices
        ]
        assert "".join(pieces) == whole.choices[0].message.content


def test_completion_scores_a_plausible_text_higher(demo_server: LiveServer) -> None:
    with demo_server.client() as client:
        answer = client.completions.create(
            model="smollm2:135m",
            prompt=["The capital of France is Paris.", "The capital of France is purple."],
            echo=True,
            logprobs=1,
            max_tokens=0,
        )
    sums = [sum(value or 0.0 for value in choice.logprobs.token_logprobs) for choice in answer.choices]
    assert sums[0] > sums[1]
    assert [choice.text for choice in answer.choices] == [
        "The capital of France is Paris.",
        "The capital of France is purple.",
    ]
