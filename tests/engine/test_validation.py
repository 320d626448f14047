"""Requests that can never run are refused with the field, the numbers and a remedy, and change nothing."""

from typing import Any

import pytest

from tests.support.engine_harness import Harness
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.validation import check_bans
from tokenmill.errors import (
    AllTokensBannedError,
    InvalidParameterError,
    PromptTooLongError,
    RequestTooLargeError,
    UserError,
)
from tokenmill.sampling_params import SamplingParams

SMALL = {"num_blocks": 9, "tokens_per_block": 4, "max_seq_len": 40, "max_batch_size": 3, "max_num_tokens": 16}


@pytest.mark.parametrize(
    ("shape", "request_", "error_class", "field", "said"),
    [
        ({}, {"prompt": []}, InvalidParameterError, "prompt", "empty"),
        ({}, {"prompt": [1], "priority": float("nan")}, InvalidParameterError, "priority", "nan"),
        ({}, {"prompt": range(40)}, PromptTooLongError, "prompt", "40 tokens; prompt and answer together may have 40"),
        ({}, {"prompt": range(10), "max_tokens": 24}, RequestTooLargeError, "max_tokens", "9 blocks of 4"),
        ({}, {"prompt": [1], "n": 4}, InvalidParameterError, "n", "4 sequences"),
        ({}, {"prompt": [1], "n": 1, "best_of": 4}, InvalidParameterError, "best_of", "at most 3"),
        ({"max_num_tokens": 2}, {"prompt": [1], "n": 3}, InvalidParameterError, "n", "at most 2"),
        ({"enable_chunked_prefill": False}, {"prompt": range(17)}, RequestTooLargeError, "prompt", "17 tokens"),
    ],
)
def test_refused(
    shape: dict[str, Any], request_: dict[str, Any], error_class: type[UserError], field: str, said: str
) -> None:
    harness = Harness(**{**SMALL, **shape})
    running = harness.add([1, 2, 3], max_tokens=4)
    harness.step()
    before = harness.core.stats()
    with pytest.raises(error_class, match=said) as caught:
        harness.add(**request_)
    assert isinstance(caught.value, ValueError)
    assert caught.value.field == field and caught.value.remedy
    assert harness.core.stats() == before
    harness.run()
    assert len(harness.tokens(running)) == 4
    harness.check_finished()


@pytest.mark.parametrize(
    ("shape", "request_"),
    [
        ({}, {"prompt": range(10), "max_tokens": 23}),
        ({"max_seq_len": 30}, {"prompt": range(29), "max_tokens": 9}),
        ({"max_seq_len": 33}, {"prompt": range(10), "max_tokens": 9999}),
        ({}, {"prompt": [1], "n": 3, "max_tokens": 32}),
        ({"enable_chunked_prefill": False}, {"prompt": range(16), "max_tokens": 17}),
        ({"max_num_tokens": 1}, {"prompt": range(20)}),
    ],
)
def test_largest_that_fits_is_served(shape: dict[str, Any], request_: dict[str, Any]) -> None:
    harness = Harness(**{**SMALL, **shape})
    harness.add(**request_)
    harness.run()
    harness.check_finished()


def test_id_in_use() -> None:
    harness = Harness()
    harness.add([1])
    with pytest.raises(InvalidParameterError, match="id 0 is running") as caught:
        harness.core.add(harness.requests[0])
    assert caught.value.field == "request_id"
    harness.run()
    harness.core.add(harness.requests[0])
    assert harness.core.has_work, "an id is free again when its request has ended"


WORDS = {"bad_words": ((0,), (1,), (2,))}
MOST = {"bad_words": ((0,), (1,))}


def banning(sampling: dict[str, Any], request: dict[str, Any]) -> GenerationRequest:
    return GenerationRequest(1, (5,), SamplingParams(**sampling), 7, **request)


@pytest.mark.parametrize(
    ("sampling", "request_", "bad_field", "field"),
    [
        ({}, WORDS, None, "bad"),
        ({}, WORDS, "bad_words", "bad_words"),
        ({"bad_token_ids": [2, 1, 0, 9]}, {}, None, "bad_token_ids"),
        ({"bad_token_ids": [2]}, MOST, None, "bad_token_ids"),
        ({"min_tokens": 1}, {**MOST, "end_ids": (2,)}, None, "min_tokens"),
        ({"min_tokens": 4}, {"stop_token_ids": (0, 1, 2)}, None, "min_tokens"),
        ({"min_tokens": 4}, {**WORDS, "end_ids": (2,)}, None, "bad"),
    ],
)
def test_a_request_that_allows_no_token_is_refused(
    sampling: dict[str, Any], request_: dict[str, Any], bad_field: str | None, field: str
) -> None:
    with pytest.raises(AllTokensBannedError, match="vocabulary") as caught:
        check_bans(banning(sampling, request_), 3, bad_field)
    assert caught.value.field == field and caught.value.remedy


@pytest.mark.parametrize(
    ("sampling", "request_"),
    [
        ({}, MOST),
        ({}, {"bad_words": ((0,), (0, 0), (1,), (2, 1), (1, 2))}),  # it depends on what the model says
        ({}, {"bad_words": ((0,), (1,), (7,), (1,))}),
        ({"min_tokens": 0}, {**MOST, "end_ids": (2,)}),
        ({}, {"stop_token_ids": (0, 1, 2)}),  # the answer is one token
        ({"min_tokens": 4, "logit_bias": {0: -100.0, 1: -1e30, 2: -100.0}}, {}),  # unlikely is not banned
    ],
)
def test_one_token_is_enough(sampling: dict[str, Any], request_: dict[str, Any]) -> None:
    check_bans(banning(sampling, request_), 3)
