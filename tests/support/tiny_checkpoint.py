"""A random two-layer llama with a byte-level tokenizer in a directory: all that a user's model has, in 200 KiB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'refused by the template' %}{{ raise_exception('no such conversation') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if greeting is defined %}{{ greeting }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "a stitch in time saves nine", "the rain in spain stays"] * 4
VOCAB_SIZE = 320
"""More than the tokenizer has, as in real models: a few ids have no text."""


def write_tiny_model(
    folder: Path,
    *,
    chat_template: bool = True,
    max_positions: int = 4096,
    weight_scale: float = 0.3,
    head_dim: int = 8,
) -> Path:
    """Write config, weights (always the same) and tokenizer into `folder`, which is made.

    With weights of 0.02 a greedy answer repeats one token for ever; with 0.3 it varies and may end.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_size = write_tokenizer(folder, chat_template)
    assert tokenizer_size < VOCAB_SIZE
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        initializer_range=weight_scale,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
    )
    return _save(LlamaForCausalLM, config, folder)


def write_tiny_moe_model(folder: Path) -> Path:
    """Like `write_tiny_model`, a Qwen 3 mixture of 8 experts, 2 for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, chat_template=True)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
    )
    return _save(Qwen3MoeForCausalLM, config, folder)


def _save(model_class: Any, config: Any, folder: Path) -> Path:
    """A model with random weights, always the same ones."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, chat_template: bool) -> int:
    """Write a byte-level tokenizer; its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        **({"chat_template": CHAT_TEMPLATE} if chat_template else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())
