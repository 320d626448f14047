"""`tokenmill bench` on a tiny model: the numbers of the report agree with each other and with what was asked."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.conftest import Program
from tokenmill.tokenization import load_tokenizer

ENGINE = ("--dtype", "float32", "--num-threads", "1", "--kv-cache-tokens", "4096")


def read_report(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return report


@pytest.mark.spec("A3")
@pytest.mark.spec("G1")
def test_throughput_report_is_consistent(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    done = program(
        "bench", "throughput", str(tiny_model), "--isl", "20", "--osl", "7", "--num-requests", "12",
        "--concurrency", "4", "--report-json", "r.json", *ENGINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("Request throughput", "TTFT", "P99", "12 of 12"):
        assert text in done.stdout
    assert "prefix cache is off" in done.stderr
    report = read_report(tmp_path / "r.json")
    results, requests = report["results"], report["requests"]
    assert results["num_finished"] == len(requests) == 12
    assert {row["num_prompt_tokens"] for row in requests} == {20}
    assert {row["num_output_tokens"] for row in requests} == {7}
    duration = results["duration_s"]
    assert results["output_throughput"] == pytest.approx(12 * 7 / duration)
    assert results["total_throughput"] == pytest.approx(12 * 27 / duration)
    assert results["request_throughput"] == pytest.approx(12 / duration)
    assert duration == pytest.approx(max(row["start_s"] + row["latency_ms"] / 1e3 for row in requests))
    for name, column in (("ttft_ms", "ttft_ms"), ("tpot_ms", "tpot_ms"), ("latency_ms", "latency_ms")):
        values = [row[column] for row in requests]
        for key, percent in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
            assert results[name][key] == pytest.approx(np.percentile(values, percent)), (name, key)
        assert results[name]["average"] == pytest.approx(np.mean(values))
    for row in requests:
        assert row["tpot_ms"] == pytest.approx((row["latency_ms"] - row["ttft_ms"]) / 6)
    assert results["cache_hit_rate"] == 0.0
    assert results["num_steps"] >= 12 * 7 / 4
    assert report["workload"]["input_len"] == 20
    assert report["configuration"]["enable_block_reuse"] is False
    assert report["configuration"]["backend"] == "engine"
    assert "attn_backend" not in report["configuration"], "the program has kernels of its own"
    assert "bench throughput" in report["command"]


def test_a_profile_beside_the_report(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("bench", "throughput", str(tiny_model), "--isl", "4", "--osl", "3", "--num-requests", "2", *ENGINE)
    done = program(*arguments, "--profile", "t.json")
    assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout and "Share" in done.stdout
    assert "ui.perfetto.dev" in done.stderr
    timeline = json.loads((tmp_path / "t.json").read_text("utf-8"))
    assert {event["cat"] for event in timeline["traceEvents"] if "cat" in event} >= {"step", "cpu_op"}
    done = program(*arguments, "--profile", "nowhere/t.json")
    assert done.returncode == 2
    assert "nowhere" in done.stderr


def test_latency_is_one_request_after_the_other(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    done = program(
        "bench", "latency", str(tiny_model), "--isl", "8", "--osl", "5", "--num-iterations", "4",
        "--report-json", "r.json", *ENGINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "r.json")
    rows = report["requests"]
    assert len(rows) == 4
    for before, after in itertools.pairwise(rows):
        assert after["start_s"] >= before["start_s"] + before["latency_ms"] / 1e3 - 1e-6
    assert report["results"]["inter_token_latency_ms"]["count"] == 4 * 4
    assert report["benchmark"] == "latency"


def test_a_dataset_is_sent_as_it_is_and_shares_prefixes(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    shared = "the same long beginning of every prompt, longer than one cache block of tokens, "
    lines = [{"prompt": f"{shared}{index}", "output_tokens": index + 1} for index in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ["bench", "throughput", str(tiny_model), "--dataset", "d.jsonl", "--concurrency", "1", *ENGINE]
    done = program(*arguments, "--report-json", "on.json")
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "on.json")
    assert [row["num_output_tokens"] for row in report["requests"]] == [1, 2, 3, 4]
    tokenizer = load_tokenizer(tiny_model)
    lengths = [len(tokenizer.encode(line["prompt"])) for line in lines]
    assert [row["num_prompt_tokens"] for row in report["requests"]] == lengths
    assert min(lengths) > 64
    assert report["results"]["cache_hit_rate"] > 0.5
    assert report["requests"][0]["num_cached_tokens"] == 0
    assert report["requests"][3]["num_cached_tokens"] >= 64
    assert report["workload"]["dataset"] == "d.jsonl"
    done = program(*arguments, "--no-prefix-cache", "--report-json", "off.json")
    assert done.returncode == 0, done.stderr
    assert read_report(tmp_path / "off.json")["results"]["cache_hit_rate"] == 0.0


def test_a_request_rate_spreads_the_requests(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    done = program(
        "bench", "throughput", str(tiny_model), "--isl", "4", "--osl", "2", "--num-requests", "6",
        "--request-rate", "40", "--seed", "5", "--report-json", "r.json", *ENGINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    starts = [row["start_s"] for row in read_report(tmp_path / "r.json")["requests"]]
    gaps = np.random.default_rng(5).exponential(1 / 40, size=6)
    assert starts == pytest.approx(np.cumsum(gaps) - gaps[0], abs=1e-6)


def test_dummy_weights_without_a_tokenizer(program: Program, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("skip_tokenizer_init: true\n")
    done = program(
        "bench", "throughput", str(tiny_model), "--load-format", "dummy", "--config", "c.yaml", "--isl", "5",
        "--osl", "3", "--num-requests", "2", *ENGINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout


def test_requests_that_cannot_run_fail_the_command(program: Program, base_model: Path) -> None:
    done = program(
        "bench", "throughput", str(base_model), "--isl", "100", "--num-requests", "2", "--warmup", "0", *ENGINE
    )
    assert done.returncode == 1
    assert "0 of 2" in done.stdout
    assert "2 of 2 requests failed" in done.stderr
