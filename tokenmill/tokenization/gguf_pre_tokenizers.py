"""How byte-level BPE vocabularies in GGUF files split text into words, by `tokenizer.ggml.pre`.

A GGUF file names the family of its pre-tokenizer instead of carrying it. Each family here is what the `tokenizer.json`
of the models that bear the name says; where llama.cpp's emulation differs (Unicode normalization), the original wins.
The names are llama.cpp's (`llama-vocab.cpp`). Used by `gguf_tokenizer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from tokenmill.errors import UnsupportedFeatureError


@dataclass(frozen=True, slots=True)
class PreTokenizerFamily:
    """One way to split text into words.

    Args:
        names: values of `tokenizer.ggml.pre`.
        patterns: regular expressions (Oniguruma), applied one after another: each cuts the pieces of the one before
            into its matches and what lies between them.
        individual_digits: first cut out each numeric character.
        gpt2_words: last, split by GPT-2's own expression.
        normalize_nfc: bring text to Unicode's composed form first.
        ignore_merges: a word that is a token is taken whole, without going through the merges.
        add_bos: a start token is added unless the file says otherwise.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    individual_digits: bool = False
    gpt2_words: bool = False
    normalize_nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer, ending in the byte alphabet."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.individual_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.extend(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns)
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2_words))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_END = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_SYMBOLS_AND_SPACE}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_END}"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_END}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_FAMILIES = (
    PreTokenizerFamily(("default", ""), patterns=(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    PreTokenizerFamily(
        ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "jais", "trillion", "granite-docling", "exaone4"),
        gpt2_words=True,
    ),
    PreTokenizerFamily(("mpt", "olmo"), gpt2_words=True, normalize_nfc=True),
    PreTokenizerFamily(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"),
        individual_digits=True,
        gpt2_words=True,
    ),
    PreTokenizerFamily(("command-r",), individual_digits=True, gpt2_words=True, normalize_nfc=True),
    PreTokenizerFamily(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        patterns=(_LLAMA3,),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizerFamily(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), patterns=(_LLAMA3,)),
    PreTokenizerFamily(("qwen2", "deepseek-r1-qwen"), patterns=(_QWEN2,), normalize_nfc=True),
    PreTokenizerFamily(("stablelm2", "hunyuan", "megrez", "solar-open", "grok-2"), patterns=(_QWEN2,)),
    PreTokenizerFamily(("qwen35",), patterns=(_QWEN35,), normalize_nfc=True),
    PreTokenizerFamily(("tekken",), patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
    PreTokenizerFamily(("gpt-4o", "llama4", "kanana2"), patterns=(_GPT4O,)),
    PreTokenizerFamily(("deepseek-v3", "hunyuan-dense"), patterns=_DEEPSEEK3),
    PreTokenizerFamily(("falcon",), patterns=(r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
)


def pre_tokenizer_family(name: str) -> PreTokenizerFamily:
    """The family called `name` in `tokenizer.ggml.pre`.

    Raises:
        UnsupportedFeatureError: the name is unknown; splitting text in another way would give wrong tokens.
    """
    for family in _FAMILIES:
        if name in family.names:
            return family
    raise UnsupportedFeatureError(
        f"The GGUF file's pre-tokenizer '{name}' (tokenizer.ggml.pre) is not known to this version.",
        field="tokenizer",
        remedy="Pass the original model's tokenizer: a directory with its tokenizer.json.",
    )
