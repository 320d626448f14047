"""Values of every kind: plausible ones, the edges of ranges, and such as no sane caller would pass."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from tokenmill.engine.request import GenerationRequest
from tokenmill.sampling_params import SamplingParams

EDGES = (
    0, -0.0, 1, -1, 2, 5e-324, -5e-324, 1e-40, 1e38, 3.5e38, -1e30, 1.7e308, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63,
    2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**400, math.inf, -math.inf, math.nan,
)  # fmt: skip
PROMPT_LEN = 40
"""Most tokens of a prompt that is meant to run."""

numbers = st.one_of(st.sampled_from(EDGES), st.integers(), st.floats(), st.integers(-2, 8), st.floats(-1.0, 2.0))
texts = st.text(st.characters(codec=None), max_size=6)  # also halves of surrogate pairs
scalars = st.one_of(st.none(), st.booleans(), numbers, texts, st.binary(max_size=3))
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.tuples(inner), st.dictionaries(st.one_of(texts, numbers), inner, max_size=3)
    ),
    max_leaves=6,
)
field_names = st.sampled_from(
    sorted({*SamplingParams.model_fields, *SamplingParams.not_yet, *SamplingParams.always_on})
)


def sampling_values(vocab_size: int) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of `SamplingParams` that mostly pass its checks, with short answers."""
    token_ids = st.integers(0, vocab_size - 1)
    words = st.text(max_size=3)
    of_fields: dict[str, st.SearchStrategy[Any]] = {
        "max_tokens": st.integers(1, 6),
        "min_tokens": st.integers(0, 4),
        "ignore_eos": st.booleans(),
        "end_id": token_ids,
        "stop": words | st.lists(words, max_size=3),
        "stop_token_ids": st.lists(token_ids, max_size=3),
        "include_stop_str_in_output": st.booleans(),
        "bad": st.lists(words, max_size=2),
        "bad_token_ids": st.lists(token_ids, max_size=vocab_size),
        "logit_bias": st.dictionaries(token_ids, st.floats(-1e30, 1e30), max_size=4),
        "n": st.integers(1, 3),
        "best_of": st.integers(1, 3),
        "seed": st.integers(-(2**63), 2**64 - 1),
        "temperature": st.floats(0, 100) | st.sampled_from([0.0, 5e-324, 1e-40, 1e-6, 1.0, 100.0]),
        "top_k": st.integers(0, 400) | st.just(2**31 - 1),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0, 100, exclude_min=True),
        "presence_penalty": st.floats(-100, 100),
        "frequency_penalty": st.floats(-100, 100),
        "logprobs": st.integers(0, 5) | st.just(1024),
        "prompt_logprobs": st.integers(0, 5),
        "detokenize": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "truncate_prompt_tokens": st.integers(1, 8),
    }
    return st.fixed_dictionaries({"max_tokens": of_fields.pop("max_tokens")}, optional=of_fields)


def generation_requests(vocab_size: int) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of `GenerationRequest` but its id and sampling: some cannot run, some are out of every range."""
    token_ids = st.integers(0, vocab_size - 1)
    wild_ids = token_ids | st.sampled_from([-1, vocab_size, 2**31, 2**63, -(2**70)])
    return st.fixed_dictionaries(
        {"prompt_token_ids": st.one_of(_tuples(token_ids, PROMPT_LEN), _tuples(wild_ids, 5), _tuples(token_ids, 400))},
        optional={
            "seed": st.integers(-(2**70), 2**70),
            "end_ids": _tuples(wild_ids, 3),
            "stop_token_ids": _tuples(wild_ids, 3),
            "bad_words": _tuples(_tuples(wild_ids, 3), 3),
            "priority": st.floats() | st.integers(-5, 5),
            "arrival_time": st.floats(0, 1e9),
        },
    )


def _tuples(items: st.SearchStrategy[Any], max_size: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=max_size).map(tuple)


def make_request(request_id: int, values: dict[str, Any], sampling: SamplingParams) -> GenerationRequest:
    """The request of drawn values."""
    return GenerationRequest(request_id=request_id, sampling=sampling, **values)
