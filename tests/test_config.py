"""Configuration is strict: unknown names, bad values and bad nested values are our errors and name the field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.config import (
    BuildConfig,
    CapacitySchedulerPolicy,
    KvCacheConfig,
    LlmArgs,
    SchedulerConfig,
    StatsConfig,
    WorkerConfig,
)
from tokenmill.errors import InvalidParameterError, UnknownParameterError, UserError
from tokenmill.executor.low_level.executor_config import ExecutorConfig
from tokenmill.executor.low_level.request import Request, SamplingConfig
from tokenmill.sampling_params import SamplingParams
from tokenmill.strict_model import StrictModel, is_number

CONFIGURATIONS: dict[type[StrictModel], dict[str, Any]] = {
    KvCacheConfig: {},
    SchedulerConfig: {},
    LlmArgs: {"model": "some/model"},
    BuildConfig: {},
}

BAD_VALUES: list[tuple[type[StrictModel], str, Any]] = [
    (KvCacheConfig, "tokens_per_block", 0),
    (KvCacheConfig, "tokens_per_block", 1025),
    (KvCacheConfig, "tokens_per_block", 1.5),
    (KvCacheConfig, "max_tokens", 0),
    (KvCacheConfig, "free_gpu_memory_fraction", 0.0),
    (KvCacheConfig, "free_gpu_memory_fraction", 1.0),
    (KvCacheConfig, "free_gpu_memory_fraction", math.nan),
    (KvCacheConfig, "free_gpu_memory_fraction", -math.inf),
    (KvCacheConfig, "dtype", "int3"),
    (KvCacheConfig, "enable_block_reuse", "maybe"),
    (SchedulerConfig, "capacity_scheduler_policy", "GUARANTEED"),
    (SchedulerConfig, "waiting_queue_policy", "random"),
    (LlmArgs, "model", 7),
    (LlmArgs, "max_batch_size", -1),
    (LlmArgs, "max_num_tokens", 0),
    (LlmArgs, "max_seq_len", 1),
    (LlmArgs, "tensor_parallel_size", 0),
    (LlmArgs, "dtype", "float8"),
    (LlmArgs, "backend", "tensorrt"),
    (LlmArgs, "load_format", "magic"),
    (LlmArgs, "num_threads", 0),
    (LlmArgs, "max_queue_size", 0),
    (LlmArgs, "kv_cache_config", 3),
    (LlmArgs, "build_config", 3),
]

NUMBER_LISTS: dict[str, list[object]] = {
    "stop_token_ids": [[5, True], np.array([True])],
    "bad_token_ids": [(False,)],
    "logit_bias": [{True: 1.0}, {5: True}, {5: np.True_}],
    "profiles": [(1, True), [True]],
}

REQUIRED: dict[type[StrictModel], dict[str, Any]] = {
    **CONFIGURATIONS,
    StatsConfig: {},
    WorkerConfig: {},
    SamplingParams: {},
    ExecutorConfig: {},
    SamplingConfig: {},
    Request: {"input_token_ids": [1], "max_tokens": 1},
}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def fields() -> list[tuple[type[StrictModel], str]]:
    """Every field of every configuration."""
    return [(owner, name) for owner in CONFIGURATIONS for name in owner.model_fields]


@pytest.mark.parametrize("owner", CONFIGURATIONS)
def test_every_field_is_documented(owner: type[StrictModel]) -> None:
    assert [name for name, field in owner.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("owner", CONFIGURATIONS)
def test_unknown_name_is_refused_with_the_closest_one(owner: type[StrictModel]) -> None:
    known = next(reversed(owner.model_fields))
    with pytest.raises(UnknownParameterError, match=f"Did you mean '{known}'") as caught:
        owner(**CONFIGURATIONS[owner], **{f"{known}x": 1})
    assert caught.value.field == f"{known}x"


@pytest.mark.parametrize(("owner", "field", "value"), BAD_VALUES)
def test_bad_value_names_the_field(owner: type[StrictModel], field: str, value: object) -> None:
    with pytest.raises(InvalidParameterError, match=field) as caught:
        owner(**{**CONFIGURATIONS[owner], field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("owner", REQUIRED)
def test_a_boolean_is_no_number(owner: type[StrictModel]) -> None:
    for name, field in owner.model_fields.items():
        kinds = str(field.annotation)
        if "bool" in kinds or not any(number in kinds for number in ("int", "float")):
            continue
        for value in [True, False, np.True_, *NUMBER_LISTS.get(name, [])]:
            with pytest.raises(InvalidParameterError, match=name) as caught:
                owner(**{**REQUIRED[owner], name: value})
            assert caught.value.field == name


def test_booleans_are_refused_wherever_numbers_are_written() -> None:
    with pytest.raises(InvalidParameterError, match=r"LlmArgs\.max_batch_size: .* not a boolean, got True"):
        LlmArgs(model="m", max_batch_size=True)
    with pytest.raises(InvalidParameterError, match="tokens_per_block"):
        LlmArgs(model="m", kv_cache_config={"tokens_per_block": True})  # type: ignore[arg-type]
    configuration = LlmArgs(model="m")
    with pytest.raises(InvalidParameterError, match="num_replicas"):
        configuration.num_replicas = True
    assert configuration.num_replicas == 0
    assert LlmArgs(model="m", deterministic=True).deterministic


@pytest.mark.parametrize("value", [0, -1.5, 10**300, np.float32(2.5), np.int64(3)])
def test_numbers(value: object) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, np.False_, math.nan, math.inf, 10**400, "1", None, 1j, [1]])
def test_no_numbers(value: object) -> None:
    assert not is_number(value)


@pytest.mark.parametrize(("owner", "field", "value"), BAD_VALUES)
def test_bad_assignment_changes_nothing(owner: type[StrictModel], field: str, value: object) -> None:
    configuration = owner(**CONFIGURATIONS[owner])
    before = configuration.model_dump()
    with pytest.raises(InvalidParameterError) as caught:
        setattr(configuration, field, value)
    assert caught.value.field == field
    assert configuration.model_dump() == before


def test_an_integer_too_long_to_print_is_described() -> None:
    with pytest.raises(InvalidParameterError, match="an integer of 16610 bits"):
        LlmArgs(model="m", max_batch_size=-(10**5000))


@given(owner_and_field=st.sampled_from(fields()), value=anything)
def test_any_value_is_taken_or_refused_by_name(owner_and_field: tuple[type[StrictModel], str], value: object) -> None:
    owner, field = owner_and_field
    try:
        configuration = owner(**{**CONFIGURATIONS[owner], field: value})
    except UserError as error:
        nested = value if isinstance(value, dict) else {}
        assert error.field == field or error.field in nested
        return
    again = owner(**configuration.model_dump())
    assert again == configuration


def test_nested_mistakes_are_named() -> None:
    with pytest.raises(UnknownParameterError, match="Did you mean 'max_tokens'") as unknown:
        LlmArgs(model="m", kv_cache_config={"max_tokns": 1})  # type: ignore[arg-type]
    assert unknown.value.field == "max_tokns"
    with pytest.raises(InvalidParameterError, match=r"KvCacheConfig\.max_tokens") as invalid:
        LlmArgs(model="m", kv_cache_config={"max_tokens": -1})  # type: ignore[arg-type]
    assert invalid.value.field == "max_tokens"


def test_missing_model_is_named() -> None:
    with pytest.raises(InvalidParameterError, match="required") as caught:
        LlmArgs()
    assert caught.value.field == "model"


def test_unknown_attribute_is_refused() -> None:
    configuration = KvCacheConfig()
    with pytest.raises(UnknownParameterError, match="Did you mean 'max_tokens'"):
        configuration.max_token = 3


def test_values_are_taken_as_users_write_them() -> None:
    arguments = LlmArgs(
        model=Path("models/a"),
        kv_cache_config=KvCacheConfig(max_tokens=4096, free_gpu_memory_fraction=0.5),
        scheduler_config={"capacity_scheduler_policy": "MAX_UTILIZATION"},  # type: ignore[arg-type]
        backend="pytorch",
    )
    assert arguments.model == Path("models/a")
    assert arguments.kv_cache_config.max_tokens == 4096
    assert arguments.scheduler_config.capacity_scheduler_policy is CapacitySchedulerPolicy.MAX_UTILIZATION


def test_defaults_are_not_shared() -> None:
    first, second = LlmArgs(model="a"), LlmArgs(model="b")
    first.kv_cache_config.max_tokens = 64
    assert second.kv_cache_config.max_tokens is None


def test_errors_of_fields_that_take_several_types_name_the_field_and_the_item() -> None:
    with pytest.raises(InvalidParameterError, match=r"^LlmArgs\.model: .*, got 3\.$") as caught:
        LlmArgs(model=3)  # type: ignore[arg-type]
    assert caught.value.field == "model"
    with pytest.raises(InvalidParameterError, match=r"^SamplingParams\.stop\.1: .* string, got 4\.$") as caught:
        SamplingParams(stop=["a", 4])  # type: ignore[list-item]
    assert caught.value.field == "stop"


def test_a_build_configuration_says_what_arguments_do_not() -> None:
    build = BuildConfig(max_batch_size=4, dtype="bfloat16", quantization="int8_group32", kv_cache_dtype="float32")
    build.max_seq_len = 128
    args = LlmArgs(model="m", max_seq_len=128, device="cuda:1", build_config=build)
    assert (args.max_batch_size, args.max_seq_len, args.dtype, args.quantization) == (4, 128, "bfloat16", "int8")
    assert args.kv_cache_config.dtype == "float32" and args.device == "cuda:1"
    assert args.max_num_tokens is None, "its 2048 was not set by anybody"
    assert args.build_config is not build
    args.max_num_tokens = 64
    build.max_batch_size = 8
    assert args.max_batch_size == 4
    with pytest.raises(InvalidParameterError, match="8 as an argument and 4 in build_config"):
        args.max_batch_size = 8
    again = LlmArgs(**json.loads(args.model_dump_json(exclude_unset=True)))
    assert again == args and again.build_config is not None
    assert again.build_config.options_of_engines() == {} and again.max_num_tokens == 64


def test_options_of_builds_are_those_that_were_set() -> None:
    every = set(BuildConfig.model_fields) - {"strip_weights"}
    shared = every & set(LlmArgs.model_fields)
    build = BuildConfig(passes=["fold_constants"], opt_level=2)
    args = LlmArgs(model="m", build_config=build)
    assert args.build_config is not None
    assert args.build_config.options_of_engines() == {"passes": ("fold_constants",), "opt_level": 2}
    of_engines = BuildConfig(**{name: getattr(BuildConfig(), name) for name in every}).options_of_engines()
    elsewhere = {"kv_cache_dtype", "kv_cache_type", "max_input_len", "max_beam_width"}
    assert set(of_engines) | shared | elsewhere == every, "every field is honoured somewhere"


@pytest.mark.parametrize(
    ("arguments", "build", "field"),
    [
        ({"max_batch_size": 8}, {"max_batch_size": 4}, "max_batch_size"),
        ({"max_num_tokens": 128}, {"max_num_tokens": 256}, "max_num_tokens"),
        ({"dtype": "float16"}, {"dtype": "float32"}, "dtype"),
        ({"device": "cpu"}, {"device": "cuda"}, "device"),
        ({"revision": "main"}, {"revision": "v2"}, "revision"),
        ({"quantization": "fp8"}, {"quantization": "none"}, "quantization"),
        ({"kv_cache_config": KvCacheConfig(dtype="fp8")}, {"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype"),
        ({}, {"strip_weights": True}, "strip_weights"),
        ({}, {"max_beam_width": 2}, "max_beam_width"),
    ],
)
def test_a_contradiction_between_arguments_and_build_names_the_field(
    arguments: dict[str, Any], build: dict[str, Any], field: str
) -> None:
    with pytest.raises(UserError) as caught:
        LlmArgs(model="m", build_config=build, **arguments)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert "build_config" in caught.value.message or field == "max_beam_width"
