"""Whatever is passed to the Python API, the answer is a result or one of tokenmill's errors, and the engine goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.conftest import FUZZING
from tests.fuzz.values import anything, field_names, generation_requests, make_request, sampling_values
from tests.support.tiny_checkpoint import VOCAB_SIZE
from tokenmill import LLM, SamplingParams
from tokenmill.errors import UserError

pytestmark = pytest.mark.fuzz

KNOWN_PROMPT = "the quick brown fox"
KNOWN_SAMPLING: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def engine_is_well_afterwards(llm: LLM) -> Iterator[None]:
    """The known request gives the known answer before and after, and nothing is lost."""
    expected = llm.generate(KNOWN_PROMPT, SamplingParams(**KNOWN_SAMPLING)).outputs[0].token_ids
    yield
    assert llm.generate(KNOWN_PROMPT, SamplingParams(**KNOWN_SAMPLING)).outputs[0].token_ids == expected
    assert len(expected) == 12
    llm.check_health()
    llm.check_integrity()
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache.usage) == (0, 0, 0.0)


@pytest.mark.spec("H2")
@FUZZING
@given(values=st.dictionaries(field_names | st.text(max_size=8), anything, max_size=4))
def test_sampling_params_take_a_value_or_name_it(values: dict[str, Any]) -> None:
    try:
        sampling = SamplingParams(**values)
    except UserError as error:
        assert error.field is not None
        assert len(str(error)) < 3000
        return
    numbers = [getattr(sampling, name) for name in type(sampling).model_fields]
    assert all(math.isfinite(number) for number in numbers if isinstance(number, float))
    assert SamplingParams(**sampling.model_dump()) == sampling


@pytest.mark.spec("H2")
@FUZZING
@given(values=sampling_values(VOCAB_SIZE), prompt=st.text(min_size=1, max_size=12))
def test_what_sampling_params_take_can_be_run(llm: LLM, values: dict[str, Any], prompt: str) -> None:
    try:
        sampling = SamplingParams(**values)
        output = llm.generate(prompt, sampling, use_tqdm=False)
    except UserError as error:
        assert error.field is not None
        return
    assert len(output.outputs) == sampling.n
    for completion in output.outputs:
        assert completion.finish_reason in ("stop", "length")
        assert completion.length <= sampling.max_tokens
        assert all(0 <= token_id < VOCAB_SIZE for token_id in completion.token_ids)
        if sampling.logprobs is not None:
            assert len(completion.logprobs) == completion.length
        assert not math.isnan(completion.cumulative_logprob or 0.0)


@pytest.mark.spec("H2")
@FUZZING
@given(values=generation_requests(VOCAB_SIZE), sampling=sampling_values(VOCAB_SIZE), streaming=st.booleans())
def test_every_request_ends_or_is_refused(
    llm: LLM, values: dict[str, Any], sampling: dict[str, Any], streaming: bool
) -> None:
    executor = llm._executor
    neighbour = llm.generate_async(KNOWN_PROMPT, SamplingParams(**KNOWN_SAMPLING))
    try:
        request = make_request(executor.next_request_id(), values, SamplingParams(**sampling))
        result = executor.submit(request, streaming=streaming)
    except UserError as error:
        assert error.field is not None
    else:
        outputs = list(result)
        assert outputs[-1].finished
        assert len(outputs[-1].outputs) == request.sampling.n
        assert all(0 <= token_id < VOCAB_SIZE for token_id in outputs[-1].outputs[0].token_ids)
    assert len(neighbour.result(timeout=60).outputs[0].token_ids) == 12, "a bad request ends alone"


@pytest.mark.spec("H2")
@FUZZING
@given(prompt=anything)
def test_prompts_of_any_kind(llm: LLM, prompt: Any) -> None:
    try:
        outputs = llm.generate(prompt, SamplingParams(max_tokens=2), use_tqdm=False)
    except UserError as error:
        assert error.field is not None
        return
    for output in outputs if isinstance(outputs, list) else [outputs]:
        assert output.finished
