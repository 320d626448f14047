"""What `SlotSamplingParams` makes of requests' parameters, and that a slot forgets its former owner."""

from __future__ import annotations

import pytest
import torch

from tokenmill.engine.plan import NewSlot
from tokenmill.sampling.random import stream_key
from tokenmill.sampling.slot_params import Need, SlotNeeds, SlotSamplingParams
from tokenmill.sampling_params import SamplingParams

VOCAB_SIZE = 100


def new_slot(slot: int, sampling: SamplingParams, **fields: object) -> NewSlot:
    values = {"token_ids": (1, 2, 3), "num_prompt_tokens": 2, "seed": 0, "sequence_index": 0, "end_ids": ()} | fields
    return NewSlot(slot=slot, block_ids=(), sampling=sampling, **values)  # type: ignore[arg-type]


def assigned(sampling: SamplingParams, **fields: object) -> SlotSamplingParams:
    params = SlotSamplingParams(4, VOCAB_SIZE, "cpu")
    params.assign([new_slot(2, sampling, **fields)])
    return params


def stored(params: SlotSamplingParams, name: str, slot: int = 2) -> float:
    slots = torch.tensor([slot])
    integers = ("stream_key", "num_prompt_tokens", "min_tokens", "top_k", "num_logprobs")
    return (params.integers(name, slots) if name in integers else params.floats(name, slots)).item()


@pytest.mark.parametrize(
    ("sampling", "temperature", "flags"),
    [
        (SamplingParams(), 0.0, Need(0)),
        (SamplingParams(temperature=0.0, top_p=0.5, top_k=7, min_p=0.1), 0.0, Need(0)),
        (SamplingParams(temperature=0.7, top_k=1, top_p=0.5), 0.0, Need(0)),
        (SamplingParams(top_p=0.5), 1.0, Need.RANDOM | Need.TOP_P),
        (SamplingParams(top_k=7), 1.0, Need.RANDOM | Need.TOP_K),
        (SamplingParams(temperature=0.7), 0.7, Need.RANDOM),
        (SamplingParams(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0), 0.7, Need.RANDOM),
        (SamplingParams(temperature=0.7, top_k=VOCAB_SIZE), 0.7, Need.RANDOM),
        (SamplingParams(temperature=0.7, top_k=2**31 - 1), 0.7, Need.RANDOM),
        (SamplingParams(temperature=0.7, min_p=0.1), 0.7, Need.RANDOM | Need.MIN_P),
        (SamplingParams(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0), 0.0, Need(0)),
        (SamplingParams(repetition_penalty=1.2), 0.0, Need.REPETITION),
        (SamplingParams(presence_penalty=-1.0), 0.0, Need.COUNTS),
        (SamplingParams(frequency_penalty=0.5), 0.0, Need.COUNTS),
        (SamplingParams(logit_bias={}), 0.0, Need(0)),
        (SamplingParams(logit_bias={3: 1.0}), 0.0, Need.BIAS),
        (SamplingParams(logit_bias={VOCAB_SIZE: 1.0, VOCAB_SIZE + 5: 2.0}), 0.0, Need(0)),
        (SamplingParams(bad_token_ids=[4]), 0.0, Need.BAD_WORDS),
        (SamplingParams(bad_token_ids=[VOCAB_SIZE]), 0.0, Need(0)),
        (SamplingParams(min_tokens=3, stop_token_ids=[5]), 0.0, Need.MIN_TOKENS),
        (SamplingParams(min_tokens=0, stop_token_ids=[5]), 0.0, Need(0)),
        (SamplingParams(min_tokens=3), 0.0, Need(0)),
    ],
)
def test_defaults_and_needs(sampling: SamplingParams, temperature: float, flags: Need) -> None:
    params = assigned(sampling)
    assert stored(params, "temperature") == temperature
    assert Need(params.slot_needs(2).flags) == flags
    assert params.slot_needs(1) == SlotNeeds()


@pytest.mark.parametrize(
    ("sampling", "num_logprobs"),
    [
        (SamplingParams(), None),
        (SamplingParams(logprobs=0), 0),
        (SamplingParams(logprobs=5), 5),
        (SamplingParams(n=2, temperature=1.0), None),
        (SamplingParams(n=2, best_of=2, temperature=1.0), None),
        (SamplingParams(n=1, best_of=2, temperature=1.0), 0),
        (SamplingParams(n=1, best_of=2, temperature=1.0, logprobs=3), 3),
    ],
)
def test_who_wants_logprobs(sampling: SamplingParams, num_logprobs: int | None) -> None:
    params = assigned(sampling)
    assert params.slot_needs(2).num_logprobs == num_logprobs
    assert stored(params, "num_logprobs") == (-1 if num_logprobs is None else num_logprobs)


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63, 2**64 - 1])
def test_seed_and_counts_are_stored(seed: int) -> None:
    sampling = SamplingParams(temperature=1.0, top_k=9, min_tokens=4, top_p=0.3, min_p=0.2, presence_penalty=0.7)
    params = assigned(sampling, seed=seed, sequence_index=3)
    assert stored(params, "stream_key") == stream_key(seed, 3)
    assert [stored(params, name) for name in ("num_prompt_tokens", "min_tokens", "top_k")] == [2, 4, 9]
    assert [stored(params, name) for name in ("top_p", "min_p", "presence_penalty")] == [0.3, 0.2, 0.7]


def test_lists() -> None:
    sampling = SamplingParams(
        logit_bias={3: 1.5, 500: 1.0, 4: 1e30}, bad_token_ids=[8, 9], min_tokens=2, stop_token_ids=[6, 7, 200]
    )
    params = assigned(sampling, end_ids=(7, 5), bad_words=((1, 2, 3), (9,), (), (4, 200), (200, 4)))
    slots = torch.tensor([2])
    (ids, values), _ = params.biases.gather(slots, params.biases.length(2))
    assert ids.tolist() == [[3, 4]]
    assert values.tolist()[0][0] == 1.5
    assert torch.isfinite(values).all()
    assert params.bans.gather(slots, params.bans.length(2))[0][0].tolist() == [[7, 5, 6]]
    assert params.bad_words.gather(slots, params.bad_words.length(2))[0][0].tolist() == [[3, 9, 4, 8]]
    (word, distance, token), _ = params.bad_word_starts.gather(slots, params.bad_word_starts.length(2))
    assert list(zip(word[0].tolist(), distance[0].tolist(), token[0].tolist(), strict=True)) == [
        (0, 1, 2), (0, 2, 1), (2, 1, 200),
    ]  # fmt: skip


def test_a_slot_forgets_its_former_owner() -> None:
    busy = SamplingParams(
        temperature=0.5, top_k=3, top_p=0.1, min_p=0.3, repetition_penalty=2.0, presence_penalty=1.0,
        frequency_penalty=1.0, logit_bias={1: 5.0}, bad_token_ids=[2], min_tokens=9, stop_token_ids=[4], logprobs=3,
        max_tokens=20,
    )  # fmt: skip
    params = assigned(busy, end_ids=(1,), bad_words=((1, 2),), seed=9, sequence_index=1)
    fresh = SlotSamplingParams(4, VOCAB_SIZE, "cpu")
    for target in (params, fresh):
        target.assign([new_slot(2, SamplingParams(), token_ids=(5,), num_prompt_tokens=1)])
    assert params.slot_needs(2) == fresh.slot_needs(2) == SlotNeeds()
    for lists in (params.biases, params.bans, params.bad_words, params.bad_word_starts):
        assert lists.length(2) == 0
        assert not lists.gather(torch.tensor([2]), 2)[1].any()
    for name in ("stream_key", "num_prompt_tokens", "min_tokens", "top_k", "num_logprobs", "temperature", "top_p",
                 "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):  # fmt: skip
        assert stored(params, name) == stored(fresh, name)


def test_batch_needs_are_of_the_scheduled_slots_alone() -> None:
    params = SlotSamplingParams(4, VOCAB_SIZE, "cpu")
    params.assign([
        new_slot(0, SamplingParams(temperature=1.0, top_k=40)),
        new_slot(1, SamplingParams(temperature=1.0, top_k=7, repetition_penalty=1.5)),
        new_slot(3, SamplingParams(presence_penalty=1.0)),
    ])  # fmt: skip
    needs = params.batch_needs([3, 1])
    assert needs.flags == Need.RANDOM | Need.TOP_K | Need.REPETITION | Need.COUNTS
    assert (needs.num_random, needs.num_penalized, needs.max_top_k) == (1, 2, 7)
    assert params.batch_needs([2]).flags == Need(0)
    assert params.batch_needs([]).flags == Need(0)
    assert params.batch_needs([0, 1, 3]).max_top_k == 40


def test_assigning_nothing_changes_nothing() -> None:
    params = assigned(SamplingParams(temperature=0.7))
    params.assign([])
    assert stored(params, "temperature") == 0.7
