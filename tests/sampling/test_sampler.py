"""The whole sampler: against transformers in float64, by distribution, and alone against in any company."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import MinNewTokensLengthLogitsProcessor

from tokenmill.sampling import exact
from tokenmill.sampling.random import stream_key, uniforms
from tokenmill.sampling.sampled_tokens import collect
from tokenmill.sampling.sampler import Sampler
from tokenmill.sampling.slot_params import SlotSamplingParams
from tokenmill.sampling_params import SamplingParams

INFINITY = math.inf
VOCAB_SIZE = 60
Sample = Callable[..., Any]


def random_logits(seed: int, vocab_size: int = VOCAB_SIZE, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


TOKENS = st.integers(0, VOCAB_SIZE - 1)
PARAMS = st.fixed_dictionaries({
    "temperature": optional(st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0, 100.0])),
    "top_k": optional(st.sampled_from([0, 1, 2, 5, 20, VOCAB_SIZE, 1000])),
    "top_p": optional(st.sampled_from([1e-6, 0.3, 0.9, 1.0])),
    "min_p": optional(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
    "repetition_penalty": optional(st.sampled_from([0.7, 1.0, 1.5])),
    "presence_penalty": optional(st.sampled_from([0.0, 1.5, -2.0])),
    "frequency_penalty": optional(st.sampled_from([0.0, 0.5, -1.0])),
    "logit_bias": optional(st.dictionaries(TOKENS, st.sampled_from([-100.0, 1.0, 5.0]), max_size=3)),
    "bad_token_ids": optional(st.lists(TOKENS, max_size=3, unique=True)),
    "min_tokens": optional(st.integers(0, 6)),
    "stop_token_ids": optional(st.lists(TOKENS, max_size=2)),
    "logprobs": optional(st.integers(0, 3)),
})  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, case_type: type[Any]) -> Any:
    return case_type(
        logits=random_logits(draw(st.integers(0, 10**6)), scale=draw(st.sampled_from([0.5, 4.0, 20.0]))),
        sampling=SamplingParams(max_tokens=100, **draw(PARAMS)),
        prompt=tuple(draw(st.lists(TOKENS, min_size=1, max_size=6))),
        answer=tuple(draw(st.lists(TOKENS, max_size=6))),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
        sequence_index=draw(st.integers(0, 3)),
        end_ids=tuple(draw(st.lists(TOKENS, max_size=2))),
        bad_words=tuple(map(tuple, draw(st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=2)))),
    )


def reference_scores(case: Any) -> torch.Tensor:
    """[V] float64: the case's logits after everything that edits them, by transformers' processors."""
    sampling, tokens = case.sampling, torch.tensor([case.tokens])
    processors = LogitsProcessorList()
    if sampling.repetition_penalty is not None:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    scores = processors(tokens, case.logits.double().unsqueeze(0))
    for token in set(case.answer):
        count = case.answer.count(token)
        scores[0, token] -= (sampling.presence_penalty or 0.0) + (sampling.frequency_penalty or 0.0) * count
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        bias = {(token,): value for token, value in sampling.logit_bias.items()}  # a list may not name the token 0
        processors.append(SequenceBiasLogitsProcessor(bias))
    words = [list(word) for word in case.bad_words] + [[token] for token in sampling.bad_token_ids or []]
    if words:
        processors.append(NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([VOCAB_SIZE])))
    ends = sorted({*case.end_ids, *(sampling.stop_token_ids or [])})
    if ends and sampling.min_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(len(case.prompt), sampling.min_tokens, torch.tensor(ends)))
    scores = processors(tokens, scores)
    for word in words:  # transformers passes over a bad word that would be the whole sequence
        if tuple(word[:-1]) == case.tokens:
            scores[0, word[-1]] = -INFINITY
    return scores[0]


def reference_probabilities(case: Any) -> tuple[torch.Tensor, bool]:
    """[V] float64: what the token is drawn from, and whether top-p and min-p leave no doubt in float32."""
    sampling, scores = case.sampling, reference_scores(case).unsqueeze(0)
    scores = TemperatureLogitsWarper(float(1.0 if sampling.temperature is None else sampling.temperature))(None, scores)
    clear = True
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        cumulative = torch.softmax(scores, -1).sort(dim=-1, descending=True).values.cumsum(-1)
        clear &= float((cumulative - sampling.top_p).abs().min()) > 1e-5
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        probabilities = torch.softmax(scores, -1)
        ratio = probabilities / probabilities.max()
        clear &= sampling.min_p == 1.0 or float((ratio - sampling.min_p).abs().min()) > 1e-5
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return torch.softmax(scores, -1)[0], clear


def check_token(case: Any, token: int | None) -> None:
    scores = reference_scores(case)
    if float(scores.max()) == -INFINITY:
        assert token is None
        return
    if case.sampling.greedy:
        assert token is not None
        assert float(scores[token]) >= float(scores.max()) - 1e-5
        return
    probabilities, clear = reference_probabilities(case)
    position = torch.tensor([len(case.tokens)])
    uniform = float(uniforms(torch.tensor([stream_key(case.seed, case.sequence_index)]), position))
    cumulative = probabilities.cumsum(-1)
    clear &= float((cumulative - uniform).abs().min()) > 2e-3 / min(1.0, case.sampling.temperature or 1.0) * 1e-2
    if clear:
        assert token == int(torch.searchsorted(cumulative, uniform, right=True))


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_tokens_match_transformers_under_any_parameters(
    data: st.DataObject, case_type: type[Any], sample_cases: Sample
) -> None:
    batch = data.draw(st.lists(cases(case_type), min_size=1, max_size=4))
    slots = data.draw(st.permutations(range(6)))[: len(batch)]
    sampled = sample_cases(batch, slots)
    for case, row in zip(batch, collect(sampled), strict=True):
        check_token(case, row.token_id)
        if case.sampling.logprobs is None or row.token_id is None:
            assert row.logprobs is None
        else:
            expected = torch.log_softmax(case.logits.double(), -1)
            top = expected.topk(case.sampling.logprobs)
            assert list(row.logprobs) == list(dict.fromkeys([row.token_id, *top.indices.tolist()]))
            for token, logprob in row.logprobs.items():
                assert logprob.logprob == pytest.approx(float(expected[token]), abs=1e-4)
                assert logprob.rank == int((expected > expected[token]).sum()) + 1


@pytest.mark.spec("H3")
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_company_does_not_matter(data: st.DataObject, case_type: type[Any], sample_cases: Sample) -> None:
    """The same request alone, at another row, in another slot, among others: the same token and log-probabilities."""
    case = data.draw(cases(case_type))
    (alone,) = collect(sample_cases([case]))
    others = data.draw(st.lists(cases(case_type), max_size=4))
    row = data.draw(st.integers(0, len(others)))
    batch = [*others[:row], case, *others[row:]]
    slots = data.draw(st.permutations(range(7)))[: len(batch)]
    together = collect(sample_cases(batch, slots, max_position=max(len(other.tokens) for other in batch)))[row]
    assert together.token_id == alone.token_id
    assert (together.logprobs is None) == (alone.logprobs is None)
    if alone.logprobs is not None and together.logprobs is not None:
        assert alone.logprobs.keys() == together.logprobs.keys()
        for token, logprob in alone.logprobs.items():
            assert together.logprobs[token].logprob == pytest.approx(logprob.logprob, abs=1e-6)


@pytest.mark.spec("H3")
def test_a_stream_of_tokens_does_not_depend_on_company(case_type: type[Any], sample_cases: Sample) -> None:
    """A large vocabulary, where summing in another order would show, and a seeded request over many steps."""
    sampling = SamplingParams(temperature=1.2, top_p=0.95, top_k=500, seed=5)
    logits = [random_logits(step, 20_000) for step in range(12)]
    noise = [
        case_type(random_logits(99 + i, 20_000), SamplingParams(temperature=0.5 + i, top_p=0.5), seed=i)
        for i in range(4)
    ]
    streams: list[tuple[int, ...]] = []
    for company in (0, 4):
        answer: tuple[int, ...] = ()
        for step in range(12):
            case = case_type(logits[step], sampling, prompt=(1, 2), answer=answer, seed=5)
            batch = [*noise[:company], case]
            answer += (int(sample_cases(batch).token_ids[-1]),)
        streams.append(answer)
    assert streams[0] == streams[1]
    assert len(set(streams[0])) > 6


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 12},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
)
def test_tokens_follow_the_exact_probabilities(
    params: dict[str, Any], case_type: type[Any], sample_cases: Sample, assert_distribution: Callable[..., None]
) -> None:
    logits, sampling = random_logits(11, scale=1.5), SamplingParams(**params)
    batch = [case_type(logits, sampling, prompt=(3, 9), answer=(4,), seed=seed) for seed in range(3_000)]
    probabilities, clear = reference_probabilities(batch[0])
    assert clear
    assert_distribution(sample_cases(batch).token_ids, probabilities)


def test_sequences_of_a_request_differ(case_type: type[Any], sample_cases: Sample) -> None:
    sampling = SamplingParams(temperature=1.0, n=16)
    batch = [case_type(torch.zeros(1000), sampling, seed=1, sequence_index=index) for index in range(16)]
    assert len(set(sample_cases(batch).token_ids.tolist())) > 14


# Greedy


def test_greedy_takes_the_first_of_the_largest(case_type: type[Any], sample_cases: Sample) -> None:
    logits = torch.tensor([1.0, 5.0, -INFINITY, 5.0])
    noise = case_type(torch.zeros(4), SamplingParams(temperature=1.0))
    greedy = [SamplingParams(), SamplingParams(temperature=0.0, top_p=0.1), SamplingParams(temperature=5.0, top_k=1)]
    for sampling in greedy:
        case = case_type(logits, sampling)
        assert sample_cases([case]).token_ids.tolist() == [1]
        assert sample_cases([noise, case, noise]).token_ids[1] == 1


def test_temperature_near_zero_is_greedy(case_type: type[Any], sample_cases: Sample) -> None:
    batch = [
        case_type(random_logits(seed), SamplingParams(temperature=1e-45 if seed % 2 else 1e-6), seed=seed)
        for seed in range(20)
    ]
    assert sample_cases(batch).token_ids.tolist() == [int(case.logits.argmax()) for case in batch]


# Bans


def test_end_tokens_wait_for_min_tokens(case_type: type[Any], sample_cases: Sample) -> None:
    logits = torch.tensor([0.0, 9.0, 8.0, 7.0, -1.0])
    sampling = SamplingParams(min_tokens=2, stop_token_ids=[2])
    by_length = [
        case_type(logits, sampling, prompt=(4, 4, 4), answer=(4,) * length, end_ids=(1,)) for length in range(4)
    ]
    assert sample_cases(by_length).token_ids.tolist() == [3, 3, 1, 1]


def test_a_bad_word_is_banned_only_after_its_beginning(case_type: type[Any], sample_cases: Sample) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0])
    endings = [((1,), (2,)), ((2,), (1,)), ((1, 2), ()), ((2,), ())]
    batch = [
        case_type(logits, SamplingParams(), prompt=prompt, answer=answer, bad_words=((1, 2, 3),))
        for prompt, answer in endings
    ]
    assert sample_cases(batch).token_ids.tolist() == [2, 3, 2, 3]


def test_banning_everything_is_an_invalid_row(case_type: type[Any], sample_cases: Sample) -> None:
    for sampling in (SamplingParams(bad_token_ids=[0, 1]), SamplingParams(temperature=1.0, bad_token_ids=[0, 1])):
        batch = [case_type(torch.tensor([1.0, 2.0]), params) for params in (sampling, SamplingParams(temperature=1.0))]
        sampled = sample_cases(batch)
        assert sampled.invalid.tolist() == [True, False]
        assert sampled.token_ids[0] == 0
        assert collect(sampled)[0] == (None, None, True)


def test_bans_and_bad_logits_are_told_apart(case_type: type[Any], sample_cases: Sample) -> None:
    """Of rows side by side, with log-probabilities and without: whose fault is it that there is no token?"""
    sound, half, none = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -INFINITY]), torch.full((2,), -INFINITY)
    everything, first = SamplingParams(bad_token_ids=[0, 1], logprobs=1), SamplingParams(bad_token_ids=[0])
    cases = [(sound, everything), (half, first), (half, SamplingParams()), (none, everything), (none, first)]
    rows = collect(sample_cases([case_type(logits, sampling) for logits, sampling in cases]))
    assert [(row.token_id, row.is_banned) for row in rows] == [
        *[(None, True)] * 2,
        (0, False),
        *[(None, False)] * 2,
    ]


# Bad logits


@pytest.mark.parametrize("sampling", [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.5, presence_penalty=1.0),
    SamplingParams(temperature=1.0, top_k=300, logit_bias={1: 2.0}, bad_token_ids=[3], logprobs=2),
])  # fmt: skip
@pytest.mark.parametrize("bad", [[math.nan], [INFINITY], [math.nan, INFINITY, -INFINITY], [-INFINITY] * 400])
def test_bad_logits_are_flagged_and_harm_nobody_else(
    sampling: SamplingParams, bad: list[float], case_type: type[Any], sample_cases: Sample
) -> None:
    good = [case_type(random_logits(seed, 400), sampling, seed=seed) for seed in range(3)]
    expected = sample_cases(good)
    assert not expected.invalid.any()
    broken = random_logits(7, 400)
    broken[-len(bad) :] = torch.tensor(bad)
    sampled = sample_cases([good[0], case_type(broken, sampling), *good[1:]])
    assert sampled.invalid.tolist() == [False, True, False, False]
    assert sampled.token_ids.tolist() == [*expected.token_ids[:1].tolist(), 0, *expected.token_ids[1:].tolist()]
    rows = collect(sampled)
    assert rows[1] == (None, None, False)
    assert rows[0] == collect(expected)[0]


def test_a_nan_cannot_hide_behind_a_ban(case_type: type[Any], sample_cases: Sample) -> None:
    sampling = SamplingParams(bad_token_ids=[0])
    assert sample_cases([case_type(torch.tensor([math.nan, 1.0]), sampling)]).invalid.tolist() == [True]


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e38])
def test_extreme_logits(scale: float, case_type: type[Any], sample_cases: Sample) -> None:
    logits = torch.tensor([-1.0, 0.5, 1.0, -INFINITY]) * scale
    for params in (
        {"temperature": 0.01},
        {"temperature": 100.0, "top_p": 1e-6},
        {"temperature": 1.0, "repetition_penalty": 1e-3, "top_k": 2},
        {"temperature": 1.0, "logit_bias": {2: 1e30}},
    ):
        sampled = sample_cases(
            [case_type(logits, SamplingParams(**params), prompt=(2,), seed=seed) for seed in range(8)]
        )
        assert not sampled.invalid.any()
        if scale > 1 or "logit_bias" in params:
            assert sampled.token_ids.tolist() == [2] * 8
        assert 3 not in sampled.token_ids.tolist()


# Shapes, slots and slices


def test_no_rows(sample_cases: Sample) -> None:
    sampled = sample_cases([])
    assert sampled.token_ids.shape == sampled.invalid.shape == (0,)
    assert sampled.token_ids.dtype == torch.int64
    assert collect(sampled) == []


def test_a_reused_slot_keeps_nothing(case_type: type[Any], sample_cases: Sample) -> None:
    busy = SamplingParams(
        temperature=2.0, top_k=2, top_p=0.5, min_p=0.2, repetition_penalty=3.0, presence_penalty=9.0,
        frequency_penalty=9.0, logit_bias={0: 100.0}, bad_token_ids=[1, 2], min_tokens=5, logprobs=4,
    )  # fmt: skip
    params = SlotSamplingParams(2, VOCAB_SIZE, "cpu")
    former = case_type(random_logits(0), busy, prompt=(1, 2), answer=(3,), end_ids=(4,), bad_words=((2, 3),))
    sample_cases([former, former], params=params)
    for sampling in (SamplingParams(), SamplingParams(temperature=1.0)):
        later = case_type(random_logits(1), sampling, prompt=(1, 2, 3), seed=8)
        reused, fresh = sample_cases([later, former], params=params), sample_cases([later])
        assert reused.token_ids[0] == fresh.token_ids[0]
        assert collect(reused)[0].logprobs is None


def test_slices_do_not_change_tokens(
    case_type: type[Any], sample_cases: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(repetition_penalty=1.5, logprobs=2),
        SamplingParams(temperature=0.7, top_k=5, logit_bias={3: 4.0}, bad_token_ids=[9]),
        SamplingParams(),
    ]
    batch = [case_type(random_logits(i), kinds[i % 4], prompt=(1, 2, 3), seed=i) for i in range(11)]
    whole = collect(sample_cases(batch))
    for num_rows in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        monkeypatch.setattr(exact, "_MAX_ELEMENTS_PER_THREAD", num_rows * VOCAB_SIZE)
        assert exact.rows_per_slice(batch[0].logits.unsqueeze(0)) == num_rows
        assert collect(sample_cases(batch)) == whole


def test_logits_are_left_alone(case_type: type[Any]) -> None:
    params = SlotSamplingParams(1, VOCAB_SIZE, "cpu")
    sampling = SamplingParams(temperature=1.0, top_k=5, top_p=0.5, repetition_penalty=2.0, logit_bias={1: 1.0})
    params.assign([case_type(random_logits(0), sampling).new_slot(0)])
    logits = random_logits(0).unsqueeze(0)
    slots, buffer = torch.tensor([0]), torch.ones(1, 4, dtype=torch.int64)
    Sampler(params).sample(logits, slots, [0], torch.tensor([1]), buffer)
    assert torch.equal(logits[0], random_logits(0))


EVERYTHING = SamplingParams(
    temperature=1.0, top_k=300, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2,
    frequency_penalty=0.1, logit_bias={1: 1.0}, bad_token_ids=[2], min_tokens=3, logprobs=3,
)  # fmt: skip


def test_nothing_waits_for_the_device(case_type: type[Any]) -> None:
    """Fake tensors hold no values: reading one on the host, as a synchronization would, raises."""
    vocab_size = 400
    params = SlotSamplingParams(3, vocab_size, "cpu")
    kinds = [EVERYTHING, SamplingParams(), SamplingParams(temperature=1.0, top_k=5)]
    case = case_type(random_logits(0, vocab_size), EVERYTHING, end_ids=(4,), bad_words=((1, 2), (1, 2, 3)))
    params.assign([case.new_slot(0), *(case_type(case.logits, kind).new_slot(i) for i, kind in enumerate(kinds) if i)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits, buffer = torch.empty(3, vocab_size), torch.empty(3, 9, dtype=torch.int32)
        slots, positions = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        sampled = Sampler(params).sample(logits, slots, [0, 1, 2], positions, buffer)
        assert sampled.token_ids.shape == (3,)
        assert sampled.logprobs is not None
        assert sampled.logprobs.top_token_ids.shape == (1, 3)
        with pytest.raises(DataDependentOutputException):
            sampled.token_ids[0].item()  # the test can fail


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_cuda_gives_the_tokens_of_the_cpu(case_type: type[Any], sample_cases: Sample) -> None:
    kinds = [EVERYTHING, SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9), SamplingParams(logprobs=2)]
    batch = [
        case_type(random_logits(i, 5_000), kinds[i % 4], prompt=(5, 6), answer=(7, 7), seed=i, bad_words=((7, 9), (8,)))
        for i in range(256)
    ]
    on_cpu = collect(sample_cases(batch))
    params = SlotSamplingParams(256, 5_000, "cuda")
    on_cuda = sample_cases(batch, params=params, device="cuda")
    rows = collect(on_cuda)
    assert [row.token_id for row in rows] == [row.token_id for row in on_cpu]
    for one, other in zip(on_cpu, rows, strict=True):
        assert (one.logprobs or {}).keys() == (other.logprobs or {}).keys()
    slots = torch.arange(256, device="cuda")
    logits = torch.stack([case.logits for case in batch]).cuda()
    positions, buffer = torch.full_like(slots, 4), torch.full((256, 9), 7, device="cuda")
    sampler, slot_list = Sampler(params), list(range(256))
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = sampler.sample(logits, slots, slot_list, positions, buffer)
        params.assign([case.new_slot(slot) for slot, case in enumerate(batch)])
        second = sampler.sample(logits, slots, slot_list, positions, buffer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first.token_ids, second.token_ids)
