"""Stop words against a search from scratch: the automaton, and an engine whose answers they end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine_harness import MAX_UTILIZATION, Harness
from tokenmill.engine.stop_words import MAX_STOP_WORD_TOKENS, StopWords
from tokenmill.errors import InvalidParameterError

Word = tuple[int, ...]

words_of_few_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)


def longest_ending(words: list[Word], tokens: list[int]) -> int:
    """Length of the longest word that the tokens end with."""
    return max((len(word) for word in words if tuple(tokens[-len(word) :]) == word), default=0)


def longest_beginning(words: list[Word], tokens: list[int]) -> int:
    """Length of the longest end of the tokens that a word begins with."""
    lengths = range(1, len(tokens) + 1)
    return max((n for n in lengths if any(word[:n] == tuple(tokens[-n:]) for word in words)), default=0)


@settings(deadline=None)
@given(words=words_of_few_tokens, tokens=st.lists(st.integers(0, 3), max_size=30))
def test_the_automaton_is_a_search_from_scratch(words: list[Word], tokens: list[int]) -> None:
    automaton, state = StopWords(words), 0
    for end, token_id in enumerate(tokens, start=1):
        state = automaton.advance(state, token_id)
        assert automaton.num_matched_tokens(state) == longest_ending(words, tokens[:end])
        assert automaton.num_open_tokens(state) == longest_beginning(words, tokens[:end])


def plain_answer(**shape: object) -> list[int]:
    """The answer of the request that all tests here make, without stop words."""
    harness = Harness(**shape)
    harness.add([1, 2, 3], max_tokens=20)
    harness.run()
    return harness.tokens(0)


PLAIN = plain_answer()


def stopped_answer(words: list[Word], min_tokens: int, end_ids: Word) -> tuple[list[int], str, int | None]:
    """The oracle: the plain answer, cut where the first stop word or end token ends it."""
    for end in range(1, len(PLAIN) + 1):
        length = longest_ending(words, PLAIN[:end])
        if length and end - length >= min_tokens:
            return PLAIN[: end - length], "stop", PLAIN[end - 1]
        if PLAIN[end - 1] in end_ids and end > min_tokens:
            return PLAIN[: end - 1], "stop", None
    return PLAIN, "length", None


@st.composite
def words_of_the_answer(draw: st.DrawFn) -> list[Word]:
    """Pieces of the plain answer, some with another last token, so that there are false starts."""
    words = []
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(PLAIN) - 2))
        word = PLAIN[start : start + draw(st.integers(1, 5))]
        words.append((*word, 49) if draw(st.booleans()) else tuple(word))
    return words


@pytest.mark.spec("A4")
@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=80, deadline=None)
@given(words=words_of_the_answer(), end_at=st.none() | st.integers(0, 19))
def test_an_answer_ends_before_the_first_stop_word(overlap: bool, words: list[Word], end_at: int | None) -> None:
    end_ids = () if end_at is None else (PLAIN[end_at],)
    expected = stopped_answer(words, 0, end_ids)
    harness = Harness(overlap=overlap)
    harness.add([1, 2, 3], max_tokens=20, stop_words=tuple(words), end_ids=end_ids)
    while harness.core.has_work:
        harness.step()
        tokens = harness.tokens(0)
        assert tokens == expected[0][: len(tokens)], "part of a stop word was told"
    answer = harness.answers[0][0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == expected
    assert len(answer.logprobs) == len(answer.token_ids)
    assert harness.core.stats().num_finished == {expected[1]: 1}


def test_tokens_are_held_no_longer_than_they_may_become_a_stop_word() -> None:
    word = (*PLAIN[2:6], 49)
    harness = Harness()
    harness.add([1, 2, 3], max_tokens=20, stop_words=(word,))
    lengths = []
    while harness.core.has_work:
        harness.step()
        lengths.append(len(harness.tokens(0)))
    assert lengths == [1, 2, 2, 2, 2, 2, *range(7, 21)]


def test_held_tokens_are_told_when_the_answer_ends_otherwise() -> None:
    for cancel in (False, True):
        harness = Harness()
        harness.add([1, 2, 3], max_tokens=20 if cancel else 5, stop_words=((*PLAIN[2:6], 49),))
        for _ in range(5):
            harness.step()
        if cancel:
            assert harness.tokens(0) == PLAIN[:2]
            harness.cancel(0)
            harness.step()
        answer = harness.answers[0][0]
        assert (answer.token_ids, answer.finish_reason) == (PLAIN[:5], "cancelled" if cancel else "length")


def test_min_tokens_counts_the_answer_without_the_stop_word() -> None:
    word = tuple(PLAIN[4:6])
    for min_tokens, expected in ((4, PLAIN[:4]), (5, PLAIN)):
        harness = Harness()
        harness.add([1, 2, 3], max_tokens=20, stop_words=(word,), min_tokens=min_tokens)
        harness.run()
        assert harness.tokens(0) == expected


def test_a_stop_word_may_be_part_of_the_answer() -> None:
    harness = Harness()
    harness.add([1, 2, 3], max_tokens=20, stop_words=(tuple(PLAIN[4:6]),), include_stop_str_in_output=True)
    while harness.core.has_work:
        num_before = len(harness.tokens(0))
        harness.step()
        assert len(harness.tokens(0)) == num_before + 1, "nothing needs to be held back"
    answer = harness.answers[0][0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (PLAIN[:6], "stop", PLAIN[5])


def test_a_stop_word_does_not_begin_in_the_prompt() -> None:
    harness = Harness()
    harness.add([1, 2, 3], max_tokens=20, stop_words=((3, *PLAIN[:2]),))
    harness.run()
    assert harness.tokens(0) == PLAIN


def test_a_preempted_sequence_remembers_what_it_holds() -> None:
    """The cache has room for one of the two sequences to finish; each waits in turn, some in the middle of a word."""
    shape: dict[str, object] = {"num_blocks": 13, "tokens_per_block": 2, "capacity_policy": MAX_UTILIZATION}
    plain = Harness(**shape)
    for _ in range(2):
        plain.add([1, 2, 3], max_tokens=16)
    plain.run()
    assert plain.core.stats().num_preemptions > 0
    for start in range(12):
        harness = Harness(**shape)
        for request_id in range(2):
            answer = plain.tokens(request_id)
            harness.add([1, 2, 3], max_tokens=16, stop_words=(tuple(answer[start : start + 4]), (*answer[2:12], 49)))
        harness.run()
        for request_id in range(2):
            assert harness.tokens(request_id) == plain.tokens(request_id)[:start]


@pytest.mark.parametrize("words", [((1, 2), ()), ((1,) * (MAX_STOP_WORD_TOKENS + 1),)])
def test_bad_stop_words_are_refused(words: tuple[Word, ...]) -> None:
    harness = Harness()
    with pytest.raises(InvalidParameterError) as caught:
        harness.add([1, 2, 3], stop_words=words)
    assert caught.value.field == "stop_words"
    assert not harness.core.has_work
