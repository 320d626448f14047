"""Incremental detokenization and stop strings: the same text however it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.tokenization.small_tokenizers import TEXTS, wrap
from tokenmill.errors import InvalidParameterError
from tokenmill.tokenization import IncrementalDetokenizer, StopStringChecker, Tokenizer

# The tokenizers are shared and never changed, so one per session is right.
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def detokenize(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    cuts: Sequence[int],
    prompt: Sequence[int] = (),
    skip: bool = True,
) -> tuple[str, list[str]]:
    """The whole text and the pieces, with `token_ids` cut at `cuts`."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt, skip_special_tokens=skip)
    bounds = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    pieces = [detokenizer.append(token_ids[start:end]) for start, end in itertools.pairwise(bounds)]
    assert detokenizer.append([]) == ""
    tail = detokenizer.flush()
    assert detokenizer.flush() == "", "a second flush gives nothing"
    return "".join(pieces) + tail, pieces


token_soup = st.lists(st.integers(0, 800), max_size=60)
cut_points = st.lists(st.integers(0, 60), max_size=8)


@shared
@given(token_soup, cut_points, st.booleans())
@example([3 + 0x30, 2, 400, 900], [1, 2], True)
def test_byte_level_soup(byte_level: tokenizers.Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> None:
    """Random tokens: mostly invalid UTF-8, cut characters, special tokens, ids outside the vocabulary."""
    text, _ = detokenize(wrap(byte_level), ids, cuts, skip=skip)
    assert text == byte_level.decode(ids, skip_special_tokens=skip)


@shared
@given(st.lists(st.integers(0, 270), max_size=60), cut_points, st.booleans())
@example([259, 259, 260], [1, 2], True)
@example([3 + 0xE6, 3 + 0x97, 3 + 0xA5, 3 + 0xE6, 260], [1, 2, 3, 4], True)
def test_byte_fallback_soup(sentencepiece: tokenizers.Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> None:
    text, _ = detokenize(wrap(sentencepiece), ids, cuts, skip=skip)
    assert text == sentencepiece.decode(ids, skip_special_tokens=skip)


@shared
@given(st.lists(st.integers(0, 12), max_size=40), cut_points)
def test_other_decoders(metaspace: tokenizers.Tokenizer, ids: list[int], cuts: list[int]) -> None:
    tokenizer = wrap(metaspace)
    assert tokenizer.decoder_style.kind == "other"
    assert detokenize(tokenizer, ids, cuts)[0] == metaspace.decode(ids)


@shared
@given(st.text(alphabet="ab 日é\U0001f642\u0301", max_size=40), st.integers(0, 60), cut_points)
@example("baaaaa b b\u0301\U0001f642\U0001f642", 21, [])  # nine bytes of a run of ten are the prompt's
def test_answer_continues_the_prompt(
    byte_level: tokenizers.Tokenizer,
    sentencepiece: tokenizers.Tokenizer,
    text: str,
    length: int,
    cuts: list[int],
) -> None:
    """decode(prompt) + answer == decode(prompt + answer), wherever the prompt ends."""
    for library in (byte_level, sentencepiece):
        ids = library.encode(text).ids
        prompt, answer = ids[:length], ids[length:]
        before = library.decode(prompt)
        whole = library.decode(ids)
        got, _ = detokenize(wrap(library), answer, cuts, prompt=prompt)
        if whole.startswith(before):
            assert before + got == whole
        else:  # the prompt ends inside a character, which belongs to the answer
            assert whole.endswith(got) and "\ufffd" not in got


def test_space_at_the_start(sentencepiece: tokenizers.Tokenizer) -> None:
    """`▁a` starts a text as "a", and continues one as " a"."""
    tokenizer = wrap(sentencepiece)
    space_a = tokenizer.token_to_id("▁a")
    assert space_a is not None
    assert IncrementalDetokenizer(tokenizer).append([space_a]) == "a"
    assert IncrementalDetokenizer(tokenizer, prompt_token_ids=[1]).append([space_a]) == "a"  # <s> is no text
    assert IncrementalDetokenizer(tokenizer, prompt_token_ids=[1, space_a]).append([space_a]) == " a"


def test_incomplete_characters_are_held_back(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = wrap(byte_level)
    ids = [tokenizer.token_to_id(character) for character in "æĹ¥"]  # the bytes E6 97 A5 of 日
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.append([token_id or 0]) for token_id in ids] == ["", "", "日"]
    assert detokenizer.append([ids[0] or 0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_run_of_byte_tokens_waits_for_its_end(sentencepiece: tokenizers.Tokenizer) -> None:
    tokenizer = wrap(sentencepiece)
    run = [3 + byte for byte in "語".encode()]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.append(run) == ""
    assert detokenizer.append([260]) == "語a"
    detokenizer.append([*run, 3 + 0xFF])
    assert detokenizer.flush() == tokenizer.decode([*run, 3 + 0xFF]) == "\ufffd" * 4


def test_every_piece_is_given_out_as_soon_as_it_is_final(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = wrap(byte_level)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        seen, given_out = b"", ""
        for token_id in ids:
            seen += tokenizer.token_bytes(token_id)
            given_out += detokenizer.append([token_id])
            assert given_out == seen.decode(errors="ignore")


def test_cost_does_not_grow_with_the_text(metaspace: tokenizers.Tokenizer) -> None:
    """The window stays small, also when nothing can be given out."""
    tokenizer = wrap(metaspace)
    decoded: list[int] = []

    class Counting(Tokenizer):
        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            decoded.append(len(token_ids))
            return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    counting = Counting(tokenizer._backend, tokenizer._special_tokens)
    detokenizer = IncrementalDetokenizer(counting)
    for _ in range(300):
        detokenizer.append([3, 6, 9])
    assert max(decoded) <= 32


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_vocabularies(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            got, pieces = detokenize(tokenizer, ids, range(len(ids)), skip=skip)
            assert got == tokenizer.decode(ids, skip_special_tokens=skip)
            assert not any("\ufffd" in piece for piece in pieces)


def reference_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """End and value of the stop string that is complete first, the longest of several; tried at each character."""
    for end in range(1, len(text) + 1):
        matches = [candidate for candidate in stop if text[:end].endswith(candidate)]
        if matches:
            return end, max(matches, key=len)
    return None


small_text = st.text(alphabet="ab日\n", max_size=30)
stop_strings = st.lists(st.text(alphabet="ab日\n", min_size=1, max_size=5), min_size=0, max_size=4)


@settings(deadline=None, max_examples=300)
@given(small_text, stop_strings, st.lists(st.integers(0, 30), max_size=8), st.booleans())
@example("aabaab", ["aab", "abaa", "b"], [1, 2, 3], False)
@example("abcd", ["abcd", "bc"], [2], False)
def test_stop_strings(text: str, stop: list[str], cuts: list[int], include: bool) -> None:
    checker = StopStringChecker(stop, include_stop=include)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    given_out = ""
    matched: str | None = None
    for start, end in itertools.pairwise(bounds):
        piece, matched = checker.append(text[start:end])
        given_out += piece
        if matched is None:  # exactly the text that can still start a stop string is held back
            held = text[len(given_out) : end]
            assert text[:end] == given_out + held
            longest = max((n for s in stop for n in range(len(s)) if text[:end].endswith(s[:n])), default=0)
            assert len(held) == longest
    given_out += checker.flush()
    expected = reference_stop(text, stop)
    if expected is None:
        assert (given_out, matched, checker.matched) == (text, None, None)
    else:
        end, value = expected
        assert matched == checker.matched == value
        assert given_out == text[: end if include else end - len(value)]
        assert checker.append("more") == ("", value) and checker.flush() == ""


def test_stop_string_over_chunks() -> None:
    checker = StopStringChecker(["<|end|>", "\n\n"])
    assert checker.append("Hello <|e") == ("Hello ", None)
    assert checker.append("xit\n") == ("<|exit", None)
    assert checker.append("\nmore") == ("", "\n\n")
    assert checker.append("text") == ("", "\n\n")


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        StopStringChecker(["a", ""])
    assert caught.value.field == "stop"


def test_no_stop_strings_pass_everything() -> None:
    checker = StopStringChecker([])
    assert checker.append("a\n") == ("a\n", None)
    assert checker.flush() == ""
