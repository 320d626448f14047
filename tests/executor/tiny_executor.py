"""What the tests of the low-level executor share: the tiny model, an executor on it, and answers without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenmill import LLM, KvCacheConfig, SamplingParams
from tokenmill.executor import Executor, ExecutorConfig, ModelType, OutputConfig, Request, Response

PROMPT = list(range(20, 32))
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_batch_size": 8}
CACHE = KvCacheConfig(max_tokens=2048, tokens_per_block=16)
ANSWER_ONLY = OutputConfig(exclude_input_from_output=True)


def make_executor(model: Path | bytes, **changes: Any) -> Executor:
    """A small executor."""
    config = ExecutorConfig(**{**OPTIONS, "kv_cache_config": CACHE, **changes})
    return Executor(model, ModelType.DECODER_ONLY, config)


def make_llm(model_dir: Path) -> LLM:
    """An `LLM` that runs the model alike."""
    return LLM(model_dir, kv_cache_config=CACHE, skip_tokenizer_init=True, **OPTIONS)


def plain_tokens(llm: LLM, prompt: list[int], max_tokens: int, **sampling: Any) -> list[int]:
    """The answer of `LLM`, without end tokens."""
    output = llm.generate(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling))
    return output.outputs[0].token_ids


def await_all(executor: Executor, request_ids: list[int], timeout: float = 60.0) -> dict[int, list[Response]]:
    """All responses of some requests, until each has its final one."""
    found: dict[int, list[Response]] = {request_id: [] for request_id in request_ids}
    open_ids = set(request_ids)
    while open_ids:
        responses = executor.await_responses(timeout, sorted(open_ids))
        assert responses, "no response in time"
        for response in responses:
            found[response.request_id].append(response)
            if response.is_final:
                open_ids.remove(response.request_id)
    return found


def streamed_tokens(responses: list[Response], sequence_index: int = 0) -> list[int]:
    """The tokens of one sequence, put together; checks that the flags fit."""
    assert [response.is_final for response in responses] == [False] * (len(responses) - 1) + [True]
    results = [response.result for response in responses if response.result.sequence_index == sequence_index]
    assert [result.is_sequence_final for result in results] == [False] * (len(results) - 1) + [True]
    return [token_id for result in results for token_id in result.output_token_ids[0]]


def only(executor: Executor, request: Request) -> Response:
    """The response of a request that gives one."""
    request_id = executor.enqueue_request(request)
    (response,) = await_all(executor, [request_id])[request_id]
    return response


def wait_until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    """Wait for something that happens on another thread."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it has not happened in time"
        time.sleep(0.002)
