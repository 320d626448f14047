"""The low-level `Executor` on the tiny model: tokens of `LLM`, responses, cancelling, threads, statistics, shutdown."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.executor.tiny_executor import (
    ANSWER_ONLY,
    PROMPT,
    await_all,
    make_executor,
    make_llm,
    only,
    plain_tokens,
    streamed_tokens,
    wait_until,
)
from tokenmill import LLM, BuildConfig, Engine, SamplingParams, build
from tokenmill.errors import (
    AllTokensBannedError,
    EngineFileError,
    InvalidParameterError,
    ModelNotFoundError,
    PromptTooLongError,
    RequestTooLargeError,
    UnsupportedFeatureError,
)
from tokenmill.executor import (
    Executor,
    FinishReason,
    KvCacheConfig,
    ModelType,
    OutputConfig,
    Request,
    Response,
    SamplingConfig,
)

pytestmark = pytest.mark.spec("A4")


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    with make_llm(tiny_model_dir) as llm:
        yield llm


@pytest.fixture(scope="module")
def executor(tiny_model_dir: Path) -> Iterator[Executor]:
    with make_executor(tiny_model_dir) as executor:
        yield executor
        executor._executor.check_integrity()
        assert executor._queue.num_open == executor.get_num_responses_ready() == 0


# ---- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_are_those_of_llm(executor: Executor, llm: LLM, streaming: bool) -> None:
    prompts = [PROMPT, PROMPT[:3], list(range(40, 100)), PROMPT[:1]]
    requests = [Request(p, 12, streaming=streaming, end_id=-1, output_config=ANSWER_ONLY) for p in prompts]
    request_ids = executor.enqueue_requests(requests)
    assert len(set(request_ids)) == len(prompts)
    responses = await_all(executor, request_ids)
    for request_id, prompt in zip(request_ids, prompts, strict=True):
        assert len(responses[request_id]) == (12 if streaming else 1)
        assert streamed_tokens(responses[request_id]) == plain_tokens(llm, prompt, 12)
        assert responses[request_id][-1].result.finish_reasons == [FinishReason.LENGTH]


def test_sampling_is_that_of_llm(executor: Executor, llm: LLM) -> None:
    settings: dict[str, Any] = {
        "temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 7, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.1,
    }  # fmt: skip
    request = Request(PROMPT, 16, end_id=-1, sampling_config=SamplingConfig(**settings), output_config=ANSWER_ONLY)
    assert only(executor, request).result.output_token_ids == [plain_tokens(llm, PROMPT, 16, **settings)]


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_prompts_may_be_arrays(executor: Executor, llm: LLM, dtype: str) -> None:
    result = only(executor, Request(np.array(PROMPT, dtype=dtype), 4, end_id=-1)).result
    assert result.output_token_ids == [PROMPT + plain_tokens(llm, PROMPT, 4)], "the prompt is part of the output"
    assert all(type(token_id) is int for token_id in result.output_token_ids[0])


def test_the_models_end_token_ends_answers_unless_another_is_given(executor: Executor, llm: LLM) -> None:
    plain = plain_tokens(llm, PROMPT, 12)
    own = only(executor, Request(PROMPT, 12, output_config=ANSWER_ONLY)).result
    assert own.output_token_ids == [llm.generate(PROMPT, SamplingParams(max_tokens=12)).outputs[0].token_ids]
    end_at = next(i for i in range(2, 12) if plain[i] not in plain[:i])
    other = only(executor, Request(PROMPT, 12, end_id=plain[end_at], output_config=ANSWER_ONLY)).result
    assert (other.output_token_ids, other.finish_reasons) == ([plain[:end_at]], [FinishReason.END_ID])


def test_log_probs_are_those_of_llm(executor: Executor, llm: LLM) -> None:
    output = llm.generate(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)).outputs[0]
    expected = [entry[token_id].logprob for token_id, entry in zip(output.token_ids, output.logprobs, strict=True)]
    config = OutputConfig(return_log_probs=True)
    result = only(executor, Request(PROMPT, 6, end_id=-1, output_config=config)).result
    assert result.log_probs == [pytest.approx(expected, abs=1e-5)]
    assert result.cum_log_probs == [pytest.approx(output.cumulative_logprob, abs=1e-4)]


def test_several_sequences_for_a_prompt(executor: Executor, llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, n=3, temperature=1.0, seed=3, ignore_eos=True)
    expected = [output.token_ids for output in llm.generate(PROMPT, params).outputs]
    for streaming in (False, True):
        sampling = SamplingConfig(temperature=1.0, seed=3, num_return_sequences=3)
        request = Request(
            PROMPT, 8, streaming=streaming, sampling_config=sampling, end_id=-1, output_config=ANSWER_ONLY
        )
        request_id = executor.enqueue_request(request)
        responses = await_all(executor, [request_id])[request_id]
        assert len(responses) == (24 if streaming else 3)
        assert [streamed_tokens(responses, index) for index in range(3)] == expected


# ---- stop words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_stop_words_end_an_answer_and_are_not_in_it(executor: Executor, llm: LLM, streaming: bool, length: int) -> None:
    plain = plain_tokens(llm, PROMPT, 24)
    at = next(i for i in range(6, 20) if plain[i : i + length] not in (plain[j : j + length] for j in range(i)))
    word = plain[at : at + length]
    false_start = [*plain[2:5], 319]
    request = Request(
        PROMPT, 24, streaming=streaming, end_id=-1, stop_words=[false_start, word], output_config=ANSWER_ONLY
    )
    request_id = executor.enqueue_request(request)
    responses = await_all(executor, [request_id])[request_id]
    assert streamed_tokens(responses) == plain[:at]
    assert responses[-1].result.finish_reasons == [FinishReason.STOP_WORDS]
    assert len(responses) == (at + 1 if streaming else 1)


def test_bad_words_do_not_come(executor: Executor, llm: LLM) -> None:
    plain = plain_tokens(llm, PROMPT, 6)
    request = Request(PROMPT, 6, end_id=-1, bad_words=np.array([plain[2:4]]), output_config=ANSWER_ONLY)
    tokens = only(executor, request).result.output_token_ids[0]
    assert tokens[:3] == plain[:3] and tokens[3] != plain[3]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"input_token_ids": [320]}, InvalidParameterError, "input_token_ids"),
        ({"input_token_ids": [5] * 96}, PromptTooLongError, "input_token_ids"),
        ({"input_token_ids": [5] * 70}, RequestTooLargeError, "input_token_ids"),
        ({"stop_words": [[1, 2], [3, 320]]}, InvalidParameterError, "stop_words"),
        ({"stop_words": [[1] * 5000]}, InvalidParameterError, "stop_words"),
        ({"bad_words": [[400]]}, InvalidParameterError, "bad_words"),
        ({"bad_words": [[token_id] for token_id in range(320)]}, AllTokensBannedError, "bad_words"),
        ({"end_id": 320}, InvalidParameterError, "end_id"),
        (
            {"sampling_config": SamplingConfig(temperature=1.0, num_return_sequences=9)},
            InvalidParameterError,
            "num_return_sequences",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused_at_once(
    narrow: Executor, changes: dict[str, Any], error: type[Exception], field: str
) -> None:
    good = Request([1, 2], 2, end_id=-1)
    bad = Request(**{"input_token_ids": [1], "max_tokens": 2, **changes})
    for enqueue in (lambda: narrow.enqueue_request(bad), lambda: narrow.enqueue_requests([good, bad])):
        with pytest.raises(error) as caught:
            enqueue()
        assert caught.value.field == field
    assert narrow.await_responses(0) == [], "nothing of a refused list is run"
    assert narrow._queue.num_open == 0


@pytest.fixture(scope="module")
def narrow(tiny_model_dir: Path) -> Iterator[Executor]:
    """An executor with small limits and no chunked context."""
    with make_executor(tiny_model_dir, max_seq_len=96, max_num_tokens=64, enable_chunked_context=False) as executor:
        yield executor


def test_limits_are_inclusive(narrow: Executor) -> None:
    assert len(only(narrow, Request([5] * 64, 100, end_id=-1)).result.output_token_ids[0]) == 96
    result = only(narrow, Request([319], 1, end_id=319, output_config=ANSWER_ONLY)).result
    assert len(result.output_token_ids[0]) <= 1


def test_a_request_that_never_fits_the_cache_names_max_tokens(tiny_model_dir: Path) -> None:
    cache = KvCacheConfig(max_tokens=128, tokens_per_block=16)
    with make_executor(tiny_model_dir, kv_cache_config=cache) as executor:
        with pytest.raises(RequestTooLargeError) as caught:
            executor.enqueue_request(Request(PROMPT, 1000))
        assert caught.value.field == "max_tokens"


def test_other_things_than_requests_are_refused(executor: Executor) -> None:
    for thing in ({"input_token_ids": [1]}, [1, 2], None):
        with pytest.raises(InvalidParameterError) as caught:
            executor.enqueue_requests([thing])
        assert caught.value.field == "request"
    assert executor.enqueue_requests([]) == []


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Engine:
    return build(tiny_model_dir, BuildConfig(dtype="float32", max_batch_size=8, max_seq_len=256))


@pytest.mark.parametrize("kind", ["directory", "buffer"])
def test_engines_give_the_tokens_of_their_model(engine: Engine, llm: LLM, tmp_path: Path, kind: str) -> None:
    source = engine.save(tmp_path / "engine") if kind == "directory" else engine.to_buffer()
    with make_executor(source) as executor:
        unpacked = executor._unpacked
        response = only(executor, Request(PROMPT, 12, end_id=-1, output_config=ANSWER_ONLY))
        assert response.result.output_token_ids[0] == plain_tokens(llm, PROMPT, 12)
    assert (unpacked is None) == (kind == "directory")
    assert unpacked is None or not Path(unpacked.name).exists()


@pytest.mark.parametrize("buffer", [b"an engine", bytearray(8), memoryview(b"")])
def test_buffers_that_are_no_engine_are_refused(buffer: bytes) -> None:
    with pytest.raises(EngineFileError):
        Executor(buffer)


def test_models_that_cannot_be_run_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((7,), InvalidParameterError, "model_path_or_buffer"),
        ((tiny_model_dir, ModelType.ENCODER_ONLY), UnsupportedFeatureError, "model_type"),
        ((tiny_model_dir, ModelType.ENCODER_DECODER), UnsupportedFeatureError, "model_type"),
        ((tiny_model_dir, "decoder"), InvalidParameterError, "model_type"),
        ((tiny_model_dir, ModelType.DECODER_ONLY, {"max_batch_size": 3}), InvalidParameterError, "executor_config"),
    ]
    for arguments, error, field in cases:
        with pytest.raises(error) as caught:
            Executor(*arguments)
        assert caught.value.field == field, arguments
    for nothing in (tmp_path / "nothing_here", "x" * 5000, "", "no\0thing"):
        with pytest.raises(ModelNotFoundError) as caught:
            Executor(nothing)
        assert caught.value.field == "model_path_or_buffer"


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", True, timedelta(seconds=-1)])
def test_bad_timeouts_are_refused(executor: Executor, timeout: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        executor.await_responses(timeout)
    assert caught.value.field == "timeout"


@pytest.mark.parametrize("request_id", [10**9, 0, -1, True, "1", 1.5, [], [1, 10**9], np.array([1, 2]), [None]])
def test_bad_request_ids_are_refused(executor: Executor, request_id: Any) -> None:
    only(executor, Request([1], 1))
    with pytest.raises(InvalidParameterError) as caught:
        executor.await_responses(0, request_id)
    assert caught.value.field == "request_id"


# ---- waiting -----------------------------------------------------------------------------------------------------


def test_waiting_ends_in_time(executor: Executor) -> None:
    for timeout in (0, 0.02, timedelta(milliseconds=20), timedelta(0)):
        before = time.monotonic()
        assert executor.await_responses(timeout) == []
        assert time.monotonic() - before < 10
    request_id = executor.enqueue_request(Request(PROMPT, 1500, end_id=-1))
    assert executor.await_responses(0.01, request_id) == []
    assert executor.get_num_responses_ready(request_id) == 0
    assert executor.cancel_request(request_id)
    assert len(executor.await_responses(1e300, np.int64(request_id))) == 1
    assert executor.await_responses(None, request_id) == executor.await_responses(None, [request_id]) == []


def test_ready_responses_are_counted(executor: Executor) -> None:
    request_ids = executor.enqueue_requests([Request(PROMPT, 5, streaming=True, end_id=-1) for _ in range(2)])
    wait_until(lambda: executor.get_num_responses_ready() == 10)
    assert [executor.get_num_responses_ready(request_id) for request_id in request_ids] == [5, 5]
    assert len(executor.await_responses(request_id=request_ids[1])) == 5
    assert executor.get_num_responses_ready() == executor.get_num_responses_ready(request_ids[0]) == 5
    responses = executor.await_responses()
    assert [response.request_id for response in responses] == [request_ids[0]] * 5


def test_threads_that_enqueue_and_threads_that_wait(executor: Executor, llm: LLM) -> None:
    """Four enqueue, two wait for any response: every response arrives once, with its client's number."""
    expected = {length: plain_tokens(llm, PROMPT[:length], 6) for length in range(1, 7)}
    num_final = threading.Semaphore(0)
    taken: list[list[Response]] = [[], []]
    is_over = threading.Event()

    def enqueue(number: int) -> None:
        for length in range(1, 7):
            request = Request(
                PROMPT[:length], 6, streaming=length % 2 == 0, end_id=-1, client_id=100 * number + length,
                output_config=ANSWER_ONLY,
            )  # fmt: skip
            executor.enqueue_request(request)

    def take(number: int) -> None:
        while not is_over.is_set():
            for response in executor.await_responses(0.02):
                taken[number].append(response)
                if response.is_final:
                    num_final.release()

    threads = [threading.Thread(target=enqueue, args=(number,)) for number in range(4)]
    takers = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    for thread in threads + takers:
        thread.start()
    for _ in range(24):
        assert num_final.acquire(timeout=60)
    is_over.set()
    for thread in threads + takers:
        thread.join(60)
    assert executor.await_responses(0) == []
    tokens: dict[int | None, list[int]] = {}
    for response in taken[0] + taken[1]:
        tokens.setdefault(response.client_id, []).extend(response.result.output_token_ids[0])
    for number in range(4):
        for length, answer in expected.items():
            # The two takers may have divided the tokens of a stream between them.
            assert sorted(tokens.pop(100 * number + length)) == sorted(answer)
    assert not tokens
