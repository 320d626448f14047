"""The engine's state of a new request."""

from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.sequence import SequenceStatus, make_request
from tokenmill.sampling_params import SamplingParams


def test_new_request() -> None:
    sampling = SamplingParams(n=2, best_of=3, temperature=1.0, max_tokens=10, min_tokens=2, prompt_logprobs=0)
    inputs = GenerationRequest(7, (1, 2, 3), sampling, end_ids=(4,), stop_token_ids=(5, 4), arrival_time=1.5)
    request = make_request(inputs, (0.0, 9), 100, 20)
    assert request.id == 7 and request.num_prompt_tokens == 3 and request.metrics.arrival_time == 1.5
    assert request.stop_token_ids == {4, 5} and request.ending_token_ids == {4, 5} and request.min_tokens == 2
    assert request.wants_prompt_logprobs and request.siblings_are_pending and request.num_unfinished == 3
    assert [sequence.id for sequence in request.sequences] == [20, 21, 22]
    assert [sequence.rank for sequence in request.sequences] == [(0.0, 9, 0), (0.0, 9, 1), (0.0, 9, 2)]
    for sequence in request.sequences:
        assert sequence.status is SequenceStatus.PENDING
        assert sequence.max_length == 13 and sequence.length == 3 and sequence.token_ids == [1, 2, 3]
        assert sequence.num_tokens_in_flight == sequence.num_generated_tokens == 0
    assert [sequence.started for sequence in request.sequences] == [False, True, True]
    request.sequences[0].token_ids.append(9)
    assert request.sequences[1].token_ids == [1, 2, 3], "each has a list of its own"


def test_length_is_limited_by_the_context() -> None:
    request = make_request(GenerationRequest(0, (1, 2, 3), SamplingParams(max_tokens=10)), (0.0, 0), 5, 0)
    assert request.sequences[0].max_length == 5
    assert not request.siblings_are_pending and not request.wants_prompt_logprobs and request.min_tokens == 0


def test_tokens_in_flight_are_part_of_the_length() -> None:
    sequence = make_request(GenerationRequest(0, (1, 2), SamplingParams()), (0.0, 0), 50, 0).sequences[0]
    sequence.length += 1
    assert sequence.num_tokens_in_flight == 1 and sequence.num_generated_tokens == 0
    sequence.token_ids.append(5)
    assert sequence.num_tokens_in_flight == 0 and sequence.num_generated_tokens == 1
