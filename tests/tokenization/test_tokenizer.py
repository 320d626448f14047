"""The `Tokenizer` interface over each kind of backend."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.tokenization.small_tokenizers import SPECIAL, TEXTS, wrap
from tokenmill.errors import InvalidParameterError
from tokenmill.tokenization import DecoderStyle, SpecialTokens, Tokenizer, wrap_tokenizer
from tokenmill.tokenization.backends import TokenizersBackend
from tokenmill.tokenization.end_of_turn import end_of_turn_ids


@pytest.fixture(params=["library", "transformers"])
def tokenizer(request: pytest.FixtureRequest, byte_level: tokenizers.Tokenizer) -> Tokenizer:
    """The same byte-level tokenizer through each backend."""
    if request.param == "library":
        return wrap(byte_level)
    special = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    return wrap_tokenizer(PreTrainedTokenizerFast(tokenizer_object=byte_level, **special))


def test_encode_and_decode(tokenizer: Tokenizer, byte_level: tokenizers.Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == byte_level.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == [] and tokenizer.decode([]) == ""


def test_vocabulary(tokenizer: Tokenizer, byte_level: tokenizers.Tokenizer) -> None:
    assert tokenizer.vocab_size == byte_level.get_vocab_size()
    for token, token_id in byte_level.get_vocab().items():
        assert (tokenizer.token_to_id(token), tokenizer.id_to_token(token_id)) == (token_id, token)
    assert tokenizer.token_to_id("not a token") is None
    for outside in (-1, tokenizer.vocab_size, 10**9):
        assert tokenizer.id_to_token(outside) is None and tokenizer.token_bytes(outside) == b""
    assert tokenizer.all_special_ids == (0, 1, 2)
    assert [tokenizer.is_special(token_id) for token_id in (0, 2, 3)] == [True, True, False]


def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "hi"  # a padded row of the embedding


def test_special_start_token(sentencepiece: tokenizers.Tokenizer) -> None:
    tokenizer = wrap(sentencepiece)
    assert tokenizer.encode("ab")[0] == 1
    assert tokenizer.encode("ab", add_special_tokens=False) == tokenizer.encode("ab")[1:]
    assert tokenizer.encode_batch(["ab", "b"], add_special_tokens=False) == [
        tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "b")
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ids=st.lists(st.integers(0, 699), max_size=30))
def test_token_bytes_of_byte_level(byte_level: tokenizers.Tokenizer, ids: list[int]) -> None:
    tokenizer = wrap(byte_level)
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    assert joined.decode(errors="replace") == tokenizer.decode(ids, skip_special_tokens=False)


def test_token_bytes(sentencepiece: tokenizers.Tokenizer, byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = wrap(sentencepiece)
    for token, expected in (
        ("▁a", b" a"),
        ("<0xE6>", b"\xe6"),
        ("<0x0A>", b"\n"),
        ("日", "日".encode()),
        ("<s>", b"<s>"),
    ):
        token_id = tokenizer.token_to_id(token)
        assert token_id is not None and tokenizer.token_bytes(token_id) == expected
    space, e6 = (wrap(byte_level).token_to_id(character) for character in "Ġæ")
    assert wrap(byte_level).token_bytes(space or 0) == b" " and wrap(byte_level).token_bytes(e6 or 0) == b"\xe6"
    assert wrap(byte_level).token_bytes(1) == b"<|im_start|>"


def test_decoder_styles(
    byte_level: tokenizers.Tokenizer, sentencepiece: tokenizers.Tokenizer, metaspace: tokenizers.Tokenizer
) -> None:
    assert wrap(byte_level).decoder_style == DecoderStyle("byte_level")
    assert wrap(sentencepiece).decoder_style == DecoderStyle("byte_fallback", num_leading_spaces=1)
    assert wrap(metaspace).decoder_style == DecoderStyle("other")
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    assert wrap(bare).decoder_style.kind == "other"
    bare.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteLevel()])
    assert wrap(bare).decoder_style.kind == "byte_level"
    # A step more than usual: the text of a token may depend on its neighbours.
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    bare.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", left=1, right=1)])
    assert wrap(bare).decoder_style.kind == "other"


def test_truncation_and_padding_of_the_file_are_off(byte_level: tokenizers.Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_str(byte_level.to_str())
    library.enable_truncation(3)
    library.enable_padding(length=512)
    tokenizer = wrap(library)
    assert len(tokenizer.encode("abc " * 10)) > 3
    assert len(tokenizer.encode("q")) == 1
    assert len(tokenizer.encode_batch(["q", "q z"])[0]) == 1


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a"], "half \ud83d of a pair"])
def test_bad_text(tokenizer: Tokenizer, text: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        tokenizer.encode(text)
    assert caught.value.field == "prompt"
    with pytest.raises(InvalidParameterError):
        tokenizer.encode_batch(["fine", text])


@pytest.mark.parametrize("token_ids", [[-1], ["a"], [1.5], [2**70]])
def test_bad_token_ids(byte_level: tokenizers.Tokenizer, token_ids: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        wrap(byte_level).decode(token_ids)
    assert caught.value.field == "token_ids"


def test_roles(byte_level: tokenizers.Tokenizer) -> None:
    bare = Tokenizer(TokenizersBackend(byte_level), SpecialTokens())
    assert (bare.eos_token_id, bare.eos_token_ids, bare.bos_token_id, bare.pad_token_id) == (None, (), None, None)
    assert not bare.has_chat_template
    special = SpecialTokens(bos_token_id=1, eos_token_ids=(2, 0), pad_token_id=0, unk_token_id=5)
    full = Tokenizer(TokenizersBackend(byte_level), special, {"default": "x"})
    assert (full.eos_token_id, full.eos_token_ids, full.bos_token_id) == (2, (2, 0), 1)
    assert (full.pad_token_id, full.unk_token_id, full.has_chat_template) == (0, 5, True)


def test_end_of_turn_tokens() -> None:
    ids = {"<|im_end|>": 7, "<|eot_id|>": 8, "<end_of_turn>": 9, "<|end|>": 10}
    special = frozenset({7, 8, 10})
    assert end_of_turn_ids([2], ["...<|im_end|>..."], ids, special) == (2, 7)
    assert end_of_turn_ids([7], ["...<|im_end|>..."], ids, special) == (7,)
    assert end_of_turn_ids([2], [], ids, special) == (2,)  # no template: nothing tells that it ends turns
    assert end_of_turn_ids([], ["<end_of_turn>"], ids, special) == ()  # plain text in this vocabulary
    assert end_of_turn_ids([1], ["<|end|>", "<|eot_id|>"], ids, special) == (1, 8, 10)
    assert end_of_turn_ids([1], ["<|end|>"], {**ids, "<|return|>": 11}, special) == (1,)
