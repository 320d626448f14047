"""`SamplingParams` takes what TensorRT-LLM's takes, refuses what makes no sense, and says which field and why."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.errors import InvalidParameterError, UnknownParameterError, UnsupportedFeatureError, UserError
from tokenmill.sampling_params import SamplingParams

BAD_VALUES: list[Any] = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", "many"),
    ("max_tokens", None),
    ("max_tokens", 2**31),
    ("min_tokens", -1),
    ("end_id", -1),
    ("n", 0),
    ("n", 257),
    ("best_of", 0),
    ("seed", 2**64),
    ("seed", -(2**63) - 1),
    pytest.param("seed", 10**5000, id="seed-too long to print"),
    ("temperature", -0.1),
    ("temperature", 100.5),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("top_k", -1),
    ("top_k", 2**31),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.nan),
    ("presence_penalty", math.inf),
    ("frequency_penalty", -101.0),
    ("logprobs", -1),
    ("logprobs", 1025),
    ("prompt_logprobs", -1),
    ("truncate_prompt_tokens", 0),
    ("stop", 3),
    ("stop", ["a", 3]),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("bad", ""),
    ("bad", b"\xff"),
    ("stop_token_ids", [1, -2]),
    ("stop_token_ids", 5),
    ("bad_token_ids", [-1]),
    ("bad_token_ids", [2**31]),
    ("logit_bias", {3: math.nan}),
    ("logit_bias", {3: math.inf}),
    ("logit_bias", {3: 1e31}),
    ("logit_bias", {-3: 1.0}),
    ("logit_bias", [1.0]),
    ("ignore_eos", "perhaps"),
]

CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("best_of", {"n": 3, "best_of": 2, "temperature": 1.0}),
    ("n", {"n": 2}),
    ("n", {"n": 2, "temperature": 0.0}),
    ("n", {"n": 2, "temperature": 1.0, "top_k": 1}),
    ("best_of", {"best_of": 2}),
    ("min_tokens", {"min_tokens": 33}),
    ("stop", {"stop": ["a"], "detokenize": False}),
    ("min_tokens", {"min_tokens": 3, "max_tokens": 2}),
]

# Fields of SamplingParams in TensorRT-LLM's LLM API, from its reference documentation.
TENSORRT_LLM_NAMES = [
    "end_id",
    "pad_id",
    "max_tokens",
    "bad",
    "bad_token_ids",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "embedding_bias",
    "logits_processor",
    "apply_batched_logits_processor",
    "n",
    "best_of",
    "use_beam_search",
    "beam_width_array",
    "top_k",
    "top_p",
    "top_p_min",
    "top_p_reset_ids",
    "top_p_decay",
    "seed",
    "temperature",
    "min_tokens",
    "beam_search_diversity_rate",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
    "min_p",
    "logprobs",
    "prompt_logprobs",
    "return_context_logits",
    "return_generation_logits",
    "return_encoder_output",
    "return_perf_metrics",
    "additional_model_outputs",
    "lookahead_config",
    "guided_decoding",
    "ignore_eos",
    "detokenize",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers() | st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_bad_value_names_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidParameterError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_bad_assignment_changes_nothing(field: str, value: object) -> None:
    params = SamplingParams()
    with pytest.raises(InvalidParameterError) as caught:
        setattr(params, field, value)
    assert caught.value.field == field
    assert params == SamplingParams()


@pytest.mark.parametrize(("field", "values"), CONTRADICTIONS)
def test_contradiction_names_the_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError, match=field) as caught:
        SamplingParams(**values)
    assert caught.value.field == field


def test_contradicting_assignment_changes_nothing() -> None:
    params = SamplingParams(n=2, temperature=0.5)
    with pytest.raises(InvalidParameterError) as caught:
        params.temperature = 0.0
    assert caught.value.field == "n"
    assert params.temperature == 0.5


@given(field=st.sampled_from(sorted(SamplingParams.model_fields)), value=anything)
def test_any_value_is_taken_or_refused_by_name(field: str, value: object) -> None:
    try:
        params = SamplingParams(**{field: value})
    except UserError as error:
        assert error.field == field
        assert len(str(error)) < 500
        return
    assert SamplingParams(**params.model_dump()) == params


@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(0, 4),
            "best_of": st.none() | st.integers(0, 4),
            "temperature": st.none() | st.floats(0, 2),
            "top_k": st.none() | st.integers(0, 3),
            "top_p": st.none() | st.floats(0.1, 1),
            "max_tokens": st.integers(0, 4),
            "min_tokens": st.none() | st.integers(0, 4),
        },
    )
)
def test_accepted_combinations_make_sense(values: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**values)
    except InvalidParameterError as error:
        assert error.field in values
        return
    assert 1 <= params.n <= params.num_sequences
    assert params.num_sequences == 1 or not params.greedy
    assert (params.min_tokens or 0) <= params.max_tokens


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("topp", "top_p"), ("topk", "top_k")],
)
def test_unknown_name_is_refused_with_the_closest_one(wrong: str, right: str) -> None:
    with pytest.raises(UnknownParameterError, match=f"Did you mean '{right}'") as caught:
        SamplingParams(**{wrong: 1})
    assert caught.value.field == wrong


@pytest.mark.spec("H6")
@pytest.mark.parametrize("name", TENSORRT_LLM_NAMES)
def test_tensorrt_llm_names_are_known(name: str) -> None:
    default = SamplingParams.model_fields[name].default if name in SamplingParams.model_fields else None
    SamplingParams(**{name: default})
    assert (name in SamplingParams.model_fields) != (name in SamplingParams.not_yet)


@pytest.mark.spec("H6")
@pytest.mark.parametrize("name", sorted(SamplingParams.not_yet))
def test_what_cannot_be_honoured_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=name) as caught:
        SamplingParams(**{name: 1})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("values", "greedy"),
    [
        ({}, True),
        ({"temperature": 0.0, "top_p": 0.9}, True),
        ({"top_k": 1, "temperature": 1.0}, True),
        ({"temperature": 1.0}, False),
        ({"top_k": 5}, False),
        ({"top_p": 0.9}, False),
        ({"top_k": 0}, False),
    ],
)
def test_greedy(values: dict[str, Any], greedy: bool) -> None:
    assert SamplingParams(**values).greedy is greedy


def test_one_string_or_several() -> None:
    assert SamplingParams(stop="a").stop_strings == ["a"]
    assert SamplingParams(stop=["a", "b"], bad="c").stop_strings == ["a", "b"]
    assert SamplingParams(bad="c").bad_strings == ["c"]
    assert SamplingParams().stop_strings == []


def test_copies_are_equal_and_independent() -> None:
    params = SamplingParams(stop=["a"], temperature=0.7, n=2, logit_bias={4: -1.5})
    for copied in (copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert copied == params
        copied.temperature = 0.1
        assert params.temperature == 0.7


def test_every_field_is_documented() -> None:
    assert [name for name, field in SamplingParams.model_fields.items() if not field.description] == []
