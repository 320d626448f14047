"""The client keeps to its limits and schedule, counts what comes, and records failures."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.bench.scripted_llm import ScriptedLLM
from tokenmill.bench.client import RequestRecord, run_requests
from tokenmill.bench.workload import BenchmarkRequest
from tokenmill.errors import InvalidParameterError


def run(llm: ScriptedLLM, requests: list[BenchmarkRequest], **options: Any) -> list[RequestRecord]:
    return asyncio.run(run_requests(llm, requests, **options))  # type: ignore[arg-type]


def test_records_are_in_order_and_count_what_came() -> None:
    requests = [BenchmarkRequest((9,) * (index + 1), 5 + index) for index in range(6)]
    finished: list[int] = []
    records = run(ScriptedLLM(), requests, on_finished=lambda: finished.append(1))
    assert [record.num_prompt_tokens for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record.num_output_tokens for record in records] == [5, 6, 7, 8, 9, 10]
    assert {record.num_cached_tokens for record in records} == {3}
    assert len(finished) == 6


def test_times_are_in_order_and_agree_with_each_other() -> None:
    record = run(ScriptedLLM(interval=0.005), [BenchmarkRequest((9,), 8)])[0]
    assert record.start_time < record.token_times[0]
    assert record.token_times == sorted(record.token_times)
    assert record.token_times[-1] <= record.end_time
    first, per_token = record.time_to_first_token, record.time_per_output_token
    assert first is not None and first >= 0.005
    assert per_token is not None
    assert first + per_token * 7 == pytest.approx(record.latency)
    assert sum(record.inter_token_latencies) == pytest.approx(record.token_times[-1] - record.token_times[0])


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency_is_reached_and_kept(limit: int) -> None:
    llm = ScriptedLLM()
    run(llm, [BenchmarkRequest((9,), 4)] * 9, concurrency=limit)
    assert llm.max_running == limit


def test_without_a_limit_all_are_sent_at_once() -> None:
    llm = ScriptedLLM(interval=0.02)
    run(llm, [BenchmarkRequest((9,), 2)] * 12)
    assert llm.max_running == 12


def test_requests_are_sent_when_they_are_due() -> None:
    requests = [BenchmarkRequest((9,), 1, arrival) for arrival in (0.0, 0.05, 0.1)]
    began = time.perf_counter()
    records = run(ScriptedLLM(), requests)
    starts = [record.start_time - records[0].start_time for record in records]
    assert starts == pytest.approx([0.0, 0.05, 0.1], abs=1e-6)
    assert records[0].start_time >= began
    assert records[2].token_times[0] >= began + 0.1


def test_waiting_for_a_slot_counts_when_requests_have_arrival_times() -> None:
    requests = [BenchmarkRequest((9,), 10, arrival) for arrival in (0.0, 0.001)]
    first, second = run(ScriptedLLM(interval=0.005), requests, concurrency=1)
    assert second.start_time == pytest.approx(first.start_time + 0.001)
    assert second.time_to_first_token is not None
    assert second.time_to_first_token >= 0.05  # ten tokens of the first come before


def test_refused_and_failed_requests_are_recorded_and_the_others_go_on() -> None:
    requests = [BenchmarkRequest((token,), 3) for token in (9, 1, 2, 9)]
    records = run(ScriptedLLM(), requests)
    assert [record.error for record in records] == [None, "refused", "broke", None]
    assert [record.num_output_tokens for record in records] == [3, 0, 1, 3]


def test_a_cancelled_run_aborts_its_requests() -> None:
    llm = ScriptedLLM(interval=0.01)

    async def cancel_soon() -> None:
        task = asyncio.create_task(run_requests(llm, [BenchmarkRequest((9,), 1000)] * 3))  # type: ignore[arg-type]
        while llm.num_running < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_soon())
    assert sorted(llm.aborted) == [1, 2, 3]


def test_a_concurrency_below_one_is_refused() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        run(ScriptedLLM(), [], concurrency=0)
    assert caught.value.field == "concurrency"
