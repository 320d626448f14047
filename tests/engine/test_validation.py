"""Requests that can never run are refused with the field, the numbers and a remedy, and change nothing."""

from typing import Any

import pytest

from tests.support.engine_harness import Harness
from tokenmill.errors import InvalidParameterError, PromptTooLongError, RequestTooLargeError, UserError

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
