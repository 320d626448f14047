"""The low-level types refuse what is wrong when they are made, and name the field."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.source_tree import ROOT
from tokenmill.config import CapacitySchedulerPolicy, SchedulerConfig
from tokenmill.errors import InvalidParameterError, UnknownParameterError, UnsupportedFeatureError, UserError
from tokenmill.executor import BatchingType, ExecutorConfig, OutputConfig, Request, SamplingConfig

pytestmark = pytest.mark.spec("A4")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64"])
def test_token_ids_come_in_lists_and_arrays(dtype: str) -> None:
    expected = (1, 2, 100)
    array = np.array(expected, dtype=dtype)
    for token_ids in ([1, 2, 100], (1, 2, 100), list(array), array, torch.tensor(expected)):
        request = Request(token_ids, max_tokens=1, stop_words=[token_ids], bad_words=(token_ids,))
        assert request.input_token_ids == expected
        assert request.stop_words == request.bad_words == (expected,)
        assert all(type(token_id) is int for token_id in request.input_token_ids)


def test_an_array_is_copied() -> None:
    array = np.arange(4)
    request = Request(array, max_tokens=1)
    array[:] = 9
    assert request.input_token_ids == (0, 1, 2, 3)


BAD_TOKEN_IDS = [
    [],
    (),
    np.array([], dtype=np.int32),
    [-1],
    [1, 2, -3],
    np.array([3, -1]),
    [2**31],
    [10**5000],
    np.array([2**40]),
    [1.0],
    [1, 2.5],
    np.array([1.0, 2.0]),
    [True],
    np.array([True, False]),
    [None],
    ["1"],
    np.array(["a"]),
    [[1, 2]],
    np.zeros((1, 3), dtype=np.int32),
    np.array(3),
    torch.zeros(2, 2, dtype=torch.int32),
    "text",
    b"bytes",
    5,
    None,
    {1: 2},
    {1, 2},
]


@pytest.mark.parametrize("token_ids", BAD_TOKEN_IDS, ids=lambda value: type(value).__name__)
def test_bad_token_ids_are_refused(token_ids: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        Request(token_ids, max_tokens=1)
    assert caught.value.field == "input_token_ids"
    for field in ("bad_words", "stop_words"):
        with pytest.raises(InvalidParameterError) as caught:
            Request([1], 1, **{field: [[1, 2], token_ids]})
        assert caught.value.field == field


@pytest.mark.parametrize("words", [5, "ab", [1, 2], np.array([1, 2]), np.zeros((1, 1, 1), dtype=int), {(1, 2)}])
def test_bad_words_of_words_are_refused(words: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        Request([1], 1, stop_words=words)
    assert caught.value.field == "stop_words"


def test_words_may_be_a_table_or_none() -> None:
    assert Request([1], 1, stop_words=np.array([[1, 2], [3, 4]])).stop_words == ((1, 2), (3, 4))
    assert Request([1], 1, stop_words=None, bad_words=None).stop_words == ()
    assert Request([1], 1, stop_words=[[1], [1]]).stop_words == ((1,),)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2**31),
        ("max_tokens", 1.5),
        ("max_tokens", None),
        ("max_tokens", "many"),
        ("streaming", "perhaps"),
        ("end_id", -2),
        ("end_id", 2**31),
        ("client_id", -1),
        ("client_id", 2**64),
        ("priority", -0.1),
        ("priority", 1.1),
        ("priority", float("nan")),
        ("sampling_config", 3),
        ("output_config", "all"),
    ],
)
def test_request_fields_are_checked(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        Request(**{"input_token_ids": [1], "max_tokens": 4, field: value})
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam_width", 0),
        ("temperature", -0.1),
        ("temperature", 101.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("seed", 2**64),
        ("min_tokens", -1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 1e9),
        ("frequency_penalty", float("inf")),
        ("num_return_sequences", 0),
        ("num_return_sequences", 2),  # greedy: all would be equal
    ],
)
def test_sampling_fields_are_checked(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        SamplingConfig(**{field: value})
    assert caught.value.field == field
    assert field in caught.value.message


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        Request([1], 3, sampling_config=SamplingConfig(min_tokens=4))
    assert caught.value.field == "min_tokens"


def test_numpy_numbers_are_numbers() -> None:
    request = Request([1], np.int64(4), sampling_config=SamplingConfig(temperature=np.float32(0.5), top_k=np.int32(3)))
    assert (request.max_tokens, request.sampling_config.temperature, request.sampling_config.top_k) == (4, 0.5, 3)


@pytest.mark.parametrize("kind", [SamplingConfig, OutputConfig, ExecutorConfig])
def test_unknown_names_get_a_hint(kind: type) -> None:
    name = next(iter(kind.model_fields))
    with pytest.raises(UnknownParameterError, match=f"Did you mean '{name}'") as caught:
        kind(**{f"{name}x": 1})
    assert caught.value.field == f"{name}x"
    with pytest.raises(UnknownParameterError, match="Did you mean 'max_tokens'"):
        Request([1], 1, max_new_tokens=1)


@pytest.mark.parametrize("kind", [SamplingConfig, OutputConfig, ExecutorConfig, Request])
def test_known_names_that_are_not_supported_say_so_unless_off(kind: Any) -> None:
    needed = {"input_token_ids": [1], "max_tokens": 1} if kind is Request else {}
    assert kind.not_yet and not kind.not_yet & set(kind.model_fields)
    for name in sorted(kind.not_yet):
        with pytest.raises(UnsupportedFeatureError) as caught:
            kind(**needed, **{name: object()})
        assert caught.value.field == name
        assert kind(**needed, **{name: None}) == kind(**needed, **{name: False}) == kind(**needed)


def test_beam_search_is_refused_by_name() -> None:
    for make, field in (
        (lambda: SamplingConfig(beam_width=2), "beam_width"),
        (lambda: ExecutorConfig(max_beam_width=4), "max_beam_width"),
    ):
        with pytest.raises(UnsupportedFeatureError) as caught:
            make()
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_beam_width", 0),
        ("max_batch_size", 0),
        ("max_num_tokens", 0),
        ("max_queue_size", 0),
        ("max_seq_len", 1),
        ("iter_stats_max_iterations", -1),
        ("request_stats_max_iterations", -1),
        ("batching_type", "SOMETIMES"),
        ("kv_cache_config", 5),
        ("dtype", "int3"),
    ],
)
def test_executor_fields_are_checked(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        ExecutorConfig(**{field: value})
    assert caught.value.field == field


def test_static_batching_is_a_scheduler_policy(tmp_path: Any) -> None:
    for policy in (CapacitySchedulerPolicy.GUARANTEED_NO_EVICT, CapacitySchedulerPolicy.STATIC_BATCH):
        scheduler = SchedulerConfig(capacity_scheduler_policy=policy, waiting_queue_policy="priority")
        static = ExecutorConfig(batching_type=BatchingType.STATIC, scheduler_config=scheduler).to_llm_args(tmp_path)
        assert static.scheduler_config.capacity_scheduler_policy is CapacitySchedulerPolicy.STATIC_BATCH
        assert static.scheduler_config.waiting_queue_policy == "priority"
        assert ExecutorConfig(scheduler_config=scheduler).to_llm_args(tmp_path).scheduler_config == scheduler
    utilization = SchedulerConfig(capacity_scheduler_policy=CapacitySchedulerPolicy.MAX_UTILIZATION)
    with pytest.raises(InvalidParameterError) as caught:
        ExecutorConfig(batching_type=BatchingType.STATIC, scheduler_config=utilization)
    assert caught.value.field == "batching_type"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.dictionaries(st.sampled_from(sorted(Request.model_fields)), anything))
def test_whatever_is_given_is_a_request_or_a_user_error(values: dict[str, Any]) -> None:
    try:
        request = Request(**{"input_token_ids": [1], "max_tokens": 1, **values})
    except UserError as error:
        assert error.field is not None
    else:
        assert request.input_token_ids and min(request.input_token_ids) >= 0
        assert all(word for word in request.stop_words + request.bad_words)


def test_a_request_can_be_made_without_torch() -> None:
    code = "import sys; from tokenmill.executor import ExecutorConfig, Request; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
