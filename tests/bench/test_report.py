"""The report's numbers against the definitions in its module, computed here a second time with numpy."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tokenmill.bench.client import RequestRecord
from tokenmill.bench.machine import Machine
from tokenmill.bench.report import BenchmarkReport, RunDescription
from tokenmill.telemetry.stats import EngineStats, KvCacheStats

MACHINE = Machine(system="Linux", cpu="Test CPU", num_cores=2, memory_bytes=2**34, gpus=("Test GPU",))


def make_records(count: int = 23, seed: int = 0) -> list[RequestRecord]:
    """Requests of random lengths, starts and token times."""
    random = np.random.default_rng(seed)
    records = []
    for index in range(count):
        start = 100.0 + random.uniform(0, 3)
        times = start + np.cumsum(random.uniform(0.01, 0.2, size=index % 7 + 1))
        records.append(
            RequestRecord(
                start_time=start,
                token_times=times.tolist(),
                end_time=float(times[-1] + random.uniform(0, 0.01)),
                num_prompt_tokens=int(random.integers(1, 50)),
            )
        )
    return records


def make_report(records: list[RequestRecord], **changes: Any) -> BenchmarkReport:
    before = EngineStats(num_steps=10, num_generated_tokens=50, kv_cache=KvCacheStats(num_queried_tokens=100))
    after = EngineStats(
        num_steps=30,
        num_generated_tokens=130,
        num_preemptions=1,
        kv_cache=KvCacheStats(num_queried_tokens=300, num_hit_tokens=50),
    )
    values: dict[str, Any] = {
        "kind": "throughput", "model": "tiny", "machine": MACHINE, "versions": {"tokenmill": "0"},
        "configuration": {"dtype": "float32"}, "workload": {"input_len": 8}, "command": "tokenmill bench",
    }  # fmt: skip
    return BenchmarkReport.of(RunDescription(**{**values, **changes}), records, before, after)


def test_throughput_is_counts_over_the_time_between_first_start_and_last_end() -> None:
    records = make_records()
    results = make_report(records).results()
    duration = max(record.end_time for record in records) - min(record.start_time for record in records)
    num_output = sum(len(record.token_times) for record in records)
    num_prompt = sum(record.num_prompt_tokens for record in records)
    assert results["duration_s"] == pytest.approx(duration)
    assert results["num_output_tokens"] == num_output
    assert results["num_prompt_tokens"] == num_prompt
    assert results["request_throughput"] * duration == pytest.approx(len(records))
    assert results["output_throughput"] * duration == pytest.approx(num_output)
    assert results["total_throughput"] * duration == pytest.approx(num_output + num_prompt)


def distribution(values: list[float]) -> dict[str, float]:
    p50, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99])
    return {
        "count": len(values), "minimum": min(values), "maximum": max(values), "average": float(np.mean(values)),
        "p50": p50, "p90": p90, "p95": p95, "p99": p99,
    }  # fmt: skip


def test_latencies_follow_their_definitions() -> None:
    records = make_records()
    results = make_report(records).results()
    first = [1e3 * (record.token_times[0] - record.start_time) for record in records]
    latency = [1e3 * (record.end_time - record.start_time) for record in records]
    lengths = [len(record.token_times) for record in records]
    per_token = [(e2e - ttft) / (n - 1) for e2e, ttft, n in zip(latency, first, lengths, strict=True) if n > 1]
    gaps = [1e3 * gap for record in records for gap in np.diff(record.token_times)]
    assert results["ttft_ms"] == pytest.approx(distribution(first))
    assert results["latency_ms"] == pytest.approx(distribution(latency))
    assert results["tpot_ms"] == pytest.approx(distribution(per_token))
    assert results["inter_token_latency_ms"] == pytest.approx(distribution(gaps))
    assert results["output_speed_per_user"] == pytest.approx(distribution([1e3 / value for value in per_token]))
    per_user = [1e3 * n / e2e for n, e2e in zip(lengths, latency, strict=True)]
    assert results["output_throughput_per_user"] == pytest.approx(distribution(per_user))


def test_engine_numbers_are_differences_of_two_snapshots() -> None:
    results = make_report(make_records()).results()
    assert results["num_steps"] == 20
    assert results["tokens_per_step"] == pytest.approx(80 / 20)
    assert results["cache_hit_rate"] == pytest.approx(50 / 200)
    assert results["num_preemptions"] == 1


def test_failed_requests_are_counted_and_otherwise_left_out() -> None:
    records = make_records(4)
    alone = make_report(records).results()
    broken = RequestRecord(start_time=0.0, token_times=[1.0, 90.0], end_time=900.0, error="it broke")
    results = make_report([*records, broken]).results()
    assert (results["num_requests"], results["num_finished"], results["num_failed"]) == (5, 4, 1)
    for name in ("duration_s", "output_throughput", "ttft_ms", "latency_ms"):
        assert results[name] == alone[name]


def test_a_run_of_failures_has_a_report_too() -> None:
    report = make_report([RequestRecord(start_time=1.0, end_time=2.0, error="no")])
    results = report.results()
    assert results["output_throughput"] == 0.0
    assert results["ttft_ms"] is None
    assert "failed: no" in printed(report)


def test_one_token_has_no_time_per_output_token() -> None:
    report = make_report([RequestRecord(start_time=0.0, token_times=[1.0], end_time=1.0, num_prompt_tokens=3)])
    assert report.results()["tpot_ms"] is None
    assert report.results()["inter_token_latency_ms"] is None
    assert report.results()["latency_ms"]["average"] == pytest.approx(1000.0)


def test_the_json_report_has_everything_and_survives_json() -> None:
    report = make_report(make_records())
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(plain) == {
        "schema_version", "benchmark", "date", "command", "model", "machine", "versions", "configuration", "workload",
        "results", "requests",
    }  # fmt: skip
    assert plain["machine"]["cpu"] == "Test CPU"
    assert plain["machine"]["gpus"] == ["Test GPU"]
    assert plain["results"] == report.results()
    assert len(plain["requests"]) == 23
    assert plain["results"]["ttft_ms"]["p90"] == pytest.approx(
        np.percentile([row["ttft_ms"] for row in plain["requests"]], 90)
    )
    assert min(row["start_s"] for row in plain["requests"]) == 0.0


def printed(report: BenchmarkReport) -> str:
    console = Console(file=io.StringIO(), width=140)
    report.print(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_tables_name_every_number() -> None:
    report = make_report(make_records())
    text = printed(report)
    for label in (
        "Request throughput", "Output token throughput", "Total token throughput", "Output speed per user",
        "time to first token", "time per output token", "Inter-token", "End to end", "min", "max", "avg",
        "P50", "P90", "P95", "P99", "Test CPU", "Test GPU", "hit rate", "Preemptions", "float32",
    ):  # fmt: skip
        assert label in text, label
    assert f"{report.results()['output_throughput']:.2f} tokens/s" in text
    assert f"{report.results()['tpot_ms']['p99']:.2f}" in text
