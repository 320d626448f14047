"""Synthetic requests, data sets and arrival times: what they hold, and how wrong input is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenmill.bench.workload import BenchmarkRequest, read_dataset, synthetic_requests, with_poisson_arrivals
from tokenmill.errors import InvalidParameterError, UnknownParameterError, UserError


def test_synthetic_requests_have_the_lengths_and_no_special_token() -> None:
    special = [0, 7, 19]
    requests = synthetic_requests(
        num_requests=50, input_len=40, output_len=9, vocab_size=20, special_token_ids=special, seed=3
    )
    assert len(requests) == 50
    assert {request.output_len for request in requests} == {9}
    assert {len(request.prompt) for request in requests} == {40}
    drawn = {token for request in requests for token in request.prompt}
    assert drawn == set(range(20)) - set(special)
    assert len({request.prompt for request in requests}) == 50


def test_synthetic_requests_depend_on_the_seed_alone() -> None:
    def prompts(seed: int, count: int) -> list[Any]:
        made = synthetic_requests(num_requests=count, input_len=8, output_len=1, vocab_size=1000, seed=seed)
        return [request.prompt for request in made]

    assert prompts(1, 5) == prompts(1, 5)
    assert prompts(1, 9)[:5] == prompts(1, 5)
    assert prompts(1, 5) != prompts(2, 5)


@pytest.mark.parametrize("name", ["num_requests", "input_len", "output_len"])
def test_counts_below_one_are_refused(name: str) -> None:
    values: dict[str, Any] = {"num_requests": 1, "input_len": 1, "output_len": 1, name: 0}
    with pytest.raises(InvalidParameterError, match=f"{name} must be at least 1, got 0") as caught:
        synthetic_requests(**values, vocab_size=10)
    assert caught.value.field == name


def test_a_vocabulary_of_special_tokens_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="no ordinary tokens"):
        synthetic_requests(num_requests=1, input_len=1, output_len=1, vocab_size=2, special_token_ids=[0, 1])


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_dataset_with_texts_and_token_ids(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        {"task_id": 1, "prompt": "Grüße", "output_tokens": 3},
        "",
        {"input_ids": [5, 6, 7]},
    )
    assert read_dataset(path, output_len=11) == [BenchmarkRequest("Grüße", 3), BenchmarkRequest((5, 6, 7), 11)]


def test_dataset_is_cut_or_repeated(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert [request.prompt for request in read_dataset(path, output_len=1, num_requests=1)] == ["a"]
    assert [request.prompt for request in read_dataset(path, output_len=1, num_requests=5)] == list("ababa")


@pytest.mark.parametrize(
    ("line", "message", "field"),
    [
        ("{", ":2: not JSON", "dataset"),
        ("[1]", ":2: a line must be a JSON object", "dataset"),
        ({"promt": "a"}, "Did you mean 'prompt'", "prompt"),
        ({}, "neither 'prompt' nor 'input_ids'", "prompt"),
        ({"prompt": "a", "input_ids": [1]}, "both", "prompt"),
        ({"prompt": ""}, "not empty", "prompt"),
        ({"prompt": 3}, "must be a text", "prompt"),
        ({"input_ids": []}, "list of token ids", "input_ids"),
        ({"input_ids": [1, -2]}, "list of token ids", "input_ids"),
        ({"input_ids": [1, True]}, "list of token ids", "input_ids"),
        ({"prompt": "a", "output_tokens": 0}, "output_tokens must be at least 1, got 0", "output_tokens"),
        ({"prompt": "a", "output_tokens": "5"}, "output_tokens must be at least 1", "output_tokens"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: Any, message: str, field: str) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"prompt": "good"}, line)
    with pytest.raises(UserError, match=message) as caught:
        read_dataset(path, output_len=1)
    assert "data.jsonl:2:" in str(caught.value)
    assert caught.value.field == field


def test_missing_empty_and_binary_datasets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="cannot be read"):
        read_dataset(tmp_path / "none.jsonl", output_len=1)
    with pytest.raises(InvalidParameterError, match="is empty"):
        read_dataset(write_lines(tmp_path / "empty.jsonl", "", "  "), output_len=1)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidParameterError, match="cannot be read"):
        read_dataset(tmp_path / "binary.jsonl", output_len=1)


def test_unknown_prompt_key_is_an_unknown_parameter(tmp_path: Path) -> None:
    with pytest.raises(UnknownParameterError):
        read_dataset(write_lines(tmp_path / "data.jsonl", {"text": "a"}), output_len=1)


def test_poisson_arrivals_have_exponential_gaps() -> None:
    requests = [BenchmarkRequest("x", 1)] * 20_000
    arrivals = np.array([request.arrival for request in with_poisson_arrivals(requests, 4.0, seed=1)])
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0.0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)  # an exponential distribution's deviation is its mean
    assert np.median(gaps) == pytest.approx(0.25 * np.log(2), rel=0.04)


def test_arrivals_keep_the_requests_and_their_order() -> None:
    requests = [BenchmarkRequest(str(index), index + 1) for index in range(5)]
    timed = with_poisson_arrivals(requests, 100.0, seed=0)
    assert [(request.prompt, request.output_len) for request in timed] == [
        (request.prompt, request.output_len) for request in requests
    ]
    assert with_poisson_arrivals(requests, None) == requests


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_rates_are_refused(rate: float) -> None:
    with pytest.raises(InvalidParameterError, match="above 0") as caught:
        with_poisson_arrivals([], rate)
    assert caught.value.field == "request_rate"
