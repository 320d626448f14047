"""The same behaviour wherever engines and postprocessing run: tokens, text, errors, statistics, ends.

Every test runs on each kind of executor; what it must give is known, or taken from the engine in this process.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.executor.conftest import NAN_TOKEN, make_llm, wait_until, wait_until_idle
from tokenmill import LLM, CompletionOutput, RequestOutput, SamplingParams
from tokenmill.config import StatsConfig
from tokenmill.errors import (
    AllTokensBannedError,
    InvalidLogitsError,
    InvalidParameterError,
    PromptTooLongError,
    QueueFullError,
    RequestTimeoutError,
    TokenmillError,
)
from tokenmill.outputs import TokenLogprobs
from tokenmill.telemetry.stats import IterationStats

pytestmark = [pytest.mark.spec("B3"), pytest.mark.spec("B6")]

TEXTS = ["the quick brown fox", "a stitch in time", "rain", "the lazy dog saves nine in spain"]


def sampling(**values: Any) -> SamplingParams:
    """Parameters that never choose the token whose embedding is not a number."""
    return SamplingParams(**{"bad_token_ids": [NAN_TOKEN], **values})


LONG = sampling(max_tokens=3000, ignore_eos=True)


def essence(output: CompletionOutput) -> tuple[Any, ...]:
    """What must not depend on where things run."""
    return output.index, output.text, output.token_ids, output.finish_reason, output.stop_reason


def same_logprobs(left: list[TokenLogprobs], right: list[TokenLogprobs]) -> None:
    """Equal but for rounding: batches differ from run to run."""
    assert [list(entry) for entry in left] == [list(entry) for entry in right]
    for one, other in zip(left, right, strict=True):
        for token, logprob in one.items():
            assert logprob.logprob == pytest.approx(other[token].logprob, abs=1e-4)
            assert logprob.rank == other[token].rank


def same(left: RequestOutput, right: RequestOutput) -> None:
    assert [essence(one) for one in left.outputs] == [essence(one) for one in right.outputs]
    assert (left.prompt, left.prompt_token_ids) == (right.prompt, right.prompt_token_ids)
    for one, other in zip(left.outputs, right.outputs, strict=True):
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
        same_logprobs(one.logprobs, other.logprobs)
        same_logprobs(one.prompt_logprobs, other.prompt_logprobs)


PARAMS = [
    sampling(max_tokens=40, ignore_eos=True),
    sampling(max_tokens=40, ignore_eos=True, temperature=1.0, seed=5, top_p=0.9, repetition_penalty=1.1),
    sampling(max_tokens=20, ignore_eos=True, n=3, temperature=1.2, seed=7),
    sampling(max_tokens=20, ignore_eos=True, n=1, best_of=3, temperature=1.2, seed=7),
    sampling(max_tokens=12, logprobs=3, prompt_logprobs=2),
    sampling(max_tokens=12, detokenize=False, logit_bias={65: 5.0}, bad_token_ids=[33, NAN_TOKEN]),
    sampling(max_tokens=60, temperature=1.5, seed=2**63 + 11, skip_special_tokens=False),
    sampling(max_tokens=30, min_tokens=9, presence_penalty=0.5, frequency_penalty=0.5, stop_token_ids=[33, 65]),
]


def test_tokens_text_and_logprobs_are_the_same(llm: LLM, reference: LLM) -> None:
    prompts = [text for text in TEXTS for _ in PARAMS]
    params = PARAMS * len(TEXTS)
    outputs, expected = llm.generate(prompts, params), reference.generate(prompts, params)
    for output, right in zip(outputs, expected, strict=True):
        same(output, right)


def test_a_stream_adds_up_to_the_whole(llm: LLM, reference: LLM) -> None:
    params = sampling(max_tokens=60, ignore_eos=True, temperature=1.0, seed=3, logprobs=1)
    whole = reference.generate(TEXTS[0], params).outputs[0]
    outputs = list(llm.generate_async(TEXTS[0], params, streaming=True))
    assert len(outputs) > 5
    assert "".join(output.outputs[0].text_diff for output in outputs) == whole.text
    assert [token for output in outputs for token in output.outputs[0].token_ids_diff] == whole.token_ids
    same_logprobs([entry for output in outputs for entry in output.outputs[0].logprobs_diff], whole.logprobs)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    metrics = outputs[-1].metrics
    assert metrics.first_scheduled_time is not None and metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time


def test_many_streams_in_one_event_loop(llm: LLM, reference: LLM) -> None:
    params = [sampling(max_tokens=25, ignore_eos=True, temperature=1.0, seed=seed) for seed in range(12)]

    async def text_of(one: SamplingParams) -> str:
        text = ""
        async for output in llm.generate_async(TEXTS[1], one, streaming=True):
            text += output.outputs[0].text_diff
        return text

    async def main() -> list[str]:
        return await asyncio.gather(*(text_of(one) for one in params))

    expected = reference.generate([TEXTS[1]] * len(params), params)
    assert asyncio.run(main()) == [output.outputs[0].text for output in expected]


def test_stop_strings_end_text_and_tokens_at_the_same_place(llm: LLM, reference: LLM) -> None:
    free = sampling(max_tokens=200, ignore_eos=True, temperature=1.0, seed=1)
    text = reference.generate(TEXTS[2], free).outputs[0].text
    for start, length in ((3, 1), (10, 4), (25, 7), (60, 2)):
        for include in (False, True):
            stop = text[start : start + length]
            params = sampling(
                max_tokens=200,
                ignore_eos=True,
                temperature=1.0,
                seed=1,
                stop=[stop, "never there"],
                include_stop_str_in_output=include,
            )
            output = llm.generate(TEXTS[2], params)
            same(output, reference.generate(TEXTS[2], params))
            end = text.index(stop) + (len(stop) if include else 0)
            assert output.outputs[0].text == text[:end]
            assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    wait_until_idle(llm)


WRONG: dict[str, tuple[Any, SamplingParams, dict[str, Any], type[TokenmillError], str]] = {
    "empty prompt": ([], sampling(), {}, InvalidParameterError, "prompt"),
    "no such token": ([1, 320], sampling(), {}, InvalidParameterError, "prompt_token_ids"),
    "prompt too long": ([5] * 16_384, sampling(), {}, PromptTooLongError, "prompt"),
    "too many sequences": ([5], sampling(n=9, temperature=1.0), {}, InvalidParameterError, "n"),
    "priority": ([5], sampling(), {"priority": math.nan}, InvalidParameterError, "priority"),
    "timeout of 0": ([5], sampling(), {"timeout": 0}, InvalidParameterError, "timeout"),
    "timeout of nan": ([5], sampling(), {"timeout": math.nan}, InvalidParameterError, "timeout"),
    "timeout of True": ([5], sampling(), {"timeout": True}, InvalidParameterError, "timeout"),
    "all tokens are bad": ([5], sampling(bad_token_ids=list(range(320))), {}, AllTokensBannedError, "bad_token_ids"),
    "all tokens end too early": (
        [5],
        sampling(min_tokens=2, stop_token_ids=list(range(320))),
        {},
        AllTokensBannedError,
        "min_tokens",
    ),
    "half a pair": ([5], sampling(stop="\ud800"), {}, InvalidParameterError, "stop"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_at_the_door(llm: LLM, name: str) -> None:
    prompt, params, options, error_class, field = WRONG[name]
    finished = llm.stats().num_finished
    with pytest.raises(error_class) as caught:
        llm.generate_async(prompt, params, **options)
    assert caught.value.field == field
    assert llm.stats().num_finished == finished


def test_a_request_that_fails_in_the_engine_fails_alone(llm: LLM, reference: LLM) -> None:
    params = sampling(max_tokens=30, ignore_eos=True)
    before = llm.stats().num_finished.get("invalid_logits", 0)
    good = [llm.generate_async(text, params) for text in TEXTS]
    bad = llm.generate_async([5, NAN_TOKEN, 6], params, streaming=True)
    with pytest.raises(InvalidLogitsError) as caught:
        next(bad)
    with pytest.raises(InvalidLogitsError) as expected:
        reference.generate([5, NAN_TOKEN, 6], params)
    assert caught.value.to_dict() == expected.value.to_dict()
    for result, right in zip(good, reference.generate(TEXTS, params), strict=True):
        same(result.result(30), right)
    assert llm.stats().num_finished["invalid_logits"] == before + 1


def test_a_request_that_has_banned_everything_fails_alone(llm: LLM, reference: LLM) -> None:
    """Bad words of two tokens ban the whole vocabulary once the first of them is there: the third token is the last."""
    params = sampling(max_tokens=30, ignore_eos=True)
    expected = reference.generate(TEXTS, params)
    token_ids = expected[0].outputs[0].token_ids
    first = token_ids[2]
    assert first not in token_ids[:2]
    before = llm.stats().num_finished.get("all_tokens_banned", 0)
    good = [llm.generate_async(text, params) for text in TEXTS]
    request, text = llm._inputs.make_request(llm._executor.next_request_id(), TEXTS[0], params, 0.5)
    bad_words = tuple((first, last) for last in range(320))
    bad = llm._executor.submit(replace(request, bad_words=bad_words), prompt=text, streaming=True)
    seen: list[int] = []
    with pytest.raises(AllTokensBannedError, match="No token may come next") as caught:
        for output in bad:
            seen = output.outputs[0].token_ids
    assert (caught.value.http_status, caught.value.field) == (400, None)
    assert seen == token_ids[:3]
    for result, right in zip(good, expected, strict=True):
        same(result.result(30), right)
    assert llm.stats().num_finished["all_tokens_banned"] == before + 1
    wait_until_idle(llm)


def test_abort_ends_a_running_request_once(llm: LLM) -> None:
    result = llm.generate_async(TEXTS[0], LONG, streaming=True)
    next(result)
    assert llm.abort(result)
    output = result.result(30)
    assert output.outputs[0].finish_reason == "cancelled"
    assert 0 < output.outputs[0].length < 3000
    assert llm.tokenizer is not None
    assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)
    assert not llm.abort(result)
    assert not llm.abort(10**9)
    wait_until_idle(llm)


def test_abort_ends_what_has_not_begun(llm: LLM) -> None:
    results = [llm.generate_async(TEXTS[0], LONG) for _ in range(40)]
    for result in reversed(results):
        assert result.abort()
    for result in results:
        assert result.result(30).outputs[0].finish_reason == "cancelled"
    wait_until_idle(llm)


def test_deadlines_end_what_runs_and_what_waits(llm: LLM) -> None:
    before = llm.stats().num_finished.get("request_timeout", 0)
    results = [llm.generate_async(TEXTS[0], LONG, timeout=0.2, streaming=index == 0) for index in range(30)]
    started = time.monotonic()
    for result in results:
        with pytest.raises(RequestTimeoutError):
            result.result(30)
    assert time.monotonic() - started < 10
    assert llm.stats().num_finished["request_timeout"] == before + 30
    assert llm.generate(TEXTS[0], sampling(max_tokens=3), timeout=60.0).finished
    wait_until_idle(llm)


def test_a_full_queue_refuses_and_recovers(llm: LLM) -> None:
    rejected = llm.stats().num_rejected
    limit = 40 + 8 * max(1, llm.args.num_replicas)
    results = [llm.generate_async(TEXTS[0], LONG) for _ in range(limit)]
    with pytest.raises(QueueFullError):
        llm.generate_async(TEXTS[0], LONG)
    assert llm.stats().num_rejected == rejected + 1
    for result in results:
        result.abort()
    for result in results:
        result.result(30)
    many = llm.generate([TEXTS[3]] * (limit + 20), sampling(max_tokens=2, ignore_eos=True))
    assert [output.outputs[0].length for output in many] == [2] * (limit + 20)
    wait_until_idle(llm)


def test_statistics_count_everything_once(llm: LLM) -> None:
    started, before = time.monotonic(), llm.stats()
    outputs = llm.generate(TEXTS * 3, sampling(max_tokens=7, ignore_eos=True))
    after = llm.stats()
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_cached = after.kv_cache.num_hit_tokens - before.kv_cache.num_hit_tokens
    assert after.num_generated_tokens - before.num_generated_tokens == 12 * 7
    assert after.num_prompt_tokens - before.num_prompt_tokens == num_prompt_tokens - num_cached
    assert after.num_finished["length"] - before.num_finished.get("length", 0) == 12
    assert after.num_steps > before.num_steps
    assert after.last_step_time is not None and time.monotonic() - after.last_step_time < 30
    assert after.workers.num_replicas == after.workers.num_ready == llm.args.num_replicas
    assert llm.stats() == after  # reading changes nothing
    records: list[IterationStats] = []

    def has_all() -> bool:
        records.extend(record for record in llm.get_stats(0.2) if record.end_time > started)
        return len(records) == after.num_steps - before.num_steps

    wait_until(has_all)
    assert sum(record.num_generated_tokens for record in records) == 12 * 7
    assert sum(record.num_prompt_tokens for record in records) == num_prompt_tokens - num_cached
    assert {record.replica for record in records} <= set(range(max(1, llm.args.num_replicas)))
    assert all(record.duration > 0 for record in records)
    assert llm.get_stats() == []


@pytest.mark.spec("C5")
@pytest.mark.parametrize("num_replicas", [0, 1])
def test_records_of_steps_and_requests(model_dir: Path, num_replicas: int) -> None:
    config = StatsConfig(iter_stats_max_iterations=50, request_stats_max_iterations=50)
    with make_llm(model_dir, num_replicas=num_replicas, stats_config=config) as llm:
        llm.generate(
            "rain", sampling(max_tokens=3, ignore_eos=True)
        )  # so that ids of requests are not those of attempts
        skipped = [llm._executor.next_request_id() for _ in range(5)]
        output = llm.generate(TEXTS[0], sampling(max_tokens=7, ignore_eos=True))
        wait_until(lambda: len(llm.stats().recent_steps) == llm.stats().num_steps)
        stats = llm.stats()
        assert output.request_id > skipped[-1]
        assert sum(step.num_generated_tokens for step in stats.recent_steps) == 10
        seen = {one.request_id: one.stage for step in stats.recent_requests for one in step.requests}
        assert seen == {1: "finished", output.request_id: "finished"}
        assert llm.stats() == stats, "reading takes nothing out"


def test_health_and_description(llm: LLM, reference: LLM) -> None:
    llm.check_health()
    health = llm.health()
    assert (health.state, health.message) == ("healthy", "")
    assert len(health.processes) == max(1, llm.args.num_replicas) + llm.args.num_postprocess_workers
    assert {process.state for process in health.processes} == {"ready"}
    assert len({process.pid for process in health.processes}) == len(health.processes)
    assert llm.description.model == reference.description.model
    assert llm.description.memory.num_blocks == reference.description.memory.num_blocks
    assert llm.max_seq_len == reference.max_seq_len
