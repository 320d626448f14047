"""Tokenization: text to token ids, chat messages to prompts, and tokens back to text as they arrive."""

from tokenmill.tokenization.chat_template import ChatTemplate
from tokenmill.tokenization.decoder_style import DecoderStyle
from tokenmill.tokenization.gguf_tokenizer import tokenizer_from_gguf_metadata
from tokenmill.tokenization.incremental import IncrementalDetokenizer, StopStringChecker
from tokenmill.tokenization.loading import load_tokenizer, wrap_tokenizer
from tokenmill.tokenization.tokenizer import SpecialTokens, Tokenizer

__all__ = [
    "ChatTemplate",
    "DecoderStyle",
    "IncrementalDetokenizer",
    "SpecialTokens",
    "StopStringChecker",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_from_gguf_metadata",
    "wrap_tokenizer",
]
