"""The judgement of the fuzzer: which refusals are explained, and what counts as found."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from benchmarks.fuzz_checks import refusal_is_explained, server_error_is_explained
from benchmarks.fuzz_http import FuzzOutcome, read_statuses


def error(param: str | None, code: str = "invalid_parameter") -> dict[str, Any]:
    return {"message": "No.", "type": "invalid_request_error", "param": param, "code": code}


@pytest.mark.parametrize(
    ("body", "param", "is_explained"),
    [
        ({"best_of": 1, "n": 2}, "best_of", True),
        ({"best_of": 3, "n": 2}, "best_of", False),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of", True),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", True),
        ({"min_tokens": 4, "max_tokens": 4}, "min_tokens", False),
        ({"min_tokens": 17}, "min_tokens", True),
        ({"min_tokens": 9}, "min_tokens", False),
        ({"prompt": ""}, "prompt", True),
        ({"prompt": "a"}, "prompt", False),
        ({"prompt": ["a", ""]}, "prompt", True),
        ({"prompt": [1, 99]}, "prompt", False),
        ({"prompt": [1, 100]}, "prompt", True),
        ({"prompt": [[1], [100]]}, "prompt[1]", True),
        ({"logit_bias": {"99": 1}}, "logit_bias", False),
        ({"logit_bias": {"100": 1}}, "logit_bias", True),
        ({"temperature": 0.5}, "temperature", False),
        ({}, None, False),
    ],
)
def test_a_refusal_needs_a_true_reason(body: dict[str, Any], param: str | None, is_explained: bool) -> None:
    assert refusal_is_explained(body, error(param), vocab_size=100) is is_explained


def test_what_only_the_server_knows_is_believed() -> None:
    assert refusal_is_explained({"prompt": "a"}, error("prompt", "context_length_exceeded"), 100)
    assert not refusal_is_explained({"prompt": "a"}, error("prompt", "unsupported_feature"), 100)


@pytest.mark.parametrize(
    ("status", "code", "timeout", "is_explained"),
    [
        (504, "request_timeout", 1e-9, True),
        (504, "request_timeout", 3600.0, False),
        (504, "request_timeout", None, False),
        (503, "engine_stalled", 0.01, True),
        (503, "engine_stalled", None, False),
        (503, "engine_error", 0.01, False),
        (500, "internal_error", 0.01, False),
    ],
)
def test_a_server_error_needs_a_short_timeout(
    status: int, code: str, timeout: float | None, is_explained: bool
) -> None:
    assert server_error_is_explained(status, code, timeout) is is_explained


def events(*statuses: int | None) -> list[str]:
    interactions = {
        str(index): {"response": None if status is None else {"status_code": status}}
        for index, status in enumerate(statuses)
    }
    finished = {"ScenarioFinished": {"recorder": {"label": "POST /v1/completions", "interactions": interactions}}}
    return [json.dumps({"EngineStarted": {}}), json.dumps(finished)]


def test_statuses_are_counted() -> None:
    assert read_statuses(events(200, 400, 400, None)) == Counter({200: 1, 400: 2, 0: 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"statuses": Counter({200: 99})},
        {"statuses": Counter({200: 100, 500: 1})},
        {"statuses": Counter({200: 100, 502: 1})},
        {"statuses": Counter({200: 100, 0: 1})},
        {"failures": ["undocumented status"]},
        {"problems": ["the server has ended"]},
        {"num_properties": 0},
        {"failed_properties": ["test_sampling_params"]},
    ],
)
def test_everything_found_is_a_goal_missed(changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {"statuses": Counter({200: 60, 400: 40}), "num_properties": 4, "num_examples": 100}
    assert all(row.is_reached for row in FuzzOutcome(**good).rows(100))
    assert not all(row.is_reached for row in FuzzOutcome(**{**good, **changes}).rows(100))
