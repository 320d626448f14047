"""Records of iterations and requests, as the low-level `Executor` gives them."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.executor.tiny_executor import (
    PROMPT,
    await_all,
    make_executor,
    only,
)
from tokenmill.executor import (
    BatchingType,
    Executor,
    OutputConfig,
    Request,
)

pytestmark = pytest.mark.spec("A4")


def settle(executor: Executor) -> None:
    """Wait until the engine is between two steps, so that the last one is recorded."""
    executor._executor.check_integrity()


@pytest.mark.spec("C5")
def test_iterations_are_told_once_and_add_up(tiny_model_dir: Path) -> None:
    with make_executor(tiny_model_dir, request_stats_max_iterations=100) as executor:
        assert executor.get_latest_iteration_stats() == executor.get_latest_request_stats() == []
        request_ids = executor.enqueue_requests([Request(PROMPT, 5, end_id=-1), Request(PROMPT[:4], 3, end_id=-1)])
        await_all(executor, request_ids)
        settle(executor)
        iterations = executor.get_latest_iteration_stats()
        assert [stats.iter for stats in iterations] == list(range(len(iterations)))
        assert len(iterations) == executor._executor.stats().num_steps
        batching = [stats.inflight_batching_stats for stats in iterations]
        assert sum(stats.num_ctx_tokens for stats in batching) == len(PROMPT) + 4
        assert sum(stats.num_gen_tokens for stats in batching) == 8
        assert sum(stats.num_completed_requests for stats in iterations) == 2
        assert all(s.num_scheduled_requests == s.num_context_requests + s.num_gen_requests for s in batching)
        assert iterations[0].max_num_active_requests == 8
        assert iterations[-1].num_active_requests == iterations[-1].num_queued_requests == 0
        as_json = json.loads(iterations[0].to_json())
        assert as_json["iterLatencyMS"] == iterations[0].iter_latency_ms > 0
        assert as_json["numNewActiveRequests"] >= 1
        assert as_json["inflightBatchingStats"]["numContextRequests"] >= 1
        cache = as_json["kvCacheStats"]
        assert cache["usedNumBlocks"] + cache["freeNumBlocks"] == cache["maxNumBlocks"] == 128
        assert abs(datetime.fromisoformat(as_json["timestamp"]).timestamp() - time.time()) < 60

        steps = executor.get_latest_request_stats()
        assert [step.iter for step in steps] == [stats.iter for stats in iterations]
        course = [stats for step in steps for stats in step.request_stats if stats.id == request_ids[0]]
        assert [stats.num_generated_tokens for stats in course if stats.scheduled] == [1, 2, 3, 4, 5]
        assert course[-1].stage == "GENERATION_COMPLETE" and course[-1].context_prefill_position == len(PROMPT)
        assert json.loads(steps[-1].to_json())["requestStats"][0]["contextPrefillPosition"] == len(PROMPT)

        assert executor.get_latest_iteration_stats() == executor.get_latest_request_stats() == []
        only(executor, Request(PROMPT, 2, end_id=-1))
        settle(executor)
        assert [stats.iter for stats in executor.get_latest_iteration_stats()] == [len(iterations), len(iterations) + 1]


def test_records_are_bounded(tiny_model_dir: Path) -> None:
    with make_executor(tiny_model_dir, iter_stats_max_iterations=3) as executor:
        only(executor, Request(PROMPT, 9, end_id=-1))
        settle(executor)
        assert [stats.iter for stats in executor.get_latest_iteration_stats()] == [6, 7, 8]
        assert executor.get_latest_request_stats() == [], "off unless asked for"


def test_performance_metrics_of_a_request(tiny_model_dir: Path) -> None:
    with make_executor(tiny_model_dir) as executor:
        result = only(executor, Request(PROMPT, 3, output_config=OutputConfig(return_perf_metrics=True))).result
    metrics = result.request_perf_metrics
    assert metrics is not None and metrics.finished_time is not None and metrics.first_token_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_static_batches_run_to_their_end(tiny_model_dir: Path) -> None:
    """The short request of the first batch leaves a slot free; nobody takes it before the long one ends."""
    with make_executor(tiny_model_dir, batching_type=BatchingType.STATIC, max_batch_size=2) as executor:
        lengths = (2, 12, 4)
        request_ids = executor.enqueue_requests([Request(PROMPT, length, end_id=-1) for length in lengths])
        await_all(executor, request_ids)
        settle(executor)
        active = [stats.num_active_requests for stats in executor.get_latest_iteration_stats()]
        admitted_late = active.index(0)
        assert 12 <= admitted_late + 1 <= 13
        assert max(active[admitted_late:]) == 1
