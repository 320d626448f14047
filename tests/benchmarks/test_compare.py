"""The comparison's arithmetic: ratios within a round, medians over rounds, limits of a machine."""

from __future__ import annotations

import pytest

pytest.importorskip("llvmlite")

from benchmarks.cpu.compare import ENGINE, LLAMA, LLAMA_BEST, TORCH, WORKS, limit_of, make_rows
from benchmarks.cpu.machine_limits import MachineLimits

MACHINE = MachineLimits(bandwidth=40e9, int8_ops=800e9)
NUM_BYTES, NUM_PARAMETERS = 100_000_000, 100_000_000


def results(decode: float, prefill: float, batch: float, start: float) -> dict[str, float]:
    return {"decode": decode, "prefill": prefill, "batch": batch, "start": start}


ROUNDS = {
    ENGINE: [results(300, 3000, 900, 2.0), results(100, 1000, 300, 3.0), results(290, 2900, 880, 2.5)],
    LLAMA: [results(100, 500, 100, 0.1), results(40, 200, 40, 0.1), results(100, 500, 100, 0.2)],
    LLAMA_BEST: [results(120, 900, 310, 0.1), results(40, 300, 100, 0.1), results(120, 1000, 300, 0.1)],
}


def test_a_ratio_is_taken_within_a_round() -> None:
    rows = {(row.work, row.metric): row for row in make_rows(ROUNDS, MACHINE, NUM_BYTES, NUM_PARAMETERS)}
    decode = rows["1 stream, 128 in, 128 out", f"{ENGINE} over {LLAMA_BEST}"]
    assert decode.value == 2.5  # of 2.5, 2.5 and 2.42: the slow round hit both
    assert decode.goal == 2.2
    assert decode.is_reached
    batch = rows["16 streams, 128 in, 128 out", f"{ENGINE} over {LLAMA_BEST}"]
    assert batch.value == pytest.approx(2.93)
    assert not batch.is_reached


def test_values_are_medians_beside_goal_and_peers() -> None:
    rows = {(row.work, row.metric): row for row in make_rows(ROUNDS, MACHINE, NUM_BYTES, NUM_PARAMETERS)}
    prefill = rows["prefill of 1024 tokens", f"prompt throughput, {ENGINE}"]
    assert prefill.value == 2900
    assert prefill.is_reached
    assert prefill.peer is not None
    assert prefill.peer[LLAMA] == 500
    start = rows["start of Python to first token", f"time, {ENGINE}"]
    assert start.value == 2.5
    assert start.is_reached  # sooner is better
    assert start.limit is None


def test_limits() -> None:
    decode, prefill, batch, _ = (limit_of(work, MACHINE, NUM_BYTES, NUM_PARAMETERS) for work in WORKS)
    assert decode == 400  # the file is read once for each token
    assert prefill == 4000  # two operations for each weight and token
    # A token of sixteen costs 1/6400 s of reading, or 1/4000 s of arithmetic, which is more; so does its prompt token.
    assert batch == 2000


def test_without_llama_there_are_no_ratios() -> None:
    rows = make_rows({ENGINE: ROUNDS[ENGINE]}, MACHINE, NUM_BYTES, NUM_PARAMETERS)
    assert not [row for row in rows if "over" in row.metric]


def test_slow_players_may_play_less() -> None:
    rounds = {**ROUNDS, TORCH: [results(60, 1000, 600, 5.0)]}
    rows = {(row.work, row.metric): row.value for row in make_rows(rounds, MACHINE, NUM_BYTES, NUM_PARAMETERS)}
    assert rows["1 stream, 128 in, 128 out", f"output throughput, {TORCH}"] == 60
    assert rows["1 stream, 128 in, 128 out", f"{ENGINE} over {TORCH}"] == 5.0  # of the same round
