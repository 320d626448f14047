"""Formats of log-probabilities, on a tokenizer of single bytes."""

from __future__ import annotations

import math
from typing import Any

from tokenmill.outputs import Logprob, TokenLogprobs
from tokenmill.server.openai.logprobs import CompletionLogprobsBuilder, TokenTexts, chat_logprobs, prompt_logprobs

BOS = 256


class ByteTokenizer:
    """Token ids are bytes; 256 starts a text."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"<s>" if token_id == BOS else bytes([token_id])

    def is_special(self, token_id: int) -> bool:
        return token_id == BOS


TOKENIZER: Any = ByteTokenizer()
TEXTS = TokenTexts(TOKENIZER)


def entry(*ranked: int, chosen: int | None = None, chosen_rank: int = 9) -> TokenLogprobs:
    """`ranked` are the most likely tokens in order, with log-probabilities -1, -2, ..."""
    found = {token: Logprob(-float(rank), rank) for rank, token in enumerate(ranked, start=1)}
    if chosen is not None:
        found[chosen] = Logprob(-float(chosen_rank), chosen_rank)
    return found


def test_chat_format_of_a_chosen_token_outside_the_most_likely() -> None:
    [item] = chat_logprobs(TEXTS, [ord("z")], [entry(ord("a"), ord("b"), chosen=ord("z"))], 2).content
    assert (item.token, item.logprob, item.bytes) == ("z", -9.0, [122])
    assert [top.token for top in item.top_logprobs] == ["a", "b"]


def test_chat_format_of_a_part_of_a_character() -> None:
    [item] = chat_logprobs(TEXTS, [0xE2], [entry(0xE2)], 0).content
    assert (item.token, item.bytes, item.top_logprobs) == ("\\xe2", [0xE2], [])


def test_banned_token_has_a_finite_logprob() -> None:
    values = {ord("a"): Logprob(0.0, 1), ord("b"): Logprob(-math.inf, 2)}
    [item] = chat_logprobs(TEXTS, [ord("a")], [values], 2).content
    assert [top.logprob for top in item.top_logprobs] == [0.0, -9999.0]
    assert b"-9999.0" in item.to_json()


def test_without_a_tokenizer_tokens_are_ids() -> None:
    [item] = chat_logprobs(TokenTexts(None), [7], [entry(7)], 1).content
    assert (item.token, item.bytes) == ("token_id:7", None)


def test_completion_format_lists_the_chosen_token_besides_the_most_likely() -> None:
    builder = CompletionLogprobsBuilder(TEXTS, 2, hides_special_tokens=True)
    built = builder.add([ord("z"), ord("a")], [entry(ord("a"), ord("b"), chosen=ord("z")), entry(ord("a"), ord("b"))])
    assert built.top_logprobs == [{"a": -1.0, "b": -2.0, "z": -9.0}, {"a": -1.0, "b": -2.0}]
    assert built.token_logprobs == [-9.0, -1.0]


def test_offsets_count_characters_not_tokens() -> None:
    text = "a€b"  # five bytes, so five tokens
    builder = CompletionLogprobsBuilder(TEXTS, 0, hides_special_tokens=True)
    built = builder.add(list(text.encode()), [entry(byte) for byte in text.encode()])
    assert built.text_offset == [0, 1, 1, 1, 2]
    assert built.tokens == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert builder.add([ord("c")], [entry(ord("c"))]).text_offset == [3], "pieces go on where the last one ended"


def test_special_tokens_have_no_width_unless_shown() -> None:
    tokens = [BOS, ord("a"), ord("b")]
    entries = [entry(token) for token in tokens]
    hidden = CompletionLogprobsBuilder(TEXTS, 0, hides_special_tokens=True).add(tokens, entries)
    shown = CompletionLogprobsBuilder(TEXTS, 0, hides_special_tokens=False).add(tokens, entries)
    assert hidden.text_offset == [0, 0, 1]
    assert shown.text_offset == [0, 3, 4]


def test_offsets_of_an_echoed_prompt_end_at_its_end() -> None:
    """The tokenizer put a space before the text, and a start token before that."""
    builder = CompletionLogprobsBuilder(TEXTS, 1, hides_special_tokens=True)
    tokens = [BOS, *b" ab"]
    built = builder.add_prompt("ab", tokens, [entry(token) for token in tokens[1:]])
    assert built.text_offset == [0, 0, 0, 1]
    assert built.token_logprobs == [None, -1.0, -1.0, -1.0]
    assert builder.add([ord("c")], [entry(ord("c"))]).text_offset == [2]


def test_prompt_logprobs() -> None:
    assert prompt_logprobs(TEXTS, list(b"ab"), []) is None
    first, second = prompt_logprobs(TEXTS, list(b"ab"), [entry(ord("x"), chosen=ord("b"))]) or []
    assert first is None
    assert second is not None
    assert {key: (value.rank, value.decoded_token) for key, value in second.items()} == {
        "120": (1, "x"),
        "98": (9, "b"),
    }
